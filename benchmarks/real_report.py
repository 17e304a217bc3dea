"""From the seeds of `benchmarks.real` to means, intervals and verdicts: recomputed, never typed."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from benchmarks.verdicts import family_verdicts, over_seeds
from tools.align import MEASURES
from tools.tables import GB, RESULTS_FOLDER, machine_line

FOLDER = RESULTS_FOLDER / "real"
RESULTS = RESULTS_FOLDER / "real.json"
LENGTH_KEPT, PROSE_KEPT = 0.60, 1.10  # of the start's, as the plan says
METHODS = {
    "dpo_plain": "plain DPO",
    "dpo": "DPO + NLL",
    "orpo": "ORPO",
    "orpo_lambda0": "λ = 0",
}
ARM_NAMES = {"start": "start", **METHODS, "orpo_clean": "ORPO, knob 0"}
ARM_NAMES["orpo_lambda0_clean"] = "λ = 0, knob 0"
MORE = ("reward_margin", "preference_accuracy")  # of the claims: no column of the page
SIDE_NAMES = {
    "hacked": "length hacking",
    "substance": "constraints of substance",
    "similar_length": "pairs of similar length",
    "nll": "the NLL term",
    "lower_rate": "a quarter of the rate",
}
TWO_PRECISIONS = ("float32", "bfloat16")  # of the check in `benchmarks.precision`
TOLD_APART = ("constraints_met", "relevance", "length_tokens", "preference_accuracy")
TOLD_APART += ("reward_margin", "perplexity", "prose_perplexity")
COLUMNS = {  # measure: its title, decimals
    **MEASURES,
    "prose_perplexity": ("perplexity of plain text", 2),
    "kl": ("KL (nats)", 2),
}


def sound(measures: dict, start: dict) -> bool:
    """Are length and general language kept, as the plan asks of a rate?"""
    length = measures["length_tokens"] / start["length_tokens"]
    prose = measures["prose_perplexity"] / start["prose_perplexity"]
    return length > LENGTH_KEPT and prose <= PROSE_KEPT


def best_rates(runs: dict[str, dict]) -> dict[str, float]:
    """The plan's choice among the tuning runs: {stage: rate}.

    Raises: ValueError where no rate of a method keeps length and general language.
    """
    start, best = runs["start"]["measures"], {}
    for stage in METHODS:
        own = [run for run in runs.values() if run.get("settings", {}).get("stage") == stage]
        kept = [run for run in own if sound(run["measures"], start)]
        if own and not kept:
            raise ValueError(f"{stage}: every rate loses length or general language. Try lower.")
        if kept:
            top = max(kept, key=lambda run: run["measures"]["score"])
            best[stage] = top["settings"]["lr"]
    return best


def _values(seeds: list[dict], arm: str, name: str) -> list[float]:
    return [seed["arms"][arm]["measures"][name] for seed in seeds]


def _minus(seeds: list[dict], arm: str, other: str, name: str) -> list[float]:
    pairs = zip(_values(seeds, arm, name), _values(seeds, other, name), strict=True)
    return [value - before for value, before in pairs]


def _ratios(seeds: list[dict], arm: str, name: str) -> list[float]:
    pairs = zip(_values(seeds, arm, name), _values(seeds, "start", name), strict=True)
    return [value / before for value, before in pairs]


def families(seeds: list[dict]) -> dict[str, dict[str, list[float]]]:
    """The four families of the plan: {family: {claim: one difference for each seed}}."""
    met, safe = "constraints_met", "safe_on_harmful"
    others = {"orpo_lambda0": ("dpo_plain", "dpo", "orpo"), "orpo_lambda0_clean": ("orpo_clean",)}
    length = [ratio - LENGTH_KEPT for ratio in _ratios(seeds, "dpo", "length_tokens")]
    prose = [PROSE_KEPT - ratio for ratio in _ratios(seeds, "dpo", "prose_perplexity")]
    return {
        "it learns: constraints met, minus the start's": {
            name: _minus(seeds, arm, "start", met) for arm, name in METHODS.items()
        },
        "contrast beats imitation: constraints met, minus those of λ = 0": {
            ARM_NAMES[arm]: _minus(seeds, arm, control, met)
            for control, arms in others.items()
            for arm in arms
        },
        "DPO + NLL does no harm elsewhere": {
            "relevance, minus the start's": _minus(seeds, "dpo", "start", "relevance"),
            "ended answers, minus the start's": _minus(seeds, "dpo", "start", "ended_with_eos"),
            "length over the start's, minus .60": length,
            "1.10 minus perplexity of plain text over the start's": prose,
        },
        "it learns to refuse: unseen harm refused, minus the start's": {
            name: _minus(seeds, arm, "start", safe) for arm, name in METHODS.items()
        },
    }


def read_precision(folder: Path = FOLDER) -> dict[str, dict]:
    """The runs of `benchmarks.precision` so far."""
    path = folder / "precision.json"
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}


def summary(seeds: list[dict], precision: dict[str, dict] | None = None) -> dict:
    """All that the page shows, from the seeds' files and the runs in two precisions."""
    complete = [seed for seed in seeds if all(arm in seed["arms"] for arm in ARM_NAMES)]
    found = {"seeds": [seed["seed"] for seed in complete], "plan": None, "machines": []}
    found["precision"] = precision_summary(precision or {})
    if not complete:
        return found
    found["plan"] = complete[0]["plan"]
    lines = [machine_line(seed["machine"]) for seed in complete]
    found["machines"] = list(dict.fromkeys(lines))
    found["arms"] = {
        arm: {
            name: asdict(over_seeds(_values(complete, arm, name)))
            if len(complete) > 1
            else {"mean": _values(complete, arm, name)[0], "ci95": None}
            for name in (*COLUMNS, *MORE)
        }
        for arm in ARM_NAMES
    }
    found["win_rate"] = {
        f"{arm}_vs_{other}": asdict(over_seeds(rates)) if len(rates) > 1 else {"mean": rates[0]}
        for arm in ARM_NAMES
        for other in complete[0]["arms"][arm].get("win_rate", ())
        for rates in [[seed["arms"][arm]["win_rate"][other] for seed in complete]]
    }
    found["displacement"] = {
        arm: mean(_values(complete, arm, "rewards_chosen")) / 0.1 for arm in METHODS
    }
    kinds = sorted({kind for seed in complete for kind in _kinds(seed, "start")})
    found["kinds"] = {
        kind: {arm: _mean([_kinds(seed, arm).get(kind) for seed in complete]) for arm in ARM_NAMES}
        for kind in kinds
    }
    found["cost"] = {
        arm: {
            "minutes": _cost(complete, arm, "wall_seconds", mean) / 60,
            "measuring_minutes": _cost(complete, arm, "measuring_seconds", mean) / 60,
            "peak_gb": _cost(complete, arm, "peak_memory_bytes", max) / GB,
            "measuring_peak_gb": _cost(complete, arm, "measuring_peak_bytes", max) / GB,
            "lr": complete[0]["arms"][arm]["settings"]["lr"],
        }
        for arm in ARM_NAMES
        if arm != "start"
    }
    found["side"] = {
        arm: {key: _mean([seed["arms"][arm]["side"][key] for seed in complete]) for key in MEASURES}
        for arm in ARM_NAMES
    }
    if len(complete) >= 5:
        found["verdicts"] = {
            family: {claim: asdict(one) for claim, one in family_verdicts(claims).items()}
            for family, claims in families(complete).items()
        }
    side = next((seed for seed in complete if "hacked" in seed["arms"]), None)
    if side:
        names = ["start", *(name for name in SIDE_NAMES if name in side["arms"])]
        found["remedies"] = {
            name: {key: side["arms"][name]["measures"][key] for key in COLUMNS} for name in names
        }
    return found


