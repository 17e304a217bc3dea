"""The ways to take one training step that `benchmarks.step` compares, on the same model, pairs and
loss.
"""

import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.activations import ACT2FN

from benchmarks.materials import bench_model, lengths_of, longer_row
from common import packed
from common.data import collate
from common.logprobs import response_logps
from common.losses import objective, scored_tokens
from common.models import freeze, train_tokenizer
from common.profiles import Recipe
from common.training.reference import REFERENCE_COLUMNS, from_columns

BENCH_BETA, BENCH_LAMBDA, MAX_LENGTH = 0.1, 0.1, 512
STEP_RECIPES = {
    "dpo": Recipe(lr=1, beta=BENCH_BETA),
    "orpo": Recipe(lr=1, lambda_or=BENCH_LAMBDA, nll_on_prompt=True),
}


@dataclass
class Bench:
    """What every variant works on. `trainers` holds TRL's, made when first asked for."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    device: str = "cpu"
    trainers: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Bench":
        """In place: float64 and back changes no weight."""
        for model in filter(None, (self.policy, self.reference)):
            model.to(dtype)
        return self

    def trainer(self, method: str):
        if method not in self.trainers:
            self.trainers[method] = trl_trainer(method, self.policy, self.reference, self.device)
        return self.trainers[method]


def new_bench(size: dict, device: str = "cpu") -> Bench:
    """Policy and reference differ, so that no term of the loss is zero."""
    return Bench(bench_model(size, 0, device), freeze(bench_model(size, 1, device)), device)


def with_reference_columns(bench: Bench, rows: list[dict]) -> list[dict]:
    """The rows with the reference's log-probabilities, under our names and under TRL's."""
    new = []
    for row in rows:
        with torch.no_grad():
            logps = response_logps(bench.reference, collate([row], device=bench.device))
        sums = {side: getattr(logps, side).sums.item() for side in REFERENCE_COLUMNS}
        theirs = {f"ref_{side}_logps": value for side, value in sums.items()}
        new.append(row | {REFERENCE_COLUMNS[side]: value for side, value in sums.items()} | theirs)
    return new


# --- ours. Each of these returns the loss of one batch of rows, a scalar to call `backward` on.


def ours(path: str, cached: bool = False, fused: bool = True) -> Callable:
    logps_by_path = packed.PATHS[path]

    def loss(bench: Bench, method: str, rows: list[dict]) -> torch.Tensor:
        batch, known = collate(rows, device=bench.device), None
        with fused_gelu(bench.policy, bench.reference) if fused else nullcontext():
            if method == "dpo" and cached:
                known = from_columns(rows, batch)
            elif method == "dpo":
                with torch.no_grad():
                    known = logps_by_path(bench.reference, batch)
            return loss_given(bench, method, rows, batch, known, logps_by_path)

    return loss


def loss_given(
    bench: Bench, method: str, rows: list[dict], batch: dict, known, logps_by_path: Callable
) -> torch.Tensor:
    """Our loss of a batch. `known`: the reference's log-probabilities; ORPO has none."""
    recipe = STEP_RECIPES[method]
    logps = logps_by_path(bench.policy, batch, recipe.nll_on_prompt)
    return objective(method, recipe, logps, known, len(rows), scored_tokens(rows, recipe))[0]


@contextmanager
def fused_gelu(*models: PreTrainedModel | None):
    """GPT-2's GELU in its fused form while a loss is computed, as `common.models` loads it."""
    blocks = [
        block
        for model in models
        if isinstance(model, GPT2LMHeadModel)
        for block in model.transformer.h
    ]
    stock = [block.mlp.act for block in blocks]
    try:
        for block in blocks:
            block.mlp.act = ACT2FN["gelu_pytorch_tanh"]
        yield
    finally:
        for block, act in zip(blocks, stock, strict=True):
            block.mlp.act = act


# --- the textbook's


