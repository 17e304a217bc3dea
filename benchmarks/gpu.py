"""Does it fit a 16 GB GPU, and how long does it take? `python -m benchmarks.gpu --cap-gb 16`, on a
CUDA GPU, which `make gpu` runs.

It checks the machine, aligns SmolLM2 as `make align` does, and takes optimiser steps of every
full-size profile, built from its configuration with random weights (no download): SFT, DPO and ORPO
by the course's packed and simple path and by TRL's trainer, each in a process of its own that gets
no more memory than the cap (`benchmarks.gpu_part`). After `--minutes` it stops. The same command
goes on: a part whose result is there for this machine and commit is not run again. Writes
benchmarks/results/gpu.json and ends with its table, with status 1 if a threshold is missed.
`--quick` tries the script on tiny models, on a CPU too: it judges and keeps nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu_part import full_length
from benchmarks.materials import LENGTHS
from benchmarks.measure import say
from benchmarks.thresholds import check_thresholds
from common import environment
from common.io.files import write_json
from common.io.fingerprints import digest, source_digest
from common.io.pretrained import model_folder
from common.memory.forecast import FORECAST_METHODS, GPU_RESULTS
from common.memory.measured import json_of_process
from common.memory.simulate import predict
from common.profiles import PROFILES, ROOT, SMOLLM, Profile, device_and_precision, get_profile
from tools.bench_table import GPU_PATHS, gpu_markdown
from tools.machine import describe_machine
from tools.tables import read_results

GPU_DONE = ROOT / "runs" / "bench-gpu"  # what was measured, by machine and commit
ALIGN = "align"  # the part that `make align` is
ORDER = ("gpt2", "qlora-7b", "smollm", "qwen-0.5b")  # of the profiles, the most telling first
LEAST_SECONDS = 20  # a part is not begun when less time is left
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


def measure_task(task: dict, seconds: float | None = None) -> dict:
    """What a part took: its peak over all phases, and where it has steps, seconds and tokens.

    {"failed": its last words} where it ended with an error or took more than `seconds`: the other
    parts go on.
    """
    # With several GPUs in sight TRL's trainer would spread its batches over them.
    one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    try:
        found = json_of_process("benchmarks.gpu_part", task, environment=one, timeout=seconds)
    except RuntimeError as error:
        return {"failed": str(error)}
    except subprocess.TimeoutExpired:
        return {"not_run": f"stopped after {seconds / 60:.0f} minutes, when the time was up"}
    if found["peaks"] and not found["out_of_memory"]:
        seconds = {kind: median(times) for kind, times in found["seconds"].items()}
        speeds = {kind: found["tokens"][kind] / each for kind, each in seconds.items()}
        peak = max(found["peaks"].values()) + found["paged"]
        found |= {"peak_bytes": peak, "step_seconds": seconds, "tokens_per_second": speeds}
    return found


def measure_align(quick: bool, seconds: float | None = None) -> dict:
    """The report of `make align` on this machine, or why there is none."""
    if not (model_folder(SMOLLM) / "README.md").exists():
        return {"failed": "the model is not here: make model"}
    command = [sys.executable, "-m", "tools.align"]
    command += ["--pairs", "32", "--prompts", "16"] if quick else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"not_run": f"stopped after {seconds / 60:.0f} minutes, when the time was up"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    report = (get_profile("smollm").folder / "align.md").read_text(encoding="utf-8")
    return {"report": report}


def in_words(found: dict) -> str:
    """One line about a part."""
    if "not_run" in found:
        return f"not measured: {found['not_run']}"
    if "failed" in found:
        return f"failed: {found['failed']}"
    if "report" in found:
        return "done"
    if found["out_of_memory"]:
        return f"does not fit ({found['out_of_memory']})"
    seconds = found["step_seconds"]["sample"]
    return f"peak {found['peak_bytes'] / 1e9:.2f} GB, {seconds:.2f} s a step"


def parts_folder(options: argparse.Namespace) -> Path:
    """Where the parts of this machine, this commit and these options are kept."""
    machine = describe_machine()
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    here = [machine["gpu"], machine["cpu"], machine["versions"], commit, source_digest()]
    size = "quick" if options.quick else f"{options.cap_gb:g} GB"
    return GPU_DONE / f"{size} {digest(here)}"


def planned() -> list[tuple[str, ...]]:
    """All parts, the most telling first: `make align`, the course's own paths, TRL's, the rest."""
    parts = [
        (name, method, path) for name in ORDER for method in FORECAST_METHODS for path in GPU_PATHS
    ]

    def rank(part: tuple[str, ...]) -> int:
        name, method, path = part
        return 0 if path == PROFILES[name].recipes[method].path else 1 if path == "trl" else 2

    return [(ALIGN,), *sorted(parts, key=rank)]


def known_part(file: Path) -> dict | None:
    """A part's result, unless there is none or it failed, which may be mended by now."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found if found and "failed" not in found else None


