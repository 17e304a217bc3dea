"""The page of the real model, from what `benchmarks.real_report` found."""

from pathlib import Path

from benchmarks.plans import differing, pages_with, read_seeds, write_summary
from benchmarks.real_report import (
    ARM_NAMES,
    COLUMNS,
    FOLDER,
    METHODS,
    RESULTS,
    SIDE_NAMES,
    TOLD_APART,
    TWO_PRECISIONS,
    read_precision,
    summary,
)
from benchmarks.verdicts import Finding
from tools.align import MEASURES
from tools.tables import markdown_table


def _plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


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
            f"{cost['lr']:g}".replace("e-0", "e-"),
            f"{cost['minutes']:.1f} + {cost['measuring_minutes']:.1f}",
            f"{cost['peak_gb']:.1f} · {cost['measuring_peak_gb']:.1f}",
        ]
        for arm, cost in found["cost"].items()
    ]
    header = ["arm", "log-probability of chosen, change (nats)", "rate"]
    header += ["minutes (training + measuring)", "peak in GB (training · measuring)"]
    parts.append(markdown_table(header, rows))
    parts.append("\n## Temperature .7: 48 prompts, two answers each\n")
    rows = [
        [ARM_NAMES[arm], *(_plain(v[key], MEASURES[key][1]) for key in MEASURES)]
        for arm, v in found["side"].items()
    ]
    parts.append(markdown_table(["arm", *(title for title, _ in MEASURES.values())], rows))
    if "remedies" in found:
        parts.append("\n## Length hacking and its remedies: one seed, described\n")
        rows = [
            [SIDE_NAMES.get(name, name), *(f"{v[key]:.{COLUMNS[key][1]}f}" for key in COLUMNS)]
            for name, v in found["remedies"].items()
        ]
        parts.append(markdown_table(["arm", *(title for title, _ in COLUMNS.values())], rows))
    return parts


def _precision(found: dict) -> list[str]:
    """The two precisions side by side, where both were run."""
    if not found:
        return []
    shown = COLUMNS | {
        "preference_accuracy": ("held-out accuracy", 3),
        "reward_margin": ("margin (β = 0.1)", 3),
        "perplexity": ("perplexity of held-out chosen answers", 2),
    }
    early, late = found["step_seconds"]
    rows = [["seconds a step", f"{early:.1f}", f"{late:.1f}", f"× {late / early:.2f}"]]
    for key in TOLD_APART:
        title, digits = shown[key]
        means = [_plain(value, digits) for value in found[key][:2]]
        rows.append([title, *means, _cell(found[key][2], digits)])
    return [
        "## bfloat16 beside float32: described",
        f"DPO + NLL on 128 pairs; seeds: {found['seeds']}; prompts of topics to learn from.",
        markdown_table(["", *TWO_PRECISIONS, "difference [95 % over seeds]"], rows),
    ]


def block(found: dict) -> str:
    """The generated part of the page."""
    parts = ["Not measured yet: `make real`."]
    if found["seeds"]:
        seeds = ", ".join(map(str, found["seeds"]))
        lines = [f"Seeds {seeds}; plan `{found['plan'][:12]}`."]
        lines += [f"Machine: {line}." for line in found["machines"]]
        parts = ["\n".join(lines), "\n".join(_tables(found))]
    return "\n\n".join([*parts, *_precision(found["precision"])])


def pages(found: dict) -> dict[Path, str]:
    """{page: its text} with the generated part made anew."""
    return pages_with("real-model", "real", block(found))


def write_results() -> None:
    """Writes `real.json` and the pages."""
    found = summary(read_seeds(FOLDER), read_precision())
    write_summary(RESULTS, found, pages(found))


def check_results() -> int:
    """Recomputes everything from the seeds. Returns 1, and says what differs, if something does."""
    found = summary(read_seeds(FOLDER), read_precision())
    return differing(RESULTS, found, pages(found), "python -m benchmarks.real")
