"""One part of `benchmarks.gpu`, in a process of its own: a profile, a method, and the course's step
or TRL's.

The course's step is that of `common.loop.Trainer`, TRL's that of its own `train()`: with
accumulation over micro-batches, clipping, optimiser and schedule. Reads a task as JSON from stdin,
prints what it found as JSON.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import GPT2Config, LlamaConfig, TrainerCallback

from benchmarks.measure import Peak
from benchmarks.variants import LENGTHS, orpo_row, random_rows, spread, trl_trainer
from common.memory.architectures import random_model
from common.memory.simulate import full_rows
from common.models import frozen_copy, lora_settings
from common.profiles import PROFILES, Profile, device_and_precision
from common.training.trainer import Trainer

PATHS = ("packed", "simple", "trl")
REPEATS = 3  # timed steps, after one to warm up
GONE = (torch.OutOfMemoryError, MemoryError)


@dataclass
class Found:
    """What a part takes. Bytes are of the GPU, weights included; on a CPU the resident memory of
    the process.
    """

    # the one that was taken: packed rows step aside where they do not give what simple rows give
    path: str
    peaks: dict[str, int] = field(default_factory=dict)  # bytes allocated, by phase
    reserved: int = 0  # bytes that torch took from the GPU to give these
    paged: int = 0  # bytes of optimiser state in memory that CUDA moves, which torch does not count
    # bytes in use on the GPU afterwards: those of the CUDA context, and of other programs, too
    device_used: int = 0
    seconds: dict[str, list[float]] = field(
        default_factory=dict
    )  # of each timed step, by kind of rows
    tokens: dict[str, float] = field(default_factory=dict)  # of a step, by kind of rows
    out_of_memory: str = ""  # the phase that did not fit


def tiny_sizes(profile: Profile, folder: Path) -> Profile:
    """The profile with a model, lengths and batches that a CPU takes a moment for; all other
    settings are its own.
    """
    sizes = {"vocab_size": 128, "max_position_embeddings": 64}
    if profile.four_bit:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            **sizes,
        )
    else:
        config = GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    config.save_pretrained(folder)
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
    """So many pairs, at full length, and as long as those of the data
    (`benchmarks/hh_lengths.json`).
    """
    stored = json.loads(LENGTHS.read_text(encoding="utf-8"))
    sample = [
        shortened(lengths, profile.max_length)
        for lengths in spread(stored * (1 + count // len(stored)), count)
    ]
    return {
        "full": random_rows([full_length(profile)] * count, vocabulary),
        "sample": random_rows(sample, vocabulary),
    }


def tokens_per_step(rows: list[dict], sides: tuple[str, ...], steps: int) -> float:
    """Prompt and response of each side, as the loop counts them."""
    return (
        sum(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in sides)
        / steps
    )


class Prompts:
    """Stands for a tokenizer: every prompt is half of the longest row."""

    pad_token_id, eos_token_id = 0, 0

    def __init__(self, length: int):
        self.length = length

    def __call__(self, texts: list[str]) -> dict:
        return {"input_ids": [[2] * self.length for _ in texts]}

    def decode(self, *_, **__) -> str:
        return ""


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(
    found: Found, profile: Profile, method: str, device: str, model, rows: dict[str, list[dict]]
) -> None:
    """Steps of the course's loop, and one of its evaluations."""
    recipe = replace(profile.recipes[method], path=found.path)
    held_out = random_rows([full_length(profile)] * profile.eval_batch, model.config.vocab_size)
    lab = SimpleNamespace(
        profile=profile,
        tokenizer=Prompts(full_length(profile)[0]),
        seed=0,
        test_pairs=held_out,
        prompts=[""] * 10**3,
        data=SimpleNamespace(world=None),
        folder=None,
    )
    trainer = Trainer(lab, method, recipe, rows["full"], held_out, None)
    with phase(found, "preparation", device):
        needs_copy = method == "dpo" and not profile.lora
        trainer.build(model, frozen_copy(model) if needs_copy else None)
    found.path = trainer.path
    with phase(
        found, "first step", device
    ):  # in which operations are counted, by the simple path too
        trainer.step()
    for kind, each in rows.items():
        trainer.rows, found.seconds[kind] = each, []
        found.tokens[kind] = tokens_per_step(each, trainer.sides, trainer.per_epoch)
        with phase(found, f"steps, {kind}", device):
            for _ in range(REPEATS + 1):
                start = clock(device)
                trainer.step()
                found.seconds[kind].append(clock(device) - start)
        found.seconds[kind] = found.seconds[kind][1:]
    found.paged = paged_bytes(trainer.optimizer)
    with phase(found, "held-out evaluation", device):
        trainer.evaluate()


