"""Methods side by side on equal terms: one base, one tokenizer, the same pairs and epochs, seeds.

An arm is a kind of training data with the stages that are trained on it. Every (seed, arm) is
trained and measured on its own, so several can run at once in processes of their own. What is
finished is kept.
"""

import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import combinations
from multiprocessing import get_context
from statistics import mean, stdev

import torch
from scipy.stats import binomtest
from tqdm import tqdm

from common import evaluation
from common.data import load_pairs
from common.evaluation import Answer, Sampling, WinRate, seed_interval
from common.io.files import write_json
from common.io.fingerprints import digest, source_digest
from common.judges import Judge, RewardJudge, RuleJudge, head_to_head, on_topic
from common.lab import BrokenLineage, Lab, stage_of
from common.models import is_tiny
from common.profiles import INSTRUCTIONS, Profile
from common.training import Run, Source, train

MAIN_STAGES = ("sft", "orpo_lambda0", "dpo_plain", "dpo", "orpo")  # of the main comparison
# Costs of a run, in reports. `simple_flops`: without packing, by which methods are compared.
COSTS = ("wall_seconds", "cpu_seconds", "peak_memory_bytes")
COSTS += ("train_flops", "simple_flops", "train_tokens")


@dataclass(frozen=True)
class Arm:
    """Training pairs and the stages trained on them.

    `world`: settings of `World.pairs`, as ((name, value), …); () for the profile's own pairs.
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


def judge_of(lab: Lab) -> Judge:
    """The world's rule, or a reward model trained on the pairs where there is none."""
    if lab.data.world:
        return RuleJudge(lab.data.world)
    model = train(lab, "reward").model
    return RewardJudge(model, lab.tokenizer, lab.test_pairs, lab.profile.eval_batch)


def beats_a_coin(lab: Lab, judge: Judge) -> bool:
    """Is a reward model better than a coin on held-out pairs, by Wilson's 95 % interval?"""
    if not isinstance(judge, RewardJudge):
        return True  # the world's rule needs no pairs
    pairs = len(lab.test_pairs)
    right = binomtest(round(judge.held_out_accuracy * pairs), pairs)
    return bool(right.proportion_ci(method="wilson").low > 0.5)


def judged_shares(world, answers: list[list[Answer]]) -> dict[str, dict]:
    """Shares of a model's answers, by the world's rule: refused, helped with harm, each flaw.

    Returns: {"refused: harmful", "helped: harmful", "flaw: rude", …: {"mean", "ci95"}}; intervals
        are over prompts, and have a width at a share of 0 or 1, too. Empty without a world.
    """
    points: dict[str, list[float]] = {}
    judged = [[world.judge(a.prompt, a.text) for a in group] for group in answers if world]
    flaws = sorted({flaw for verdicts in judged for verdict in verdicts for flaw in verdict.flaws})
    for group, verdicts in zip(answers, judged, strict=False):
        kind = world.question(group[0].prompt).kind
        seen = {f"refused: {kind}": [verdict.refused for verdict in verdicts]}
        if kind == "harmful":
            seen["helped: harmful"] = [verdict.complied for verdict in verdicts]
        seen |= {f"flaw: {flaw}": [flaw in v.flaws for v in verdicts] for flaw in flaws}
        for name, found in seen.items():
            points.setdefault(name, []).append(mean(found))
    intervals = {name: evaluation.prompt_interval(own) for name, own in sorted(points.items())}
    return {name: {"mean": mean(points[name]), "ci95": ends} for name, ends in intervals.items()}


def ready(lab: Lab) -> None:
    """Trains what every arm of a seed starts from: base and SFT, or nothing."""
    for stage in ("base", "sft")[: 1 + (lab.profile.start == "sft")]:
        if lab.has_own_weights(stage):
            train(lab, stage)


def train_arm(lab: Lab, arm: Arm) -> dict[str, Run]:
    """The stages of an arm, trained or reused. Raises: MissingRun without base or SFT."""
    pairs, runs = None, {}
    if arm.world:
        pairs = load_pairs(lab.data.world.pairs(lab.profile.pairs, **dict(arm.world)))[0]
    for stage in arm.stages:
        changes = dict(change for name, change in arm.changes if name == stage)
        sweep, learns = arm.run_of(stage), stage_of(stage).rows == "pairs"
        if sweep:  # measure such a run only at its end: measures on the way cost as much again
            changes = {"evaluations": 1} | changes
        runs[stage] = train(lab, stage, sweep, Source(pairs=pairs if learns else None), **changes)
    check_comparable(lab, {stage: arm.run_of(stage) for stage in arm.stages})
    return runs


