"""Methods side by side on equal terms: one base, one tokenizer, the same pairs and epochs, several
seeds.

An arm is a kind of training data with the stages that are trained on it. Every (seed, arm) is
trained and measured on its own, so that several can run at once in processes of their own, and what
is finished is kept.
"""

import inspect
import json
import math
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import combinations, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy.stats import t as student
from tqdm import tqdm

from common import models
from common.data import load_pairs
from common.evaluation import (
    Answer,
    Sampling,
    WinRate,
    generate,
    kl_on_samples,
    logps_of,
    perplexity,
    preference_metrics,
    text_measures,
)
from common.io.files import write_json
from common.io.fingerprints import digest
from common.judges import Judge, RewardJudge, RuleJudge, head_to_head
from common.lab import BrokenLineage, Lab, stage_of
from common.profiles import Profile
from common.toyworld import World
from common.training import Run, Source, train

MAIN_STAGES = ("sft", "orpo_lambda0", "dpo_plain", "dpo", "orpo")  # of the main comparison
CONTRAST = ("sft", "orpo_lambda0", "dpo", "orpo")  # of an arm with other pairs
# Costs of a run, in reports. `simple_flops`: without packing, by which methods are compared.
COSTS = (
    "wall_seconds",
    "cpu_seconds",
    "peak_memory_bytes",
    "train_flops",
    "simple_flops",
    "train_tokens",
)


@dataclass(frozen=True)
class Arm:
    """Training pairs and the stages trained on them. `world`: settings of `World.pairs`; () the
    profile's own pairs.

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


DEFAULT = Arm("default", MAIN_STAGES)
DEFAULT_RATE = (
    inspect.signature(World.pairs).parameters["flaw_rate"].default
)  # of a profile's own pairs


def flaw_rate_arms(profile: Profile) -> dict[float | str, Arm]:
    """The flaw-rate experiment, {rate: arm}, and under "tiers" the pairs whose two answers are of
    independent quality.

    At the rate of the profile's own pairs the main comparison serves: nothing is trained twice.
    """
    arms = {
        rate: Arm(f"flaw-{rate:g}", CONTRAST, (("flaw_rate", rate),)) for rate in profile.flaw_rates
    }
    if DEFAULT_RATE in arms:
        arms[DEFAULT_RATE] = DEFAULT
    return {**arms, "tiers": Arm("tiers", CONTRAST, (("style", "tiers"),))} if arms else {}


def judge_of(lab: Lab) -> Judge:
    """The world's rule, or a reward model trained on the pairs where there is none."""
    if lab.data.world:
        return RuleJudge(lab.data.world)
    return RewardJudge(
        train(lab, "reward").model, lab.tokenizer, lab.test_pairs, lab.profile.eval_batch
    )


def ready(lab: Lab) -> None:
    """Trains what every arm of a seed starts from: base and SFT."""
    if lab.has_own_weights("base"):
        train(lab, "base")
    train(lab, "sft")


def train_arm(lab: Lab, arm: Arm) -> dict[str, Run]:
    """The stages of an arm, trained or reused. Needs base and SFT. Raises: MissingRun,
    BrokenLineage.
    """
    pairs = (
        load_pairs(lab.data.world.pairs(lab.profile.pairs, **dict(arm.world)))[0]
        if arm.world
        else None
    )
    runs = {}
    for stage in arm.stages:
        changes, sweep = (
            dict(change for name, change in arm.changes if name == stage),
            arm.run_of(stage),
        )
        own = {"source": Source(pairs=pairs)} if stage_of(stage).rows == "pairs" else {}
        # A run of an arm is only measured at its end: held-out measures along the way would cost as
        # much again.
        quiet = {"evaluations": 1} if sweep else {}
        runs[stage] = train(lab, stage, sweep=sweep, **own, **{**quiet, **changes})
    check_comparable(lab, {stage: arm.run_of(stage) for stage in arm.stages})
    return runs


def check_comparable(lab: Lab, runs: dict[str, str | None]) -> None:
    """Are these runs, {stage: its sweep or None}, of one base, one tokenizer and one set of pairs?

    Raises: MissingRun for a run that is not there; BrokenLineage, naming the odd one out, for a run
        of another base, other pairs or another tokenizer, or one whose parent was trained again
        since.
    """
    roots, found = {}, {"tokenizer": {}, "pairs": {}}
    for stage, sweep in runs.items():
        roots[stage] = lab.lineage(stage, sweep)[0]
        parts = lab.record(stage, sweep)["fingerprint_parts"]
        found["tokenizer"][stage] = parts["tokenizer"]
        if stage_of(stage).rows == "pairs":
            found["pairs"][stage] = parts["data"]
    wanted = {"base": lab.fingerprint_of("base"), "tokenizer": lab.tokenizer_digest()}
    if not any(runs.values()):  # no run of other pairs among them: they must be the profile's own
        wanted["pairs"] = digest([lab.train_pairs.to_list(), lab.test_pairs.to_list()])
    for what, values in {"base": roots, **found}.items():
        expected = wanted.get(what) or Counter(values.values()).most_common(1)[0][0]
        odd = [stage for stage, value in values.items() if value != expected]
        if odd:
            told = (
                "other pairs than the rest" if what == "pairs" else f"another {what} than is here"
            )
            again = [lab.train_command(stage) for stage in odd if not runs[stage]] or [
                "the cell that made it"
            ]
            raise BrokenLineage(
                f"{', '.join(odd)}: trained with {told}; no fair comparison. Train again: {'; '.join(again)}"
            )


