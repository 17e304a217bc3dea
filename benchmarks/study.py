"""Which method wins, and against what: `python -m benchmarks.study`, or `make study`.

Fourteen arms on the embedded world, profile cpu, over fresh seeds, as `docs/study-plan.md` says.
Hours, resumable: a seed's file in `benchmarks/results/study/` is written after each arm, and what
stands there is not run again. The rates are chosen first, on seeds that nothing is concluded from.
`--check` recomputes all tables, figures and verdicts from the files.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from multiprocessing import get_context
from statistics import mean

import numpy as np
import torch

from benchmarks import study_report
from benchmarks.plans import PlanError, plan_digest, seed_record
from benchmarks.study_arms import (
    KNOB_PAIRS,
    MAIN,
    PART_SEEDS,
    STUDY_ARMS,
    STUDY_PARTS,
    TUNED,
    TUNING_SEEDS,
    pair_of,
)
from common.comparison import COSTS, measure
from common.data import load_pairs
from common.evaluation import Answer, Sampling, generate
from common.io.files import write_json
from common.io.fingerprints import source_digest
from common.judges import length_controlled
from common.lab import Lab
from common.profiles import ROOT, get_profile
from common.toyworld import WEIGHTS
from common.training import Run, Source, train
from tools.machine import describe_machine

STUDY_PLAN = ROOT / "docs" / "study-plan.md"
TUNING = study_report.STUDY_FOLDER / "tuning.json"
COOL, COOL_SAMPLES, TUNING_SAMPLES = 0.7, 2, 2
MOST_RATES = 8  # five, and three more where the best one is the lowest or the highest
NOT_HERE = ("constraints_met", "all_met", "kinds_met", "flaws")  # of the other world, or kept apart


# --- one training


@cache
def study_lab(seed: int) -> Lab:
    """The lab of a seed, in a folder of its own: `cpu@study`."""
    return Lab(replace(get_profile("cpu"), overrides=("study",)), seed)


def take_pairs(lab: Lab, knob: str) -> None:
    """From now on the lab's training pairs are those of a knob."""
    if getattr(lab, "knob", None) != knob:
        lab.data.train = load_pairs(lab.data.world.pairs(lab.profile.pairs, **KNOB_PAIRS[knob]))[0]
        vars(lab).pop("train_pairs", None)
        lab.knob = knob


def train_study_arm(lab: Lab, name: str, rate: float, sweep: str | None = None) -> Run:
    """An arm on the lab's pairs. SFT, and imitation from the base, are stages that others start
    from.
    """
    arm = STUDY_ARMS[name]
    changes = arm.changes | {"lr": rate}
    if arm.stage != "sft":  # which keeps the weights of the best evaluation
        changes["evaluations"] = 1
    if changes.get("contrast") == "sums":
        lengths = [len(row["chosen_ids"]) for row in lab.train_pairs]
        changes["lambda_or"] = lab.profile.recipes["orpo"].lambda_or / mean(lengths)
    sweep = sweep or (None if name in ("sft", "lambda0") else f"study-{name}")
    return train(lab, arm.stage, sweep, Source(parent=arm.parent), **changes)


def train_parents(lab: Lab, name: str, rates: dict[str, float]) -> None:
    """The base, and what an arm starts from, at the rates that were chosen for them."""
    train(lab, "base")
    parent = STUDY_ARMS[name].parent or lab.parent_of(STUDY_ARMS[name].stage)
    needed = {"sft": "sft", "orpo_lambda0": "lambda0"}.get(parent)
    if needed:
        train_study_arm(lab, needed, rates[needed])


def scores(lab: Lab, answers: list[list[Answer]]) -> list[list[float]]:
    """What the rule gives to every answer, (prompts, samples)."""
    judge = lab.data.world.judge
    return [[judge(answer.prompt, answer.text).score for answer in group] for group in answers]


# --- tuning


