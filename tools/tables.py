"""Markdown tables of what was measured, the line about the machine, and both in Chinese."""

import json
import re
from pathlib import Path

RESULTS_FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
GB = 1e9
# English words of the generated blocks, and what stands for them on a page in Chinese.
CHINESE = json.loads(Path(__file__).with_name("zh_tw.json").read_text(encoding="utf-8"))
# Never translated: code, addresses of links, and intervals such as [0.49, 0.52].
_FIXED = re.compile(r"(`[^`]*`|(?<=\])\([^)]*\)|\[[\d., –-]+\])")
_PHRASES = re.compile(
    "|".join(
        rf"(?<![A-Za-z']){re.escape(phrase)}(?![A-Za-z])"
        for phrase in sorted(CHINESE, key=len, reverse=True)
    )
)


def read_results(name: str) -> dict | None:
    """A benchmark's results, or None where nothing was measured."""
    path = RESULTS_FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, without a newline at its end."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def thresholds_table(checks: list[dict]) -> str:
    """What `benchmarks.thresholds` checked. A value of None was not measured."""
    rows = []
    for check in checks:
        relation = {">=": "≥", "<=": "≤"}.get(check["relation"], check["relation"])
        measured = "not measured" if check["measured"] is None else f"{check['measured']:.3g}"
        outcome = "met" if check["met"] else "**missed**"
        rows.append([check["what"], measured, f"{relation} {check['bound']:g}", outcome])
    return markdown_table(["what must hold", "measured", "threshold", ""], rows)


def machine_line(machine: dict) -> str:
    """`2 cores (…), 25 GB of memory; python 3.11.7, …`."""
    hardware = ", ".join([*machine["gpu"], f"{machine['cores']} cores ({machine['cpu']})"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{hardware}, {machine['memory_bytes'] / GB:.0f} GB of memory; {versions}"


def align_line(took: dict) -> str:
    """What `make align` did, and what it took."""
    return (
        f"Pairs: {took['pairs']}, steps: {took['steps']}, seed {took['seed']}. Held-out prompts: "
        f"{took['prompts']}, answers to each: {took['samples']}, at temperature 1. Minutes: "
        f"{took['minutes']:.1f}, of training {took['training_minutes']:.1f} "
        f"({took['precision']}). Peak memory: {took['peak_memory_bytes'] / GB:.1f} GB. "
        f"Machine: {machine_line(took['machine'])}."
    )


def align_table(took: dict | None) -> str:
    """The table of `make align`, as `python -m tools.align --record` kept it."""
    if took is None:
        return "Time, memory and change: not measured.\n"
    return f"{align_line(took)}\n\n{took['table']}\n"


def in_chinese(text: str) -> str:
    """A generated block with its words in Chinese: names, code and addresses stay as they are."""
    parts = _FIXED.split(text)
    for index in range(0, len(parts), 2):
        part = _PHRASES.sub(lambda found: CHINESE[found[0]], parts[index])
        # Punctuation of Chinese is full-width, without a space on either side.
        part = re.sub(r"(?<=\d), (?=\d)", "、", part)
        part = re.sub(r"([,;:.]) |([.:])(?=\n|$)", _full_width, part)
        parts[index] = re.sub(r" *([，；：。（）])(?: +(?!\|))?", r"\1", part)
    return "".join(parts)


def _full_width(found: re.Match) -> str:
    return {",": "，", ";": "；", ":": "：", ".": "。"}[found[1] or found[2]]
