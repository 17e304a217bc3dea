"""The ways to take one training step that `benchmarks.step` compares, on the same model, pairs and
loss.
"""

import importlib
import json
import os
import random
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from common.data import collate, load_pairs, tokenize_pairs
from common.logprobs import response_logps
from common.losses import objective, scored_tokens
from common.models import freeze, train_tokenizer
from common.profiles import Recipe
from common.training.reference import COLUMNS, from_columns

BETA, LAMBDA, MAX_LENGTH, PAD = 0.1, 0.1, 512, 1
RECIPES = {
    "dpo": Recipe(lr=1, beta=BETA),
    "orpo": Recipe(lr=1, lambda_or=LAMBDA, nll_on_prompt=True),
}
PARTS = "prompt", "chosen", "rejected"
LENGTHS = Path(__file__).parent / "hh_lengths.json"
SAMPLE = (
    "hh-rlhf/harmless-base-sample.jsonl.gz"  # looked for in ../shared/data, or where HH_SAMPLE says
)


def sample_file() -> Path | None:
    """A sample of real HH-RLHF rows on this machine, if there is one."""
    path = Path(
        os.environ.get("HH_SAMPLE")
        or Path(__file__).resolve().parents[2] / "shared" / "data" / SAMPLE
    )
    return path if path.is_file() else None


def row_length(lengths: list[int]) -> int:
    """Tokens of a pair's longer row, of [prompt, chosen, rejected]."""
    return lengths[0] + max(lengths[1:])


