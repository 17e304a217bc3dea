"""Trains a stage: its lineage, the reuse of finished runs, and the folder a finished run leaves.

`train` is the door, and all that knows the lab. The loop is `common.training.trainer`.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed

from common import models
from common.data import drawn, tokenize_pairs
from common.evaluation import Sampling
from common.io.files import read_metrics, write_json, written_whole
from common.io.fingerprints import digest, versions
from common.lab import Lab, stage_of
from common.profiles import Recipe, device_and_precision
from common.training import checkpoints, processes
from common.training.held_out import HeldOut
from common.training.task import Session, Source, Task, row_length
from common.training.trainer import Trainer


@dataclass
class Run:
    """A finished run: the model in evaluation mode (in shards, under FSDP), `run.json`, metrics."""

    model: torch.nn.Module
    record: dict
    metrics: list[dict]
    folder: Path


def train(
    lab: Lab,
    stage: str,
    sweep: str | None = None,
    source: Source | None = None,
    figure=None,
    session: Session | None = None,
    **changes,
) -> Run:
    """Trains a stage, or returns the finished run whose fingerprint matches.

    Args: `sweep`: a name for a run beside the stage's own, kept in `sweeps/<name>/`. `source`:
        where it starts and what it learns from. `figure`: is given the metrics after each step
        (`plots.curves.LiveFigure`). `session`: checkpoints and resume. `changes`: Recipe fields.
    Raises: ValueError for an unknown stage or field; MissingRun if the parent was not trained;
        TrainingError for a loss that is not finite; CheckpointError when the disk is full;
        LaunchError for processes that cannot train together.
    """
    kind, source, session = stage_of(stage), source or Source(), session or Session()
    if not lab.has_own_weights(stage):
        name = lab.profile.model
        raise ValueError(f"The base of this profile is {name} itself: there is nothing to train.")
    if unknown := changes.keys() - {field.name for field in fields(Recipe)}:
        unknown = ", ".join(sorted(unknown))
        raise ValueError(f"Unknown hyper-parameter {unknown}: see common.profiles.Recipe.")
    recipe = replace(lab.profile.recipes[stage.removesuffix("_lora")], **changes)
    # 1. Where does it start, and what is it compared with?
    parent = source.parent or lab.parent_of(stage)
    reference = source.reference or (parent if kind.method == "dpo" else None)
    rows, held_out = _rows_of(lab, stage, source.pairs)
    lineage = [name and lab.fingerprint_of(name) for name in (parent, reference)]
    # 2. Was this very run finished before?
    parts = lab.fingerprint_parts(stage, recipe, rows, *lineage)
    fingerprint, folder = digest(parts), lab.path(stage, sweep)
    if record := _reusable(lab, stage, sweep, fingerprint, parts):
        return Run(lab.load(stage, sweep), record, read_metrics(folder), folder)
    # 3. Train.
    task = _task_of(lab, stage, recipe, rows, folder)
    held_out = _held_out_of(lab, held_out)
    measured = [*rows, *held_out.rows, *held_out.pairs]
    task.longest = max(row_length(row, ("chosen", "rejected")) for row in measured)
    if kind.method == "dpo" or reference:  # then answers are sampled, and scored
        task.longest = max(task.longest, lab.profile.max_length)
    trainer = _trainer(lab, task, parent, reference, held_out)
    metrics = trainer.run(fingerprint, session, figure)
    # 4. Keep the model and what the run took.
    record = _record(lab, trainer, metrics, parts, (parent, reference))
    model = _save(lab, trainer, record, lab.source(parent) if parent else None)
    if trainer.accelerator.is_main_process:
        seconds = record["wall_seconds"]
        print(f"{sweep or stage}: trained in {seconds:.0f} s (fingerprint {fingerprint})")
    return Run(model, record, metrics, folder)


def train_from_base(lab: Lab, *stages: str, figure=None) -> dict[str, Run]:
    """Trains stages after all that they start from; finished runs are reused.

    A base that is a pre-trained model is left out, with a line that says so.
    Args: `figure`: makes the figure of a stage from its name (`plots.curves.LiveFigure`).
    Raises: as `train`.
    """
    runs = {}
    for stage in stages:
        if (parent := lab.parent_of(stage)) and parent not in runs:
            runs |= train_from_base(lab, parent, figure=figure)
        if not lab.has_own_weights(stage):
            print(f"{stage}: {lab.profile.model} itself, which is trained already")
        elif stage not in runs:
            runs[stage] = train(lab, stage, figure=figure and figure(stage))
    return runs


def _rows_of(lab: Lab, stage: str, pairs) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) of a stage, tokenised.

    Texts and demonstrations hold out their last twentieth. Those of real data, which stand in
    blocks (a subset, a file), are first brought into a fixed random order, and no more of them are
    held out than pairs are.
    """
    kind = stage_of(stage).rows
    if kind == "pairs":
        own = lab.train_pairs
        if pairs is not None:
            own = tokenize_pairs(pairs, lab.tokenizer, lab.profile.max_length)[0]
        return own.to_list(), lab.test_pairs.to_list()
    rows = (lab.texts if kind == "texts" else lab.demonstrations).to_list()
    held_out = max(1, len(rows) // 20)
    if lab.data.world is None:
        rows, held_out = drawn(rows, len(rows)), min(held_out, lab.profile.held_out)
    return rows[:-held_out], rows[-held_out:]


def _reusable(lab: Lab, stage: str, sweep: str | None, fingerprint: str, parts: dict):
    """The record of a finished run with this fingerprint, or None, saying what changed since."""
    path, name = lab.path(stage, sweep) / "run.json", sweep or stage
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["fingerprint"] == fingerprint:
        seconds = record["wall_seconds"]
        print(f"{name}: reused, trained before in {seconds:.0f} s (fingerprint {fingerprint})")
        return record
    before, now = record["fingerprint_parts"], json.loads(json.dumps(parts))
    changed = [part for part in now if before.get(part) != now[part]]
    print(f"{name}: trained again, since it changed in: {', '.join(changed) or 'format'}")
    return None


def _task_of(lab: Lab, stage: str, recipe: Recipe, rows: list[dict], folder: Path) -> Task:
    return Task(
        name=stage,
        method=stage_of(stage).method,
        recipe=recipe,
        rows=rows,
        folder=folder,
        shared=lab.folder,
        seed=lab.seed,
        eval_batch=lab.profile.eval_batch,
        optimizer=lab.profile.optimizer,
        precision=device_and_precision(lab.profile)[1],
    )


def _held_out_of(lab: Lab, rows: list[dict]) -> HeldOut:
    return HeldOut(
        rows=rows,
        pairs=lab.test_pairs.to_list(),
        prompts=lab.prompts[: lab.profile.sampled_prompts],
        tokenizer=lab.tokenizer,
        sampling=Sampling(lab.profile.max_new_tokens, seed=lab.seed),
        world=lab.data.world,
    )


def _trainer(
    lab: Lab, task: Task, parent: str | None, reference: str | None, held_out: HeldOut
) -> Trainer:
    """The trainer with its models: the policy, and a frozen reference where one is needed."""
    recipe, profile = task.recipe, lab.profile
    accelerator = processes.new_accelerator(profile)
    sharded, lora = processes.is_sharded(accelerator), bool(profile.lora) or "_lora" in task.name
    if sharded and lora:
        raise processes.LaunchError(
            "FSDP is for full fine-tuning here. LoRA fits one GPU: use torchrun."
        )
    count, batch = accelerator.num_processes, min(recipe.batch_size, len(task.rows))
    rows = stage_of(task.name).rows
    divided = processes.shares(count, batch, recipe.micro_batch, rows, sharded)
    if accelerator.is_main_process and (count > 1 or batch > recipe.micro_batch):
        print(f"{task.name}: {divided}")
    device = "cpu" if sharded else device_and_precision()[0]  # whole, it may not fit on one GPU
    policy, frozen = _parent_model(lab, task.method, parent, device), None
    if reference and not (lora and reference == parent):  # under LoRA, adapter off is the parent
        frozen = models.freeze(lab.load(reference, device=device))
    set_seed(lab.seed, device_specific=True)
    policy = models.prepared_policy(policy, profile, task.method, lora)
    policy.config.pad_token_id = lab.tokenizer.pad_token_id
    trainer = Trainer(task, accelerator, policy, frozen, held_out.measures)
    if task.method == "dpo" and recipe.cache_reference:
        held_out.remember_reference(trainer)
        trainer.cache_reference()
    return trainer


def _parent_model(lab: Lab, method: str, parent: str | None, device: str):
    """The weights a stage starts from: a new tiny model for `base`, else its parent."""
    if parent is None:
        return models.new_tiny_model(lab.profile, lab.tokenizer, lab.seed).to(device)
    source = lab.source(parent)
    set_seed(lab.seed)  # a reward model's new head
    model = models.load_model(source, lab.profile, reward_head=method == "reward", device=device)
    models.check_fits(model, lab.tokenizer, lab.profile)
    return model


def _record(lab: Lab, trainer: Trainer, metrics: list[dict], parts: dict, lineage: tuple) -> dict:
    """What `run.json` holds: the keys are a contract with the notebooks and the tables."""
    task, progress, (parent, reference) = trainer.task, trainer.progress, lineage
    # By path: what the run took, and what it takes without packing.
    flops = {
        path: each * progress.padded[path] + progress.reference_flops
        for path, each in progress.flops_per_token.items()
    }
    measured = metrics[-1].items()
    return {
        "stage": task.name,
        "profile": lab.profile.run_name,
        "seed": task.seed,
        "parent": parent,
        "reference": reference,
        "fingerprint": progress.fingerprint,
        "fingerprint_parts": parts,
        "model": lab.profile.model,
        "dataset": lab.data.name,
        "n_pairs": len(task.rows),
        "hyperparameters": asdict(task.recipe),
        "steps": progress.step,
        "best_step": progress.best_step,
        "stopped_early": progress.stopped_early,
        "train_tokens": progress.tokens,
        "padded_tokens": progress.padded["simple"],
        "path": trainer.path,
        "train_flops": flops[trainer.path],
        "simple_flops": flops["simple"],
        "wall_seconds": progress.wall,
        "evaluation_seconds": progress.aside,
        "cpu_seconds": progress.cpu,
        "peak_memory_bytes": progress.peak,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "processes": trainer.accelerator.num_processes,
        "versions": versions(),
        "warnings": progress.warnings,
        "final": {name: value for name, value in measured if name not in ("step", "lr", "tokens")},
    }


def _save(lab: Lab, trainer: Trainer, record: dict, parent_source: str | None):
    """Writes the finished model, whole weights even after LoRA, and `run.json` last. Returns it.

    A 4-bit run in a sweep leaves its adapter alone: whole weights, 15 GB for each point of a sweep,
    would fill a disk.
    """
    accelerator, folder, profile = trainer.accelerator, trainer.task.folder, lab.profile
    reward, main = trainer.task.method == "reward", accelerator.is_main_process
    model = accelerator.unwrap_model(trainer.policy, keep_fp32_wrapper=False)
    if trainer.recipe.keep_best:
        accelerator.wait_for_everyone()
        checkpoints.load_best(model, folder)
    only_adapter = profile.four_bit and folder.parent.name == "sweeps" and not reward
    if trainer.has_adapter and not only_adapter:
        model = models.merge_lora(model, parent_source, profile)
    model.eval()
    weights = None  # the model's own
    if processes.is_sharded(accelerator):
        weights = checkpoints.whole_weights(model.state_dict().items(), main)
    if main:
        with written_whole(folder / "model") as scratch:
            model.save_pretrained(scratch, state_dict=weights)
            lab.tokenizer.save_pretrained(scratch)
        for path in (folder / "model").iterdir():
            path.replace(folder / path.name)
        (folder / "model").rmdir()
        write_json(folder / "run.json", record)
        checkpoints.remove(folder)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    if profile.four_bit:  # not what is run: merged weights are on the CPU and not quantised
        return models.load_model(folder, profile, reward_head=reward).eval()
    return model
