"""One part of `benchmarks.gpu`, in a process of its own: a profile, a method, and the course's step
or TRL's.

The course's step is that of `common.training.trainer.Trainer`, TRL's that of its own `train()`:
with accumulation over micro-batches, clipping, optimiser and schedule. Reads a task as JSON from
stdin, prints what it found as JSON.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig, TrainerCallback

from benchmarks.materials import random_rows, representative, stored_lengths
from benchmarks.measure import clocks
from benchmarks.variants import (
    orpo_row,
    trl_trainer,
)
from common import models
from common.evaluation import Sampling
from common.memory.architectures import random_model
from common.memory.meter import PeakMemory, give_back
from common.memory.simulate import full_rows
from common.profiles import PROFILES, Profile, device_and_precision
from common.training import processes
from common.training.held_out import HeldOut
from common.training.task import Task
from common.training.trainer import Trainer

REPEATS = 3  # timed steps, after one to warm up
GONE = (torch.OutOfMemoryError, MemoryError)


@dataclass
class Found:
    """What a part takes. Bytes are of the GPU, weights included; on a CPU the resident memory of
    the process.
    """

    path: (
        str  # the one taken: packed rows step aside where they do not give the simple rows' values
    )
    peaks: dict[str, int] = field(default_factory=dict)  # bytes allocated, by phase
    reserved: int = 0  # bytes that torch took from the GPU to give these
    paged: int = 0  # bytes of optimiser state in memory that CUDA moves, which torch does not count
    device_used: int = 0  # bytes in use afterwards, by the CUDA context and other programs too
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each timed step, by rows
    tokens: dict[str, float] = field(default_factory=dict)  # of a step, by kind of rows
    out_of_memory: str = ""  # the phase that did not fit


class phase(PeakMemory):
    """Notes the peak of a block under its name, and the block's name if memory runs out in it."""

    def __init__(self, found: Found, name: str):
        self.found, self.name = found, name

    def __enter__(self) -> "phase":
        give_back()
        return super().__enter__()

    def __exit__(self, kind, *_) -> None:
        super().__exit__()
        self.found.peaks[self.name] = self.peak
        if self.cuda:
            self.found.reserved = max(self.found.reserved, torch.cuda.max_memory_reserved())
        if kind and issubclass(kind, GONE):
            self.found.out_of_memory = self.name


def tiny_sizes(profile: Profile, folder: Path) -> Profile:
    """The profile with a model, lengths and batches that a CPU takes a moment for; all other
    settings are its own.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
    LlamaConfig(vocab_size=128, **sizes, **heads).save_pretrained(folder)
    recipes = {
        name: replace(recipe, batch_size=2, micro_batch=1)
        for name, recipe in profile.recipes.items()
    }
    lengths = {"max_length": 48, "max_new_tokens": 2, "eval_batch": 2}
    return replace(profile, model=str(folder), recipes=recipes, lora=profile.lora and 2, **lengths)


def full_length(profile: Profile) -> list[int]:
    """[prompt, chosen, rejected] in tokens of the longest pair, half of it prompt."""
    return full_rows(profile, 1, 2)[0]


def shortened(lengths: list[int], limit: int) -> list[int]:
    """A pair cut to `limit` tokens a row: the prompt to one less, then the responses."""
    prompt = min(lengths[0], limit - 1)
    return [prompt, *(min(length, limit - prompt) for length in lengths[1:])]


def rows_of(profile: Profile, count: int, vocabulary: int) -> dict[str, list[dict]]:
    """`count` pairs of full length, and as many as long as those of HH-RLHF."""
    stored = stored_lengths()
    drawn = representative(stored * (1 + count // len(stored)), count)
    sample = [shortened(lengths, profile.max_length) for lengths in drawn]
    full = [full_length(profile)] * count
    return {"full": random_rows(full, vocabulary), "sample": random_rows(sample, vocabulary)}


def tokens_per_step(rows: list[dict], sides: tuple[str, ...], steps: float) -> float:
    """Prompt and response of each side, as the loop counts them."""
    parts = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in sides]
    return sum(len(prompt) + len(response) for prompt, response in parts) / steps


class Prompts:
    """Stands for a tokenizer: every prompt is half of the longest row."""

    pad_token_id, eos_token_id = 0, 0

    def __init__(self, length: int):
        self.length = length

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [] if add_special_tokens else [2] * self.length}  # no BOS

    def decode(self, *_, **__) -> str:
        return ""


def course_steps(found: Found, profile: Profile, method: str, model, rows: dict) -> None:
    """Steps of the course's loop, and one of its evaluations."""
    longest, device = full_length(profile), model.device.type
    held_out = random_rows([longest] * profile.eval_batch, model.config.vocab_size)
    answered = [""] * profile.sampled_prompts
    sampling = Sampling(profile.max_new_tokens)
    measured = HeldOut(held_out, held_out, answered, Prompts(longest[0]), sampling)
    task = Task(
        name=method,
        method=method,
        recipe=replace(profile.recipes[method], path=found.path),
        rows=rows["full"],
        folder=Path(),
        shared=Path(),
        longest=profile.max_length,
        eval_batch=profile.eval_batch,
        optimizer=profile.optimizer,
    )
    with phase(found, "preparation"):
        reference = models.frozen_copy(model) if method == "dpo" and not profile.lora else None
        policy = models.prepared_policy(model, profile, method, bool(profile.lora))
        accelerator = processes.new_accelerator()
        trainer = Trainer(task, accelerator, policy, reference, measured.measures)

    def take_step() -> None:
        batch = trainer.next_batch()
        trainer.step(batch, trainer.backward(batch))

    found.path = trainer.path
    with phase(found, "first step"):  # it counts operations too, also by the simple path
        take_step()
    for kind, each in rows.items():
        trainer.rows, ends = each, []
        found.tokens[kind] = tokens_per_step(each, task.sides, trainer.per_epoch)
        with phase(found, f"steps, {kind}"):
            for _ in range(REPEATS + 1):
                take_step()
                ends.append(clocks(device)[1])
        found.seconds[kind] = durations(ends)
    found.paged = paged_bytes(trainer.optimizer)
    with phase(found, "held-out evaluation"):
        trainer.held_out_measures()