def show_plan(folder: Path, minutes: float) -> None:
    """The parts with the time that each took, where it was measured, here or elsewhere."""
    before, todo = read_results("gpu") or {}, []
    for part in planned():
        found, text = known_part(folder / f"{'-'.join(part)}.json"), "not measured"
        elsewhere = before.get("part_seconds", {}).get("-".join(part))
        if found:
            text = f"done, in {found['wall_seconds'] / 60:.1f} minutes"
        elif elsewhere:
            text = f"{elsewhere / 60:.1f} minutes on {', '.join(before['machine']['gpu'])}"
        todo += [] if found else [part]
        print(f"  {', '.join(part):28} {text}")
    print(f"{len(todo)} parts to run, in at most {minutes:g} minutes; the same command goes on.")


def run_parts(options: argparse.Namespace) -> dict[tuple[str, ...], dict]:
    """Every part: read, measured, or not run when the time is up."""
    folder, end, results = parts_folder(options), time.perf_counter() + 60 * options.minutes, {}
    if options.again:
        shutil.rmtree(folder, ignore_errors=True)
    show_plan(folder, options.minutes)
    for part in planned():
        file, left = folder / f"{'-'.join(part)}.json", end - time.perf_counter()
        found = known_part(file)
        if not found and left < LEAST_SECONDS:
            found = {"not_run": "the time was up"}
        elif not found:
            began = time.perf_counter()
            found = measure_align(options.quick, left) if part == (ALIGN,) else None
            found = found or measure_task(task_of(part, options), left)
            found["wall_seconds"] = time.perf_counter() - began
            say(f"{', '.join(part)}: {in_words(found)}")
            if "not_run" not in found:
                write_json(file, found)
        results[part] = found
    return results


def task_of(part: tuple[str, ...], options: argparse.Namespace) -> dict:
    """What `benchmarks.gpu_part` is asked."""
    task = dict(zip(("profile", "method", "path"), part, strict=True))
    return task | {"quick": options.quick, "cap_bytes": int(options.cap_gb * 1e9)}


def result_of(name: str, parts: dict[tuple[str, ...], dict], quick: bool) -> dict:
    """All methods and paths of a profile, with the forecast of the course's own paths."""
    profile, methods = PROFILES[name], {}
    pairs = profile.pairs or HH_PAIRS
    for method in FORECAST_METHODS:
        recipe, paths = profile.recipes[method], {}
        for path in GPU_PATHS:
            paths[path] = found = parts[name, method, path]
            if path != "trl" and not quick:  # which has other sizes than the profile
                found["predicted_bytes"] = predicted_bytes(profile, method, path)
        methods[method] = {
            "path": recipe.path,
            "steps": steps_of(profile, method, pairs),
            "epochs": recipe.epochs,
            "paths": paths,
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
    parts, profiles = run_parts(options), [name for name in PROFILES if name in ORDER]
    took = {"-".join(p): each["wall_seconds"] for p, each in parts.items() if "not_run" not in each}
    return {
        "machine": machine,
        "device": device,
        "precision": precision,
        "gpu": why,
        "cap_gb": options.cap_gb,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0,
        "lengths": LENGTHS.name,
        "profiles": {name: result_of(name, parts, options.quick) for name in profiles},
        ALIGN: parts[(ALIGN,)],
        "part_seconds": took,
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
    parser.add_argument("--minutes", type=float, default=40, help="then it stops (40)")
    parser.add_argument("--again", action="store_true", help="run every part anew")
    options, start = parser.parse_args(arguments), time.perf_counter()
    if not (torch.cuda.is_available() or options.quick):
        missing = "No CUDA GPU is here, so nothing was measured; --quick tries the script on a CPU."
        print(missing, file=sys.stderr)
        return 2
    for status, text in environment.all_lines():
        print(f"{status:4}  {text}")
    results = run_gpu(options)
    seconds = time.perf_counter() - start
    checks = [] if options.quick else gpu_thresholds(results)
    results |= {"thresholds": checks, "wall_seconds": seconds}
    if not options.quick:
        write_json(GPU_RESULTS, results)
    note = "; tiny models, so the figures below say nothing of a GPU" if options.quick else ""
    say(f"took {seconds / 60:.1f} minutes{note}")
    print(f"\n{gpu_markdown(results)}")
    if late := len(planned()) - len(results["part_seconds"]):
        print(f"{late} parts were not measured: the time was up. The same command goes on.")
    return int(not all(check["met"] for check in checks))


if __name__ == "__main__":
    sys.exit(main())
