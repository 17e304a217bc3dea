"""From the seeds of `benchmarks.real` to tables, verdicts and the page: recomputed, never typed."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from benchmarks.verdicts import Finding, family_verdicts, over_seeds
from common.io.files import write_json, written_whole
from common.profiles import ROOT
from tools.align import MEASURES
from tools.tables import GB, RESULTS_FOLDER, in_chinese, machine_line, markdown_table

FOLDER = RESULTS_FOLDER / "real"
RESULTS = RESULTS_FOLDER / "real.json"
REAL_PAGES = {
    "real-model.md": lambda text: text,
    "real-model.zh-TW.md": in_chinese,
}
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


def read_seeds(folder: Path = FOLDER) -> list[dict]:
    """The files of all seeds, by seed. Raises: ValueError if they were run under several plans."""
    paths = sorted(folder.glob("seed-*.json"))
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if len({seed["plan"] for seed in seeds}) > 1:
        raise ValueError("These seeds were run under several plans: they are no one study.")
    return seeds


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


def summary(seeds: list[dict]) -> dict:
    """All that the page shows, from the seeds' files."""
    complete = [seed for seed in seeds if all(arm in seed["arms"] for arm in ARM_NAMES)]
    found = {"seeds": [seed["seed"] for seed in complete], "plan": None, "machines": []}
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
            "minutes": mean(seed["arms"][arm]["cost"]["wall_seconds"] for seed in complete) / 60,
            "peak_gb": max(seed["arms"][arm]["cost"]["peak_memory_bytes"] for seed in complete)
            / GB,
            "lr": complete[0]["arms"][arm]["settings"]["lr"],
        }
        for arm in ARM_NAMES
        if arm != "start"
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


def _kinds(seed: dict, arm: str) -> dict[str, float]:
    return seed["arms"][arm]["measures"]["kinds_met"]


def _mean(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _cell(finding: dict, digits: int) -> str:
    if finding["ci95"] is None:
        return f"{finding['mean']:.{digits}f}"
    low, high = finding["ci95"]
    return f"{finding['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _verdict_rows(claims: dict[str, dict]) -> list[list[str]]:
    rows = []
    for claim, found in claims.items():
        finding = Finding(**found)
        p = "< .0001" if finding.p < 1e-4 else f"{finding.p:.4f}"
        rows.append([claim, _cell(found, 3), p, f"**{finding.verdict}**"])
    return rows


def _tables(found: dict) -> list[str]:
    header = ["arm", *(title for title, _ in COLUMNS.values())]
    rows = [
        [ARM_NAMES[arm], *(_cell(values[name], digits) for name, (_, digits) in COLUMNS.items())]
        for arm, values in found["arms"].items()
    ]
    parts = ["## Measures\n", "Mean and 95 % interval over seeds.\n", markdown_table(header, rows)]
    parts.append("\n## Verdicts\n")
    if "verdicts" in found:
        for family, claims in found["verdicts"].items():
            header = [family, "mean [95 %]", "p, adjusted", "verdict"]
            parts += [markdown_table(header, _verdict_rows(claims)), ""]
    else:
        parts.append("None: a verdict takes five seeds.\n")
    parts.append("## Each kind of constraint\n")
    rows = [
        [f"`{kind}`", *("–" if values[arm] is None else f"{values[arm]:.2f}" for arm in ARM_NAMES)]
        for kind, values in found["kinds"].items()
    ]
    parts.append(markdown_table(["share met", *ARM_NAMES.values()], rows))
    parts.append("\n## Displacement, time and memory\n")
    rows = [
        [
            ARM_NAMES[arm],
            f"{found['displacement'][arm]:+.1f}" if arm in METHODS else "–",
            f"{cost['lr']:g}",
            f"{cost['minutes']:.1f}",
            f"{cost['peak_gb']:.1f}",
        ]
        for arm, cost in found["cost"].items()
    ]
    header = ["arm", "log-probability of chosen, change (nats)", "rate", "minutes", "peak (GB)"]
    parts.append(markdown_table(header, rows))
    if "remedies" in found:
        parts.append("\n## Length hacking and its remedies: one seed, described\n")
        rows = [
            [SIDE_NAMES.get(name, name), *(f"{v[key]:.{COLUMNS[key][1]}f}" for key in COLUMNS)]
            for name, v in found["remedies"].items()
        ]
        parts.append(markdown_table(["arm", *(title for title, _ in COLUMNS.values())], rows))
    return parts


def block(found: dict) -> str:
    """The generated part of the page."""
    if not found["seeds"]:
        return "Not measured yet: `make real`."
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [f"Seeds {seeds}; plan `{found['plan'][:12]}`."]
    lines += [f"Machine: {line}." for line in found["machines"]]
    return "\n\n".join(["\n".join(lines), "\n".join(_tables(found))])


def pages(found: dict) -> dict[Path, str]:
    """{page: its text} with the generated part between its two marks made anew."""
    begin, end = "<!-- real -->\n", "<!-- /real -->"
    texts = {}
    for name, translated in REAL_PAGES.items():
        path = ROOT / "docs" / name
        before, _, rest = path.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(end)[2]
        texts[path] = f"{before}{begin}{translated(block(found))}\n{end}{after}"
    return texts


def write_results() -> None:
    """Writes `real.json` and the pages."""
    found = summary(read_seeds())
    write_json(RESULTS, found)
    for path, text in pages(found).items():
        with written_whole(path) as scratch:
            scratch.write_text(text, encoding="utf-8")


def check_results() -> int:
    """Recomputes everything from the seeds. Returns 1, and says what differs, if something does."""
    found = summary(read_seeds())
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    wrong = [] if known == json.loads(json.dumps(found)) else [RESULTS.name]
    wrong += [p.name for p, text in pages(found).items() if p.read_text("utf-8") != text]
    for name in wrong:
        print(f"{name} does not say what the seeds say: python -m benchmarks.real", file=sys.stderr)
    return int(bool(wrong))