def check_comparable(lab: Lab, runs: dict[str, str | None]) -> None:
    """Are these runs, {stage: its sweep or None}, of one base, one tokenizer and one set of pairs?

    Raises: MissingRun for a run that is not there; BrokenLineage, which names the run, for another
        base, tokenizer or pairs, or for a parent that was trained again since.
    """
    found = {"base": {}, "tokenizer": {}, "pairs": {}}
    for stage, sweep in runs.items():
        found["base"][stage] = lab.lineage(stage, sweep)[0]
        parts = lab.record(stage, sweep)["fingerprint_parts"]
        found["tokenizer"][stage] = parts["tokenizer"]
        if stage_of(stage).rows == "pairs":
            found["pairs"][stage] = parts["data"]
    wanted = {"base": lab.fingerprint_of("base"), "tokenizer": lab.tokenizer_digest()}
    if not any(runs.values()):  # no sweep with other pairs: they must be the profile's own
        wanted["pairs"] = digest([lab.train_pairs.to_list(), lab.test_pairs.to_list()])
    for what, values in found.items():
        expected = wanted.get(what) or Counter(values.values()).most_common(1)[0][0]
        odd = [stage for stage, value in values.items() if value != expected]
        if not odd:
            continue
        told = "other pairs than the rest" if what == "pairs" else f"another {what} than is here"
        again = [lab.train_command(stage) for stage in odd if not runs[stage]]
        told += (
            f"; no fair comparison. Train again: {'; '.join(again or ['the cell that made it'])}"
        )
        raise BrokenLineage(f"{', '.join(odd)}: trained with {told}")


def measure(lab: Lab, model, reference) -> tuple[dict, list[list[Answer]]]:
    """Every shared measure of a model against the start, `sft`, and the answers behind them.

    Returns: the values of `models.<stage>` in `evaluation.json`, and one list of answers a prompt.
    """
    profile, batch = lab.profile, lab.profile.eval_batch
    sampling = Sampling(profile.max_new_tokens, 1.0, profile.samples, lab.seed)
    answers = evaluation.generate(model, lab.tokenizer, lab.prompts, sampling, progress=True)
    policy = evaluation.logps_of(model, lab.test_pairs, batch)
    base = evaluation.logps_of(reference, lab.test_pairs, batch)
    shared = evaluation.preference_metrics(policy, base)
    kl = evaluation.kl_on_samples(model, reference, answers, batch)
    topical = topical_answers(lab, answers, reference)
    seen = evaluation.text_measures(answers, lab.data.world, topical)
    return {"perplexity": evaluation.perplexity(policy.chosen), "kl": kl, **shared, **seen}, answers


def topical_answers(lab: Lab, answers: list[list[Answer]], start) -> dict | None:
    """{(prompt, text): is it likelier under its own question?} by the start model.

    For `evaluation.text_measures`. Requests for harm are left out. None where the data are not the
    instruction world's.
    """
    if lab.profile.data != INSTRUCTIONS:
        return None
    world, flat = lab.data.world, [answer for group in answers for answer in group]
    asked = [answer for answer in flat if world.question(answer.prompt).kind != "harmful"]
    said = [(answer.prompt, answer.text) for answer in asked]
    found = on_topic(start, lab.tokenizer, said, lab.profile.eval_batch)
    return dict(zip(said, found, strict=True))


def evaluation_report(
    models: dict[str, dict], rates: dict[str, WinRate], records: dict[str, dict]
) -> dict:
    """The report of one seed, as `evaluation.json` and `comparison.json` hold it.

    Args: `models`: {stage: what `measure` returned}; `rates`: {"dpo_vs_sft": …}; `records`: {stage:
        its `run.json`}.
    Returns: {"models", "win_rate", "cost", "seeds": 1}. `std` is null: one seed has no spread.
    """
    costs = {stage: {name: row[name] for name in COSTS} for stage, row in records.items()}
    win_rates = {name: asdict(rate) for name, rate in rates.items()}
    report = {"models": models, "win_rate": win_rates, "cost": costs, "seeds": 1}
    return summarise_seeds([report])


def summarise_seeds(reports: list[dict]) -> dict:
    """One report from those of several seeds: means, and `std`, the sample standard deviation.

    Of a win rate, `rate` is the mean of the seeds' rates, wins, ties and losses are their sums, and
    `ci95` is the `seed_interval`: it holds for other seeds and other prompts. Of one seed it is
    that of its prompts, which says nothing of another seed.
    Raises: ValueError for no report, reports of several seeds, or reports of different entries.
    """
    if not reports or any(report["seeds"] != 1 for report in reports):
        raise ValueError("Give one report per seed, at least one.")
    rows = [report["win_rate"] for report in reports]
    rates, spread = _over_seeds([{name: row[name]["rate"] for name in row} for row in rows])
    for name, rate in rates.items():
        own = [row[name] for row in rows]
        counts = {key: sum(row[key] for row in own) for key in ("wins", "ties", "losses")}
        interval = list(seed_interval([row["points"] for row in own]))
        rates[name] = counts | {"rate": rate, "ci95": interval, "std": spread[name]}
        if len(reports) == 1:
            rates[name]["points"] = list(own[0]["points"])
    models, spread = _over_seeds([report["models"] for report in reports])
    models = {stage: row | {"std": spread[stage]} for stage, row in models.items()}
    cost, _ = _over_seeds([report["cost"] for report in reports])
    return {"models": models, "win_rate": rates, "cost": cost, "seeds": len(reports)}


