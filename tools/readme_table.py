"""Writes what was measured into the READMEs and the notebooks' first cells: `python tools/readme_table.py`.

A table stands between comments such as `<!-- notebook times -->` and `<!-- /notebook times -->`. Nobody types it.
What it shows is in benchmarks/results: notebooks.json (times) and comparison.json (methods side by side), written by
`python tools/run_labs.py --fresh --record`, quality.json, written by `python -m benchmarks.quality`, step.json, by
`python -m benchmarks.step`, and gpu.json, by `python -m benchmarks.gpu`. Without the last two: "not measured".
"""

import json
import re
import sys
from pathlib import Path

import nbformat
from bench_table import gpu_markdown, read, step_summary
from results_table import comparison_markdown, quality_markdown

from common.profiles import PROFILES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "notebooks.json"
QUALITY = ROOT / "benchmarks" / "results" / "quality.json"
COMPARISON = ROOT / "benchmarks" / "results" / "comparison.json"
ORPO_LAB = "Lab-1.8-ORPO_Alignment"
WORDS = {  # README → heading of the first column, name of the last row, "not measured"
    "README.md": ("notebook", "all", "not measured"),
    "README.zh-TW.md": ("筆記本", "全部", "未測量"),
}
LANGUAGES = {"README.md": "en", "README.zh-TW.md": "zh"}


def measured(timing: dict[str, float]) -> str:
    """`1 min 20 s · 0.62 GB`: GB are 1e9 bytes."""
    minutes, seconds = divmod(round(timing["wall_seconds"]), 60)
    return f"{f'{minutes} min ' if minutes else ''}{seconds} s · {timing['peak_memory_bytes'] / 1e9:.2f} GB"


def machine_line(profile: str, machine: dict) -> str:
    hardware = ", ".join([*machine["gpu"], f"{machine['cores']} cores ({machine['cpu']})"])
    memory = f"{machine['memory_bytes'] / 1e9:.0f} GB of memory"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"- `{profile}`: {hardware}, {memory}; {versions}"


def table(results: dict, first: str, last: str, missing: str) -> str:
    """One row per notebook and one column per profile: wall time and peak memory; below, the machines."""
    names = sorted({name for result in results.values() for name in result["notebooks"]})
    rows = [[first, *(f"`{profile}`" for profile in results)], ["---"] * (1 + len(results))]
    for name in names:
        found = [result["notebooks"].get(name) for result in results.values()]
        link = f"[{name.split('/')[0].split('-DPO')[0].split('-ORPO')[0]} {Path(name).stem}]({name})"
        rows.append([link, *(measured(timing) if timing else missing for timing in found)])
    sums = []
    for result in results.values():
        timings = result["notebooks"].values()
        sums.append({
            "wall_seconds": sum(timing["wall_seconds"] for timing in timings),
            "peak_memory_bytes": max(timing["peak_memory_bytes"] for timing in timings),
        })
    rows.append([last, *map(measured, sums)])
    machines = [machine_line(profile, result["machine"]) for profile, result in results.items()]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", *machines]) + "\n"


def updated(readme: str, name: str, new: str) -> str:
    """A README's text with `new` between the comments of `name`. Raises: ValueError if they are not there once."""
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = between.subn(lambda match: match[1] + new + match[2], readme)
    if count != 1:
        raise ValueError(f"expected one pair of {name!r} comments, found {count}")
    return text


def measured_line(results: dict, notebook: str) -> str:
    """The line under a notebook's title: profile × time × peak memory, and what was not measured."""
    known = {profile: result["notebooks"].get(notebook) for profile, result in results.items()}
    shown = [f"`{profile}` {measured(timing)}" for profile, timing in known.items() if timing]
    missing = [f"`{profile}`" for profile in PROFILES if not known.get(profile)]
    rest = f" Not measured: {', '.join(missing)}." if missing else ""
    return f"<!-- measured --> Measured: {', '.join(shown)}.{rest}"


def mark_notebook(path: Path, line: str) -> None:
    """Puts the measured line into a notebook's first cell. Raises: ValueError if it has no place for it."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source, count = re.subn(r"<!-- measured -->.*", lambda _: line, notebook.cells[0].source)
    if count != 1:
        raise ValueError(f"{path.name}: expected one `<!-- measured -->` in the first cell, found {count}")
    nbformat.write(notebook, path)


def update_readmes() -> None:
    """The READMEs of the course and of Lab 1.8, from the result files."""
    files = (RESULTS, QUALITY, COMPARISON)
    times, scores, comparison = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    for name, words in WORDS.items():
        path = ROOT / name
        text = updated(path.read_text(encoding="utf-8"), "notebook times", table(times, *words))
        text = updated(text, "step", step_summary(read("step"), LANGUAGES[name]))
        text = updated(text, "gpu", gpu_markdown(read("gpu"), LANGUAGES[name]))
        path.write_text(updated(text, "quality", quality_markdown(scores)), encoding="utf-8", newline="\n")
        print(f"{name}: times of {', '.join(times)}; quality of {', '.join(scores['profiles'])}")
        path = ROOT / ORPO_LAB / name
        text = updated(path.read_text(encoding="utf-8"), "comparison", comparison_markdown(comparison))
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{ORPO_LAB}/{name}: comparison of {', '.join(comparison)}")


def main() -> int:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name in sorted({name for result in results.values() for name in result["notebooks"]}):
        mark_notebook(ROOT / name, measured_line(results, name))
    update_readmes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
