"""Writes what was measured into the pages and the notebooks: `python -m tools.readme_table`.

A table stands between comments such as `<!-- quality -->` and `<!-- /quality -->`, in any README or
page of `docs/`; nobody types it. What it shows is in benchmarks/results: notebooks.json and
comparison.json (`make notebooks`), quality.json (`make quality`), step.json (`make bench`),
align.json (`make align`), gpu.json (`make gpu`), claims.json (`python -m benchmarks.claims`). The
recipes are those of `common.profiles`.
"""

import os
import re
import sys
from pathlib import Path

import nbformat

from common.profiles import PROFILES, ROOT
from tools.bench_table import gpu_markdown, step_summary
from tools.claims_table import claims_page, lab_table
from tools.results_table import comparison_markdown, quality_markdown
from tools.tables import align_table, in_chinese, machine_line, markdown_table, read_results

DEEP_DIVES = "deep-dives"  # the folder of a lab with the notebooks that only some readers need
PAGES = ("README*.md", "docs/*.md", "Lab-*/README*.md")
# Name of the comments → the block. `link` turns a path in the project into a link from the page.
BLOCKS = {
    "notebook times": lambda link: times_table(read_results("notebooks"), link),
    "quality": lambda link: quality_markdown(read_results("quality")),
    "comparison": lambda link: comparison_markdown(read_results("comparison")),
    "step": lambda link: step_summary(read_results("step"), link("benchmarks/results/step.md")),
    "align": lambda link: align_table(read_results("align")),
    "gpu": lambda link: gpu_markdown(read_results("gpu")),
    "recipes": lambda link: recipes_table(),
    "claims": claims_page,
    "claims of DPO": lambda link: lab_table("D", link),
    "claims of ORPO": lambda link: lab_table("O", link),
    # Written in Chinese, and not translated word by word:
    "claims, zh-TW": lambda link: claims_page(link, chinese=True),
    "claims of DPO, zh-TW": lambda link: lab_table("D", link, chinese=True),
    "claims of ORPO, zh-TW": lambda link: lab_table("O", link, chinese=True),
}


