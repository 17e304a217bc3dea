"""What the page of the study shows: tables, verdicts, and the numbers of its figures."""

import json
from pathlib import Path

from benchmarks.study_arms import (
    FAMILY_TITLES,
    KNOB_PAIRS,
    MAIN,
    PART_SEEDS,
    STUDY_ARMS,
    pair_of,
    title_of,
)
from tools.tables import GB, markdown_table

RATE_KINDS = ("win_rate", "lc_win_rate", "temperature_07")
MEASURE_COLUMNS = {  # measure: its title, decimals
    "score": ("score (0–10)", 2),
    "safe_on_harmful": ("safe on harm", 3),
    "over_refusal": ("over-refusal", 3),
    "ended_with_eos": ("ended", 3),
    "length_tokens": ("tokens", 1),
    "kl": ("KL to SFT (nats)", 2),
    "perplexity": ("perplexity", 3),
    "preference_accuracy": ("held-out accuracy", 3),
}
FLAWS = {
    "rude": "rude",
    "wrong_fact": "wrong fact",
    "bare": "bare",
    "vague": "vague",
    "off_topic": "off topic",
    "complies": "helps with harm",
    "malformed": "malformed",
}


ROUTES = (  # of the second figure
    ("orpo", "lambda0"),
    ("dpo", "imitate_sft"),
    ("sft_orpo", "imitate_sft"),
    ("dpo_plain", "imitate_sft"),
    ("chosen_dpo", "lambda0"),
    ("orpo", "chosen_dpo"),
    ("orpo", "dpo"),
)


# --- figures: their numbers here, their drawing in `benchmarks.study_figures`


def figure_points(found: dict) -> dict[str, tuple[str, dict[str, dict[str, dict]]]]:
    """{figure: (title, {series: {place: mean, interval and seeds}})}, what was measured of it."""
    rates, arms = found["win_rate"], found["arms"]
    knobs = {
        STUDY_ARMS[name].title: {
            knob: rates.get(pair_of(f"{name}@{knob}", f"lambda0@{knob}")) for knob in KNOB_PAIRS
        }
        for name in ("orpo", "dpo")
    }
    routes = {
        f"knob {knob}": {
            f"{STUDY_ARMS[one].title} over {STUDY_ARMS[other].title}": rates.get(
                pair_of(f"{one}@{knob}", f"{other}@{knob}")
            )
            for one, other in ROUTES
        }
        for knob in (".3", "0")
    }
    flaws = {
        STUDY_ARMS[name].title: {
            title: arms[f"{name}@.3"]["flaws"][flaw] if f"{name}@.3" in arms else None
            for flaw, title in FLAWS.items()
        }
        for name in MAIN
    }
    titles = {
        "study-knobs": ("Win rate over imitation of the chosen answers, by the pairs' knob", knobs),
        "study-routes": ("Win rates between arms of the same start or the same answers", routes),
        "study-flaws": ("Share of answers with each flaw, knob .3", flaws),
    }
    return {
        figure: (title, {name: _known(points) for name, points in series.items()})
        for figure, (title, series) in titles.items()
    }


def _known(points: dict) -> dict:
    return {place: point for place, point in points.items() if point}


def figure_in_words(title: str, series: dict[str, dict[str, dict]]) -> str:
    """All numbers of a figure: its alt text, and what `--check` looks for in its file."""
    told = [
        f"{name}: " + ", ".join(f"{place} {_cell(point, 3)}" for place, point in points.items())
        for name, points in series.items()
        if points
    ]
    return f"{title}. Mean and 95 % interval over seeds. {'; '.join(told)}."


# --- the page


def _cell(point: dict | None, digits: int) -> str:
    if not point:
        return "–"
    low, high = point["ci95"]
    return f"{point['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _p(value: float) -> str:
    return "< .0001" if value < 1e-4 else f"{value:.4f}"


