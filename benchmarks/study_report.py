"""From the seeds of `benchmarks.study` to tables, figures, verdicts and the page: recomputed."""

import json
from dataclasses import asdict
from html import escape, unescape
from pathlib import Path
from statistics import mean

from benchmarks.plans import differing, pages_with, read_seeds, write_summary
from benchmarks.study_arms import (
    FAMILIES,
    FAMILY_TITLES,
    KNOBS,
    PARTS,
    SEEDS,
    SIDE_SEEDS,
    TUNING_SEEDS,
    arm_ids,
    pair_of,
    rate_in,
    title_of,
)
from benchmarks.verdicts import FEWEST_SEEDS, Finding, family_verdicts, over_seeds
from common.io.files import written_whole
from common.profiles import ROOT
from tools.tables import GB, RESULTS_FOLDER, machine_line, markdown_table

FOLDER = RESULTS_FOLDER / "study"
RESULTS = RESULTS_FOLDER / "study.json"
FIGURES = ROOT / "docs" / "figures"
RATES = {"win_rate": "rate", "lc_win_rate": "controlled", "temperature_07": "cool"}
COLUMNS = {  # measure: its title, decimals
    "score": ("score (0–10)", 2),
    "safe_on_harmful": ("safe on harm", 3),
    "over_refusal": ("over-refusal", 3),
    "ended_with_eos": ("ended", 3),
    "length_tokens": ("tokens", 1),
    "kl": ("KL to SFT (nats)", 2),
    "perplexity": ("perplexity", 3),
    "preference_accuracy": ("held-out accuracy", 3),
}
FLAWS = ("rude", "wrong_fact", "bare", "vague", "off_topic", "complies", "malformed")
CONTROLS = {".3": "lambda0", "0": "lambda0"}  # of the tables of win rates: beside SFT


def _spread(values: list[float]) -> dict:
    """Mean and 95 % interval over seeds; of one seed no interval."""
    if len(values) < 2:
        return {"mean": values[0], "ci95": None, "seeds": len(values)}
    found = over_seeds(values)
    return {"mean": found.mean, "ci95": list(found.ci95), "seeds": found.seeds}


def _holding(seeds: list[dict], *arms: str) -> list[dict]:
    return [seed for seed in seeds if all(arm in seed["arms"] for arm in arms)]


def _arm(seeds: list[dict], arm: str) -> dict:
    """An arm over the seeds that have it."""
    own = [seed["arms"][arm] for seed in _holding(seeds, arm)]
    cost = {key: mean(one["cost"][key] for one in own) for key in own[0]["cost"]}
    return {
        "name": title_of(arm),
        "seeds": len(own),
        "settings": own[0]["settings"],
        "measures": {
            name: _spread([one["measures"][name] for one in own])
            for name, value in own[0]["measures"].items()
            if value is not None
        },
        "flaws": {flaw: _spread([one["flaws"][flaw] for one in own]) for flaw in own[0]["flaws"]},
        "cost": cost,
    }


def _rates(seeds: list[dict], kind: str) -> dict[str, dict]:
    """Every win rate of one kind, in both directions."""
    found = {}
    for one in arm_ids():
        for other in arm_ids():
            if one == other or one.split("@")[1] != other.split("@")[1]:
                continue
            own = []
            for seed in _holding(seeds, one, other):
                try:
                    own.append(rate_in(seed, one, other, kind))
                except KeyError:  # cooler answers are drawn of the main arms only
                    continue
            if own:
                found[pair_of(one, other)] = _spread(own)
    return found


def findings(seeds: list[dict]) -> dict[str, dict[str, Finding]]:
    """The verdicts of every family for which there are five seeds with all of its arms."""
    found = {}
    for family, comparisons in FAMILIES.items():
        values, short = {}, False
        for name, difference in comparisons.items():
            values[name] = []
            for seed in seeds:
                try:
                    values[name].append(difference(seed))
                except KeyError:  # this seed does not have the arm yet
                    continue
            short |= len(values[name]) < FEWEST_SEEDS
        if not short:
            found[family] = family_verdicts(values)
    return found


def summary(seeds: list[dict]) -> dict:
    """All that the page shows, from the seeds' files."""
    found = {"plan": None, "seeds": [seed["seed"] for seed in seeds], "machines": [], "arms": {}}
    found |= {name: {} for name in RATES} | {"verdicts": {}}
    if not seeds:
        return found
    found["plan"] = seeds[0]["plan"]
    lines = [machine_line(seed["machine"]) for seed in seeds]
    found["machines"] = list(dict.fromkeys(lines))
    found["arms"] = {arm: _arm(seeds, arm) for arm in arm_ids() if _holding(seeds, arm)}
    found |= {name: _rates(seeds, kind) for name, kind in RATES.items()}
    found["verdicts"] = {
        family: {name: asdict(one) for name, one in claims.items()}
        for family, claims in findings(seeds).items()
    }
    return found


def write_results() -> None:
    """Writes `study.json`, the figures and the page."""


def check_results() -> int:
    return 0
