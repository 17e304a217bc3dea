"""Methods side by side on equal terms: one base, one tokenizer, the same pairs and epochs, several seeds.

An arm is a kind of training data with the stages that are trained on it. Every (seed, arm) is trained and measured on
its own, so that several can run at once in processes of their own, and what is finished is kept.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import combinations
from multiprocessing import get_context
from statistics import mean, stdev

import torch
from scipy.stats import t as student
from tqdm.auto import tqdm

from common import models
from common.data import load_pairs
from common.evaluation import evaluation_report, measure, summarise_seeds
from common.judges import Judge, RewardJudge, RuleJudge, head_to_head
from common.profiles import Profile
from common.runs import BrokenLineage, Lab, digest, stage_of, write_json
from common.training import Run, train

STAGES = ("sft", "orpo_lambda0", "dpo_plain", "dpo", "orpo")  # of the main comparison
CONTRAST = ("sft", "orpo_lambda0", "dpo", "orpo")  # of an arm with other pairs


@dataclass(frozen=True)
class Arm:
    """Training pairs and the stages trained on them. `world`: settings of `World.pairs`; () the profile's own pairs.

    `changes`: Recipe fields that differ, as ((stage, (field, value)), …).
    """

    name: str
    stages: tuple[str, ...]
    world: tuple[tuple[str, object], ...] = ()
    changes: tuple[tuple[str, tuple[str, object]], ...] = ()

    def run_of(self, stage: str) -> str | None:
        """The name of a stage's run in `sweeps/`, or None where it is the stage itself."""
        mine = self.world or any(name == stage for name, _ in self.changes)
        return f"{self.name}-{stage}" if mine and stage != "sft" else None


def flaw_rate_arms(profile: Profile) -> list[Arm]:
    """The arms of the flaw-rate experiment, and the tiers, whose answers are of independent quality."""
    arms = [Arm(f"flaw-{rate:g}", CONTRAST, (("flaw_rate", rate),)) for rate in profile.flaw_rates]
    return [*arms, Arm("tiers", CONTRAST, (("style", "tiers"),))] if arms else []


def judge_of(lab: Lab) -> Judge:
    """The world's rule, or a reward model trained on the pairs where there is none."""
    if lab.data.world:
        return RuleJudge(lab.data.world)
    return RewardJudge(train(lab, "reward").model, lab.tokenizer, lab.test_pairs)


def ready(lab: Lab) -> None:
    """Trains what every arm of a seed starts from: base and SFT."""
    if lab.has_own_weights("base"):
        train(lab, "base")
    train(lab, "sft")


def train_arm(lab: Lab, arm: Arm) -> dict[str, Run]:
    """The stages of an arm, trained or reused. Needs base and SFT. Raises: MissingRun, BrokenLineage."""
    pairs = load_pairs(lab.data.world.pairs(lab.profile.pairs, **dict(arm.world)))[0] if arm.world else None
    runs = {}
    for stage in arm.stages:
        changes, sweep = dict(change for name, change in arm.changes if name == stage), arm.run_of(stage)
        own = {"pairs": pairs} if stage_of(stage).rows == "pairs" else {}
        # A run of an arm is only measured at its end: held-out measures along the way would cost as much again.
        quiet = {"evaluations": 1} if sweep else {}
        runs[stage] = train(lab, stage, sweep=sweep, **own, **{**quiet, **changes})
    check_comparable(lab, {stage: arm.run_of(stage) for stage in arm.stages})
    return runs


def check_comparable(lab: Lab, runs: dict[str, str | None]) -> None:
    """Are these runs, {stage: its sweep or None}, of one base, one tokenizer and one set of pairs?

    Raises: MissingRun for a run that is not there; BrokenLineage, naming the odd one out, for a run of another base,
        other pairs or another tokenizer, or one whose parent was trained again since.
    """
    roots, found = {}, {"tokenizer": {}, "pairs": {}}
    for stage, sweep in runs.items():
        roots[stage] = lab.lineage(stage, sweep)[0]
        parts = lab.record(stage, sweep)["fingerprint_parts"]
        found["tokenizer"][stage] = parts["tokenizer"]
        if stage_of(stage).rows == "pairs":
            found["pairs"][stage] = parts["data"]
    wanted = {"base": lab.fingerprint_of("base"), "tokenizer": lab.tokenizer_digest()}
    for what, values in {"base": roots, **found}.items():
        expected = wanted.get(what) or (next(iter(values.values())) if values else None)
        odd = [stage for stage, value in values.items() if value != expected]
        if odd:
            raise BrokenLineage(
                f"{', '.join(odd)}: trained with another {what} than {'the others' if what == 'pairs' else 'is here'}; "
                f"no fair comparison. Train again: {'; '.join(lab.train_command(stage) for stage in odd)}"
            )