def spread(lengths: list[list[int]], count: int) -> list[list[int]]:
    """So many pairs that stand for all: the middle one of each of `count` equal parts, by length of
    row, shuffled.
    """
    ordered = sorted(lengths, key=lambda each: (row_length(each), each))
    chosen = [ordered[(2 * part + 1) * len(ordered) // (2 * count)] for part in range(count)]
    random.Random(0).shuffle(chosen)
    return chosen


def lengths_of(sample: Path) -> list[list[int]]:
    """[prompt, chosen, rejected] in tokens, of 64 pairs of a sample, under a BPE tokenizer trained
    on it.
    """
    pairs, _ = load_pairs(str(sample))
    tokenizer = train_tokenizer(
        [row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected")], 50257
    )
    rows = tokenize_pairs(pairs, tokenizer, MAX_LENGTH)[0].to_list()
    return spread([[len(row[f"{part}_ids"]) for part in PARTS] for row in rows], 64)


def pair_lengths() -> tuple[list[list[int]], str]:
    """The lengths and where they are from: the sample, or the list that was once made from it in
    the same way.
    """
    if sample := sample_file():
        return lengths_of(sample), f"measured on {sample.name}"
    return json.loads(
        LENGTHS.read_text(encoding="utf-8")
    ), f"{LENGTHS.name}, once measured on {Path(SAMPLE).name}"


def random_rows(lengths: list[list[int]], vocabulary: int) -> list[dict]:
    """Pairs of these lengths of random tokens: to a model with random weights one text is like
    another.
    """
    draw = torch.Generator().manual_seed(0)
    return [
        {
            f"{part}_ids": torch.randint(2, vocabulary, (length,), generator=draw).tolist()
            for part, length in zip(PARTS, row, strict=True)
        }
        for row in lengths
    ]


def new_model(size: dict, seed: int, device: str = "cpu") -> GPT2LMHeadModel:
    """A GPT-2 with random weights, without dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=size["vocabulary"],
        n_layer=size["layers"],
        n_embd=size["width"],
        n_head=size["heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config).to(device)


@dataclass
class Bench:
    """What every variant works on. `trainers` holds TRL's, made when first asked for."""

    policy: GPT2LMHeadModel
    reference: GPT2LMHeadModel | None
    device: str
    trainers: dict

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
    return Bench(new_model(size, 0, device), freeze(new_model(size, 1, device)), device, {})


def with_reference_columns(bench: Bench, rows: list[dict]) -> list[dict]:
    """The rows with what the reference says of them, under our names and under TRL's."""
    new = []
    for row in rows:
        with torch.no_grad():
            logps = response_logps(bench.reference, collate([row], PAD, bench.device))
        sums = {side: getattr(logps, side).sums.item() for side in COLUMNS}
        trl_names = {f"ref_{side}_logps": value for side, value in sums.items()}
        new.append(row | {COLUMNS[side]: value for side, value in sums.items()} | trl_names)
    return new


# Each of these returns the loss of one batch of rows, a scalar to call `backward` on.


def ours(path: str, cached: bool = False, fused: bool = True) -> Callable:
    def loss(bench: Bench, method: str, rows: list[dict]) -> torch.Tensor:
        batch, known = collate(rows, PAD, bench.device), None
        with fused_gelu(bench.policy, bench.reference) if fused else nullcontext():
            if method == "dpo" and cached:
                known = from_columns(rows, batch)
            elif method == "dpo":
                with torch.no_grad():
                    known = response_logps(bench.reference, batch, path)
            return ours_given(bench, method, rows, path, known, batch)

    return loss


@contextmanager
def fused_gelu(*models: GPT2LMHeadModel | None):
    """GPT-2's GELU in its fused form, as `common.models.load_model` makes it, while a loss is
    computed.
    """
    blocks = [block for model in models if model for block in model.transformer.h]
    stock = [block.mlp.act for block in blocks]
    try:
        for block in blocks:
            block.mlp.act = ACT2FN["gelu_pytorch_tanh"]
        yield
    finally:
        for block, act in zip(blocks, stock, strict=True):
            block.mlp.act = act


def ours_given(
    bench: Bench, method: str, rows: list[dict], path: str, known, batch: dict
) -> torch.Tensor:
    """Our loss where the reference's log-probabilities are known."""
    recipe = RECIPES[method]
    logps = response_logps(bench.policy, batch, path, score_prompt=recipe.nll_on_prompt)
    return objective(method, recipe, logps, known, len(rows), scored_tokens(rows, recipe))[0]


def padded(
    rows: list[dict], side: str, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids, attention mask, response mask) of one side, each (batch, length)."""
    ids = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row in rows]
    response = [
        torch.arange(len(row)) >= len(each["prompt_ids"])
        for row, each in zip(ids, rows, strict=True)
    ]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    ids = pad_sequence(ids, batch_first=True, padding_value=PAD)
    return ids.to(device), mask.to(device), pad_sequence(response, batch_first=True).to(device)


def textbook(bench: Bench, method: str, rows: list[dict]) -> torch.Tensor:
    """One forward per model and side, and log_softmax over the vocabulary at every position."""

    def token_logps(model, side: str):
        ids, mask, response = padded(rows, side, bench.device)
        logps = F.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1], dim=-1)
        return logps.gather(2, ids[:, 1:, None]).squeeze(2), mask[:, 1:], response[:, 1:]

    chosen, in_row, in_chosen = token_logps(bench.policy, "chosen")
    rejected, _, in_rejected = token_logps(bench.policy, "rejected")
    sums = (chosen * in_chosen).sum(1), (rejected * in_rejected).sum(1)
    if method == "dpo":
        with torch.no_grad():
            known = [
                (logps * mask).sum(1)
                for logps, _, mask in (
                    token_logps(bench.reference, side) for side in ("chosen", "rejected")
                )
            ]
        return -F.logsigmoid(BETA * ((sums[0] - known[0]) - (sums[1] - known[1]))).mean()
    means = sums[0] / in_chosen.sum(1), sums[1] / in_rejected.sum(1)
    odds = [mean - torch.log1p(-torch.exp(mean)) for mean in means]
    return -(chosen * in_row).sum() / in_row.sum() - LAMBDA * F.logsigmoid(odds[0] - odds[1]).mean()


def trl_trainer(method: str, policy, reference, device: str, adapter=None, **settings):
    """TRL's trainer for a method, on a dataset of one pair: the batches are handed to it, as it
    collates them.

    `adapter`: a LoRA configuration, which it applies in its own way. `settings`: fields of its
    configuration.
    """
    import datasets
    import trl

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    tokenizer = train_tokenizer(["\n\nHuman: Hello\n\nAssistant: Yes, hello."], 300)
    row = {"prompt": "\n\nHuman: Hello\n\nAssistant:", "chosen": " Yes", "rejected": " No"}
    defaults = {
        "max_length": MAX_LENGTH,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
    }
    extra = {"peft_config": adapter} if adapter else {}
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

        defaults["beta"] = LAMBDA
    elif method == "dpo":
        Config, Trainer, extra["ref_model"], defaults["beta"] = (
            trl.DPOConfig,
            trl.DPOTrainer,
            reference,
            BETA,
        )
    else:
        Config, Trainer, row = (
            trl.SFTConfig,
            trl.SFTTrainer,
            {"prompt": row["prompt"], "completion": row["chosen"]},
        )
    arguments = Config(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        **defaults | settings,
    )
    dataset = datasets.Dataset.from_list([row])
    return Trainer(
        model=policy, args=arguments, train_dataset=dataset, processing_class=tokenizer, **extra
    )


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
        batch = {
            name: value.to(bench.device) for name, value in trainer.data_collator(rows).items()
        }
        with response_only_head(compact):
            return trainer.compute_loss(trainer.model, batch)

    return loss


def orpo_row(row: dict) -> dict:
    """A row as TRL's ORPO trainer tokenises it."""
    new = {
        "prompt_input_ids": row["prompt_ids"],
        "prompt_attention_mask": [1] * len(row["prompt_ids"]),
    }
    for side in ("chosen", "rejected"):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        labels = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
        new |= {
            f"{side}_input_ids": ids,
            f"{side}_attention_mask": [1] * len(ids),
            f"{side}_labels": labels,
        }
    return new


def authors_trainer():
    """The ORPO authors' trainer class, from a clone of their repository that ORPO_AUTHORS names (it
    is no package).

    Raises: ImportError where there is none, or where what it needs (wandb among it) is not
        installed.
    """
    folder = os.environ.get("ORPO_AUTHORS")
    if not folder:
        raise ImportError(
            "it is no package: let ORPO_AUTHORS name a clone of github.com/xfactlab/orpo"
        )
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("src.orpo_trainer").ORPOTrainer
    finally:
        sys.path.remove(folder)


def authors(bench: Bench, method: str, rows: list[dict]) -> torch.Tensor:
    """The authors' own loss, which they round to bfloat16.

    They score one token past the end of an answer. Their attention masks therefore end one token
    early here, which no scored token sees.
    """
    cls, loss_of = authors_trainer(), torch.nn.CrossEntropyLoss(reduction="none")
    stub = types.SimpleNamespace(
        pad=PAD, alpha=LAMBDA, disable_prompt_loss=False, label_smoother=None, loss_fct=loss_of
    )
    stub.compute_logps = types.MethodType(cls.compute_logps, stub)
    wide = max(
        len(row["prompt_ids"]) + len(row[f"{side}_ids"])
        for row in rows
        for side in ("chosen", "rejected")
    )
    prompt = torch.tensor(
        [[1] * len(row["prompt_ids"]) + [0] * (wide - len(row["prompt_ids"])) for row in rows]
    )
    batch = {"attention_mask": prompt.to(bench.device)}
    for name, side in (("positive", "chosen"), ("negative", "rejected")):
        ids, mask, _ = padded(rows, side, bench.device)
        room = (0, wide - ids.shape[1])
        shorter = F.pad(mask[:, 1:], (0, room[1] + 1))
        batch |= {
            f"{name}_input_ids": F.pad(ids, room, value=PAD),
            f"{name}_attention_mask": shorter,
        }
    sys.modules["src.orpo_trainer"].wandb.log = lambda *_: None
    return cls.compute_loss(stub, bench.policy, batch)


@dataclass(frozen=True)
class Variant:
    """A way to compute the loss of a batch."""

    label: str
    loss: Callable
    loss_tolerance: float = (
        1e-12  # against the naive float64 computation, with the model in float64
    )
    gradient_tolerance: float = 1e-12
    bucketed: bool = False  # batches of pairs of like length
    cached: bool = False  # needs no reference model

    def batches(self, rows: list[dict], size: int) -> list[list[dict]]:
        if self.bucketed:
            rows = sorted(
                rows, key=lambda row: row_length([len(row[f"{part}_ids"]) for part in PARTS])
            )
        return [rows[at : at + size] for at in range(0, len(rows), size)]


# TRL computes its head and its odds ratio in float32 whatever the model's precision.
SINGLE = {"loss_tolerance": 1e-5, "gradient_tolerance": 1e-5}
VARIANTS = {
    "trl": Variant("TRL", trl(), **SINGLE),
    "trl_bucketed": Variant("TRL, bucketed by length", trl(), bucketed=True, **SINGLE),
    "trl_precomputed": Variant(
        "TRL, reference precomputed", trl(precomputed=True), cached=True, **SINGLE
    ),
    "trl_compact": Variant("TRL, compact head", trl(compact=True), **SINGLE),
    "trl_best": Variant("TRL, all three", trl(True, True), bucketed=True, cached=True, **SINGLE),
    "textbook": Variant("textbook", textbook),
    "authors": Variant("the authors' code", authors, loss_tolerance=1e-2, gradient_tolerance=1e-5),
    "simple": Variant("ours, simple", ours("simple")),
    "packed_unfused": Variant("ours, packed, GELU not fused", ours("packed", fused=False)),
    "packed": Variant("ours, packed", ours("packed")),
    "packed_cached": Variant(
        "ours, packed, reference cached", ours("packed", cached=True), cached=True
    ),
}
