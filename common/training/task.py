"""What a run is given, and how far it is: plain data, without the lab."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

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

    @property
    def sides(self) -> tuple[str, ...]:
        """The answers it learns from. ORPO with lambda 0 needs no rejected ones."""
        imitates = self.method in ("lm", "sft")
        imitates |= self.method == "orpo" and self.recipe.lambda_or == 0
        return ("chosen",) if imitates else ("chosen", "rejected")


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