def wanted(arm, found: dict[str, dict[str, float]]) -> list[tuple[float, int]]:
    """The trials still to run for an arm, as (rate, seed). [] when its best rate is known.

    Five rates on the first seed, the two best of them on all seeds. Where the best one is the
    lowest or the highest of all that were tried, the next one beyond it is tried as well.
    Args: `found`: {rate: {seed: mean score}}.
    """
    first, *others = map(str, TUNING_SEEDS)
    tried = sorted({*arm.rates, *map(float, found)})
    missing = [rate for rate in tried if first not in found.get(f"{rate:g}", {})]
    if missing:
        return [(rate, int(first)) for rate in missing]
    ranked = sorted(tried, key=lambda rate: found[f"{rate:g}"][first], reverse=True)
    finalists = {*ranked[:2], *(rate for rate in tried if len(found[f"{rate:g}"]) > 1)}
    trials = [
        (rate, int(seed))
        for rate in sorted(finalists)
        for seed in others
        if seed not in found[f"{rate:g}"]
    ]
    if trials or len(tried) >= MOST_RATES:
        return trials
    best = best_rate(found)
    if best in (tried[0], tried[-1]):
        return [(float(f"{best * (2.0 if best == tried[-1] else 0.5):g}"), int(first))]
    return []


def best_rate(found: dict[str, dict[str, float]]) -> float:
    """The rate with the highest mean over all tuning seeds, of those that were run on all."""
    whole = {rate: mean(seeds.values()) for rate, seeds in found.items() if len(seeds) == 3}
    return float(max(whole, key=whole.get))


def tuning_trial(name: str, rate: float, seed: int) -> float:
    """Mean score of an arm at a rate on a tuning seed, at the knob .3 and temperature 1."""
    lab = study_lab(seed)
    take_pairs(lab, ".3")
    run = train_study_arm(lab, name, rate, f"tune-{name}-{rate:g}")
    sampling = Sampling(lab.profile.max_new_tokens, 1.0, TUNING_SAMPLES, seed)
    return float(np.mean(scores(lab, generate(run.model, lab.tokenizer, lab.prompts, sampling))))


def tuning_parents(seed: int, names: tuple[str, ...], rates: dict[str, float]) -> None:
    lab = study_lab(seed)
    take_pairs(lab, ".3")
    for name in names:
        train_parents(lab, name, rates)


def tune_arms(part: str, plan: str, workers: int) -> None:
    """Chooses the rates of a part's arms; what stands in the file is not run again."""
    new = {"plan": plan, "machine": describe_machine(), "runs": {}, "best": {}}
    found = seed_record(TUNING, plan, new)
    runs, best = found["runs"], found["best"]
    for names in TUNED[part]:
        if all(name in best for name in names):
            continue
        print(f"tuning {', '.join(names)}", flush=True)
        parents = [(seed, names, best) for seed in TUNING_SEEDS]
        for _ in one_core_each(tuning_parents, parents, workers):
            pass
        while trials := [
            (name, *trial)
            for name in names
            for trial in wanted(STUDY_ARMS[name], runs.get(name, {}))
        ]:
            for (name, rate, seed), score in one_core_each(tuning_trial, trials, workers):
                runs.setdefault(name, {}).setdefault(f"{rate:g}", {})[str(seed)] = score
                print(f"  {name} at {rate:g}, seed {seed}: {score:.3f}", flush=True)
                write_json(TUNING, found)
        best |= {name: best_rate(runs[name]) for name in names}
        write_json(TUNING, found)


# --- a seed


def compared(one: dict, other: dict) -> dict[str, float]:
    """Win rates of one arm's answers over another's: plain, length-controlled, and cooler ones.

    By the rule, as `RuleJudge` and `head_to_head`: the higher score wins, a tie is half.
    """
    verdicts = np.sign(np.subtract(one["scores"], other["scores"]))
    found = {"rate": float((verdicts.mean() + 1) / 2)}
    found["controlled"] = length_controlled(verdicts, one["lengths"], other["lengths"])
    if "cool" in one and "cool" in other:
        found["cool"] = float((np.sign(np.subtract(one["cool"], other["cool"])).mean() + 1) / 2)
    return found


