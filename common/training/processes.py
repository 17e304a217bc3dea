"""Several processes that train one model: are they all there, and do they agree?"""

import math
import os

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

from common.profiles import Profile, device_and_precision


class LaunchError(RuntimeError):
    """Processes that cannot train together. The message says what to start instead."""


def place() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_main(value):
    """What the first process passed, on every process. All take part; the value must pickle."""
    if place()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def of_all(value) -> list:
    """What each process passed, in their order, on every process. All take part."""
    values = [value] * place()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def explained(error: Exception) -> str:
    """An error in words. Where a process lost another one, the network's words say little."""
    if isinstance(error, dist.DistError) or "/gloo/" in str(error):
        return (
            "the connection to another process broke, most likely because that one ended: what it "
            "printed, or the launcher's report, says why. The same command with --resume goes on "
            "from the newest checkpoint."
        )
    return str(error)


def leave() -> None:
    """Parts from the other processes after a run that went well. Else the launcher ends them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def new_accelerator(profile: Profile | None = None) -> Accelerator:
    """Accelerate for this device and precision. Raises: LaunchError, as `check_launch`."""
    device, dtype, _ = device_and_precision(profile)
    mixed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")
    # Without `cpu`, processes that torchrun starts on a machine without a GPU do not meet.
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed)
    check_launch(accelerator)
    return accelerator


def is_sharded(accelerator) -> bool:
    """Does FSDP keep the weights in shards?"""
    return accelerator.distributed_type == DistributedType.FSDP


def check_launch(accelerator) -> None:
    """Raises LaunchError unless Accelerate sees the processes, and the sharding, asked for."""
    asked, found = int(os.environ.get("WORLD_SIZE") or 1), accelerator.num_processes
    if asked != found:
        raise LaunchError(
            f"WORLD_SIZE is {asked}, but Accelerate sees {_named(found)}: they would not train one "
            "model together. Start them with torchrun --nproc_per_node N -m common.training STAGE, "
            "or unset WORLD_SIZE for a single process."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not is_sharded(accelerator):
        raise LaunchError(
            "FSDP was asked for, but Accelerate shards over several GPUs only. Without them use "
            "torchrun, or python -m common.training STAGE for one process."
        )


def shares(processes: int, batch: int, micro_batch: int, rows: str, sharded: bool = False) -> str:
    """How a step of so many rows is divided, in words.

    Args: `rows`: what they are called; `sharded`: by FSDP.
    Raises: LaunchError where a process would have none or, sharded, where not all have the same
        number: each forward pass then waits for the other processes.
    """
    if sharded and batch % processes:
        raise LaunchError(
            f"Under FSDP, {batch} {rows} a step must be a multiple of the {processes} processes: "
            "--set batch_size=…"
        )
    if batch < processes:
        raise LaunchError(
            f"{batch} {rows} a step cannot be divided among {processes} processes. Raise "
            f"batch_size (--set batch_size={processes}), use more data, or start fewer processes."
        )
    share = math.ceil(batch / processes)
    each = min(share, micro_batch)
    times = math.ceil(share / each)
    micro_batches = f"{each} {rows} per micro-batch × {times}"
    if processes * each * times == batch:
        return f"{_named(processes)} × {micro_batches} = {batch} {rows} a step"
    return f"{_named(processes)} × at most {micro_batches}, {batch} {rows} a step in all"


def _named(processes: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}"


def check_same(fingerprint: str) -> None:
    """Raises LaunchError where this process has other settings, data or code than the first."""
    if of_main(fingerprint) != fingerprint:
        raise LaunchError(
            f"Process {place()[0]} has other settings, data, code or package versions than process "
            "0. Every machine needs the same copy of this folder, and LAB_RUNS on a disk that they "
            "share."
        )
