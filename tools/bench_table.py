"""The tables of the step and GPU benchmarks, from their results: `python -m tools.bench_table`."""

import sys
from statistics import median

from common.profiles import PROFILES, TINY
from tools.tables import GB, machine_line, markdown_table, read_results, thresholds_table

GPU_PATHS = {"packed": "packed", "simple": "simple", "trl": "TRL"}
NOT_MEASURED = "not measured"
STEP_HEADER = [
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
GPU_HEADER = [
    "profile",
    "method",
    "peak, GB: packed · simple · TRL",
    "predicted, GB",
    "tokens/s: packed · simple · TRL",
    "hours for the data",
]


def _whole_steps(variant: dict, clock: str) -> float:
    """Median seconds of a repetition, the optimiser's included."""
    return median(map(sum, zip(variant[clock], variant[f"optimizer_{clock}"], strict=True)))


def _step_row(part: dict, name: str, clock: str) -> list[str]:
    """One variant beside TRL: seconds, speed, memory, operations, errors."""
    variant, rival = part["variants"][name], part["variants"]["trl"]
    steps = [f"{median(variant[which]) / variant['steps']:.2f}" for which in ("cpu", "wall")]
    each = [theirs / mine for theirs, mine in zip(rival[clock], variant[clock], strict=True)]
    speed = median(rival[clock]) / median(variant[clock])
    whole = _whole_steps(rival, clock) / _whole_steps(variant, clock)
    sizes = []
    for what in ("peak_bytes", "growth_bytes"):
        if "memory" not in variant:
            sizes.append("–")
            continue
        mine, theirs = median(variant["memory"][what]), median(rival["memory"][what])
        ratio = "" if name == "trl" else f" ({mine / theirs:.2f}×)"
        sizes.append(f"{mine / GB:.2f} GB{ratio}")
    share = variant["flops"] / median(variant[clock]) / max(part["matmul_speed"])
    errors = [f"{variant['errors'][dtype]['gradient']:.0e}" for dtype in ("float64", "float32")]
    return [
        variant["label"],
        *steps,
        f"{speed:.2f} ({min(each):.2f}–{max(each):.2f})",
        f"{whole:.2f}",
        *sizes,
        f"{variant['flops'] / 1e9 / variant['steps']:.0f}",
        f"{share:.0%}",
        *errors,
    ]


def _default_allocator(part: dict) -> list[str]:
    """What packed and TRL take where glibc keeps freed blocks, if it was measured."""
    memory = [part["variants"][name].get("memory", {}) for name in ("packed", "trl")]
    if not all("default_allocator" in each for each in memory):
        return []
    peaks, growths = (
        [median(each["default_allocator"][f"{what}_bytes"]) / GB for each in memory]
        for what in ("peak", "growth")
    )
    return [
        "With glibc's default settings, which keep freed blocks: packed peaks at "
        f"{peaks[0]:.2f} GB ({peaks[0] / peaks[1]:.2f}× TRL's), growth {growths[0]:.2f} GB "
        f"({growths[0] / growths[1]:.2f}×)."
    ]


def step_markdown(results: dict) -> str:
    """The whole comparison: one table per model and method, then the thresholds."""
    clock = results["clock"]
    blocks = [
        f"Machine: {machine_line(results['machine'])}. Device {results['device']}, "
        f"{results['threads']} thread, {results['repetitions']} repetitions of interleaved "
        f"variants, float32, no dropout. Lengths of pairs: {results['lengths']}.",
        "A step is collating, the forward passes and the backward pass; “with AdamW” adds the "
        "optimiser's step, which is the same for all. Speed: how many times as fast as TRL in "
        f"{clock} time, by medians (least to most over repetitions). Peak: memory on the largest "
        "batch, over what the process held before it built a model (on a CPU resident memory, with "
        "MALLOC_MMAP_THRESHOLD_=65536, so that freed blocks are given back). Growth: over weights, "
        "reference, gradients and optimiser state too. Errors: of the gradient of all weights on "
        "the two shortest pairs, against a naive float64 computation. Ours runs GPT-2's GELU in "
        "its fused form, as the course loads its models; the others do as its config says.",
    ]
    for size in results["sizes"].values():
        for method, part in size["methods"].items():
            blocks += [
                f"**{method.upper()}, {size['name']}**, vocabulary {size['vocabulary']}, batch "
                f"{size['batch']}, {size['pairs']} pairs per repetition:",
                markdown_table(
                    STEP_HEADER, [_step_row(part, name, clock) for name in part["variants"]]
                ),
                *_default_allocator(part),
            ]
    blocks += [f"Not run: {reason}." for reason in results["not_run"]]
    if results["thresholds"]:
        blocks.append(thresholds_table(results["thresholds"]))
    return "\n\n".join(blocks) + "\n"


def step_summary(results: dict | None, link: str) -> str:
    """For a page: the thresholds, the machine, and a link to the whole comparison."""
    if results is None:
        return f"{NOT_MEASURED}\n"
    machine = f"Machine: {machine_line(results['machine'])}. [All variants]({link})."
    return f"{thresholds_table(results['thresholds'])}\n\n{machine}\n"


def _gpu_cell(part: dict, value) -> str:
    """`value(part)` where a path was measured, else why there is nothing to show."""
    if "not_run" in part:
        return NOT_MEASURED
    if "failed" in part:
        return "failed"
    return "does not fit" if part["out_of_memory"] else value(part)


def _gpu_row(method: dict) -> list[str]:
    """Peaks and speeds of all paths; prediction and hours of the path that the recipe names."""
    paths, own = [method["paths"][path] for path in GPU_PATHS], method["paths"][method["path"]]
    peaks = [_gpu_cell(part, lambda part: f"{part['peak_bytes'] / GB:.2f}") for part in paths]
    speeds = [
        _gpu_cell(part, lambda part: f"{part['tokens_per_second']['sample']:.0f}") for part in paths
    ]
    hours = _gpu_cell(
        own, lambda part: f"{method['steps'] * part['step_seconds']['sample'] / 3600:.1f}"
    )
    bytes_predicted = own.get("predicted_bytes")
    predicted = f"{bytes_predicted / GB:.2f}" if bytes_predicted else "not predicted"
    return [" · ".join(peaks), predicted, " · ".join(speeds), hours]


def _failures(results: dict) -> list[str]:
    """What failed, ran out of memory, or took another path than it was asked for: a line each."""
    lines = []
    for name, profile in results["profiles"].items():
        for method, each in profile["methods"].items():
            for path, part in each["paths"].items():
                taken = part.get("path", path)
                if "not_run" in part:
                    continue
                elif "failed" in part:
                    why = part["failed"]
                elif part["out_of_memory"]:
                    why = f"out of memory: {part['out_of_memory']}"
                elif taken != path:
                    why = f"stepped aside, the {taken} path was taken"
                else:
                    continue
                lines.append(f"- `{name}`, {method.upper()}, {GPU_PATHS[path]}: {why}.")
    return ["\n".join(lines)] if lines else []


def gpu_markdown(results: dict | None) -> str:
    """One row per full-size profile and method; what they were measured on; the thresholds."""
    rows = []
    for name in [name for name, profile in PROFILES.items() if profile.model != TINY]:
        found = results and results["profiles"].get(name)
        for method in ("sft", "dpo", "orpo"):
            cells = _gpu_row(found["methods"][method]) if found else [NOT_MEASURED] * 4
            rows.append([f"`{name}`", method.upper(), *cells])
    blocks = [markdown_table(GPU_HEADER, rows)]
    if results:
        pairs = ", ".join(
            f"`{name}` {each['pairs']:,}" for name, each in results["profiles"].items()
        )
        blocks += [
            f"Machine: {machine_line(results['machine'])}. {results['gpu']}; "
            f"{results['precision']}; torch's memory capped at {results['cap_gb']:g} GB. Random "
            "weights. Peak: all rows at the profile's full length, an evaluation included. Tokens "
            f"per second and hours: lengths of {results['lengths']}, without evaluations. "
            f"Pairs: {pairs}.",
            *_failures(results),
        ]
        blocks += _align_table(results)
        if results["thresholds"]:
            blocks.append(thresholds_table(results["thresholds"]))
    return "\n\n".join(blocks) + "\n"


def _align_table(results: dict) -> list[str]:
    """What `make align` found on the same machine: its table, without the answers."""
    found = results.get("align", {})
    if "report" not in found:
        return []
    lines = [line for line in found["report"].splitlines() if line.startswith("|")]
    return [f"`make align`, {found['wall_seconds'] / 60:.1f} minutes:", "\n".join(lines)]


def main() -> int:
    for name, markdown in (("step", step_markdown), ("gpu", gpu_markdown)):
        results = read_results(name)
        print(markdown(results) if results else f"{name}: {NOT_MEASURED}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
