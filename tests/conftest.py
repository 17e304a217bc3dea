"""Every test runs on the smoke profile, offline, in a fresh run folder. Subprocesses inherit this.

With `-n 2` each of the two processes reads this file, and has a run folder of its own.
"""

import os
import tempfile

import pytest

LONGEST = [
    "test_notebooks",
    "test_memory",
    "test_distributed",
    "test_comparison",
    "test_gpu_bench",
    "test_qlora",
    "test_training",
    "test_serving_engine",
    "test_serving_faults",
    "test_serving_load",
]

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
# torch reads this when it is imported. With tensors this small, more threads slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    folder = tempfile.TemporaryDirectory(prefix="labs-")
    os.environ["LAB_RUNS"] = folder.name
    config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items):
    """The longest files come first, so that no process is left with a long one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else 99)


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
