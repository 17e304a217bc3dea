"""Trains a stage: its lineage, the reuse of finished runs, and the folder a finished run leaves."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset

from common import models
from common.data import drawn, tokenize_pairs
from common.io.files import read_metrics, write_json, written_whole
from common.io.fingerprints import digest, versions
from common.lab import Lab, stage_of
from common.profiles import Recipe, device_and_precision
from common.training import checkpoints
from common.training.trainer import Trainer


@dataclass
class Run:
    """A finished run: the model in evaluation mode (in shards, under FSDP), `run.json` and
    `metrics.jsonl`.
    """

    model: torch.nn.Module
    record: dict
    metrics: list[dict]
    folder: Path


def _rows_of(lab: Lab, stage: str, pairs: Dataset | None) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) of a stage, tokenised.

    Texts and demonstrations hold out their last twentieth. Those of real data, which stand in
    blocks (a subset, a file), are brought into a fixed random order before, and no more of them are
    held out than pairs are.
    """
    kind = stage_of(stage).rows
    if kind == "pairs":
        own = (
            lab.train_pairs
            if pairs is None
            else tokenize_pairs(pairs, lab.tokenizer, lab.profile.max_length)[0]
        )
        return own.to_list(), lab.test_pairs.to_list()
    rows = (lab.texts if kind == "texts" else lab.demonstrations).to_list()
    held_out = max(1, len(rows) // 20)
    if lab.data.world is None:
        rows, held_out = drawn(rows, len(rows)), min(held_out, lab.profile.held_out)
    return rows[:-held_out], rows[-held_out:]


def _reusable(
    lab: Lab, stage: str, sweep: str | None, fingerprint: str, parts: dict
) -> dict | None:
    """The record of a finished run with this fingerprint, or None, saying what changed since."""
    path = lab.path(stage, sweep) / "run.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["fingerprint"] == fingerprint:
        print(
            f"{sweep or stage}: reused, trained before in {record['wall_seconds']:.0f} s (fingerprint {fingerprint})"
        )
        return record
    before, now = record["fingerprint_parts"], json.loads(json.dumps(parts))
    changed = [name for name in now if before.get(name) != now[name]]
    print(f"{sweep or stage}: trained again, since it changed in: {', '.join(changed) or 'format'}")
    return None


def train(
    lab: Lab,
    stage: str,
    *,
    sweep: str | None = None,
    parent: str | None = None,
    reference: str | None = None,
    pairs: Dataset | None = None,
    resume: bool = True,
    live: bool = False,
    checkpoint_every: int | None = None,
    **changes,
) -> Run:
    """Trains a stage, or returns the finished run whose fingerprint matches.

    Args: `sweep`: a name for a run beside the stage's own, kept in `sweeps/<name>/`. `parent`,
        `reference`: other stages to start from and to compare with (default: the stage's parent,
        for both; ORPO takes a reference only to report KL against it). `pairs`: other training
        pairs (prompt, chosen, rejected). `resume`: go on from the newest checkpoint of this run, if
        its fingerprint matches. `live`: draw curves as it trains. `changes`: Recipe fields.
    Raises: ValueError for an unknown stage or field; MissingRun if the parent was not trained;
        TrainingError for a loss that is not finite; CheckpointError when the disk is full;
        LaunchError for processes that cannot train together.
    """
    kind = stage_of(stage)
    if not lab.has_own_weights(stage):
        raise ValueError(
            f"The base of this profile is {lab.profile.model} itself: there is nothing to train."
        )
    if unknown := changes.keys() - {field.name for field in fields(Recipe)}:
        raise ValueError(
            f"Unknown hyper-parameter {', '.join(sorted(unknown))}: see common.profiles.Recipe."
        )
    recipe = replace(lab.profile.recipes[stage.removesuffix("_lora")], **changes)
    parent = parent or kind.parent
    reference = reference or (parent if kind.method == "dpo" else None)
    lora = bool(lab.profile.lora) or stage.endswith("_lora")
    rows, held_out = _rows_of(lab, stage, pairs)
    lineage = [name and lab.fingerprint_of(name) for name in (parent, reference)]
    parts = lab.fingerprint_parts(stage, recipe, rows, *lineage)
    fingerprint, folder = digest(parts), lab.path(stage, sweep)
    if record := _reusable(lab, stage, sweep, fingerprint, parts):
        return Run(lab.load(stage, sweep), record, read_metrics(folder), folder)

    trainer = Trainer(lab, stage, recipe, rows, held_out, folder)
    device = (
        "cpu" if trainer.sharded else device_and_precision()[0]
    )  # whole, it may not fit on one GPU
    parent_model = _parent_model(lab, kind.method, parent, device)
    needs_copy = reference and not (
        lora and reference == parent
    )  # under LoRA, adapter off is the parent
    trainer.build(
        parent_model, models.freeze(lab.load(reference, device=device)) if needs_copy else None
    )
    metrics = trainer.run(fingerprint, resume, live, checkpoint_every)
    record = _record(trainer, metrics, fingerprint, parts, parent, reference)
    model = _save(trainer, record, lab.source(parent) if parent else None)
    return Run(model, record, metrics, folder)


def _parent_model(lab: Lab, method: str, parent: str | None, device: str):
    """The weights a stage starts from: a new tiny model for `base`, else its parent."""
    if parent is None:
        return models.new_tiny_model(lab.profile, lab.tokenizer, lab.seed).to(device)
    source = lab.source(parent)
    set_seed(lab.seed)  # a reward model's new head
    model = models.load_model(source, lab.profile, reward_head=method == "reward", device=device)
    models.check_fits(model, lab.tokenizer, lab.profile)
    return model


def _record(
    trainer: Trainer,
    metrics: list[dict],
    fingerprint: str,
    parts: dict,
    parent: str | None,
    reference: str | None,
) -> dict:
    """What `run.json` holds: the keys are a contract with the notebooks and the tables."""
    profile, state = trainer.lab.profile, trainer.state
    device = "cuda" if torch.cuda.is_available() else "cpu"
    final = {
        name: value for name, value in metrics[-1].items() if name not in ("step", "lr", "tokens")
    }
    counted = state[
        "flops_per_token"
    ].items()  # by path: what it took, and what it takes without packing
    flops = {
        path: each * state["padded"][path] + state["reference_flops"] for path, each in counted
    }
    return {
        "stage": trainer.stage,
        "profile": profile.run_name,
        "seed": trainer.lab.seed,
        "parent": parent,
        "reference": reference,
        "fingerprint": fingerprint,
        "fingerprint_parts": parts,
        "model": profile.model,
        "dataset": trainer.lab.data.name,
        "n_pairs": len(trainer.rows),
        "hyperparameters": asdict(trainer.recipe),
        "steps": state["step"],
        "best_step": state.get("best_step"),
        "stopped_early": state["stopped_early"],
        "train_tokens": state["tokens"],
        "padded_tokens": state["padded"]["simple"],
        "path": trainer.path,
        "train_flops": flops[trainer.path],
        "simple_flops": flops["simple"],
        "wall_seconds": state["wall"],
        "evaluation_seconds": state["aside"],
        "cpu_seconds": state["cpu"],
        "peak_memory_bytes": state["peak"],
        "device": device,
        "processes": trainer.accelerator.num_processes,
        "versions": versions(),
        "warnings": state["warnings"],
        "final": final,
    }


def _save(trainer: Trainer, record: dict, parent_source: str | None):
    """Writes the finished model, whole weights even after LoRA, and `run.json` last. Returns the
    model.

    A 4-bit run in a sweep leaves its adapter alone: whole weights, 15 GB for each point of a sweep,
    would fill a disk.
    """
    model = trainer.accelerator.unwrap_model(trainer.policy, keep_fp32_wrapper=False)
    if trainer.recipe.keep_best:
        trainer.accelerator.wait_for_everyone()
        checkpoints.load_best(model, trainer.folder)
    if trainer.lora and not (
        trainer.lab.profile.four_bit and trainer.folder.parent.name == "sweeps"
    ):
        model = models.merge_lora(model, parent_source, trainer.lab.profile)
    model.eval()
    main = trainer.accelerator.is_main_process
    weights = (
        checkpoints.whole_weights(model.state_dict().items(), main) if trainer.sharded else None
    )  # None: its own
    if main:
        with written_whole(trainer.folder / "model") as scratch:
            model.save_pretrained(scratch, state_dict=weights)
            trainer.lab.tokenizer.save_pretrained(scratch)
        for path in (trainer.folder / "model").iterdir():
            path.replace(trainer.folder / path.name)
        (trainer.folder / "model").rmdir()
        write_json(trainer.folder / "run.json", record)
        checkpoints.remove(trainer.folder)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    if (
        trainer.lab.profile.four_bit
    ):  # not what is run: merged weights are on the CPU and not quantised
        reward = trainer.method == "reward"
        return models.load_model(trainer.folder, trainer.lab.profile, reward_head=reward).eval()
    return model
