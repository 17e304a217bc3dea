"""The training step against TRL's and the textbook's: `python -m benchmarks.step`.

Every variant takes the same step on the same model, pairs and loss (`benchmarks.variants`). First
each has to equal a naive float64 computation (`benchmarks.correct`); one that does not is not
timed. Then they take turns, in reverse order on every other repetition; memory is measured in one
process per variant (`benchmarks.measure`). Writes benchmarks/results/step.json and step.md and ends
with the table, with status 1 if a threshold is missed (`benchmarks.thresholds`).
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

from benchmarks.correct import WrongVariant, errors_of_all, lora_errors
from benchmarks.materials import LENGTHS, random_rows, representative, stored_lengths
from benchmarks.measure import memory_in_own_process, say, time_all
from benchmarks.thresholds import step_thresholds
from benchmarks.variants import (
    STEP_VARIANTS,
    new_bench,
    with_reference_columns,
)
from common.io.files import write_json
from common.profiles import ROOT
from tools.bench_table import step_markdown
from tools.machine import describe_machine
from tools.tables import RESULTS_FOLDER, read_results

STEP_DONE = ROOT / "runs" / "bench"  # parts of an unfinished run, for --resume
OF_TRL = ["trl", "trl_precomputed", "trl_compact", "trl_best"]
COMPARED = {
    ("small", "dpo"): [*OF_TRL, "textbook", "simple", "packed", "packed_cached"],
    ("small", "orpo"): ["trl", "trl_bucketed", "simple", "packed"],
    ("gpt2", "dpo"): ["trl", "simple", "packed_unfused", "packed", "packed_cached"],
    ("gpt2", "orpo"): ["trl", "packed"],
    ("smollm", "dpo"): ["trl", "trl_compact", "simple", "packed"],
}
# Memory is measured for DPO. Those that the thresholds compare are measured once more on GPT-2,
# with the allocator as it is.
HELD, NEEDED = ("trl", "trl_compact", "simple", "packed"), ("trl", "packed")


def gpt2_size(name: str, layers: int, width: int, batch: int, pairs: int, words=50257) -> dict:
    """A GPT-2, the pairs of a batch and those of a repetition."""
    model = {"layers": layers, "width": width, "heads": width // 64, "vocabulary": words}
    return {"name": name, **model, "batch": batch, "pairs": pairs}


STEP_SIZES = {
    "small": gpt2_size("6 layers of width 384", layers=6, width=384, batch=4, pairs=8),
    "gpt2": gpt2_size("GPT-2 124M", layers=12, width=768, batch=2, pairs=4),
}
# As SmolLM2-135M: a Llama, whose heads share their keys by threes.
SMOLLM_HEADS = {"heads": 9, "key_heads": 3, "inner": 1536}
STEP_SIZES["smollm"] = (
    gpt2_size("SmolLM2 135M", layers=30, width=576, batch=2, pairs=4, words=49152) | SMOLLM_HEADS
)
QUICK = gpt2_size("a tiny model", layers=2, width=64, batch=2, pairs=4, words=3000)
QUICK["key_heads"] = 1  # where it is a Llama


def errors_and_times(
    size: dict, method: str, names: list[str], repetitions: int, device: str
) -> dict:
    """Errors and times of the variants of one model and method. Raises: WrongVariant."""
    lengths, bench = representative(stored_lengths(), size["pairs"]), new_bench(size, device)
    rows = with_reference_columns(bench.to(torch.float64), random_rows(lengths, size["vocabulary"]))
    say(f"{method}, {size['name']}: errors of {len(names)} variants in float64 and float32")
    torch.set_num_threads(os.cpu_count())
    errors = errors_of_all(bench, method, names, rows)
    torch.set_num_threads(1)
    found = time_all(bench, method, names, rows, size["batch"], repetitions)
    for name in names:
        found["variants"][name] |= {"label": STEP_VARIANTS[name].label, "errors": errors[name]}
    return found | {"lengths": lengths}


def memory_of_variants(part: dict, size: dict, method: str, device: str) -> dict:
    """{variant: what `memory_of` gives}, each in a process of its own, two at a time on a CPU with
    two cores.

    On a CPU those that the thresholds compare are measured once more on GPT-2, as
    "default_allocator".
    """
    if method != "dpo" or (device == "cpu" and sys.platform != "linux"):
        return {}
    asked = NEEDED if size["name"] == QUICK["name"] else HELD
    jobs = [(name, False) for name in part["variants"] if name in asked]
    if device == "cpu" and size["name"] == STEP_SIZES["gpt2"]["name"]:
        jobs += [(name, True) for name in NEEDED]
    task = {"size": size, "lengths": part["lengths"], "device": device, "method": method}

    def measure_one(job: tuple[str, bool]) -> dict:
        name, default_allocator = job
        return memory_in_own_process(task | {"name": name, "repeats": 3}, default_allocator)

    found = {}
    with ThreadPoolExecutor(1 if device == "cuda" else min(2, os.cpu_count())) as pool:
        for (name, default), memory in zip(jobs, pool.map(measure_one, jobs), strict=True):
            peak, growth = (max(memory[f"{what}_bytes"]) / 1e9 for what in ("peak", "growth"))
            job = f"{method}, {size['name']}, {name}{', default allocator' if default else ''}"
            say(f"{job}: peak {peak:.2f} GB, growth {growth:.2f} GB")
            if default:
                found[name]["default_allocator"] = memory
            else:
                found[name] = memory
    return found


def resumable(file: Path, resume: bool, measure: Callable, *arguments) -> dict:
    """What `measure` gives, kept in a file. With `resume`, read from the file if it is there."""
    if resume and file.exists():
        say(f"{file.stem}: read, measured before")
        return json.loads(file.read_text(encoding="utf-8"))
    found = measure(*arguments)
    write_json(file, found)
    return found


def run_step(options: argparse.Namespace) -> dict:
    """All parts. Raises: WrongVariant."""
    torch.set_num_threads(1)
    device, resume, sizes = options.device, options.resume, {}
    for size_name in options.only or STEP_SIZES:
        size = STEP_SIZES[size_name] | (QUICK if options.quick else {})
        sizes[size_name] = {**size, "methods": {}}
        for method in (known for own, known in COMPARED if own == size_name):
            names, file = COMPARED[size_name, method], STEP_DONE / f"{size_name}-{method}.json"
            arguments = size, method, names, options.repetitions, device
            part = resumable(file, resume, errors_and_times, *arguments)
            file = file.with_stem(f"{file.stem}-memory")
            arguments = part, size, method, device
            memory = resumable(file, resume, memory_of_variants, *arguments)
            for name, each in memory.items():
                part["variants"][name]["memory"] = each
            sizes[size_name]["methods"][method] = part
    if "gpt2" in sizes:
        size = STEP_SIZES["gpt2"] | (QUICK if options.quick else {})
        rows = random_rows(representative(stored_lengths(), size["pairs"]), size["vocabulary"])
        sizes["gpt2"]["lora_errors"] = lora_errors(size, rows[: size["batch"]])
        say(f"LoRA in float64: {sizes['gpt2']['lora_errors']}")
    return {
        "machine": describe_machine(),
        "device": device,
        "clock": "wall" if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repetitions": options.repetitions,
        "lengths": f"{LENGTHS.name}, from HH-RLHF",
        "not_run": [] if device == "cuda" else ["GPU (`--device cuda` runs the same there)"],
        "quick": options.quick,
        "sizes": sizes,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, to try the script: keeps nothing"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run with the same options was stopped"
    )
    parser.add_argument(
        "--only", nargs="+", choices=STEP_SIZES, help="these models; the others stay as they were"
    )
    options, start = parser.parse_args(arguments), time.perf_counter()
    name = "step" if options.device == "cpu" else "step_cuda"
    known = read_results(name) if options.only and not options.quick else None
    if known and known["machine"] != describe_machine():
        print(f"{name}.json is of another machine or other versions: run it all.", file=sys.stderr)
        return 1
    if not options.resume:
        shutil.rmtree(STEP_DONE, ignore_errors=True)
    try:
        results = run_step(options)
    except WrongVariant as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(STEP_DONE, ignore_errors=True)
    seconds = time.perf_counter() - start
    if known:  # the other models' parts, and the time that all took
        results["sizes"] = known["sizes"] | results["sizes"]
    seconds_of_all = seconds + (known["wall_seconds"] if known else 0)
    results |= {"thresholds": step_thresholds(results), "wall_seconds": seconds_of_all}
    markdown = step_markdown(results)
    if not options.quick:
        target = RESULTS_FOLDER / f"{name}.json"
        write_json(target, results)
        target.with_suffix(".md").write_text(markdown, encoding="utf-8", newline="\n")
    judged = options.device == "cpu" and not options.quick
    note = "" if judged else "; the thresholds are for the full CPU run"
    say(f"took {seconds / 60:.1f} minutes{note}")
    print(f"\n{markdown}")
    return int(judged and not all(check["met"] for check in results["thresholds"]))


if __name__ == "__main__":
    sys.exit(main())
