"""What a step takes: time, floating-point operations, peak memory, and the machine's matmul speed
to compare with.
"""

import json
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.materials import lengths_of, longer_row, random_rows
from benchmarks.variants import (
    STEP_VARIANTS,
    Bench,
    StepVariant,
    new_bench,
    with_reference_columns,
)
from common.memory.measured import json_of_process
from common.memory.meter import PeakMemory, bytes_of, give_back


def clocks(device: str) -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds), what the GPU still has to do included."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def still_optimizer(model) -> torch.optim.AdamW:
    """A learning rate too small to change a weight: every step of every variant sees the same
    model.
    """
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(learned, lr=1e-12, weight_decay=0, fused=True)


def take_steps(
    bench: Bench, method: str, variant: StepVariant, batches: list, optimizer
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
        for at, name in enumerate(("cpu", "wall")):
            seconds[name] += middle[at] - start[at]
            seconds[f"optimizer_{name}"] += end[at] - middle[at]
    return seconds


def matmul_speed(device: str, size: int = 2048, times: int = 3) -> float:
    """Operations per second of the fastest of some large float32 matrix products: what the machine
    can reach.
    """
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    torch.mm(left, right)
    clock, found = int(device == "cuda"), []  # CPU time on a CPU, wall time on a GPU
    for _ in range(times):
        start = clocks(device)
        torch.mm(left, right)
        found.append(2 * size**3 / (clocks(device)[clock] - start[clock]))
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
    bench: Bench, method: str, names: list[str], rows: list[dict], size: int, repetitions: int
) -> dict:
    """The variants in turn, in reverse order on every other repetition, in batches of `size` pairs.

    Returns: {"matmul_speed": [one per repetition], "variants": {name: {"steps", "flops", "cpu":
        […], "wall": […], …}}}, seconds and operations of one pass over all pairs. The pass that
        counts operations is the warm-up.
    """
    optimizer, found = still_optimizer(bench.policy), {"matmul_speed": [], "variants": {}}
    batches = {name: STEP_VARIANTS[name].batches(rows, size) for name in names}
    for name in names:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            take_steps(bench, method, STEP_VARIANTS[name], batches[name], optimizer)
        found["variants"][name] = {"steps": len(batches[name]), "flops": counter.get_total_flops()}
    for repetition in range(repetitions):
        found["matmul_speed"].append(matmul_speed(bench.device))
        for name in names if repetition % 2 else reversed(names):
            seconds = take_steps(bench, method, STEP_VARIANTS[name], batches[name], optimizer)
            for clock, value in seconds.items():
                found["variants"][name].setdefault(clock, []).append(value)
        timed = found["variants"].items()
        last = {name: round(each["cpu"][-1] / each["steps"], 2) for name, each in timed}
        say(f"repetition {repetition + 1} of {repetitions}, CPU seconds per step: {last}")
    return found


def say(text: str) -> None:
    """Prints a line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def memory_of(task: dict) -> dict:
    """Peak memory of a variant's step on its largest batch, in this process.

    Args: `task`: size, lengths, device, method, name of the variant, repeats.
    Returns: of every repeat `peak_bytes`, over what the process held before it built a model, and
        `growth_bytes`, the peak over weights, reference, gradients (which are allocated in the
        step) and optimiser.
    """
    # Loaded for every variant, so that none is charged for it alone.
    from trl import DPOTrainer  # noqa: F401
    from trl.experimental.orpo import ORPOTrainer  # noqa: F401

    with PeakMemory() as memory:
        before = memory.held
    size, method, variant = task["size"], task["method"], STEP_VARIANTS[task["name"]]
    bench, rows = new_bench(size, task["device"]), random_rows(task["lengths"], size["vocabulary"])
    if variant.cached:
        rows = with_reference_columns(bench, rows)
    batches = variant.batches(rows, size["batch"])
    batch = max(batches, key=lambda rows: len(rows) * max(longer_row(lengths_of(r)) for r in rows))
    optimizer = still_optimizer(bench.policy)
    # This makes the optimiser's state, and TRL's trainer.
    take_steps(bench, method, variant, [batch[:1]], optimizer)
    if method == "orpo" or variant.cached:
        bench.reference = None
        for trainer in bench.trainers.values():
            trainer.ref_model = None
    gradients = bytes_of(optimizer.param_groups[0]["params"])
    found = {"peak_bytes": [], "growth_bytes": [], "gradient_bytes": gradients}
    for _ in range(task["repeats"]):
        give_back()
        with PeakMemory() as memory:
            take_steps(bench, method, variant, [batch], optimizer)
        found["peak_bytes"].append(memory.peak - before)
        found["growth_bytes"].append(memory.peak - memory.held - gradients)
    return found | {"held_bytes": memory.held - before}


def memory_in_own_process(task: dict, default_allocator: bool = False) -> dict:
    """`memory_of`, in a process of its own. Raises: RuntimeError with its last words.

    glibc is told to give every larger block back when it is freed: resident memory is then what the
    step holds. With `default_allocator` it keeps freed activations in its heap, takes new memory
    for the gradients, and holds more.
    """
    environment = {} if default_allocator else {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return json_of_process("benchmarks.measure", task, environment=environment)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(memory_of(json.loads(sys.stdin.read()))))
