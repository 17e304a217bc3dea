"""Runs every notebook on the smoke profile, offline, in one fresh run folder: the main ones in
their order, since each builds on those before it; the deep dives, which train what they need.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [
    "Lab-1.7-DPO_Alignment/01-Setup_and_Data.ipynb",
    "Lab-1.7-DPO_Alignment/02-SFT_Baseline.ipynb",
    "Lab-1.7-DPO_Alignment/03-DPO_Training.ipynb",
    "Lab-1.7-DPO_Alignment/04-Evaluation_and_Compare.ipynb",
    "Lab-1.8-ORPO_Alignment/01-Setup.ipynb",
    "Lab-1.8-ORPO_Alignment/02-ORPO_Training.ipynb",
    "Lab-1.8-ORPO_Alignment/03-Compare_with_DPO.ipynb",
    "Lab-1.8-ORPO_Alignment/04-Production_Deploy.ipynb",
]
DEEP_DIVES = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("Lab-*/deep-dives/*.ipynb")
)
CELL_TIMEOUT = 300  # seconds; also how long nbval waits for a kernel that has died

failed: list[str] = []  # the first notebook that failed: the later ones build on its results


def test_every_notebook_is_tested():
    """A notebook that is missing, renamed, in another folder or not in the lists fails here."""
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("Lab-*/**/*.ipynb")}
    saved = {name for name in found if "/.ipynb_checkpoints/" in name}  # an editor's own copies
    assert found - saved == {*NOTEBOOKS, *DEEP_DIVES}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    environment = {**os.environ, "LAB_RUNS": str(tmp_path_factory.mktemp("runs"))}
    del environment["MPLBACKEND"]  # the kernel shows its figures inline
    return environment


def run_by_itself(notebook: str, environment: dict[str, str]) -> None:
    """Runs one notebook in a kernel of its own. The test fails with what the kernel said."""
    options = [
        "-x",
        "--color=no",
        "--nbval-lax",
        "--nbval-current-env",
        f"--nbval-cell-timeout={CELL_TIMEOUT}",
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, notebook]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    if result.returncode != 0:
        pytest.fail(f"{notebook}\n{result.stdout}", pytrace=False)


@pytest.mark.notebook
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs(notebook, environment):
    if failed:
        pytest.fail(f"not run, because {failed[0]} failed before it", pytrace=False)
    failed.append(notebook)
    run_by_itself(notebook, environment)
    failed.clear()


@pytest.mark.more
@pytest.mark.notebook
@pytest.mark.parametrize("notebook", DEEP_DIVES)
def test_a_deep_dive_runs_by_itself(notebook, environment):
    """Nothing but its own cells has run: it trains what it needs, or finds it trained."""
    run_by_itself(notebook, environment)
