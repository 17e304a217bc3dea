"""What alignment does to a real language model: `python -m benchmarks.real`, or `make real`.

Trains SmolLM2-135M-Instruct on its own verified answers, several methods on fresh seeds, as
`docs/real-model-plan.md` says, and measures each on held-out topics. Hours, resumable: a seed's
file in `benchmarks/results/real/` is written after each arm, and what stands there is not run
again. `--tune` chooses the rates first, on a seed and topics that nothing is evaluated on.
`--remedies` runs the side study of length. `--check` recomputes all tables from the files.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from datasets import Dataset

from benchmarks import real_pages, real_report
from benchmarks.plans import PlanError, plan_digest, seed_record
from benchmarks.real_measures import Ruler
from common.comparison import COSTS
from common.data import load_pairs
from common.evaluation import Answer
from common.instructions import CONSTRAINTS, instruction
from common.io.files import write_json, write_lines
from common.judges import RuleJudge, head_to_head
from common.lab import Lab
from common.profiles import ROOT, get_profile
from common.training import Source, train
from tools.machine import describe_machine

PLAN = ROOT / "docs" / "real-model-plan.md"
SEEDS = (11, 12, 13, 14, 15)
TUNING_SEED, TUNING_PROMPTS, TUNING_PAIRS = 0, 96, 256
ARM_PAIRS, SIDE_PAIRS = 512, 256  # of an arm: 32 steps of 16; of the side study: 16 steps
RATES = {  # five for every arm: the same effort
    "dpo_plain": (2.5e-6, 5e-6, 1e-5, 2e-5, 4e-5),
    "dpo": (2.5e-6, 5e-6, 1e-5, 2e-5, 4e-5),
    "orpo": (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4),
    "orpo_lambda0": (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4),
}


@dataclass(frozen=True)
class Trial:
    """A stage on pairs of one knob value. `choose` takes some of the pairs, the best first."""

    stage: str
    knob: float = 0.3
    pairs: int = ARM_PAIRS
    changes: dict = field(default_factory=dict)
    choose: Callable[[Dataset], Dataset] | None = None


TRIALS = {
    "dpo_plain": Trial("dpo_plain"),
    "dpo": Trial("dpo"),
    "orpo": Trial("orpo"),
    "orpo_lambda0": Trial("orpo_lambda0"),
    "orpo_clean": Trial("orpo", knob=0.0),
    "orpo_lambda0_clean": Trial("orpo_lambda0", knob=0.0),
}


def _log_ratio(row: dict) -> float:
    """Log of the chosen answer's length over the rejected one's, in words."""
    return math.log(len(row["chosen"].split()) / len(row["rejected"].split()))


def shorter_chosen(pairs: Dataset) -> Dataset:
    """Pairs of brevity: the constraints ask for it, or for form, and chosen is the shorter one."""
    rows = [
        row
        for row in pairs
        if (asked := instruction(row["prompt"]).constraints)
        and all(CONSTRAINTS[kind]["asks_for"] != "substance" for kind, _ in asked)
    ]
    return Dataset.from_list(sorted(rows, key=_log_ratio))


def of_substance(pairs: Dataset) -> Dataset:
    """The shortest chosen answers again, of all constraints, those for substance included."""
    rows = [row for row in pairs if instruction(row["prompt"]).constraints]
    return Dataset.from_list(sorted(rows, key=_log_ratio)[:: max(1, len(rows) // SIDE_PAIRS)])


def of_similar_length(pairs: Dataset) -> Dataset:
    """Pairs of brevity and form again, but those of the most similar lengths."""
    rows = shorter_chosen(pairs).to_list()
    return Dataset.from_list(sorted(rows, key=lambda row: abs(_log_ratio(row))))


def length_trials(rate: float) -> dict[str, Trial]:
    """Length hacking, and four remedies that each change one thing. `rate`: of plain DPO."""
    few = {"knob": 0.3, "pairs": SIDE_PAIRS}
    fast = {"lr": 2 * rate}
    return {
        "hacked": Trial("dpo_plain", changes=fast, choose=shorter_chosen, **few),
        "substance": Trial("dpo_plain", changes=fast, choose=of_substance, **few),
        "similar_length": Trial("dpo_plain", changes=fast, choose=of_similar_length, **few),
        "nll": Trial("dpo", changes=fast, choose=shorter_chosen, **few),
        "lower_rate": Trial("dpo_plain", changes={"lr": rate / 2}, choose=shorter_chosen, **few),
    }


def pairs_of(lab: Lab, trial: Trial) -> Dataset:
    """The training pairs of an arm: of all that there are at this knob, the chosen ones."""
    count = trial.pairs if trial.choose is None else ARM_PAIRS
    pairs = load_pairs(lab.data.world.pairs(count, flaw_rate=trial.knob))[0]
    if trial.choose:
        pairs = trial.choose(pairs)
        pairs = pairs.select(range(min(trial.pairs, len(pairs))))
    return pairs


def run_trial(lab: Lab, name: str, trial: Trial):
    """Trains one arm, with the reference's log-probabilities cached.

    Returns: (its `Run`, what is known of it). Nothing but a few rows is measured on the way: every
    arm is measured afterwards.
    """
    few = Lab(replace(lab.profile, held_out=8, sampled_prompts=1), lab.seed)
    options = {"evaluations": 1, "cache_reference": True} | trial.changes
    source = Source(pairs=pairs_of(lab, trial))
    run = train(few, trial.stage, f"real-{name}", source, **options)
    settings = {"lr": run.record["hyperparameters"]["lr"], "steps": run.record["steps"]}
    settings |= {"n_pairs": run.record["n_pairs"], "knob": trial.knob, "stage": trial.stage}
    return run, {"settings": settings, "cost": {key: run.record[key] for key in COSTS}}


class Seed:
    """The file of one seed: what it holds is kept, what is missing is run."""

    def __init__(self, seed: int, folder: Path = real_report.FOLDER):
        self.path, plan = folder / f"seed-{seed}.json", plan_digest(PLAN)
        new = {"seed": seed, "plan": plan, "machine": describe_machine(), "arms": {}}
        self.record = seed_record(self.path, plan, new)
        self.lab = Lab(get_profile("smollm"), seed)
        self.ruler = Ruler(self.lab)
        if self.record.setdefault("prose", self.ruler.digest) != self.ruler.digest:
            raise PlanError(f"{self.path.name} was measured on other prose than lies in its folder")

    def answers(self, name: str) -> list[list[Answer]]:
        """The answers of an arm that was measured before."""
        path = self.lab.folder / "answers" / f"{name}.jsonl"
        rows = [Answer(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        size = self.lab.profile.samples
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def keep(self, name: str, arm: dict, answers: list[list[Answer]]) -> None:
        rows = [vars(answer) for group in answers for answer in group]
        write_lines(self.lab.folder / "answers" / f"{name}.jsonl", rows)
        self.record["arms"][name] = arm
        write_json(self.path, self.record)

    def run(self, arms: dict[str, Trial]) -> None:
        """The start and every arm that is missing, with its win rates against those before it."""
        judge = RuleJudge(self.lab.data.world)
        if "start" not in self.record["arms"]:
            self.keep("start", *self.ruler.measure())
        for name, trial in arms.items():
            if name in self.record["arms"]:
                continue
            print(f"seed {self.record['seed']}, {name}", flush=True)
            run, arm = run_trial(self.lab, name, trial)
            found, answers = self.ruler.measure(run.model)
            others = [other for other in self.record["arms"] if other in ("start", *TRIALS)]
            arm["win_rate"] = {
                other: head_to_head(judge, answers, self.answers(other)).rate for other in others
            }
            arm |= found | {"cost": arm["cost"] | found["cost"]}
            self.keep(name, arm, answers)
            shutil.rmtree(run.folder)  # half a gigabyte each


def tuning_lab(seed: int = TUNING_SEED) -> Lab:
    """Another seed, whose prompts are of the topics to learn from: no held-out topic is seen."""
    lab = Lab(replace(get_profile("smollm"), samples=2), seed)
    lab.data.prompts = list(islice(lab.data.world.prompts("train", "tuning"), TUNING_PROMPTS))
    return lab


def tune() -> dict:
    """Five rates for each method, on one seed. The file says which one is best, and by what."""
    path, lab = real_report.FOLDER / "tuning.json", tuning_lab()
    found = {"plan": plan_digest(PLAN), "machine": describe_machine(), "runs": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    ruler = Ruler(lab)
    if "start" not in found["runs"]:
        found["runs"]["start"] = ruler.measure(brief=True)[0]
        write_json(path, found)
    for stage, rates in RATES.items():
        for rate in rates:
            if (name := f"{stage}-{rate:g}") in found["runs"]:
                continue
            print(f"tuning {name}", flush=True)
            trial = Trial(stage, pairs=TUNING_PAIRS, changes={"lr": rate})
            run, arm = run_trial(lab, f"tune-{name}", trial)
            measured = ruler.measure(run.model, brief=True)[0]
            found["runs"][name] = arm | measured | {"cost": arm["cost"] | measured["cost"]}
            write_json(path, found)
            shutil.rmtree(run.folder)
    found["best"] = real_report.best_rates(found["runs"])
    write_json(path, found)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 where a table differs from the results, or a run cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--tune", action="store_true", help="choose the rates")
    parser.add_argument("--remedies", action="store_true", help="the side study of length")
    parser.add_argument("--check", action="store_true", help="recompute, compare, run nothing")
    given = parser.parse_args(arguments)
    if given.check:
        return real_pages.check_results()
    try:
        if given.tune:
            print(json.dumps(tune()["best"], indent=1))
        elif given.remedies:
            rate = get_profile("smollm").recipes["dpo_plain"].lr
            Seed(SEEDS[0]).run(length_trials(rate))
        else:
            for seed in given.seeds:
                Seed(seed).run(TRIALS)
    except (PlanError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    real_pages.write_results()
    return 0


if __name__ == "__main__":
    sys.exit(main())