def measure(
    lab: Lab, model, reference, temperature: float = 1.0
) -> tuple[dict, list[list[Answer]]]:
    """Every shared measure of a model against the reference `sft`, and the answers they were taken
    on.

    Returns: the values of `models.<stage>` in `evaluation.json` (units: see the functions above),
        and the answers.
    """
    profile = lab.profile
    sampling = Sampling(profile.max_new_tokens, temperature, profile.samples, lab.seed)
    answers = generate(
        model, lab.tokenizer, lab.prompts, sampling, 4 * profile.eval_batch, progress=True
    )
    policy = logps_of(model, lab.test_pairs, batch_size=profile.eval_batch)
    shared = preference_metrics(
        policy, logps_of(reference, lab.test_pairs, batch_size=profile.eval_batch)
    )
    kl = kl_on_samples(model, reference, answers, profile.eval_batch)
    seen = text_measures(answers, lab.data.world)
    return {"perplexity": perplexity(policy.chosen), "kl": kl, **shared, **seen}, answers


def evaluation_report(
    models: dict[str, dict], rates: dict[str, WinRate], records: dict[str, dict]
) -> dict:
    """The report of one seed, as `evaluation.json` and `comparison.json` hold it.

    Args: `models`: {stage: what `measure` returned}; `rates`: {"dpo_vs_sft": …}; `records`: {stage:
        its `run.json`}.
    Returns: {"models", "win_rate", "cost", "seeds": 1}. Every `std` is null: one seed has no
        spread.
    """
    report = {
        "models": {stage: dict(measures) for stage, measures in models.items()},
        "win_rate": {name: asdict(rate) for name, rate in rates.items()},
        "cost": {
            stage: {name: record[name] for name in COSTS} for stage, record in records.items()
        },
        "seeds": 1,
    }
    return summarise_seeds([report])


def summarise_seeds(reports: list[dict]) -> dict:
    """One report from those of several seeds: means, and beside them `std`, the sample standard
    deviation (n - 1).

    Of a win rate, `rate` is the mean of the seeds' rates, wins, ties and losses are their sums, and
    `ci95` combines the seeds' own intervals: it says how sure we are given these trained models;
    `std` says how much training varies.
    Raises: ValueError for no report, reports of several seeds, or reports that do not hold the same
        entries.
    """
    parts = ("models", "win_rate", "cost")
    if not reports or any(report["seeds"] != 1 for report in reports):
        raise ValueError("Give one report per seed, at least one.")
    if any(report[part].keys() != reports[0][part].keys() for report in reports for part in parts):
        raise ValueError(
            "These reports do not hold the same models, pairs and costs: they cannot be averaged."
        )
    rows = {
        part: {name: [report[part][name] for report in reports] for name in reports[0][part]}
        for part in parts
    }
    models = {}
    for stage, seeds in rows["models"].items():
        if any(row.keys() != seeds[0].keys() for row in seeds):
            raise ValueError(
                f"The reports of {stage!r} hold different measures: they cannot be averaged."
            )
        means, spreads = _over_seeds(
            [{name: row[name] for name in row if name != "std"} for row in seeds]
        )
        models[stage] = means | {"std": spreads}
    return {
        "models": models,
        "win_rate": {name: _mean_rate(seeds) for name, seeds in rows["win_rate"].items()},
        "cost": {stage: _over_seeds(seeds)[0] for stage, seeds in rows["cost"].items()},
        "seeds": len(reports),
    }


def _over_seeds(values: list) -> tuple:
    """(mean, standard deviation) of numbers; of dicts key by key, where a flaw that was never seen
    has share 0.
    """
    if isinstance(values[0], dict):
        names = dict.fromkeys(name for value in values for name in value)
        pairs = {name: _over_seeds([value.get(name, 0.0) for value in values]) for name in names}
        return {name: pair[0] for name, pair in pairs.items()}, {
            name: pair[1] for name, pair in pairs.items()
        }
    if None in values:
        return None, None
    return (mean(values), stdev(values)) if len(values) > 1 else (values[0], None)


def _mean_rate(seeds: list[dict]) -> dict:
    """A win rate over seeds. The seeds' errors are independent, so their half-widths add as
    squares.
    """
    rate, std = _over_seeds([seed["rate"] for seed in seeds])
    down, up = (
        math.hypot(*(seed["ci95"][i] - seed["rate"] for seed in seeds)) / len(seeds) for i in (0, 1)
    )
    counts = {name: sum(seed[name] for seed in seeds) for name in ("wins", "ties", "losses")}
    return counts | {"rate": rate, "ci95": [rate - down, rate + up], "std": std}


