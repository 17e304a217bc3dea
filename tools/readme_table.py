"""Writes what was measured into the READMEs and the notebooks' first cells: `python
tools/readme_table.py`.

A table stands between comments such as `<!-- notebook times -->` and `<!-- /notebook times -->`.
Nobody types it. What it shows is in benchmarks/results: notebooks.json (times) and comparison.json
(methods side by side), written by `python tools/run_labs.py --fresh --record`, quality.json,
written by `python -m benchmarks.quality`, step.json, by `python -m benchmarks.step`, and gpu.json,
by `python -m benchmarks.gpu`. Without the last two: "not measured". The table of recipes is made of
`common.profiles`.
"""

import json
import re
import sys
from pathlib import Path

import nbformat

from common.profiles import PROFILES
from tools.bench_table import gpu_markdown, read, step_summary
from tools.results_table import comparison_markdown, quality_markdown

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


RECIPE_HEADINGS = {
    "README.md": ("profile", "stage", "learning rate", "β", "λ", "epochs", "where they come from"),
    "README.zh-TW.md": ("設定檔", "階段", "學習率", "β", "λ", "輪數", "出處"),
}
CHINESE = (  # of the words in `Profile.sources`, the longest first
    ("the upper end of the lab pages' 5e-7 to 5e-6", "實驗頁面 5e-7 至 5e-6 的上限"),
    ("the default of transformers' Trainer", "transformers 的 Trainer 預設值"),
    (
        "ten times that of the [ORPO authors' script for Mistral-7B]",
        "[ORPO 作者的 Mistral-7B 腳本]",
    ),
    (", since only an adapter learns", " 的十倍，因為只有轉接器在學"),
    ("[Zephyr's QLoRA recipe]", "[Zephyr 的 QLoRA 配方]"),
    ("ours, tuned on seeds 0–2", "自訂，在種子 0–2 上調整"),
    ("[TRL's example]", "[TRL 的範例]"),
    ("its default", "其預設值"),
    ("the lab page", "實驗頁面"),
    ("the same script", "同一腳本"),
    ("not tuned", "未調整"),
    ("(its β: 0.01)", "（其 β：0.01）"),
    (" for ", "，用於 "),
    (" at 7B, and ", "（7B），以及"),
    ("rate: ", "學習率："),
    ("β: ", "β："),
    ("λ: ", "λ："),
    ("App. B", "附錄 B"),
    ("; ", "；"),
    (", ", "，"),
)


def number(value: float) -> str:
    """`5e-6`, `2.5e-4`, `0.1`, `2`."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value < 1e-2 else f"{value:g}"


def recipes_table(readme: str) -> str:
    """One row per profile and stage: learning rate, β or λ, epochs, and where the numbers come
    from.
    """
    headings = RECIPE_HEADINGS[readme]
    rows = [headings, ["---"] * len(headings)]
    for name, profile in PROFILES.items():
        for stage in ("sft", "dpo_plain", "dpo", "orpo"):
            recipe, source = profile.recipes[stage], profile.sources[stage.removesuffix("_plain")]
            if stage == "dpo_plain" and recipe.lr == profile.recipes["dpo"].lr:
                continue
            for english, chinese in CHINESE if readme == "README.zh-TW.md" else ():
                source = source.replace(english, chinese)
            beta = number(recipe.beta) if stage.startswith("dpo") else ""
            weight = number(recipe.lambda_or) if stage == "orpo" else ""
            rows.append(
                [
                    f"`{name}`",
                    f"`{stage}`",
                    number(recipe.lr),
                    beta,
                    weight,
                    number(recipe.epochs),
                    source,
                ]
            )
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


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
    """One row per notebook and one column per profile: wall time and peak memory; below, the
    machines.
    """
    names = sorted({name for result in results.values() for name in result["notebooks"]})
    rows = [[first, *(f"`{profile}`" for profile in results)], ["---"] * (1 + len(results))]
    for name in names:
        found = [result["notebooks"].get(name) for result in results.values()]
        link = (
            f"[{name.split('/')[0].split('-DPO')[0].split('-ORPO')[0]} {Path(name).stem}]({name})"
        )
        rows.append([link, *(measured(timing) if timing else missing for timing in found)])
    sums = []
    for result in results.values():
        timings = result["notebooks"].values()
        sums.append(
            {
                "wall_seconds": sum(timing["wall_seconds"] for timing in timings),
                "peak_memory_bytes": max(timing["peak_memory_bytes"] for timing in timings),
            }
        )
    rows.append([last, *map(measured, sums)])
    machines = [machine_line(profile, result["machine"]) for profile, result in results.items()]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", *machines]) + "\n"


def updated(readme: str, name: str, new: str) -> str:
    """A README's text with `new` between the comments of `name`. Raises: ValueError if they are not
    there once.
    """
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
    """Puts the measured line into a notebook's first cell. Raises: ValueError if it has no place
    for it.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source, count = re.subn(
        r"<!-- measured -->.*", lambda _: line, notebook.cells[0].source
    )
    if count != 1:
        raise ValueError(
            f"{path.name}: expected one `<!-- measured -->` in the first cell, found {count}"
        )
    nbformat.write(notebook, path)


def update_readmes() -> None:
    """The READMEs of the course and of Lab 1.8, from the result files."""
    files = (RESULTS, QUALITY, COMPARISON)
    times, scores, comparison = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    for name, words in WORDS.items():
        path = ROOT / name
        text = updated(path.read_text(encoding="utf-8"), "notebook times", table(times, *words))
        text = updated(
            updated(text, "quality", quality_markdown(scores)), "recipes", recipes_table(name)
        )
        text = updated(text, "step", step_summary(read("step"), LANGUAGES[name]))
        text = updated(text, "gpu", gpu_markdown(read("gpu"), LANGUAGES[name]))
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: times of {', '.join(times)}; quality of {', '.join(scores['profiles'])}")
        path = ROOT / ORPO_LAB / name
        text = updated(
            path.read_text(encoding="utf-8"), "comparison", comparison_markdown(comparison)
        )
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
