"""What every variant of a step works on: pairs of random tokens with real lengths, and models with
random weights. Neither changes what a step takes.
"""

import json
import random
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROW_PARTS = "prompt", "chosen", "rejected"
# Tokens of 64 pairs of HH-RLHF (harmless-base), under a BPE tokenizer trained on them.
LENGTHS = Path(__file__).parent / "hh_lengths.json"


def longer_row(lengths: list[int]) -> int:
    """Tokens of a pair's longer row, of [prompt, chosen, rejected]."""
    return lengths[0] + max(lengths[1:])


def lengths_of(row: dict) -> list[int]:
    """[prompt, chosen, rejected] in tokens."""
    return [len(row[f"{part}_ids"]) for part in ROW_PARTS]


def representative(lengths: list[list[int]], count: int) -> list[list[int]]:
    """Picks `count` pairs evenly over the lengths of their longer rows, shuffled.

    The pairs are sorted and cut into `count` equal parts; the middle one of each part is taken.
    """
    ordered = sorted(lengths, key=lambda each: (longer_row(each), each))
    chosen = [ordered[(2 * part + 1) * len(ordered) // (2 * count)] for part in range(count)]
    random.Random(0).shuffle(chosen)
    return chosen


def stored_lengths() -> list[list[int]]:
    return json.loads(LENGTHS.read_text(encoding="utf-8"))


def random_rows(lengths: list[list[int]], vocabulary: int) -> list[dict]:
    """Pairs of random tokens with these lengths: their text does not change what a step takes."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=draw).tolist()

    return [
        {f"{part}_ids": ids(length) for part, length in zip(ROW_PARTS, row, strict=True)}
        for row in lengths
    ]


def bench_model(size: dict, seed: int, device: str = "cpu"):
    """A model with random weights, without dropout: a GPT-2, or a Llama where `size` has the width
    inside a block.
    """
    torch.manual_seed(seed)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    names = {"n_layer": "layers", "n_embd": "width", "n_head": "heads", "vocab_size": "vocabulary"}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    kind, config = GPT2LMHeadModel, GPT2Config
    if "inner" in size:
        names = {"num_hidden_layers": "layers", "hidden_size": "width", "vocab_size": "vocabulary"}
        names |= {"num_attention_heads": "heads", "num_key_value_heads": "key_heads"}
        names |= {"intermediate_size": "inner"}
        kind, config, dropout = LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}
    sizes = {name: size[key] for name, key in names.items()}
    return kind(config(**sizes, **dropout, **tokens)).to(device)
