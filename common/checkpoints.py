"""Checkpoints of a run: written whole or not at all, and the newest whole one is what a resumed run loads."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from common.runs import written_whole

STATE = "trainer.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written. The message says which one is intact and what to do."""


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run folder; a half-written one has another name and is never seen."""
    return max(folder.glob("checkpoint-[0-9]*"), default=None)


def read_state(checkpoint: Path) -> dict:
    """Step, counters and fingerprint of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def save(accelerator, folder: Path, state: dict) -> None:
    """Writes `checkpoint-<step>` (weights, optimiser, schedule, random states, `state`) and removes the older ones.

    All processes take part. It is written under another name, synced to disk, and renamed in one step.
    Raises: CheckpointError when the disk is full or the folder cannot be written; older ones are then intact.
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
            for path in partial.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            for old in folder.glob("checkpoint-[0-9]*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # torch, safetensors and the system each have their own error for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        before = newest(folder)
        intact = f"The one of step {read_state(before)['step']} is intact" if before else "There is none before it"
        raise CheckpointError(
            f"The checkpoint of step {state['step']} was not written to {folder} ({type(error).__name__}: {error}). "
            f"{intact}. "
            f"{shutil.disk_usage(folder.parent).free / 1e9:.1f} GB are free: make room or set LAB_RUNS, then resume."
        ) from error
    accelerator.wait_for_everyone()


def remove(folder: Path) -> None:
    """Removes all checkpoints of a run that is finished or starts anew."""
    for path in [*folder.glob("checkpoint-[0-9]*"), folder / "partial-checkpoint", folder / "best"]:
        shutil.rmtree(path, ignore_errors=True)


def keep_only_trained(accelerator) -> None:
    """Leaves frozen weights out of checkpoints from now on, for a run that trains an adapter.

    They are the parent's and do not change; and 4-bit ones cannot be put back into a model.
    """

    def save_trained(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            save_file(_trained(accelerator.unwrap_model(models[0])), Path(folder) / "trained.safetensors")

    def load_trained(models, folder):
        _load_trained(accelerator.unwrap_model(models.pop()), Path(folder) / "trained.safetensors")

    accelerator.register_save_state_pre_hook(save_trained)
    accelerator.register_load_state_pre_hook(load_trained)


def _trained(model) -> dict:
    """The weights that are trained, on the CPU."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return {name: weight.detach().cpu().contiguous() for name, weight in trained}


def _load_trained(model, path: Path) -> None:
    model.load_state_dict(load_file(path, device=str(model.device)), strict=False)


def save_best(model, folder: Path) -> None:
    """Keeps the trainable weights of the best evaluation so far, in `best/`."""
    with written_whole(folder / "best") as scratch:
        scratch.mkdir()
        save_file(_trained(model), scratch / "weights.safetensors")


def load_best(model, folder: Path) -> None:
    """Puts those weights back."""
    _load_trained(model, folder / "best" / "weights.safetensors")
