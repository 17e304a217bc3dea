"""What a run is given, and how far it is: plain data, without the lab."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from common.profiles import Recipe


@dataclass(frozen=True)
class Source:
    """Where a run starts and what it learns from. None: what is usual for the stage.

    `reference`: the stage it is compared with; ORPO takes one only to report KL against it.
    `pairs`: other training pairs, with prompt, chosen and rejected.
    """

    parent: str | None = None
    reference: str | None = None
    pairs: Dataset | None = None


@dataclass(frozen=True)
class Session:
    """How a run is carried out; it decides no weight.

    `resume`: go on from the newest checkpoint with the same fingerprint. `checkpoint_every`: steps
    between checkpoints; None: at every evaluation.
    """

    resume: bool = True
    checkpoint_every: int | None = None


@dataclass
class Task:
    """What is trained on what: all that the loop needs beside its models."""

    name: str  # printed before each line
    method: str  # "lm", "sft", "dpo", "orpo" or "reward"
    recipe: Recipe
    rows: list[dict]  # tokenised training rows
    folder: Path  # of the run
    shared: Path  # of the lab: cached log-probabilities of the reference
    seed: int = 0
    longest: int = 0  # tokens of the longest row that is ever scored, held-out rows included
    eval_batch: int = 64  # rows per forward pass without gradients
    optimizer: str = "adamw"
    precision: str = "float32"  # of forward and backward passes

    @property
    def sides(self) -> tuple[str, ...]:
        """The answers it learns from. ORPO with lambda 0 needs no rejected ones."""
        imitates = self.method in ("lm", "sft")
        imitates |= self.method == "orpo" and self.recipe.lambda_or == 0
        return ("chosen",) if imitates else ("chosen", "rejected")

    def new_optimizer(self, parameters: list[Parameter], device: str) -> tuple[Optimizer, str]:
        """AdamW with the recipe's settings, and a note where another one was asked for; else "".

        On a GPU it is PyTorch's fused AdamW, which takes no temporary copy of the weights, or
        bitsandbytes' 8-bit one, whose moments are paged to the CPU when memory runs out.
        Args: `device`: "cpu" or "cuda".
        """
        recipe, paged = self.recipe, self.optimizer == "paged_adamw_8bit"
        settings = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
        if paged and device == "cuda":
            from bitsandbytes.optim import PagedAdamW8bit

            return PagedAdamW8bit(parameters, **settings), ""
        if device == "cuda":
            settings["fused"] = True
        note = f"paged 8-bit AdamW needs a CUDA GPU: plain AdamW on {device}" if paged else ""
        return AdamW(parameters, **settings), note


@dataclass
class Progress:
    """How far a run is, kept with each checkpoint. Seconds and bytes are of the first process."""

    fingerprint: str = ""
    step: int = 0
    tokens: int = 0
    best: float = math.inf  # held-out loss
    best_step: int | None = None
    since_best: int = 0  # evaluations since then
    stopped_early: bool = False
    warnings: list[str] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0
    aside: float = 0.0  # seconds of held-out measures, part of `wall`
    peak: int = 0
    reference_flops: float = 0.0
    # By path, the run's own and the simple one to compare methods by:
    padded: dict[str, int] = field(default_factory=dict)  # tokens as the model sees them
    flops_per_token: dict[str, float] = field(default_factory=dict)


def how_long(seconds: float, steps: int) -> str:
    """What a run will take, by the seconds of one step; "" where that is less than a minute."""
    if seconds * steps < 60:
        return ""
    minutes = f"about {seconds * steps / 60:.0f} minutes"
    return f"{minutes} for {steps} steps of {seconds:.0f} s, held-out measures not counted"


def row_length(row: dict, sides: tuple[str, ...]) -> int:
    """Tokens of the prompt with the longer of its answers."""
    return len(row["prompt_ids"]) + max(len(row.get(f"{side}_ids", ())) for side in sides)


def padded_tokens(batch: dict, sides: tuple[str, ...], path: str) -> int:
    """Tokens as the model sees them. Packed: each once; else every row as long as the longest."""
    if path == "packed":
        return sum(int(batch[f"{part}_lengths"].sum()) for part in ("prompt", *sides))
    ends = [batch["prompt_lengths"] + batch[f"{side}_lengths"] for side in sides]
    return len(sides) * len(batch["prompt_ids"]) * max(int(each.max()) for each in ends)
