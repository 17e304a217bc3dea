"""Does it fit a 16 GB GPU, and how long does it take? `python -m benchmarks.gpu --cap-gb 16`, on a
CUDA GPU.

Every full-size profile, built from its configuration with random weights (no download), takes
optimiser steps of SFT, DPO and ORPO by the course's packed and simple path and by TRL's trainer,
each in a process of its own that gets no more memory than the cap (`benchmarks.gpu_part`). Writes
benchmarks/results/gpu.json and ends with its table, with status 1 if a threshold is missed.
`--quick` tries the script on tiny models, on a CPU too: it judges and keeps nothing.
"""

import argparse
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu_part import full_length
from benchmarks.materials import LENGTHS
from benchmarks.measure import say
from benchmarks.step import resumable
from benchmarks.thresholds import check_thresholds
from common.io.files import write_json
from common.memory.forecast import FORECAST_METHODS, GPU_RESULTS
from common.memory.measured import json_of_process
from common.memory.simulate import predict
from common.models import is_tiny
from common.profiles import PROFILES, ROOT, Profile, device_and_precision
from tools.bench_table import GPU_PATHS, gpu_markdown
from tools.machine import describe_machine

GPU_DONE = ROOT / "runs" / "bench-gpu"  # parts of an unfinished run, for --resume
# rows of HH-RLHF's train split, all subsets, before cleaning: the dataset's page on the hub
HH_PAIRS = 160_800
JUDGED = ("gpt2", "qlora-7b")
# The thresholds: peak memory, and how far the prediction may be from it.
MOST_GB, MOST_OFF = 15.0, 0.15


def predicted_bytes(profile: Profile, method: str, path: str) -> int:
    """Predicted peak of training with all rows at full length, evaluations and the first step
    included, in which operations are counted, by the simple path too.
    """
    dtype = device_and_precision()[1]
    simple = predict(profile, method, "simple", dtype).phases["step"]
    return max(predict(profile, method, path, dtype).peak, simple)


def steps_of(profile: Profile, method: str, pairs: int) -> int:
    """Optimiser steps of a stage on so many pairs, as the loop counts them. SFT holds out a
    twentieth of its rows.
    """
    recipe = profile.recipes[method]
    rows = pairs - max(1, pairs // 20) if method == "sft" else pairs
    return max(1, round(max(1, rows // recipe.batch_size) * recipe.epochs))


def measure_task(task: dict) -> dict:
    """What a part took: its peak over all phases, and where it has steps, seconds and tokens.

    {"failed": its last words} where it ended with an error: the other parts go on.
    """
    # With several GPUs in sight TRL's trainer would spread its batches over them.
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        found = json_of_process(
            "benchmarks.gpu_part", task, environment={"CUDA_VISIBLE_DEVICES": one}
        )
    except RuntimeError as error:
        return {"failed": str(error)}
    if found["peaks"] and not found["out_of_memory"]:
        seconds = {kind: median(times) for kind, times in found["seconds"].items()}
        speeds = {kind: found["tokens"][kind] / each for kind, each in seconds.items()}
        peak = max(found["peaks"].values()) + found["paged"]
        found |= {"peak_bytes": peak, "step_seconds": seconds, "tokens_per_second": speeds}
    return found


def in_words(found: dict) -> str:
    """One line about a part."""
    if "failed" in found:
        return f"failed: {found['failed']}"
    if found["out_of_memory"]:
        return f"does not fit ({found['out_of_memory']})"
    seconds = found["step_seconds"]["sample"]
    return f"peak {found['peak_bytes'] / 1e9:.2f} GB, {seconds:.2f} s a step"


def parts_folder(options: argparse.Namespace) -> Path:
    return GPU_DONE / ("quick" if options.quick else f"{options.cap_gb:g} GB")


def measure_profile(name: str, options: argparse.Namespace) -> dict:
    """All methods and paths of a profile."""
    profile, methods = PROFILES[name], {}
    pairs = profile.pairs or HH_PAIRS
    for method in FORECAST_METHODS:
        recipe, parts = profile.recipes[method], {}
        for path in GPU_PATHS:
            task = {"profile": name, "method": method, "path": path, "quick": options.quick}
            task["cap_bytes"] = int(options.cap_gb * 1e9)
            file = parts_folder(options) / f"{name}-{method}-{path}.json"
            parts[path] = found = resumable(file, options.resume, measure_task, task)
            if "failed" in found:  # may be mended before the run goes on
                file.unlink()
            if path != "trl" and not options.quick:  # which has other sizes than the profile
                found["predicted_bytes"] = predicted_bytes(profile, method, path)
            say(f"{name}, {method}, {path}: {in_words(found)}")
        methods[method] = {
            "path": recipe.path,
            "steps": steps_of(profile, method, pairs),
            "epochs": recipe.epochs,
            "paths": parts,
            "batch_size": recipe.batch_size,
            "micro_batch": recipe.micro_batch,
        }
    settings = ("model", "max_length", "four_bit", "lora", "optimizer")
    found = {setting: getattr(profile, setting) for setting in settings}
    return found | {"pairs": pairs, "full_length": full_length(profile), "methods": methods}


def gpu_thresholds(results: dict) -> list[dict]:
    """That the course's own path fits, and that its memory was predicted. What was not measured or
    predicted misses.
    """
    limits = []
    for name in JUDGED:
        for method, part in results["profiles"][name]["methods"].items():
            found, nothing = part["paths"][part["path"]], float("nan")
            peak = found.get("peak_bytes", nothing)
            predicted = found.get("predicted_bytes") or nothing
            off = abs(predicted / peak - 1)
            limits.append((f"{name}, {method}: peak memory in GB", peak / 1e9, "<=", MOST_GB))
            limits.append((f"{name}, {method}: prediction off by", off, "<=", MOST_OFF))
    return check_thresholds(limits)


def run_gpu(options: argparse.Namespace) -> dict:
    """Every full-size profile, and what it was measured on."""
    machine, (device, precision, why) = describe_machine(), device_and_precision()
    machine["versions"] |= {name: version(name) for name in ("bitsandbytes", "peft", "accelerate")}
    profiles = [name for name, profile in PROFILES.items() if not is_tiny(profile)]
    return {
        "machine": machine,
        "device": device,
        "precision": precision,
        "gpu": why,
        "cap_gb": options.cap_gb,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0,
        "lengths": LENGTHS.name,
        "profiles": {name: measure_profile(name, options) for name in profiles},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--cap-gb", type=float, default=16, help="memory of the GPU to stand for, in 1e9 bytes (16)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, to try the script: keeps nothing"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run with the same options was stopped"
    )
    options, start = parser.parse_args(arguments), time.perf_counter()
    if not (torch.cuda.is_available() or options.quick):
        missing = "No CUDA GPU is here, so nothing was measured; --quick tries the script on a CPU."
        print(missing, file=sys.stderr)
        return 2
    if not options.resume:
        shutil.rmtree(parts_folder(options), ignore_errors=True)
    results = run_gpu(options)
    shutil.rmtree(parts_folder(options), ignore_errors=True)
    seconds = time.perf_counter() - start
    checks = [] if options.quick else gpu_thresholds(results)
    results |= {"thresholds": checks, "wall_seconds": seconds}
    if not options.quick:
        write_json(GPU_RESULTS, results)
    note = "; tiny models, so the figures below say nothing of a GPU" if options.quick else ""
    say(f"took {seconds / 60:.1f} minutes{note}")
    print(f"\n{gpu_markdown(results)}")
    return int(not all(check["met"] for check in checks))


if __name__ == "__main__":
    sys.exit(main())
