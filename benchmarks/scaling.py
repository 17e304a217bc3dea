"""How a DPO step grows: `python -m benchmarks.scaling`.

Time up to the gradients and the step's growth of memory, as pairs, prompt length, response length,
vocabulary and width grow, each alone. Writes benchmarks/results/scaling.json and a log-log figure,
scaling.png, with fitted exponents; ends with status 1 if the packed path's time or memory is not
linear in pairs, or its memory holds anything of the size of vocabulary × prompt. Memory is measured
on Linux.
"""

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.bars import judged
from benchmarks.measure import Peak, new_optimizer, take_steps
from benchmarks.variants import VARIANTS, Bench, new_bench, random_rows
from common.costs import bytes_of
from common.io.files import write_json
from common.plots.curves import PALETTE
from tools.bench_table import scaling_markdown
from tools.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "scaling.json"
NAMES = ("textbook", "simple", "packed")
BASE = {"pairs": 8, "prompt": 128, "response": 32, "vocabulary": 8192, "width": 128}
AXES = {
    "pairs": (2, 4, 8, 16, 32),
    "prompt": (32, 64, 128, 256, 512),
    "response": (16, 32, 64, 128, 256),
    "vocabulary": (2048, 4096, 8192, 16384, 32768),
    "width": (64, 128, 256, 512),
}
UNITS = {
    "pairs": "pairs in the batch",
    "prompt": "prompt length (tokens)",
    "response": "response length (tokens)",
    "vocabulary": "vocabulary (tokens)",
    "width": "width of the model",
}
CORNERS = [{"vocabulary": v, "prompt": p} for v in (4096, 32768) for p in (64, 512)]


def setting(point: dict) -> tuple[Bench, list[dict]]:
    """Two layers at this point, and pairs of equal lengths: nothing is gained here by leaving
    padding out.
    """
    size = {**point, "layers": 2, "heads": point["width"] // 64}
    lengths = [[point["prompt"], point["response"], point["response"]]] * point["pairs"]
    return new_bench(size), random_rows(lengths, point["vocabulary"])


def seconds_at(point: dict, repetitions: int) -> dict[str, float]:
    """CPU seconds of a step up to the gradients, by variant: the median over repetitions in turn."""
    bench, rows = setting(point)
    optimizer, found = new_optimizer(bench.policy), {name: [] for name in NAMES}
    for repetition in range(repetitions + 1):  # the first is the warm-up
        for name in NAMES if repetition % 2 else reversed(NAMES):
            found[name].append(take_steps(bench, "dpo", VARIANTS[name], [rows], optimizer)["cpu"])
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def growth_at(point: dict) -> dict[str, int]:
    """Bytes of a step over weights, reference, gradients and optimiser, by variant."""
    bench, rows = setting(point)
    optimizer, found = new_optimizer(bench.policy), {}
    for name in NAMES:
        take_steps(bench, "dpo", VARIANTS[name], [rows], optimizer)
        with Peak("cpu") as memory:
            take_steps(bench, "dpo", VARIANTS[name], [rows], optimizer)
        found[name] = memory.peak - memory.held - bytes_of(bench.policy.parameters())
    return found


def return_freed_memory_at_once() -> None:
    """Blocks of 64 KB and more go back to the system when freed (glibc), so that resident memory is
    what is in use.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # M_MMAP_THRESHOLD


def exponent(values: list[float], measured: list[float]) -> float:
    """b of the fit measured = a · value^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])


def interaction(growths: list[int], pairs: int) -> float:
    """What of the memory grows with vocabulary × prompt, in float32 matrices of that size for one
    side of the batch.

    Args: growth at CORNERS. What grows with the vocabulary alone, or with the prompt alone,
        cancels.
    """
    vocabularies, prompts = (
        [corner[name] for corner in CORNERS] for name in ("vocabulary", "prompt")
    )
    matrix = 4 * pairs * (max(vocabularies) - min(vocabularies)) * (max(prompts) - min(prompts))
    return (growths[3] - growths[2] - growths[1] + growths[0]) / matrix


def off_a_line(values: list[float], measured: list[float]) -> float:
    """The largest distance from the best straight line, a fixed part allowed, over the largest
    measurement.
    """
    line = np.polyval(np.polyfit(values, measured, 1), values)
    return float(np.abs(line - measured).max() / max(measured))


