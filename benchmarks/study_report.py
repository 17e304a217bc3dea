"""From the seeds of `benchmarks.study` to tables, figures, verdicts and the page: recomputed."""

import sys
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import mean

from benchmarks.plans import differing, pages_with, read_seeds, write_summary
from benchmarks.study_arms import (
    FAMILIES,
    STUDY_PARTS,
    arm_ids,
    pair_of,
    rate_in,
    title_of,
)
from benchmarks.study_page import figure_in_words, figure_points, study_block
from benchmarks.verdicts import FEWEST_SEEDS, Finding, family_verdicts, over_seeds
from common.profiles import ROOT
from tools.tables import RESULTS_FOLDER, machine_line

STUDY_FOLDER = RESULTS_FOLDER / "study"
STUDY_RESULTS = RESULTS_FOLDER / "study.json"
FIGURES = ROOT / "docs" / "figures"
RATE_KEYS = {"win_rate": "rate", "lc_win_rate": "controlled", "temperature_07": "cool"}


def _spread(values: list[float]) -> dict:
    """Mean and 95 % interval over seeds."""
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
            if len(own) > 1:
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


def study_summary(seeds: list[dict]) -> dict:
    """All that the page shows, from the seeds' files. An arm is shown from two seeds on."""
    found = {"plan": None, "seeds": [seed["seed"] for seed in seeds], "machines": [], "arms": {}}
    found["complete"] = {
        part: [seed["seed"] for seed in _holding(seeds, *arm_ids(part))] for part in STUDY_PARTS
    }
    found |= {name: {} for name in RATE_KEYS} | {"verdicts": {}}
    if not seeds:
        return found
    found["plan"] = seeds[0]["plan"]
    lines = [machine_line(seed["machine"]) for seed in seeds]
    found["machines"] = list(dict.fromkeys(lines))
    found["arms"] = {arm: _arm(seeds, arm) for arm in arm_ids() if len(_holding(seeds, arm)) > 1}
    found |= {name: _rates(seeds, kind) for name, kind in RATE_KEYS.items()}
    found["verdicts"] = {
        family: {name: asdict(one) for name, one in claims.items()}
        for family, claims in findings(seeds).items()
    }
    return found


def stale_figures(found: dict, folder: Path) -> list[str]:
    """The figures that are missing, or were drawn of other numbers."""
    wrong = []
    for figure, (title, series) in figure_points(found).items():
        path = folder / f"{figure}.svg"
        said = escape(figure_in_words(title, series), quote=False)
        if any(series.values()) and not (path.exists() and said in path.read_text("utf-8")):
            wrong.append(path.name)
    return wrong


def study_pages(found: dict) -> dict[Path, str]:
    """{page: its text} with the generated part made anew."""
    return pages_with("study", "study", study_block(found, STUDY_FOLDER / "tuning.json"))


def write_study() -> None:
    """Writes `study.json`, the page, and the figures whose numbers are new."""
    found = study_summary(read_seeds(STUDY_FOLDER))
    if stale := stale_figures(found, FIGURES):
        from benchmarks.study_figures import draw

        points = figure_points(found)
        for name in stale:
            draw(name, *points[Path(name).stem], FIGURES / name)
    write_summary(STUDY_RESULTS, found, study_pages(found))


def check_study() -> int:
    """Recomputes everything from the seeds. Returns 1, and says what differs, if something does."""
    found, command = (
        study_summary(read_seeds(STUDY_FOLDER)),
        "python -m benchmarks.study --study_pages",
    )
    for name in (stale := stale_figures(found, FIGURES)):
        print(f"{name} was drawn of other numbers: {command}", file=sys.stderr)
    return int(bool(stale)) or differing(STUDY_RESULTS, found, study_pages(found), command)