def arm_measured(lab: Lab, name: str, run: Run, start) -> tuple[dict, dict]:
    """What the seed's file keeps of an arm, and what its answers were worth."""
    values, answers = measure(lab, run.model, start)
    kept = {"scores": scores(lab, answers)}
    kept["lengths"] = [[len(answer.chosen_ids) for answer in group] for group in answers]
    if name in MAIN:
        sampling = Sampling(lab.profile.max_new_tokens, COOL, COOL_SAMPLES, lab.seed)
        kept["cool"] = scores(lab, generate(run.model, lab.tokenizer, lab.prompts, sampling))
    settings = run.record["hyperparameters"]
    settings = {key: settings[key] for key in ("lr", "epochs", "lambda_or", "contrast")}
    arm = {"settings": settings | {"steps": run.record["steps"]}}
    arm["measures"] = {key: value for key, value in values.items() if key not in NOT_HERE}
    arm["flaws"] = {flaw: values["flaws"].get(flaw, 0.0) for flaw in WEIGHTS}
    arm["cost"] = {key: run.record[key] for key in COSTS}
    return arm, kept


def run_study_seed(seed: int, part: str, rates: dict[str, float], plan: str) -> int:
    """The arms of a part that a seed's file does not hold yet. Returns how many it ran."""
    path, done = study_report.STUDY_FOLDER / f"seed-{seed}.json", 0
    new = {"seed": seed, "plan": plan, "machine": describe_machine(), "source": source_digest()}
    record, lab, start = seed_record(path, plan, new | {"arms": {}, "rates": {}}), None, None
    for knob, names in STUDY_PARTS[part].items():
        for name in names:
            if (arm_id := f"{name}@{knob}") in record["arms"]:
                continue
            if lab is None:
                lab = study_lab(seed)
            take_pairs(lab, knob)
            train_parents(lab, name, rates)
            start = start or train_study_arm(lab, "sft", rates["sft"]).model
            arm, kept = arm_measured(lab, name, train_study_arm(lab, name, rates[name]), start)
            folder = lab.folder / "study"
            for other in record["arms"]:
                if other.endswith(f"@{knob}"):
                    theirs = json.loads((folder / f"{other}.json").read_text(encoding="utf-8"))
                    record["rates"][pair_of(arm_id, other)] = compared(kept, theirs)
            write_json(folder / f"{arm_id}.json", kept)
            record["arms"][arm_id] = arm
            write_json(path, record)
            done += 1
            print(f"seed {seed}: {arm_id}", file=sys.__stderr__, flush=True)
    return done


def run_part(part: str, seeds: list[int], plan: str, workers: int) -> None:
    rates = json.loads(TUNING.read_text(encoding="utf-8"))["best"]
    jobs = [(seed, part, rates, plan) for seed in PART_SEEDS[part] if seed in seeds]
    for (seed, *_), done in one_core_each(run_study_seed, jobs, workers):
        if done:
            print(f"seed {seed}: {part} arms done", flush=True)
            study_report.write_study()


def _quietly(job, *arguments):
    """Runs a job without its own lines: those of several would only mix."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return job(*arguments)


def one_core_each(job, arguments: list[tuple], workers: int):
    """Each tuple of arguments with what the job gave, as they end, in processes of one core."""
    one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(workers, get_context("spawn"), **one_core) as pool:
        try:
            futures = {pool.submit(_quietly, job, *each): each for each in arguments}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 where a table differs from the results, or a run cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=STUDY_PARTS, default=list(STUDY_PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(PART_SEEDS["main"]))
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--tune", action="store_true", help="choose the rates, and stop")
    parser.add_argument("--pages", action="store_true", help="tables and figures, and no run")
    parser.add_argument("--check", action="store_true", help="recompute, compare, run nothing")
    given = parser.parse_args(arguments)
    if given.check:
        return study_report.check_study()
    if given.pages:
        study_report.write_study()
        return 0
    if os.environ.get("LAB_MODEL") or os.environ.get("LAB_DATA"):
        parser.error("this measures the embedded world: unset LAB_MODEL and LAB_DATA")
    try:
        plan = plan_digest(STUDY_PLAN)
        for part in given.parts:
            tune_arms(part, plan, given.workers)
            if not given.tune:
                run_part(part, given.seeds, plan, given.workers)
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
