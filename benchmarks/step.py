"""The training step against TRL's and the textbook's: `python -m benchmarks.step`.

Every variant takes the same step on the same model, pairs and loss (`benchmarks.variants`). First
each has to equal a naive float64 computation (`benchmarks.correct`); one that does not is not
timed. Then they take turns, in reverse order on every other repetition; memory is measured in one
process per variant (`benchmarks.measure`). Writes benchmarks/results/step.json and step.md and ends
with the table, with status 1 if a bar is missed (`benchmarks.bars`).
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.bars import step_bars
from benchmarks.correct import WrongVariant, errors_of_all, lora_errors
from benchmarks.measure import memory_in_own_process, time_all
from benchmarks.variants import (
    VARIANTS,
    authors_trainer,
    new_bench,
    pair_lengths,
    random_rows,
    spread,
    with_reference_columns,
)
from common.io.files import write_json
from tools.bench_table import step_markdown
from tools.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "step.json"
DONE = Path(__file__).parents[1] / "runs" / "bench"  # parts of an unfinished run, for --resume
SIZES = {
    "small": {
        "name": "6 layers of width 384",
        "layers": 6,
        "width": 384,
        "heads": 6,
        "vocabulary": 50257,
        "batch": 4,
        "pairs": 8,
    },
    "gpt2": {
        "name": "GPT-2 124M",
        "layers": 12,
        "width": 768,
        "heads": 12,
        "vocabulary": 50257,
        "batch": 2,
        "pairs": 4,
    },
}
QUICK = {
    "name": "a tiny model",
    "layers": 2,
    "width": 64,
    "heads": 2,
    "vocabulary": 3000,
    "batch": 2,
    "pairs": 4,
}
COMPARED = {
    ("small", "dpo"): [
        "trl",
        "trl_precomputed",
        "trl_compact",
        "trl_best",
        "textbook",
        "simple",
        "packed",
        "packed_cached",
    ],
    ("small", "orpo"): ["trl", "trl_bucketed", "authors", "simple", "packed"],
    ("gpt2", "dpo"): ["trl", "simple", "packed_unfused", "packed", "packed_cached"],
    ("gpt2", "orpo"): ["trl", "packed"],
}
# Memory is measured for DPO, and on GPT-2 those that the bars compare once more with the allocator
# as it is.
HELD, NEEDED = ("trl", "trl_compact", "simple", "packed"), ("trl", "packed")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def measure_part(
    size: dict, method: str, names: list[str], lengths: list, repetitions: int, device: str
) -> dict:
    """Errors, times and memory of the variants of one model and method. Raises: WrongVariant."""
    lengths, bench = spread(lengths, size["pairs"]), new_bench(size, device)
    rows = with_reference_columns(bench.to(torch.float64), random_rows(lengths, size["vocabulary"]))
    say(f"{method}, {size['name']}: errors of {len(names)} variants in float64 and float32")
    torch.set_num_threads(os.cpu_count())
    errors = errors_of_all(bench, method, names, rows)
    torch.set_num_threads(1)
    found = time_all(bench, method, names, rows, size["batch"], repetitions, say)
    del bench
    for name in names:
        found["variants"][name] |= {"label": VARIANTS[name].label, "errors": errors[name]}
    return found | {"lengths": lengths}


def measure_memory(part: dict, size: dict, method: str, device: str) -> dict:
    """{variant: what `memory_of` gives}, each in a process of its own, two at a time on a CPU with
    two cores.

    On a CPU those that the bars compare are measured once more on GPT-2, as "default_allocator".
    """
    if method != "dpo" or (device == "cpu" and sys.platform != "linux"):
        return {}
    names = [
        name
        for name in part["variants"]
        if name in (NEEDED if size["name"] == QUICK["name"] else HELD)
    ]
    jobs = [(name, False) for name in names]
    if device == "cpu" and size["name"] == SIZES["gpt2"]["name"]:
        jobs += [(name, True) for name in NEEDED]

    def measure(job: tuple[str, bool]) -> dict:
        task = {
            "size": size,
            "lengths": part["lengths"],
            "device": device,
            "method": method,
            "name": job[0],
        }
        return memory_in_own_process(task | {"repeats": 3}, default_allocator=job[1])

    found = {}
    with ThreadPoolExecutor(1 if device == "cuda" else min(2, os.cpu_count())) as pool:
        for (name, default), memory in zip(jobs, pool.map(measure, jobs), strict=True):
            peak, growth = (max(memory[f"{what}_bytes"]) / 1e9 for what in ("peak", "growth"))
            extra = ", glibc as it is" if default else ""
            say(
                f"{method}, {size['name']}, {name}{extra}: peak {peak:.2f} GB, growth {growth:.2f} GB"
            )
            if default:
                found[name]["default_allocator"] = memory
            else:
                found[name] = memory
    return found


def resumable(
    name: str, resume: bool, measure: Callable, *arguments, folder: Path | None = None
) -> dict:
    """What `measure` gives, kept in a file. With `resume`, read from the file where it is there."""
    file = (folder or DONE) / f"{name}.json"
    if resume and file.exists():
        say(f"{name}: read, measured before")
        return json.loads(file.read_text(encoding="utf-8"))
    found = measure(*arguments)
    write_json(file, found)
    return found


def not_run(device: str) -> list[str]:
    """What is missing from the comparison, and why."""
    missing = [] if device == "cuda" else ["GPU (`--device cuda` runs the same there)"]
    try:
        authors_trainer()
    except ImportError as error:
        missing.append(f"the ORPO authors' code, since {error}")
    return missing


def run(options: argparse.Namespace) -> dict:
    """All parts. Raises: WrongVariant."""
    torch.set_num_threads(1)
    lengths, source = pair_lengths()
    missing = not_run(options.device)
    has_authors = not any("authors" in reason for reason in missing)
    results = {
        "machine": describe_machine(),
        "device": options.device,
        "clock": "wall" if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repetitions": options.repetitions,
        "lengths": source,
        "not_run": missing,
        "quick": options.quick,
        "sizes": {},
    }
    for size_name, size in SIZES.items():
        size = size | (QUICK if options.quick else {})
        found = results["sizes"][size_name] = {**size, "methods": {}}
        for method in ("dpo", "orpo"):
            names = [
                name for name in COMPARED[size_name, method] if name != "authors" or has_authors
            ]
            arguments = size, method, names, lengths, options.repetitions, options.device
            part = resumable(f"{size_name}-{method}", options.resume, measure_part, *arguments)
            memory = resumable(
                f"{size_name}-{method}-memory",
                options.resume,
                measure_memory,
                part,
                size,
                method,
                options.device,
            )
            for name, each in memory.items():
                part["variants"][name]["memory"] = each
            found["methods"][method] = part
    rows = random_rows(spread(lengths, size["pairs"]), size["vocabulary"])[: size["batch"]]
    results["sizes"]["gpt2"]["lora_errors"] = lora_errors(size, rows)
    say(f"LoRA in float64: {results['sizes']['gpt2']['lora_errors']}")
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models, to try the script: judges and keeps nothing",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run with the same options was stopped"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    if not options.resume:
        shutil.rmtree(DONE, ignore_errors=True)
    try:
        results = run(options)
    except WrongVariant as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(DONE, ignore_errors=True)
    judged = options.device == "cpu" and not options.quick
    results |= {"bars": step_bars(results), "wall_seconds": time.perf_counter() - start}
    markdown = step_markdown(results)
    if not options.quick:
        target = RESULTS if options.device == "cpu" else RESULTS.with_stem("step_cuda")
        write_json(target, results)
        target.with_suffix(".md").write_text(markdown, encoding="utf-8", newline="\n")
    say(
        f"took {results['wall_seconds'] / 60:.1f} minutes"
        + ("" if judged else "; the bars are for the full CPU run")
    )
    print(f"\n{markdown}")
    return int(judged and not all(bar["met"] for bar in results["bars"]))


if __name__ == "__main__":
    sys.exit(main())