def paged_bytes(optimizer) -> int:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(value.nbytes for value in state if getattr(value, "is_paged", False))


class Watch(TrainerCallback):
    """Notes when each step of a library's trainer ended."""

    def __init__(self, device: str):
        self.device, self.ends = device, []

    def on_step_end(self, *_, **__) -> None:
        self.ends.append(clock(self.device))


def trl(
    found: Found, profile: Profile, method: str, device: str, model, rows: dict[str, list[dict]]
) -> None:
    """Steps of TRL's trainer with the settings of the recipe."""
    import datasets

    recipe, dtype = profile.recipes[method], device_and_precision()[1]
    paged = profile.optimizer == "paged_adamw_8bit" and device == "cuda"
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
        "optim": "paged_adamw_8bit"
        if paged
        else "adamw_torch_fused"
        if device == "cuda"
        else "adamw_torch",
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    if method != "sft":
        settings["beta"] = recipe.lambda_or if method == "orpo" else recipe.beta
    if settings["gradient_checkpointing"]:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if method == "dpo" and recipe.nll_weight:
        settings |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, recipe.nll_weight]}
    with phase(found, "preparation", device):
        reference = frozen_copy(model) if method == "dpo" and not profile.lora else None
        adapter = lora_settings(model, profile) if profile.lora else None
        trainer = trl_trainer(method, model, reference, device, adapter, **settings)
    sides = ("chosen",) if method == "sft" else ("chosen", "rejected")
    for kind, each in rows.items():
        watch, as_theirs = Watch(device), {"sft": sft_row, "dpo": dict, "orpo": orpo_row}[method]
        trainer.train_dataset = datasets.Dataset.from_list([as_theirs(row) for row in each])
        trainer.add_callback(watch)
        with phase(found, f"steps, {kind}", device):
            trainer.train()
        trainer.remove_callback(watch)
        found.seconds[kind] = [
            end - start for start, end in zip(watch.ends, watch.ends[1:], strict=False)
        ]
        found.tokens[kind] = tokens_per_step(each, sides, REPEATS + 1)
    found.paged = paged_bytes(trainer.optimizer)


def sft_row(row: dict) -> dict:
    """A row as TRL's SFT trainer tokenises it, scored on the response."""
    ids = row["prompt_ids"] + row["chosen_ids"]
    return {"input_ids": ids, "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"]}


class phase(Peak):
    """Notes the peak of a block under its name, and the block's name if memory runs out in it."""

    def __init__(self, found: Found, name: str, device: str):
        super().__init__(device)
        self.found, self.name = found, name

    def __exit__(self, kind, *_) -> None:
        super().__exit__()
        self.found.peaks[self.name] = self.peak
        if self.device == "cuda":
            self.found.reserved = max(self.found.reserved, torch.cuda.max_memory_reserved())
        if kind and issubclass(kind, GONE):
            self.found.out_of_memory = self.name


def measure(task: dict) -> dict:
    """Args: `task`: profile, method, path (one of PATHS), quick, cap_bytes. Returns: `Found` as a
    dict.
    """
    device, found = device_and_precision()[0], Found(task["path"])
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, task["cap_bytes"] / total))
    with tempfile.TemporaryDirectory() as folder:
        profile, method = PROFILES[task["profile"]], task["method"]
        if task["quick"]:
            profile = tiny_sizes(profile, Path(folder))
        recipe = profile.recipes[method]
        try:
            with phase(found, "building the model", device):
                model = random_model(profile, device)
            rows = rows_of(profile, recipe.batch_size * (REPEATS + 1), model.config.vocab_size)
            (trl if task["path"] == "trl" else ours)(found, profile, method, device, model, rows)
        except GONE:
            if not found.out_of_memory:
                raise
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found.device_used = total - free
    return asdict(found)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.read()))))