def durations(ends: list[float]) -> list[float]:
    """Seconds of each step but the first, from the times at which they ended."""
    return [end - start for start, end in pairwise(ends)]


def paged_bytes(optimizer) -> int:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(value.nbytes for value in state if getattr(value, "is_paged", False))


class StepTimes(TrainerCallback):
    """Notes when each step of a library's trainer ended."""

    def __init__(self, device: str):
        self.device, self.ends = device, []

    def on_step_end(self, *_, **__) -> None:
        self.ends.append(clocks(self.device)[1])


def trl_settings(profile: Profile, method: str, device: str) -> dict:
    """The recipe as fields of TRL's configuration."""
    recipe, dtype = profile.recipes[method], device_and_precision()[1]
    optimizer = "adamw_torch"
    if device == "cuda":
        paged = profile.optimizer == "paged_adamw_8bit"
        optimizer = "paged_adamw_8bit" if paged else "adamw_torch_fused"
    settings = {
        "max_length": profile.max_length,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "gradient_checkpointing": profile.gradient_checkpointing,
        "learning_rate": recipe.lr,
        "per_device_train_batch_size": recipe.micro_batch,
        "max_steps": REPEATS + 1,
        "gradient_accumulation_steps": recipe.batch_size // recipe.micro_batch,
        "max_grad_norm": recipe.clip,
        "optim": optimizer,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    if method != "sft":
        settings["beta"] = recipe.lambda_or if method == "orpo" else recipe.beta
    if profile.gradient_checkpointing:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if method == "dpo" and recipe.nll_weight:
        settings |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, recipe.nll_weight]}
    return settings


def trl_steps(found: Found, profile: Profile, method: str, model, rows: dict) -> None:
    """Steps of TRL's trainer with the settings of the recipe."""
    import datasets

    device = device_and_precision()[0]
    with phase(found, "preparation"):
        reference = models.frozen_copy(model) if method == "dpo" and not profile.lora else None
        adapter = models.lora_settings(profile) if profile.lora else None
        settings = trl_settings(profile, method, device)
        trainer = trl_trainer(method, model, reference, device, adapter, **settings)
    sides = ("chosen",) if method == "sft" else ("chosen", "rejected")
    as_theirs = {"sft": sft_row, "dpo": dict, "orpo": orpo_row}[method]
    for kind, each in rows.items():
        watch = StepTimes(device)
        trainer.train_dataset = datasets.Dataset.from_list([as_theirs(row) for row in each])
        trainer.add_callback(watch)
        with phase(found, f"steps, {kind}"):
            trainer.train()
        trainer.remove_callback(watch)
        found.seconds[kind] = durations(watch.ends)
        found.tokens[kind] = tokens_per_step(each, sides, REPEATS + 1)
    found.paged = paged_bytes(trainer.optimizer)


def sft_row(row: dict) -> dict:
    """A row as TRL's SFT trainer tokenises it, scored on the response."""
    ids = row["prompt_ids"] + row["chosen_ids"]
    return {"input_ids": ids, "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"]}


def measure_part(task: dict) -> dict:
    """Args: `task`: profile, method, path (packed, simple or trl), quick, cap_bytes. Returns:
    `Found` as a dict.
    """
    device, found = device_and_precision()[0], Found(task["path"])
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, task["cap_bytes"] / total))
    with tempfile.TemporaryDirectory() as folder:
        profile, method = PROFILES[task["profile"]], task["method"]
        if task["quick"]:
            profile = tiny_sizes(profile, Path(folder))
        count = profile.recipes[method].batch_size * (REPEATS + 1)
        take_steps = trl_steps if task["path"] == "trl" else course_steps
        try:
            with phase(found, "building the model"):
                model = random_model(profile, device)
            rows = rows_of(profile, count, model.config.vocab_size)
            take_steps(found, profile, method, model, rows)
        except GONE:
            if not found.out_of_memory:
                raise
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found.device_used = total - free
    return asdict(found)


if __name__ == "__main__":
    print(json.dumps(measure_part(json.loads(sys.stdin.read()))))
