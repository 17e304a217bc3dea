"""Every test runs on the smoke profile, offline, in a fresh run folder. Subprocesses inherit this."""

import os
import tempfile

import pytest

for name in [name for name in os.environ if name.startswith("LAB_")]:
    del os.environ[name]  # a developer's LAB_MODEL, LAB_DATA, … must not reach a test

os.environ.update(
    LAB_PROFILE="smoke",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
# Read by torch when it is imported: with tensors this small, more threads only get in each other's
# way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    folder = tempfile.TemporaryDirectory(prefix="labs-")
    os.environ["LAB_RUNS"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="module")
def trained_lab(tmp_path_factory):
    """A very small lab with its base and SFT model trained. Tests keep their own runs in sweeps."""
    import tiny

    from common.lab import Lab
    from common.training import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("runs")))
        lab = Lab(tiny.micro_profile())
        train(lab, "base")
        train(lab, "sft")
        yield lab