def _verdicts(found: dict) -> list[str]:
    parts = ["## Verdicts\n"]
    for family, title in FAMILY_TITLES.items():
        if family not in found["verdicts"]:
            parts.append(f"**{title}**: not measured yet, five seeds are needed.\n")
            continue
        rows = [
            [f"`{name}`", _cell(one, 3), str(one["seeds"]), _p(one["p"]), f"**{one['verdict']}**"]
            for name, one in found["verdicts"][family].items()
        ]
        header = [title, "difference [95 %]", "seeds", "p, adjusted", "verdict"]
        parts += [markdown_table(header, rows), ""]
    return parts


def _win_rates(found: dict, knob: str) -> list[str]:
    """Every arm of a knob against SFT and against imitation: plain, length-controlled, cooler."""
    rows = []
    for arm in (arm for arm in found["arms"] if arm.endswith(f"@{knob}")):
        cells = [
            _cell(found[kind].get(pair_of(arm, f"{other}@{knob}")), 3)
            for other in ("sft", "lambda0")
            for kind in RATE_KINDS
        ]
        rows.append([title_of(arm), f"`{arm}`", str(found["arms"][arm]["seeds"]), *cells])
    kinds = ["", ", length-controlled", ", temperature .7"]
    header = [f"over {other}{kind}" for other in ("SFT", "imitation") for kind in kinds]
    return [f"\n### Knob `{knob}`\n", markdown_table(["arm", "id", "seeds", *header], rows)]


def _measures(found: dict, title: str, part: str, columns: dict) -> list[str]:
    rows = []
    for arm in (f"{name}@{knob}" for knob in (".3", "0") for name in STUDY_ARMS):
        if arm in found["arms"]:
            values = found["arms"][arm][part]
            cells = [_cell(values[name], digits) for name, (_, digits) in columns.items()]
            rows.append([f"`{arm}`", *cells])
    header = ["arm", *(title for title, _ in columns.values())]
    return [f"\n## {title}\n", markdown_table(header, rows)]


def _costs(found: dict, tuning: Path) -> list[str]:
    tuned = json.loads(tuning.read_text(encoding="utf-8"))["runs"]
    rows = []
    for arm, values in found["arms"].items():
        name, knob = arm.split("@")
        if knob != ".3":
            continue
        cost, tried = values["cost"], sorted(map(float, tuned[name]))
        rows.append(
            [
                values["name"],
                f"{values['settings']['lr']:g}",
                f"{tried[0]:g}–{tried[-1]:g}",
                str(values["settings"]["steps"]),
                f"{cost['simple_flops'] / 1e12:.2f}",
                f"{cost['cpu_seconds']:.0f}",
                f"{cost['peak_memory_bytes'] / GB:.2f}",
            ]
        )
    header = ["arm", "rate", "rates tried", "steps", "TFLOPs, unpacked", "CPU (s)", "peak (GB)"]
    return ["\n## Rates and costs\n", "Of the last training alone.\n", markdown_table(header, rows)]


def study_block(found: dict, tuning: Path) -> str:
    """The generated part of the page. `tuning`: the file of the rates that were tried."""
    if not found["seeds"]:
        return "Not measured yet: `make study`."
    lines = [f"Plan `{found['plan'][:12]}`."]
    for part, title in (("main", "Main arms"), ("side", "Side arms")):
        lines.append(
            f"{title}: {len(found['complete'][part])} / {len(PART_SEEDS[part])} seeds complete."
        )
    lines += [f"Machine: {line}." for line in found["machines"]]
    parts = _verdicts(found)
    for figure, (title, series) in figure_points(found).items():
        if any(series.values()):
            parts.append(f"![{figure_in_words(title, series)}](figures/{figure}.svg)\n")
    parts += ["## Win rates\n", "Mean and 95 % interval over seeds; a tie is half a win."]
    for knob in dict.fromkeys(arm.split("@")[1] for arm in found["arms"]):
        parts += _win_rates(found, knob)
    parts += _measures(found, "Measures", "measures", MEASURE_COLUMNS)
    flaws = {flaw: (title, 3) for flaw, title in FLAWS.items()}
    parts += _measures(found, "Flaws: share of answers", "flaws", flaws) + _costs(found, tuning)
    return "\n\n".join(["\n".join(lines), "\n".join(parts)])
