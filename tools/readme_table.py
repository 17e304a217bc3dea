"""Writes the measured times of the notebooks into the READMEs: `python tools/readme_table.py`.

The table stands between the comments `<!-- notebook times -->` and `<!-- /notebook times -->`. Nobody types it: it
comes from benchmarks/results/notebooks.json, which `python tools/run_labs.py --fresh --record` writes.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "notebooks.json"
WORDS = {  # README → heading of the first column, name of the last row, "not measured"
    "README.md": ("notebook", "all", "not measured"),
    "README.zh-TW.md": ("筆記本", "全部", "未測量"),
}
BETWEEN = re.compile(r"(<!-- notebook times -->\n).*?(<!-- /notebook times -->)", re.DOTALL)


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


def updated(readme: str, new: str) -> str:
    """A README's text with `new` between the two comments. Raises: ValueError if they are not there once."""
    text, count = BETWEEN.subn(lambda match: match[1] + new + match[2], readme)
    if count != 1:
        raise ValueError(f"expected one pair of 'notebook times' comments, found {count}")
    return text


def main() -> int:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, words in WORDS.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        path.write_text(updated(text, table(results, *words)), encoding="utf-8", newline="\n")
        print(f"{name}: times of {', '.join(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
