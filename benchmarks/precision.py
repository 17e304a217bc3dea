"""Does bfloat16 cost quality? `python -m benchmarks.precision`: the arm that the labs end with,
trained on few pairs in float32 and in bfloat16, on three seeds.

On a CPU without instructions for bfloat16 there is nothing to compare. Prompts are of the topics
that training sees. Resumable: a run that stands in `benchmarks/results/real/precision.json` is not
run again. What it finds is described, on the page of the real model; it is no verdict.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys

from benchmarks.plans import PlanError, plan_digest
from benchmarks.real import PLAN, Trial, run_trial, tuning_lab
from benchmarks.real_measures import Ruler
from benchmarks.real_pages import write_results
from benchmarks.real_report import FOLDER, TWO_PRECISIONS
from common.io.files import write_json
from common.profiles import device_and_precision, get_profile
from tools.machine import describe_machine

PRECISION_RUNS = FOLDER / "precision.json"
PRECISION_SEEDS = (21, 22, 23)  # neither those of the study nor the one that rates were tuned on
FEW_PAIRS, FEW_PROMPTS = 128, 48  # 8 steps of 16


def known() -> dict:
    """What was measured so far. Raises: PlanError if that was under another plan."""
    plan, found = plan_digest(PLAN), None
    if PRECISION_RUNS.exists():
        found = json.loads(PRECISION_RUNS.read_text(encoding="utf-8"))
        if found["plan"] != plan:
            raise PlanError(
                f"{PRECISION_RUNS.name} was run under another plan. Move it away, or say so"
            )
    return found or {"plan": plan, "machine": describe_machine(), "runs": {}}


def run_seed(seed: int) -> None:
    """Trains and measures one run in this process's precision, and adds it to the file."""
    found, precision = known(), device_and_precision(get_profile("smollm"))[1]
    if (name := f"{precision}-{seed}") in found["runs"]:
        return
    print(f"precision {name}", flush=True)
    lab = tuning_lab(seed)
    lab.data.prompts = lab.data.prompts[:FEW_PROMPTS]
    run, arm = run_trial(lab, f"precision-{precision}", Trial("dpo", pairs=FEW_PAIRS))
    measured = Ruler(lab).measure(run.model)[0]
    found["runs"][name] = arm | measured | {"cost": arm["cost"] | measured["cost"]}
    write_json(PRECISION_RUNS, found)
    shutil.rmtree(run.folder)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 where there is nothing to compare, or a run fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, help="one run in this process, as LAB_PRECISION says")
    given = parser.parse_args(arguments)
    try:
        if given.seed is not None:
            run_seed(given.seed)
            return 0
        known()  # the plan is committed, and the file is of this plan
    except (PlanError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if device_and_precision(get_profile("smollm"))[1] != "bfloat16":
        print("error: this machine trains in float32: nothing to compare", file=sys.stderr)
        return 1
    # A process has one precision: every run gets a process of its own.
    for seed in PRECISION_SEEDS:
        for precision in TWO_PRECISIONS:
            asked = {"LAB_PRECISION": precision} if precision == "float32" else {}
            command = [sys.executable, "-m", "benchmarks.precision", "--seed", str(seed)]
            if subprocess.run(command, env=os.environ | asked).returncode:
                return 1
    write_results()
    return 0


if __name__ == "__main__":
    sys.exit(main())