def measure_runs(lab: Lab, runs: dict[str, Run], judge: Judge) -> dict:
    """`evaluation_report` of one seed: every shared measure, and the win rate of every pair of stages."""
    measures, answers = {}, {}
    for stage, run in runs.items():
        measures[stage], answers[stage] = measure(lab, run.model, runs["sft"].model)
    rates = {f"{a}_vs_{b}": head_to_head(judge, answers[a], answers[b]) for b, a in combinations(runs, 2)}
    report = evaluation_report(measures, rates, {stage: run.record for stage, run in runs.items()})
    return report | {"seed": lab.seed, "prompts": len(lab.prompts), "samples": lab.profile.samples, "judge": judge.name}


def run_arm(profile: Profile, seed: int, arm: Arm) -> dict:
    """Trains and measures one arm of one seed, or returns its report of before if nothing changed since.

    Args: `profile`: as `get_profile` gave it. Returns: the report of `measure_runs`, kept in `<run folder>/arms/`.
    """
    lab = Lab(profile, seed)
    if device_is_shared(profile):
        torch.set_num_threads(1)
    ready(lab)
    runs = train_arm(lab, arm)
    key = digest([{stage: run.record["fingerprint"] for stage, run in runs.items()}, profile.samples, profile.held_out])
    path = lab.folder / "arms" / f"{arm.name}.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return before
    report = measure_runs(lab, runs, judge_of(lab)) | {"arm": asdict(arm), "key": key}
    write_json(path, report)
    return json.loads(path.read_text(encoding="utf-8"))


def device_is_shared(profile: Profile) -> bool:
    """Can several tiny models be trained at once, one to a CPU core?"""
    return models.is_tiny(profile) and not torch.cuda.is_available()


def _quietly(job, *arguments):
    """Runs a job of a worker process: what it prints would only mix with the others' lines."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return job(*arguments)


def run_arms(lab: Lab, arms: list[Arm], seeds: list[int] | None = None) -> dict[str, list[dict]]:
    """Every arm for every seed, {arm: one report per seed}; tiny models side by side, one process to a core.

    Args: `seeds`: default the lab's own and the next ones, `profile.seeds` in all. Shows progress; what is finished
        is kept, so an interrupted experiment goes on where it stopped.
    """
    seeds = [lab.seed + k for k in range(lab.profile.seeds)] if seeds is None else seeds
    jobs = [(arm, seed) for arm in arms for seed in seeds]
    reports: dict[str, dict[int, dict]] = {arm.name: {} for arm in arms}
    workers = min(os.cpu_count() or 1, 4, len(jobs)) if device_is_shared(lab.profile) else 1
    bar = tqdm(total=len(jobs), desc=f"{len(arms)} kinds of pairs × {len(seeds)} seeds, {workers} at once")
    if workers <= 1:
        for arm, seed in jobs:
            reports[arm.name][seed] = _quietly(run_arm, lab.profile, seed, arm)
            bar.update()
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            first = [pool.submit(_quietly, ready, Lab(lab.profile, seed)) for seed in seeds]
            for future in first:
                future.result()  # an error of a worker is raised here, whole
            waiting = {pool.submit(_quietly, run_arm, lab.profile, seed, arm): (arm, seed) for arm, seed in jobs}
            try:
                for future in as_completed(waiting):
                    arm, seed = waiting[future]
                    reports[arm.name][seed] = future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    bar.close()
    return {name: [found[seed] for seed in seeds] for name, found in reports.items()}


def over_seeds(reports: list[dict]) -> dict:
    """`summarise_seeds`, and for each win rate `seed_ci95`: the 95 % interval of its mean over seeds (Student's t).

    Where there is one seed it is None: nothing is known about another one.
    """
    summary = summarise_seeds(reports)
    for name, rate in summary["win_rate"].items():
        rate["seed_ci95"] = seed_interval([report["win_rate"][name]["rate"] for report in reports])
    return summary


def seed_interval(values: list[float]) -> list[float] | None:
    """95 % interval of the mean over seeds by Student's t, or None for fewer than two."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [mean(values) - half, mean(values) + half]