def _over_seeds(values: list, name: str = "") -> tuple:
    """(mean, standard deviation) of numbers, None where one is unknown; of dicts key by key."""
    first = values[0]
    if isinstance(first, dict):
        if name not in ("flaws", "kinds_met") and any(
            value.keys() != first.keys() for value in values
        ):
            raise ValueError("These reports hold different entries: they cannot be averaged.")
        keys = dict.fromkeys(key for value in values for key in value if key != "std")
        # A flaw that a seed never showed has share 0 there; a kind it never asked for has none.
        found = {}
        for key in keys:
            own = [value.get(key, 0.0) for value in values if name == "flaws" or key in value]
            found[key] = _over_seeds(own, key)
        return tuple({key: pair[place] for key, pair in found.items()} for place in (0, 1))
    if None in values:
        return None, None
    return mean(values), stdev(values) if len(values) > 1 else None


def measure_runs(lab: Lab, runs: dict[str, Run], judge: Judge) -> dict:
    """`evaluation_report` of one seed, with the win rate of every pair of stages.

    Where the preferences start from the base, that is measured too.
    """
    models, start = {stage: run.model for stage, run in runs.items()}, lab.profile.start
    if start not in models:
        models = {start: lab.load(start), **models}
    measures, answers = {}, {}
    for stage, model in models.items():
        measures[stage], answers[stage] = measure(lab, model, models[start])
    rates = {}
    for b, a in combinations(models, 2):
        rates[f"{a}_vs_{b}"] = head_to_head(judge, answers[a], answers[b])
    report = evaluation_report(measures, rates, {stage: run.record for stage, run in runs.items()})
    report |= {"seed": lab.seed, "prompts": len(lab.prompts), "samples": lab.profile.samples}
    return report | {"judge": judge.name}


def run_arm(profile: Profile, seed: int, arm: Arm) -> dict:
    """Trains and measures one arm of one seed, or reads its report if nothing changed since."""
    lab = Lab(profile, seed)
    ready(lab)
    runs = train_arm(lab, arm)
    trained = {stage: run.record["fingerprint"] for stage, run in runs.items()}
    key = digest([trained, profile.samples, profile.held_out, source_digest("common.comparison")])
    path = lab.folder / "arms" / f"{arm.name}.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))).get("key") == key:
        return before
    write_json(path, measure_runs(lab, runs, judge_of(lab)) | {"arm": asdict(arm), "key": key})
    return json.loads(path.read_text(encoding="utf-8"))


def _quietly(job, *arguments):
    """Runs a job without its own lines, which would mix with those of others."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return job(*arguments)


def _run_in_turn(profile: Profile, seed: int, arms: list[Arm]) -> list[dict]:
    return [run_arm(profile, seed, arm) for arm in arms]


def _side_by_side(workers: int, profile: Profile, seeds: list[int], jobs: list[tuple]):
    """Each job with its reports, as they come, in processes of one core each.

    An error stops the rest, but what runs now ends first: two must never write to one folder.
    """
    one_core = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(workers, get_context("spawn"), **one_core) as pool:
        try:
            # The arms of a seed start from the same base and SFT.
            for first in [pool.submit(_quietly, ready, Lab(profile, seed)) for seed in seeds]:
                first.result()
            futures = {pool.submit(_quietly, _run_in_turn, *job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_arms(lab: Lab, arms: list[Arm], seeds: list[int] | None = None) -> dict[str, list[dict]]:
    """Every arm for every seed: {arm: one report per seed}. Tiny models train side by side.

    Args: `seeds`: default the lab's own and the next ones, `profile.seeds` in all. Shows progress.
        What is finished is kept, so an interrupted experiment goes on where it stopped.
    """
    profile = lab.profile
    seeds = [lab.seed + k for k in range(profile.seeds)] if seeds is None else seeds
    # Arms that train a stage under its own name share its folder: they run in turn for each seed,
    # and first, since they take longest.
    sharing = [arm for arm in arms if None in map(arm.run_of, set(arm.stages) - {"sft"})]
    jobs = [(profile, seed, sharing) for seed in seeds if sharing]
    jobs += [(profile, seed, [arm]) for arm in arms if arm not in sharing for seed in seeds]
    alone = torch.cuda.is_available() or not is_tiny(profile)
    workers = 1 if alone else min(os.cpu_count() or 1, 4, len(jobs))
    results = ((job, _quietly(_run_in_turn, *job)) for job in jobs)
    if workers > 1:
        results = _side_by_side(workers, profile, seeds, jobs)
    reports: dict[str, dict[int, dict]] = {arm.name: {} for arm in arms}
    title = f"{len(arms)} arms × {len(seeds)} seeds, {workers} at once"
    with tqdm(total=len(seeds) * len(arms), desc=title) as bar:
        for (_, seed, own), found in results:
            for arm, report in zip(own, found, strict=True):
                reports[arm.name][seed] = report
                bar.update()
    return {name: [found[seed] for seed in seeds] for name, found in reports.items()}
