"""Checkpoints of a run: written whole or not at all. A resumed run loads the newest one."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from common.io.files import sync, written_whole

STATE = "trainer.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written. The message says which one is intact."""


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run folder. A half-written one has another name."""
    return max(folder.glob("checkpoint-[0-9]*"), default=None)


def read_state(checkpoint: Path) -> dict:
    """Step, counters and fingerprint of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def save(accelerator, folder: Path, state: dict) -> None:
    """Writes `checkpoint-<step>` and removes the older ones. All processes take part.

    It holds weights, optimiser, schedule, random states and `state`. It is written under another
    name, synced to disk, and renamed in one step.
    Raises: CheckpointError when the disk is full or the folder cannot be written; older ones are
        then intact.
    """
    partial, target = folder / "partial-checkpoint", folder / f"checkpoint-{state['step']:08d}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
            sync(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            for old in folder.glob("checkpoint-[0-9]*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    except (
        Exception
    ) as error:  # torch, safetensors and the system: each has its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        intact, free = "There is none before it", shutil.disk_usage(folder.parent).free / 1e9
        if before := newest(folder):
            intact = f"The one of step {read_state(before)['step']} is intact"
        raise CheckpointError(
            f"The checkpoint of step {state['step']} was not written to {folder} "
            f"({type(error).__name__}: {error}). {intact}. {free:.1f} GB are free: make room or "
            "set LAB_RUNS, then resume."
        ) from error
    accelerator.wait_for_everyone()


def remove(folder: Path) -> None:
    """Removes all checkpoints of a run that is finished or starts anew."""
    for path in [*folder.glob("checkpoint-[0-9]*"), folder / "partial-checkpoint", folder / "best"]:
        shutil.rmtree(path, ignore_errors=True)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is or, of a sharded model, put together from all processes."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def keep_only_trained(accelerator) -> None:
    """Leaves frozen weights out of checkpoints from now on, for a run that trains an adapter.

    They are the parent's and do not change; and 4-bit ones cannot be put back into a model.
    """

    def save_trained(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            trained = whole_weights(_trained(accelerator.unwrap_model(models[0])), main=True)
            save_file(trained, Path(folder) / "trained.safetensors")

    def load_trained(models, folder):
        _put_back(accelerator.unwrap_model(models.pop()), Path(folder) / "trained.safetensors")

    accelerator.register_save_state_pre_hook(save_trained)
    accelerator.register_load_state_pre_hook(load_trained)


def _trained(model) -> list[tuple[str, torch.Tensor]]:
    return [named for named in model.named_parameters() if named[1].requires_grad]


def whole_weights(
    weights: Iterable[tuple[str, torch.Tensor]], main: bool
) -> dict[str, torch.Tensor]:
    """Weights by name, on the CPU of the main process; on others, nothing. Of a sharded model all
    take part.
    """
    found = {}
    for name, weight in weights:
        weight = whole(weight)  # one at a time: together they may not fit
        if main:
            found[name] = weight.detach().cpu().contiguous()
    return found


def save_best(model, folder: Path, main: bool) -> None:
    """Keeps the trainable weights of the best evaluation so far, in `best/`. All processes take
    part.
    """
    weights = whole_weights(_trained(model), main)
    if main:
        with written_whole(folder / "best") as scratch:
            scratch.mkdir()
            save_file(weights, scratch / "weights.safetensors")


def load_best(model, folder: Path) -> None:
    """Puts those weights back. All processes take part."""
    _put_back(model, folder / "best" / "weights.safetensors")


@torch.no_grad()
def _put_back(model, path: Path) -> None:
    own = dict(model.named_parameters())
    for name, weight in load_file(path, device=str(model.device)).items():
        if isinstance(own[name], DTensor):
            weight = distribute_tensor(weight, own[name].device_mesh, own[name].placements)
        own[name].copy_(weight)
