"""Does it fit a 16 GB GPU, and how long does it take? `python -m benchmarks.gpu --cap-gb 16`, on a
CUDA GPU.

Every full-size profile, built from its configuration with random weights (no download), takes
optimiser steps of SFT, DPO and ORPO by the course's packed and simple path and by TRL's trainer,
each in a process of its own that gets no more memory than the cap (`benchmarks.gpu_part`). Writes
benchmarks/results/gpu.json and ends with its table, with status 1 if a bar is missed. `--quick`
tries the script on tiny models, on a CPU too: it judges and keeps nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from math import isnan
from pathlib import Path
from statistics import median

import torch

from benchmarks.bars import judged
from benchmarks.gpu_part import PATHS, full_length
from benchmarks.step import resumable, say
from benchmarks.variants import LENGTHS
from common.io.files import write_json
from common.memory import METHODS
from common.memory.simulate import predict
from common.models import is_tiny
from common.profiles import PROFILES, Profile, device_and_precision
from tools.bench_table import gpu_markdown
from tools.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "gpu.json"
DONE = Path(__file__).parents[1] / "runs" / "bench-gpu"  # parts of an unfinished run, for --resume
# rows of HH-RLHF's train split, all subsets, before cleaning: the dataset's page on the hub
HH_PAIRS = 160_800
JUDGED = ("gpt2", "qlora-7b")
PEAK_BYTES, OFF = 15e9, 0.15  # the bars: peak memory, and how far the prediction may be from it


def full_size() -> list[str]:
    """Names of the profiles with a model of the hub."""
    return [name for name, profile in PROFILES.items() if not is_tiny(profile)]


def predicted_bytes(profile: Profile, method: str, path: str) -> int:
    """Predicted peak of training with all rows at full length, evaluations and the first step
    included.

    In that step operations are counted, by the simple path too.
    """
    dtype = device_and_precision()[1]
    return max(
        predict(profile, method, path, dtype).peak,
        predict(profile, method, "simple", dtype).phases["step"],
    )


def steps_of(profile: Profile, method: str, pairs: int) -> int:
    """Optimiser steps of a stage on so many pairs, as the loop counts them. SFT holds out a
    twentieth of its rows.
    """
    recipe = profile.recipes[method]
    rows = pairs - max(1, pairs // 20) if method == "sft" else pairs
    return max(1, round(max(1, rows // recipe.batch_size) * recipe.epochs))


def in_own_process(task: dict) -> dict:
    """What the part found, or {"failed": its last words}: the other parts go on."""
    command, root = (
        [sys.executable, "-m", "benchmarks.gpu_part"],
        Path(__file__).resolve().parents[1],
    )
    # With several GPUs in sight TRL's trainer would spread its batches over them.
    one = os.environ | {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    }
    done = subprocess.run(
        command, input=json.dumps(task), capture_output=True, text=True, cwd=root, env=one
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or [
            "it said nothing: perhaps the machine's memory ran out"
        ]
        return {"failed": words[0]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: dict) -> dict:
    """A part and what follows from it: its peak over all phases, and where it has steps, seconds
    and tokens.
    """
    found = in_own_process(task)
    if found.get("peaks") and not found["out_of_memory"]:
        seconds = {kind: median(each) for kind, each in found["seconds"].items()}
        found |= {
            "peak_bytes": max(found["peaks"].values()) + found["paged"],
            "step_seconds": seconds,
            "tokens_per_second": {
                kind: found["tokens"][kind] / each for kind, each in seconds.items()
            },
        }
    return found


def in_words(found: dict) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    if found["out_of_memory"]:
        return f"does not fit ({found['out_of_memory']})"
    return (
        f"peak {found['peak_bytes'] / 1e9:.2f} GB, {found['step_seconds']['sample']:.2f} s a step"
    )


def parts_folder(options: argparse.Namespace) -> Path:
    return DONE / ("quick" if options.quick else f"{options.cap_gb:g} GB")


def measure_profile(name: str, options: argparse.Namespace) -> dict:
    """All methods and paths of a profile."""
    profile, methods = PROFILES[name], {}
    pairs = profile.pairs or HH_PAIRS
    for method in METHODS:
        recipe, parts = profile.recipes[method], {}
        for path in PATHS:
            task = {"profile": name, "method": method, "path": path, "quick": options.quick}
            task["cap_bytes"] = int(options.cap_gb * 1e9)
            kept = parts_folder(options)
            part = f"{name}-{method}-{path}"
            parts[path] = found = resumable(part, options.resume, measure, task, folder=kept)
            if "failed" in found:  # may be mended before the run goes on
                (kept / f"{part}.json").unlink()
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
    return {
        "model": profile.model,
        "pairs": pairs,
        "max_length": profile.max_length,
        "full_length": full_length(profile),
        "four_bit": profile.four_bit,
        "lora": profile.lora,
        "optimizer": profile.optimizer,
        "methods": methods,
    }


def gpu_bars(results: dict) -> list[dict]:
    """That the course's own path fits, and that its memory was predicted. What was not measured or
    predicted misses.
    """
    bars = []
    for name in JUDGED:
        for method, part in results["profiles"][name]["methods"].items():
            found = part["paths"][part["path"]]
            peak, predicted = (
                found.get("peak_bytes", float("nan")),
                found.get("predicted_bytes") or float("nan"),
            )
            bars += [
                (f"{name}, {method}: peak memory in GB", peak / 1e9, "<=", PEAK_BYTES / 1e9),
                (f"{name}, {method}: prediction off by", abs(predicted / peak - 1), "<=", OFF),
            ]
    found = judged(bars)
    return [
        bar | {"measured": None if isnan(bar["measured"]) else bar["measured"]} for bar in found
    ]


def run(options: argparse.Namespace) -> dict:
    machine, (device, precision, why) = describe_machine(), device_and_precision()
    machine["versions"] |= {name: version(name) for name in ("bitsandbytes", "peft", "accelerate")}
    return {
        "machine": machine,
        "device": device,
        "precision": precision,
        "gpu": why,
        "cap_gb": options.cap_gb,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0,
        "lengths": LENGTHS.name,
        "profiles": {name: measure_profile(name, options) for name in full_size()},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--cap-gb", type=float, default=16, help="memory of the GPU to stand for, in 1e9 bytes (16)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models, to try the script: judges and keeps nothing",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run with the same options was stopped"
    )
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.quick):
        print(
            "No CUDA GPU is here, so nothing was measured; --quick tries the script on a CPU.",
            file=sys.stderr,
        )
        return 2
    start, kept = time.perf_counter(), parts_folder(options)
    if not options.resume:
        shutil.rmtree(kept, ignore_errors=True)
    results = run(options)
    shutil.rmtree(kept, ignore_errors=True)
    results |= {
        "bars": [] if options.quick else gpu_bars(results),
        "wall_seconds": time.perf_counter() - start,
    }
    if not options.quick:
        write_json(RESULTS, results)
    note = "; tiny models, so the figures below say nothing of a GPU" if options.quick else ""
    say(f"took {results['wall_seconds'] / 60:.1f} minutes{note}")
    print(f"\n{gpu_markdown(results)}")
    return int(not all(bar["met"] for bar in results["bars"]))


if __name__ == "__main__":
    sys.exit(main())