def measure_runs(lab: Lab, runs: dict[str, Run], judge: Judge) -> dict:
    """`evaluation_report` of one seed: every shared measure, and the win rate of every pair of
    stages.
    """
    measures, answers = {}, {}
    for stage, run in runs.items():
        measures[stage], answers[stage] = measure(lab, run.model, runs["sft"].model)
    rates = {
        f"{a}_vs_{b}": head_to_head(judge, answers[a], answers[b]) for b, a in combinations(runs, 2)
    }
    report = evaluation_report(measures, rates, {stage: run.record for stage, run in runs.items()})
    return report | {
        "seed": lab.seed,
        "prompts": len(lab.prompts),
        "samples": lab.profile.samples,
        "judge": judge.name,
    }


def run_arm(profile: Profile, seed: int, arm: Arm) -> dict:
    """Trains and measures one arm of one seed, or returns its report of before if nothing changed
    since.

    Args: `profile`: as `get_profile` gave it. Returns: the report of `measure_runs`, kept in `<run
        folder>/arms/`.
    """
    lab = Lab(profile, seed)
    ready(lab)
    runs = train_arm(lab, arm)
    trained = {stage: run.record["fingerprint"] for stage, run in runs.items()}
    source = Path(__file__).read_text(encoding="utf-8")  # how it is measured
    key = digest([trained, profile.samples, profile.held_out, source])
    path = lab.folder / "arms" / f"{arm.name}.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))).get("key") == key:
        return before
    report = measure_runs(lab, runs, judge_of(lab)) | {"arm": asdict(arm), "key": key}
    write_json(path, report)
    return json.loads(path.read_text(encoding="utf-8"))


def device_is_shared(profile: Profile) -> bool:
    """Can several tiny models be trained at once, one to a CPU core?"""
    return models.is_tiny(profile) and not torch.cuda.is_available()


def _quietly(job, *arguments):
    """Runs a job without its own lines: those of several would only mix."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return job(*arguments)


def _in_worker(job, *arguments):
    """Runs a job in a process of its own, on one core."""
    torch.set_num_threads(1)
    return _quietly(job, *arguments)


def _run_in_turn(profile: Profile, seed: int, arms: list[Arm]) -> list[dict]:
    return [run_arm(profile, seed, arm) for arm in arms]


def run_arms(lab: Lab, arms: list[Arm], seeds: list[int] | None = None) -> dict[str, list[dict]]:
    """Every arm for every seed, {arm: one report per seed}; tiny models side by side, one process
    to a core.

    Args: `seeds`: default the lab's own and the next ones, `profile.seeds` in all. Shows progress;
        what is finished is kept, so an interrupted experiment goes on where it stopped.
    """
    seeds = [lab.seed + k for k in range(lab.profile.seeds)] if seeds is None else seeds
    # Arms that train a stage under its own name share its folder: of one seed they run in turn, and
    # first, being long.
    sharing = [
        arm
        for arm in arms
        if any(arm.run_of(stage) is None for stage in arm.stages if stage != "sft")
    ]
    jobs = [(seed, sharing) for seed in seeds if sharing]
    jobs += [(seed, [arm]) for arm in arms if arm not in sharing for seed in seeds]
    reports: dict[str, dict[int, dict]] = {arm.name: {} for arm in arms}
    workers = min(os.cpu_count() or 1, 4, len(jobs)) if device_is_shared(lab.profile) else 1
    bar = tqdm(
        total=len(seeds) * len(arms),
        desc=f"{len(arms)} arms × {len(seeds)} seeds, {workers} at once",
    )

    def keep(seed: int, arms: list[Arm], found: list[dict]) -> None:
        for arm, report in zip(arms, found, strict=True):
            reports[arm.name][seed] = report
            bar.update()

    if workers == 1:
        for seed, own in jobs:
            keep(seed, own, _quietly(_run_in_turn, lab.profile, seed, own))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                for future in [
                    pool.submit(_in_worker, ready, Lab(lab.profile, seed)) for seed in seeds
                ]:
                    future.result()  # an error of a worker is raised here, whole
                waiting = {
                    pool.submit(_in_worker, _run_in_turn, lab.profile, *job): job for job in jobs
                }
                for future in as_completed(waiting):
                    keep(*waiting[future], future.result())
            except BaseException:
                pool.shutdown(
                    cancel_futures=True
                )  # what runs now ends first: two must never write one folder
                raise
    bar.close()
    return {name: [found[seed] for seed in seeds] for name, found in reports.items()}


def over_seeds(reports: list[dict]) -> dict:
    """`summarise_seeds`, and for each win rate `seed_ci95`: the 95 % interval of its mean over
    seeds (Student's t).

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


def sign_change(places: list[float], rates: list[float]) -> float | None:
    """Where a win rate first crosses one half on its way up, read off between two places by a
    straight line.

    Returns: None where it never does, be it always above or never.
    """
    for (left, low), (right, high) in pairwise(zip(places, rates, strict=True)):
        if low < 0.5 <= high:
            return left + (right - left) * (0.5 - low) / (high - low)
    return None
