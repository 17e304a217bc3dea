"""The notebooks on profile `smollm`, with a tiny stand-in (`stand_in`): real tokenizer,
template, world, prompts and pairs. What a world does not have must stop no notebook.

SMOLLM_DIR names the real folder, for its tokenizer. Without it these tests are skipped, in one loud
line; with REQUIRE_MODEL=1 that is a failure.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import write_stand_in
from test_notebooks import NOTEBOOKS, ROOT, run_by_itself

from benchmarks import gpu
from benchmarks.real_report import COLUMNS, TOLD_APART
from common.profiles import device_and_precision, get_profile
from tools.align import MEASURES

pytestmark = pytest.mark.more
FOLDER = os.environ.get("SMOLLM_DIR", "")
WHY = "NOT TESTED: no real model. Run `make model`, and set SMOLLM_DIR to the folder that it names."


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    if not (FOLDER and (Path(FOLDER) / "tokenizer.json").exists()):
        (pytest.fail if os.environ.get("REQUIRE_MODEL") == "1" else pytest.skip)(WHY)
    runs = tmp_path_factory.mktemp("runs")
    write_stand_in(Path(FOLDER), runs)
    places = [str(ROOT / "tests" / "small"), str(ROOT)]  # the first makes the profile small
    environment = {**os.environ, "LAB_PROFILE": "smollm", "LAB_RUNS": str(runs)}
    environment["PYTHONPATH"] = os.pathsep.join(places)
    del environment["MPLBACKEND"]  # the kernel shows its figures inline
    return environment


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_on_the_small_real_model(notebook, environment):
    run_by_itself(notebook, environment)


SEED = """
import json, sys
from dataclasses import replace
from pathlib import Path
from benchmarks import real
real.plan_digest = lambda _: "a plan"
trials = {name: replace(real.TRIALS[name], pairs=24) for name in ("dpo_plain", "orpo")}
for _ in range(2):  # the second time everything is there
    seed = real.Seed(31, Path(sys.argv[1]))
    seed.run(trials)
print(json.dumps(seed.record))
"""


def test_a_seed_of_the_study_in_miniature(environment, tmp_path):
    """Start and two arms, each run once. Only the start is at distance 0 from itself, arms know
    whom they met, their weights are gone, and every table's columns are there.
    """
    command = [sys.executable, "-c", SEED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 31, ") == 2
    record = json.loads(done.stdout.splitlines()[-1])
    arms = record["arms"]
    assert list(arms) == ["start", "dpo_plain", "orpo"] and record["plan"] == "a plan"
    assert arms["start"]["measures"]["kl"] == 0.0 != arms["orpo"]["measures"]["kl"]
    assert arms["orpo"]["win_rate"].keys() == {"start", "dpo_plain"}
    for arm in arms.values():
        assert {*COLUMNS, "kinds_met", "rewards_chosen"} <= arm["measures"].keys()
        assert arm["side"].keys() == MEASURES.keys()
        assert min(arm["cost"].values()) > 0
    assert not list(Path(environment["LAB_RUNS"]).glob("smollm/seed-31/sweeps/*"))


def test_the_gpu_benchmark_aligns_on_this_machine_too(environment, monkeypatch):
    """Its quick form, with the stand-in on a CPU: the table of what changed is in the report."""
    for name in ("LAB_RUNS", "PYTHONPATH"):
        monkeypatch.setenv(name, environment[name])
    found = gpu.measure_align(quick=True)
    assert "| constraints met | 0." in found["report"], found


PRECISION = """
import sys
from pathlib import Path
from benchmarks import precision
precision.plan_digest = lambda _: "a plan"
precision.PRECISION_RUNS, precision.FEW_PAIRS = Path(sys.argv[1]), 16
precision.run_seed(21)
"""


def test_a_run_in_each_precision_is_measured_once(environment, tmp_path):
    """The second process in float32 finds its run there. Both runs have the columns to compare."""
    file = tmp_path / "precision.json"
    for asked in ("float32", "float32", ""):
        done = subprocess.run(
            [sys.executable, "-c", PRECISION, str(file)],
            cwd=ROOT,
            env={**environment, "LAB_PRECISION": asked},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    here = device_and_precision(get_profile("smollm"))[1]
    assert runs.keys() == {"float32-21", f"{here}-21"}
    assert all(set(TOLD_APART) <= run["measures"].keys() for run in runs.values())
