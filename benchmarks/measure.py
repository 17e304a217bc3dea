"""What a step takes: time, floating-point operations, peak memory, and the machine's matmul speed
to compare with.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.variants import (
    VARIANTS,
    Bench,
    Variant,
    new_bench,
    random_rows,
    with_reference_columns,
)
from common.costs import bytes_of, give_back


def clocks(device: str) -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds), what the GPU still has to do included."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def new_optimizer(model) -> torch.optim.AdamW:
    """A learning rate too small to change a weight: every step of every variant sees the same
    model.
    """
    return torch.optim.AdamW(
        [w for w in model.parameters() if w.requires_grad], lr=1e-12, weight_decay=0, fused=True
    )


def take_steps(
    bench: Bench, method: str, variant: Variant, batches: list, optimizer
) -> dict[str, float]:
    """One step per batch. Returns: seconds up to the gradients, CPU and wall, and those of the
    optimiser.
    """
    seconds = dict.fromkeys(("cpu", "wall", "optimizer_cpu", "optimizer_wall"), 0.0)
    for batch in batches:
        start = clocks(bench.device)
        variant.loss(bench, method, batch).backward()
        middle = clocks(bench.device)
        optimizer.step()
        optimizer.zero_grad()
        end = clocks(bench.device)
        for name, at in (("cpu", 0), ("wall", 1)):
            seconds[name] += middle[at] - start[at]
            seconds[f"optimizer_{name}"] += end[at] - middle[at]
    return seconds


def matmul_speed(device: str, size: int = 2048, times: int = 3) -> float:
    """Operations per second of the fastest of some large float32 matrix products: what the machine
    can reach.
    """
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    torch.mm(left, right)
    found = []
    for _ in range(times):
        start = clocks(device)
        torch.mm(left, right)
        end = clocks(device)
        found.append(2 * size**3 / (end[device == "cuda"] - start[device == "cuda"]))
    return max(found)


def _attention_flops(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(upstream, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(upstream, query, key, value)


# PyTorch counts attention on a GPU, and leaves it out on a CPU: these are its own formulas.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def time_all(
    bench: Bench, method: str, names: list[str], rows: list[dict], size: int, repetitions: int, say
) -> dict:
    """The variants in turn, in reverse order on every other repetition.

    Returns: {"matmul_speed": [one per repetition], "variants": {name: {"steps", "flops", "cpu":
        […], "wall": […], …}}}, seconds and operations of one pass over all pairs. The pass that
        counts operations is the warm-up.
    """
    optimizer, batches = (
        new_optimizer(bench.policy),
        {name: VARIANTS[name].batches(rows, size) for name in names},
    )
    found = {"matmul_speed": [], "variants": {}}
    for name in names:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            take_steps(bench, method, VARIANTS[name], batches[name], optimizer)
        found["variants"][name] = {"steps": len(batches[name]), "flops": counter.get_total_flops()}
    for repetition in range(repetitions):
        found["matmul_speed"].append(matmul_speed(bench.device))
        for name in names if repetition % 2 else reversed(names):
            seconds = take_steps(bench, method, VARIANTS[name], batches[name], optimizer)
            for clock, value in seconds.items():
                found["variants"][name].setdefault(clock, []).append(value)
        last = {
            name: round(found["variants"][name]["cpu"][-1] / len(batches[name]), 2)
            for name in names
        }
        say(f"repetition {repetition + 1} of {repetitions}, CPU seconds per step: {last}")
    return found


def in_use(device: str, name: str = "VmRSS") -> int:
    """Bytes on the GPU, or of this process's resident memory; the peak of the latter is VmHWM
    (Linux).
    """
    if device == "cuda":
        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Peak:
    """Peak memory of a block: `peak`, and `held` as it began. Of the GPU, or this process's
    resident memory (Linux).
    """

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> "Peak":
        give_back()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # makes the peak the present size
        self.held = in_use(self.device)
        return self

    def __exit__(self, *_) -> None:
        self.peak = (
            torch.cuda.max_memory_allocated() if self.device == "cuda" else in_use("cpu", "VmHWM")
        )


def padded_tokens(batch: list[dict]) -> int:
    """Tokens of a batch with two padded rows per pair."""
    return (
        2
        * len(batch)
        * max(
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in batch
        )
    )


def memory_of(task: dict) -> dict:
    """Peak memory of a variant's step on its largest batch, in this process.

    Args: `task`: size, lengths, device, method, name of the variant, repeats.
    Returns: of every repeat `peak_bytes`, over what the process held before it built a model, and
        `growth_bytes`, the peak over weights, reference, gradients (which are allocated in the
        step) and optimiser.
    """
    from trl import DPOTrainer  # noqa: F401 - loaded for every variant, so that none is charged for it alone
    from trl.experimental.orpo import ORPOTrainer  # noqa: F401

    before = in_use(task["device"])
    size, method, variant = task["size"], task["method"], VARIANTS[task["name"]]
    bench, rows = new_bench(size, task["device"]), random_rows(task["lengths"], size["vocabulary"])
    if variant.cached:
        rows = with_reference_columns(bench, rows)
    batch = max(variant.batches(rows, size["batch"]), key=padded_tokens)
    optimizer = new_optimizer(bench.policy)
    take_steps(
        bench, method, variant, [batch[:1]], optimizer
    )  # makes the optimiser's state, and TRL's trainer
    if method == "orpo" or variant.cached:
        bench.reference = None
        for trainer in bench.trainers.values():
            trainer.ref_model = None
    found = {
        "peak_bytes": [],
        "growth_bytes": [],
        "gradient_bytes": bytes_of(optimizer.param_groups[0]["params"]),
    }
    for _ in range(task["repeats"]):
        with Peak(task["device"]) as memory:
            take_steps(bench, method, variant, [batch], optimizer)
        found["peak_bytes"].append(memory.peak - before)
        found["growth_bytes"].append(memory.peak - memory.held - found["gradient_bytes"])
    return found | {"held_bytes": memory.held - before}


def memory_in_own_process(task: dict, default_allocator: bool = False) -> dict:
    """`memory_of`, in a process of its own. Raises: RuntimeError with its last words.

    glibc is told to give every larger block back when it is freed: resident memory is then what the
    step holds. With `default_allocator` it keeps freed activations in its heap, takes new memory
    for the gradients, and holds more.
    """
    command = [sys.executable, "-m", "benchmarks.measure"]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | ({} if default_allocator else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    done = subprocess.run(
        command, input=json.dumps(task), capture_output=True, text=True, cwd=root, env=environment
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["it said nothing: perhaps memory ran out"]
        raise RuntimeError(
            f"Measuring the memory of {task['method']} {task['name']} failed: {words[0]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(memory_of(json.loads(sys.stdin.read()))))
