"""Small models, ragged rows and a very small profile for the tests; nothing here is under test."""

from dataclasses import replace

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from common import models as lab_models
from common.lab import stage_of
from common.models import train_tokenizer
from common.profiles import PROFILES, Profile
from common.training import Task, processes
from common.training.trainer import Trainer

EOS = 1


def assert_same(actual, expected, tolerance: float = 1e-12) -> None:
    """Equal to `tolerance`, relative and absolute, compared in float64."""
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gpt2(
    dtype=torch.float64, seed: int = 0, vocabulary: int = 23, positions: int = 64, width: int = 16
):
    """A GPT-2 of two layers. Its weights are ten times the usual size, so that its predictions are
    far from uniform.
    """
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).to(dtype).eval()


def ragged_rows(count: int = 5, vocabulary: int = 23, seed: int = 0) -> list[dict]:
    """Tokenised pairs of all lengths, each response ending with EOS; the shortest response is EOS
    alone.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=draw).tolist()

    shapes = [
        (1, 0, 7),
        (9, 4, 1),
        (3, 11, 2),
        (5, 6, 6),
        (12, 2, 0),
        (2, 8, 3),
        (7, 1, 5),
        (4, 3, 9),
    ]
    return [
        {
            "prompt_ids": ids(prompt),
            "chosen_ids": ids(chosen) + [EOS],
            "rejected_ids": ids(rejected) + [EOS],
        }
        for prompt, chosen, rejected in shapes[:count]
    ]


def naive_token_logps(
    model, prompt_ids: list[int], response_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p of the prompt's tokens from the second on, log p of the response's tokens): one row,
    no padding.
    """
    row = torch.tensor([[*prompt_ids, *response_ids]])
    logps = torch.log_softmax(model(row).logits[0].double(), dim=-1)
    picked = torch.stack(
        [logps[position - 1, row[0, position]] for position in range(1, row.shape[1])]
    )
    return picked[: len(prompt_ids) - 1], picked[len(prompt_ids) - 1 :]


class Bigram(torch.nn.Module):
    """A model whose logits are a table, row by last token, to look up every log-probability."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table, self.head = torch.nn.Parameter(table), torch.nn.Identity()
        self.device = table.device

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return type("Output", (), {"logits": self.head(self.table[input_ids])})()


def tokenizer(vocabulary: int = 400):
    """A byte-level BPE tokenizer trained on one short dialogue."""
    text = "\n\nHuman: What is the kettle for?"
    text += "\n\nAssistant: The kettle is for boiling water, since it does that best."
    return train_tokenizer([text] * 3, vocabulary)


def metaspace_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2 and Mistral: BOS, and '▁' before every text and in place
    of each space.
    """
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    bpe.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def micro_profile(**changes) -> Profile:
    """The smoke profile with hardly any data and a model of one thin layer: a stage trains in a
    second or two.
    """
    smoke = PROFILES["smoke"]
    small = {"base": {"epochs": 0.5}, "sft": {"epochs": 1.0}, "dpo": {"epochs": 2.0, "lr": 2e-3}}
    recipes = {
        name: replace(
            recipe, batch_size=8, micro_batch=8, evaluations=2, **small.get(name, {"epochs": 1.0})
        )
        for name, recipe in smoke.recipes.items()
    }
    sizes = {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "vocabulary": 500,
        "plain_lines": 120,
        "demonstrations": 60,
        "pairs": 40,
        "held_out": 8,
        "samples": 1,
        "max_length": 160,
        "max_new_tokens": 12,
    }
    return replace(smoke, recipes=recipes, **{**sizes, **changes})


def make_trainer(
    lab, stage, folder, dtype=torch.float32, attention="sdpa", reference="sft", seed=None, **changes
) -> Trainer:
    """A trainer that is ready to step, outside `train` and without held-out measures."""
    kind = stage_of(stage)
    rows = lab.train_pairs if kind.rows == "pairs" else lab.demonstrations
    recipe = replace(lab.profile.recipes[stage], **changes)
    task = Task(
        name=stage,
        method=kind.method,
        recipe=recipe,
        rows=rows.to_list(),
        folder=folder,
        shared=folder,
        seed=lab.seed if seed is None else seed,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a reward model's new head
        source, head = lab.source("sft"), kind.method == "reward"
        policy = lab_models.load_model(source, lab.profile, reward_head=head).to(dtype)
    frozen = None
    if kind.method == "dpo":
        frozen = lab_models.freeze(lab.load(reference).to(dtype))
    for model in (policy, frozen):
        if model is not None and not head:
            model.set_attn_implementation(attention)
    return Trainer(task, processes.new_accelerator(), policy, frozen)


def take_step(trainer: Trainer) -> dict[str, float]:
    """One optimiser step, as the loop takes it."""
    rows = trainer.next_batch()
    return trainer.step(rows, trainer.backward(rows))