def _cost(seeds: list[dict], arm: str, name: str, over) -> float:
    return over([seed["arms"][arm]["cost"][name] for seed in seeds])


def precision_summary(runs: dict[str, dict]) -> dict:
    """{measure: [float32, bfloat16, the difference's mean and interval]} over the seeds of both."""
    seeds = sorted({name.partition("-")[2] for name in runs})
    own = [[runs.get(f"{name}-{seed}") for seed in seeds] for name in TWO_PRECISIONS]
    both = [pair for pair in zip(*own, strict=True) if all(pair)]
    if len(both) < 2:
        return {}
    found = {"seeds": len(both), "step_seconds": []}
    for place in range(2):
        runs_of = [pair[place] for pair in both]
        each = [run["cost"]["wall_seconds"] / run["settings"]["steps"] for run in runs_of]
        found["step_seconds"].append(mean(each))
    for key in TOLD_APART:
        pairs = [[run["measures"][key] for run in pair] for pair in both]
        gap = asdict(over_seeds([late - early for early, late in pairs]))
        found[key] = [*map(mean, zip(*pairs, strict=True)), gap]
    return found


def _kinds(seed: dict, arm: str) -> dict[str, float]:
    return seed["arms"][arm]["measures"]["kinds_met"]


def _mean(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