def _number(value: float) -> str:
    """`5e-6`, `2.5e-4`, `0.1`, `2`."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value < 1e-2 else f"{value:g}"


def recipes_table() -> str:
    """One row per profile and stage: learning rate, β or λ, epochs, and where they come from."""
    rows = []
    for name, profile in PROFILES.items():
        for stage in ("sft", "dpo_plain", "dpo", "orpo"):
            recipe, source = profile.recipes[stage], profile.sources[stage.removesuffix("_plain")]
            if stage == "dpo_plain" and recipe.lr == profile.recipes["dpo"].lr:
                continue
            beta = _number(recipe.beta) if stage.startswith("dpo") else ""
            weight = _number(recipe.lambda_or) if stage == "orpo" else ""
            settings = [_number(recipe.lr), beta, weight, _number(recipe.epochs)]
            rows.append([f"`{name}`", f"`{stage}`", *settings, source])
    header = ["profile", "stage", "learning rate", "β", "λ", "epochs", "where they come from"]
    return markdown_table(header, rows) + "\n"


def timing_text(timing: dict[str, float]) -> str:
    """`1 min 20 s · 0.62 GB`: GB are 1e9 bytes."""
    minutes, seconds = divmod(round(timing["wall_seconds"]), 60)
    whole = f"{minutes} min " if minutes else ""
    return f"{whole}{seconds} s · {timing['peak_memory_bytes'] / 1e9:.2f} GB"


def label_of(name: str) -> str:
    """`Lab-1.7 01-Setup`, or `Lab-1.7 deep-dives/01-Tokens` for a deep dive."""
    inside = f"{DEEP_DIVES}/" if DEEP_DIVES in name else ""
    return f"{'-'.join(name.split('-')[:2])} {inside}{Path(name).stem}"


def _sum_of(timings: list[dict]) -> str:
    """The times added, and the largest peak."""
    if not timings:
        return "not measured"
    seconds = sum(timing["wall_seconds"] for timing in timings)
    peak = max(timing["peak_memory_bytes"] for timing in timings)
    return timing_text({"wall_seconds": seconds, "peak_memory_bytes": peak})


def times_table(results: dict, link=str) -> str:
    """Wall time and peak memory, one row per notebook and one column per profile; the machines.

    The main notebooks come first, then the deep dives, each with the sum of their times.
    """
    names, rows = {name for result in results.values() for name in result["notebooks"]}, []
    for title, dive in (("all", False), ("all deep dives", True)):
        group = sorted(name for name in names if (DEEP_DIVES in name) == dive)
        for name in group:
            found = [result["notebooks"].get(name) for result in results.values()]
            times = [timing_text(timing) if timing else "not measured" for timing in found]
            rows.append([f"[{label_of(name)}]({link(name)})", *times])
        measured = [
            [timing for name, timing in result["notebooks"].items() if name in group]
            for result in results.values()
        ]
        rows += [[title, *map(_sum_of, measured)]] if group else []
    table = markdown_table(["notebook", *(f"`{name}`" for name in results)], rows)
    machines = [f"- `{name}`: {machine_line(each['machine'])}" for name, each in results.items()]
    return "\n".join([table, "", *machines]) + "\n"


def updated(text: str, name: str, new: str) -> str:
    """A page's text with `new` between the comments of `name`.

    Raises: ValueError unless there is exactly one pair of them.
    """
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = between.subn(lambda match: match[1] + new + match[2], text)
    if count != 1:
        raise ValueError(f"expected one pair of {name!r} comments, found {count}")
    return text


def filled(page: Path, text: str) -> str:
    """The text of a page with every block that it holds made anew, in the page's language.

    Raises: ValueError, which names the page, if a pair of comments is broken.
    """

    def link(target: str) -> str:
        return Path(os.path.relpath(ROOT / target, page.parent)).as_posix()

    for name in re.findall(r"^<!-- /?(.+?) -->$", text, re.MULTILINE):
        if name in BLOCKS:
            block = BLOCKS[name](link)
            try:
                chinese = page.name.endswith(".zh-TW.md") and not name.endswith("zh-TW")
                text = updated(text, name, in_chinese(block) if chinese else block)
            except ValueError as error:
                raise ValueError(f"{page}: {error}") from error
    return text


def measured_line(results: dict, notebook: str) -> str:
    """The line under a notebook's title: time and peak memory by profile, and what is missing."""
    known = {profile: result["notebooks"].get(notebook) for profile, result in results.items()}
    shown = [f"`{profile}` {timing_text(timing)}" for profile, timing in known.items() if timing]
    missing = [f"`{profile}`" for profile in PROFILES if not known.get(profile)]
    rest = f" Not measured: {', '.join(missing)}." if missing else ""
    return f"<!-- measured --> Measured: {', '.join(shown)}.{rest}"


def mark_notebook(path: Path, line: str) -> None:
    """Puts the measured line into a notebook's first cell. Raises: ValueError if it has no place
    for it.
    """
    notebook, place = nbformat.read(path, as_version=4), r"<!-- measured -->.*"
    source, count = re.subn(place, lambda _: line, notebook.cells[0].source)
    if count != 1:
        raise ValueError(
            f"{path.name}: expected one `<!-- measured -->` in the first cell, found {count}"
        )
    notebook.cells[0].source = source
    nbformat.write(notebook, path)


def main() -> int:
    times = read_results("notebooks")
    for name in sorted({name for result in times.values() for name in result["notebooks"]}):
        mark_notebook(ROOT / name, measured_line(times, name))
    for page in [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]:
        before = page.read_text(encoding="utf-8")
        after = filled(page, before)
        if after != before:
            page.write_text(after, encoding="utf-8", newline="\n")
            print(f"written: {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