def textbook(bench: Bench, method: str, rows: list[dict]) -> torch.Tensor:
    """One forward per model and side, and log_softmax over the vocabulary at every position."""

    def logps_and_masks(model, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the tokens, which of them are in a row, and which in a response."""
        ids = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row in rows]
        starts = torch.tensor([len(row["prompt_ids"]) for row in rows], device=bench.device)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        ids = pad_sequence(ids, batch_first=True)
        ids, mask = ids.to(bench.device), mask.to(bench.device)
        position = torch.arange(ids.shape[1], device=bench.device)
        response = (mask * (position >= starts[:, None]))[:, 1:]
        logps = F.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1], dim=-1)
        return logps.gather(2, ids[:, 1:, None]).squeeze(2), mask[:, 1:], response

    chosen, in_row, in_chosen = logps_and_masks(bench.policy, "chosen")
    rejected, _, in_rejected = logps_and_masks(bench.policy, "rejected")
    sums = (chosen * in_chosen).sum(1), (rejected * in_rejected).sum(1)
    if method == "dpo":
        with torch.no_grad():
            known = []
            for side in ("chosen", "rejected"):
                logps, _, mask = logps_and_masks(bench.reference, side)
                known.append((logps * mask).sum(1))
        return -F.logsigmoid(BENCH_BETA * ((sums[0] - known[0]) - (sums[1] - known[1]))).mean()
    means = sums[0] / in_chosen.sum(1), sums[1] / in_rejected.sum(1)
    odds = [mean - torch.log1p(-torch.exp(mean)) for mean in means]
    return (
        -(chosen * in_row).sum() / in_row.sum()
        - BENCH_LAMBDA * F.logsigmoid(odds[0] - odds[1]).mean()
    )


# --- TRL's


def trl_trainer(method: str, policy, reference, device: str, adapter=None, **settings):
    """TRL's trainer for a method, on a dataset of one pair: batches are handed to it later.

    Args: `adapter`: a LoRA configuration, which it applies in its own way; `settings`: fields of
        its configuration.
    """
    import datasets
    import trl

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    tokenizer = train_tokenizer(["\n\nHuman: Hello\n\nAssistant: Yes, hello."], 300)
    row = {"prompt": "\n\nHuman: Hello\n\nAssistant:", "chosen": " Yes", "rejected": " No"}
    extra = {"peft_config": adapter} if adapter else {}
    if method == "orpo":
        from trl.experimental import orpo

        config, trainer = orpo.ORPOConfig, orpo.ORPOTrainer
        settings = {"beta": BENCH_LAMBDA} | settings
    elif method == "dpo":
        config, trainer, extra["ref_model"] = trl.DPOConfig, trl.DPOTrainer, reference
        settings = {"beta": BENCH_BETA} | settings
    else:
        config, trainer = trl.SFTConfig, trl.SFTTrainer
        row = {"prompt": row["prompt"], "completion": row["chosen"]}
    settings = {
        "max_length": MAX_LENGTH,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    } | settings
    dataset = datasets.Dataset.from_list([row])
    given = {"args": config(**settings), "train_dataset": dataset, "processing_class": tokenizer}
    return trainer(model=policy, **given, **extra)


@contextmanager
def response_only_head(force: bool):
    """TRL's head on response positions only, as on a GPU; on a CPU it scores every position unless
    forced.
    """
    from trl.trainer import utils

    stock = utils._use_triton
    utils._use_triton = (lambda device: True) if force else stock
    try:
        yield
    finally:
        utils._use_triton = stock


def trl(precomputed: bool = False, compact: bool = False) -> Callable:
    def loss(bench: Bench, method: str, rows: list[dict]) -> torch.Tensor:
        trainer = bench.trainer(method)
        if method == "orpo":
            batch = trainer.data_collator([orpo_row(row) for row in rows])
            return trainer.get_batch_loss_metrics(trainer.model, batch)[0]
        trainer.precompute_ref_logps = precomputed
        batch = trainer.data_collator(rows)
        batch = {name: value.to(bench.device) for name, value in batch.items()}
        with response_only_head(compact):
            return trainer.compute_loss(trainer.model, batch)

    return loss


def orpo_row(row: dict) -> dict:
    """A row as TRL's ORPO trainer tokenises it."""
    prompt = row["prompt_ids"]
    new = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer = row[f"{side}_ids"]
        new[f"{side}_input_ids"] = prompt + answer
        new[f"{side}_attention_mask"] = [1] * len(prompt + answer)
        new[f"{side}_labels"] = [-100] * len(prompt) + answer
    return new


# --- all of them


@dataclass(frozen=True)
class StepVariant:
    """A way to compute the loss of a batch.

    `tolerance`: of loss and gradient against the naive computation, all in float64.
    """

    label: str
    loss: Callable
    tolerance: float = 1e-12
    bucketed: bool = False  # batches of pairs of like length
    cached: bool = False  # needs no reference model

    def batches(self, rows: list[dict], size: int) -> list[list[dict]]:
        if self.bucketed:
            rows = sorted(rows, key=lambda row: longer_row(lengths_of(row)))
        return [rows[at : at + size] for at in range(0, len(rows), size)]


SINGLE = 1e-5  # TRL computes its head and its odds ratio in float32 whatever the model's precision
STEP_VARIANTS = {
    "trl": StepVariant("TRL", trl(), SINGLE),
    "trl_bucketed": StepVariant("TRL, bucketed by length", trl(), SINGLE, bucketed=True),
    "trl_precomputed": StepVariant("TRL, reference precomputed", trl(True), SINGLE, cached=True),
    "trl_compact": StepVariant("TRL, compact head", trl(compact=True), SINGLE),
    "trl_best": StepVariant("TRL, all three", trl(True, True), SINGLE, bucketed=True, cached=True),
    "textbook": StepVariant("textbook", textbook),
    "simple": StepVariant("ours, simple", ours("simple")),
    "packed_unfused": StepVariant("ours, packed, GELU not fused", ours("packed", fused=False)),
    "packed": StepVariant("ours, packed", ours("packed")),
    "packed_cached": StepVariant(
        "ours, packed, reference cached", ours("packed", True), cached=True
    ),
}