def scaling_bars(results: dict) -> list[dict]:
    """Linear in pairs: not faster, and on a line. The packed path keeps nothing of the size of
    vocabulary × prompt.
    """
    pairs, bars = results["axes"]["pairs"], []
    for what, kind in (("time", "seconds"), ("memory", "growth_bytes")):
        if kind in pairs["packed"]:
            bars.append(
                (f"{what}: exponent in pairs", pairs["packed"][f"{what}_exponent"], "<=", 1.1)
            )
            distance = off_a_line(pairs["values"], pairs["packed"][kind])
            bars.append((f"{what}: largest distance from a line in pairs", distance, "<=", 0.1))
    if "interaction" in results:
        what = "memory: float32 matrices of vocabulary × prompt per side"
        bars.append((what, results["interaction"]["packed"], "<=", 0.1))
    return judged(bars)


def figure(results: dict) -> Figure:
    """Time and memory against each axis, log-log, the fitted exponents in the legends."""
    kinds = {
        "seconds": ("CPU seconds per step", "time_exponent", 1),
        "growth_bytes": ("growth of memory (MB)", "memory_exponent", 1e6),
    }
    kinds = {
        kind: each for kind, each in kinds.items() if kind in results["axes"]["pairs"]["packed"]
    }
    shape = len(kinds), len(results["axes"])
    drawn, panels = plt.subplots(
        *shape, figsize=(17, 3.6 * shape[0]), sharey="row", squeeze=False, layout="constrained"
    )
    for row, (kind, (label, fitted, unit)) in zip(panels, kinds.items(), strict=True):
        for panel, (axis, found) in zip(row, results["axes"].items(), strict=True):
            for name, color, marker in zip(NAMES, PALETTE, "s^o", strict=False):
                legend = f"{name}, exponent {found[name][fitted]:.2f}"
                heights = [value / unit for value in found[name][kind]]
                panel.plot(found["values"], heights, marker=marker, color=color, label=legend)
            panel.set(xscale="log", yscale="log", xlabel=UNITS[axis])
            panel.set_xticks(found["values"], found["values"], minor=False)
            panel.minorticks_off()
            panel.legend(fontsize=8)
            panel.grid(alpha=0.3)
        row[0].set_ylabel(label)
    others = ", ".join(f"{name} {value}" for name, value in results["base"].items())
    drawn.suptitle(f"One DPO step, two layers; what an axis does not change: {others}")
    return drawn


def run(axes: dict, repetitions: int) -> dict:
    torch.set_num_threads(1)
    results = {
        "machine": describe_machine(),
        "threads": 1,
        "repetitions": repetitions,
        "base": BASE,
        "axes": {},
    }
    for axis, values in axes.items():
        found = results["axes"][axis] = {
            "values": list(values),
            **{name: {"seconds": []} for name in NAMES},
        }
        for value in values:
            seconds = seconds_at(BASE | {axis: value}, repetitions)
            for name in NAMES:
                found[name]["seconds"].append(seconds[name])
            print(
                f"{time.strftime('%H:%M:%S')}  {axis} {value}: "
                + ", ".join(f"{name} {seconds[name]:.3f} s" for name in NAMES),
                flush=True,
            )
        for name in NAMES:
            found[name]["time_exponent"] = exponent(values, found[name]["seconds"])
    if sys.platform != "linux":
        print("memory is not measured: this is not Linux")
        return results
    return_freed_memory_at_once()
    for axis, values in axes.items():
        growths = [growth_at(BASE | {axis: value}) for value in values]
        print(f"{time.strftime('%H:%M:%S')}  {axis}: memory at {len(values)} points", flush=True)
        for name in NAMES:
            found = results["axes"][axis][name]
            found["growth_bytes"] = [growth[name] for growth in growths]
            found["memory_exponent"] = exponent(values, found["growth_bytes"])
    corners = [growth_at(BASE | corner) for corner in CORNERS]
    results["interaction"] = {
        name: interaction([growth[name] for growth in corners], BASE["pairs"]) for name in NAMES
    }
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one axis, once, to try the script: keeps nothing"
    )
    options = parser.parse_args(arguments)
    results = run(
        {"pairs": (4, 8, 16)} if options.quick else AXES,
        1 if options.quick else options.repetitions,
    )
    results["bars"] = scaling_bars(results)
    if not options.quick:
        write_json(RESULTS, results)
        figure(results).savefig(RESULTS.with_suffix(".png"), dpi=110)
    print(f"\n{scaling_markdown(results)}")
    return int(not options.quick and not all(bar["met"] for bar in results["bars"]))


if __name__ == "__main__":
    sys.exit(main())
