"""The tables of the step, scaling and GPU benchmarks, from their results files: `python
tools/bench_table.py`.
"""

import json
import sys
from pathlib import Path
from statistics import median

from common.profiles import PROFILES, TINY

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
METHODS = {"sft": "SFT", "dpo": "DPO", "orpo": "ORPO"}
PATHS = {"packed": "packed", "simple": "simple", "trl": "TRL"}
GB = 1e9
WORDS = {
    "en": {
        "heads": [
            "profile",
            "method",
            "peak, GB: packed · simple · TRL",
            "predicted, GB",
            "tokens/s: packed · simple · TRL",
            "hours for the data",
        ],
        "missing": "not measured",
        "unpredicted": "not predicted",
        "large": "does not fit",
        "failed": "failed",
        "more": "All variants",
    },
    "zh": {
        "heads": [
            "設定檔",
            "方法",
            "記憶體峰值（GB）：packed · simple · TRL",
            "預測（GB）",
            "每秒 token：packed · simple · TRL",
            "整份資料的小時數",
        ],
        "missing": "未測量",
        "unpredicted": "未預測",
        "large": "放不下",
        "failed": "失敗",
        "more": "所有做法",
    },
}


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, the first row its head."""
    return ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]


def _ratios(variant: dict, rival: dict, clock: str) -> str:
    """How many times faster than the rival: by medians, and the least and most over the
    repetitions.
    """
    each = [theirs / mine for theirs, mine in zip(rival[clock], variant[clock], strict=True)]
    return f"{median(rival[clock]) / median(variant[clock]):.2f} ({min(each):.2f}–{max(each):.2f})"


def _with_optimizer(variant: dict, rival: dict, clock: str) -> str:
    mine, theirs = (
        median(map(sum, zip(each[clock], each[f"optimizer_{clock}"], strict=True)))
        for each in (variant, rival)
    )
    return f"{theirs / mine:.2f}"


def _row(part: dict, name: str, label: str, clock: str) -> list[str]:
    variant, rival = part["variants"][name], part["variants"]["trl"]
    memory, rival_memory = (
        variant.get("memory"),
        rival.get("memory"),
    )  # of the variants that it was measured for
    steps = [median(variant[which]) / variant["steps"] for which in ("cpu", "wall")]
    speeds = [_ratios(variant, rival, clock), _with_optimizer(variant, rival, clock)]
    cells = [label, *(f"{step:.2f}" for step in steps), *speeds]
    for what in ("peak_bytes", "growth_bytes"):
        if not memory:
            cells.append("–")
            continue
        mine, theirs = median(memory[what]), median(rival_memory[what])
        cells.append(f"{mine / GB:.2f} GB" + ("" if name == "trl" else f" ({mine / theirs:.2f}×)"))
    share = variant["flops"] / median(variant[clock]) / max(part["matmul_speed"])
    errors = variant["errors"]
    return [
        *cells,
        f"{variant['flops'] / 1e9 / variant['steps']:.0f}",
        f"{share:.0%}",
        f"{errors['float64']['gradient']:.0e}",
        f"{errors['float32']['gradient']:.0e}",
    ]


def default_allocator_line(part: dict) -> list[str]:
    """What packed and TRL take where glibc keeps freed blocks, if it was measured."""
    kept = [
        part["variants"][name].get("memory", {}).get("default_allocator")
        for name in ("packed", "trl")
    ]
    if None in kept:
        return []
    peaks, growths = (
        [median(memory[f"{what}_bytes"]) / GB for memory in kept] for what in ("peak", "growth")
    )
    return [
        "",
        "With glibc as it is, which keeps freed blocks: packed peaks at "
        f"{peaks[0]:.2f} GB ({peaks[0] / peaks[1]:.2f}× TRL's), growth {growths[0]:.2f} GB "
        f"({growths[0] / growths[1]:.2f}×).",
    ]


def verdicts(bars: list[dict]) -> list[str]:
    """The bars as a table, a missed one marked. What has no value (None) was not measured."""
    rows = [["bar", "measured", "wanted", ""]]
    for bar in bars:
        relation = {">=": "≥", "<=": "≤"}[bar["relation"]]
        verdict = "met" if bar["met"] else "**missed**"
        measured = "not measured" if bar["measured"] is None else f"{bar['measured']:.3g}"
        rows.append([bar["what"], measured, f"{relation} {bar['bound']:g}", verdict])
    return table(rows)


def machine_line(results: dict) -> str:
    machine = results["machine"]
    hardware = ", ".join([*machine["gpu"], f"{machine['cores']} cores ({machine['cpu']})"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"Machine: {hardware}, {machine['memory_bytes'] / GB:.0f} GB of memory; {versions}."


def step_markdown(results: dict) -> str:
    """The comparison as Markdown: one table per model and method, then the bars. Everything is from
    the results.
    """
    clock = results["clock"]
    lines = [
        f"{machine_line(results)} Device {results['device']}, {results['threads']} thread, "
        f"{results['repetitions']} repetitions of interleaved variants, float32, no dropout. "
        f"Lengths of pairs: {results['lengths']}.",
        "",
        "A step is collating, the forward passes and the backward pass; “with AdamW” adds the optimiser's, the same "
        f"for all. Speed: how many times as fast as TRL in {clock} time, by medians (least to most over repetitions). "
        "Peak: resident memory on the largest batch, over what the process held before it built a model "
        "(MALLOC_MMAP_THRESHOLD_=65536, so that freed blocks are given back); growth: over weights, reference, "
        "gradients and optimiser too. Errors: of the gradient on the two shortest pairs, against a naive float64 "
        "computation, all weights as one vector. Ours runs GPT-2's GELU in its fused form, as the course loads its "
        "models; the others do as its config says.",
    ]
    for size in results["sizes"].values():
        for method, part in size["methods"].items():
            heads = [
                "",
                "CPU s per step",
                "wall s",
                "speed over TRL",
                "with AdamW",
                "peak",
                "growth",
                "GFLOP per step",
                "of matmul peak",
                "error, float64",
                "error, float32",
            ]
            rows = [
                _row(part, name, variant["label"], clock)
                for name, variant in part["variants"].items()
            ]
            title = f"**{METHODS[method]}, {size['name']}**, vocabulary {size['vocabulary']}, batch {size['batch']}"
            lines += [
                "",
                f"{title}, {size['pairs']} pairs per repetition:",
                "",
                *table([heads, *rows]),
            ]
            lines += default_allocator_line(part)
    lines += ["", *[f"Not run: {reason}." for reason in results["not_run"]]]
    if results["bars"]:
        lines += ["", *verdicts(results["bars"])]
    return "\n".join(lines) + "\n"


def step_summary(results: dict | None, language: str = "en") -> str:
    """For the README: the bars and the machine, with a link to the whole comparison."""
    words = WORDS[language]
    if results is None:
        return f"{words['missing']}\n"
    lines = [
        *verdicts(results["bars"]),
        "",
        f"{machine_line(results)} [{words['more']}](benchmarks/results/step.md).",
    ]
    return "\n".join(lines) + "\n"


def scaling_markdown(results: dict) -> str:
    """Fitted exponents of time and memory, by variant and axis, and the bars."""
    axes, names = results["axes"], ("textbook", "simple", "packed")
    heads = [
        f"{axis} ({min(found['values'])}–{max(found['values'])})" for axis, found in axes.items()
    ]
    rows = [["exponent of", *heads]]
    for what, fitted in (("time", "time_exponent"), ("memory", "memory_exponent")):
        for name in names:
            values = [found[name].get(fitted) for found in axes.values()]
            rows.append(
                [f"{what}, {name}", *("–" if value is None else f"{value:.2f}" for value in values)]
            )
    return "\n".join([*table(rows), "", *verdicts(results["bars"])]) + "\n"


def _gpu_cell(part: dict, words: dict, value) -> str:
    """What `value` says of a path that was measured; else why there is nothing to say."""
    if "failed" in part:
        return words["failed"]
    return words["large"] if part["out_of_memory"] else value(part)


def _gpu_row(method: dict, words: dict) -> list[str]:
    """Peaks and speeds of all paths; prediction and hours of the recipe's own."""
    paths, own = [method["paths"][path] for path in PATHS], method["paths"][method["path"]]
    peaks = [
        _gpu_cell(part, words, lambda part: f"{part['peak_bytes'] / GB:.2f}") for part in paths
    ]
    speeds = [
        _gpu_cell(part, words, lambda part: f"{part['tokens_per_second']['sample']:.0f}")
        for part in paths
    ]
    hours = _gpu_cell(
        own, words, lambda part: f"{method['steps'] * part['step_seconds']['sample'] / 3600:.1f}"
    )
    predicted = (
        f"{own['predicted_bytes'] / GB:.2f}" if own.get("predicted_bytes") else words["unpredicted"]
    )
    return [" · ".join(peaks), predicted, " · ".join(speeds), hours]


def gpu_rows(results: dict | None, language: str = "en") -> list[str]:
    """One row per full-size profile and method. A profile without results is "not measured"."""
    words, rows = WORDS[language], []
    for name in [name for name, profile in PROFILES.items() if profile.model != TINY]:
        found = (results or {"profiles": {}})["profiles"].get(name)
        for method, label in METHODS.items():
            cells = _gpu_row(found["methods"][method], words) if found else [words["missing"]] * 4
            rows.append([f"`{name}`", label, *cells])
    return table([words["heads"], *rows])


def _failures(results: dict) -> list[str]:
    """What failed, and in which phase memory ran out, a line each."""
    lines = []
    for name, profile in results["profiles"].items():
        for method, each in profile["methods"].items():
            for path, part in each["paths"].items():
                why = (
                    part.get("failed")
                    or part["out_of_memory"]
                    and f"out of memory: {part['out_of_memory']}"
                )
                taken = part.get("path", path)
                why = why or taken != path and f"stepped aside, the {taken} path was taken"
                lines += [f"- `{name}`, {METHODS[method]}, {PATHS[path]}: {why}."] if why else []
    return lines


def gpu_markdown(results: dict | None, language: str = "en") -> str:
    """The table and, where there are results, what they were measured on and the bars."""
    lines = gpu_rows(results, language)
    if results:
        pairs = ", ".join(
            f"`{name}` {profile['pairs']:,}" for name, profile in results["profiles"].items()
        )
        lines += [
            "",
            f"{machine_line(results)} {results['gpu']}; {results['precision']}; torch's memory capped at "
            f"{results['cap_gb']:g} GB. Random weights. Peak: all rows at the profile's full length, an evaluation "
            f"included. Tokens per second and hours: lengths of {results['lengths']}, without evaluations. "
            f"Pairs: {pairs}.",
        ]
        failures = _failures(results)
        lines += ["", *failures] if failures else []
        lines += ["", *verdicts(results["bars"])] if results["bars"] else []
    return "\n".join(lines) + "\n"


def read(name: str) -> dict | None:
    """A benchmark's results, or None where nothing was measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> int:
    for name, markdown in (
        ("step", step_markdown),
        ("scaling", scaling_markdown),
        ("gpu", gpu_markdown),
    ):
        results = read(name)
        print(markdown(results) if results else f"{name}: not measured\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
