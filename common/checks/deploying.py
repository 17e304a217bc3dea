"""Checks of the exercises of notebook 1.8-04.

The expected values are computed here, by another route than the worked answers.
"""

import math
from itertools import product

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.checks import close


def check_cache_bytes(fn):
    one = fn(1, 1, 1, 1, 1, 1)
    yield "keys and values: 1 layer, 1 head of width 1, 1 token, 1 byte each are 2 bytes", one == 2
    gpt2 = fn(12, 12, 64, 1024, 1, 2)
    yield "GPT-2 (12 layers, 12 heads of 64), 1,024 tokens: 36 MiB", gpt2 == 36 * 2**20
    yield "8 rows need 8 times as much", fn(2, 4, 16, 100, 8, 4) == 8 * fn(2, 4, 16, 100, 1, 4)
    mistral = fn(32, 8, 128, 32768, 1, 2)
    yield "8 heads of 128 in 32 layers (Mistral 7B), 32,768 tokens: 4 GiB", mistral == 4 * 2**30


def check_round_in_blocks(fn):
    weights = torch.tensor([[1.0, -2.0, 0.5, 4.0], [100.0, 30.0, 0.0, 0.0]])
    before = weights.clone()
    result = fn(weights, 3, 2)
    yield "the shape stays", result.shape == weights.shape
    # 3 bits: levels -3 … 3. Blocks of 2: steps 2/3, 4/3, 100/3; a block of zeros.
    expected = [[4 / 3, -2.0, 0.0, 4.0], [100.0, 100 / 3, 0.0, 0.0]]
    yield "3 bits, blocks of 2: each block has its own step", close(result, expected, 1e-5)
    yield "a block of zeros stays zeros, not NaN", bool((result[1, 2:] == 0).all())
    is_kept = close(result[0, [1, 3]], [-2.0, 4.0], 1e-6)
    yield "the largest of each block is kept, whatever its sign", is_kept
    again = close(fn(result, 3, 2), result, 1e-5)
    yield "what is rounded already does not change again", again
    yield "the weights themselves are left as they were", torch.equal(weights, before)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 6, generator=draw, dtype=torch.float64)
    found = fn(noise, 4, 12)  # a block of 12 is two rows
    yield "float64 stays float64", found.dtype == torch.float64
    rows = noise.reshape(-1, 12).tolist()
    steps = [max(map(abs, row)) / 7 for row in rows]
    levels = [[round(x / step) * step for x in row] for row, step in zip(rows, steps, strict=True)]
    by_hand = torch.tensor(levels, dtype=torch.float64).reshape(8, 6)
    yield "4 bits: 15 levels in each block, also where it is two rows", close(found, by_hand, 1e-9)


def check_cached_decode(fn):
    settings = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "initializer_range": 1.0,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, **settings)).eval()
    read = []

    def note(_, positional, named):
        ids = positional[0] if positional else named["input_ids"]
        read.append(ids.shape[1])

    def without_cache(ids, count):
        for _ in range(count):
            with torch.no_grad():
                last = model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
        return ids[0, -count:].tolist()

    def with_cache(ids, count, end):
        read.clear()
        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            return [int(token) for token in fn(model, ids, count, end)]
        finally:
            hook.remove()

    never = -1
    for start in ([5, 17, 3], [40], [2, 2, 58, 9, 31, 7, 11]):
        ids = torch.tensor([start])
        right = with_cache(ids, 12, never) == without_cache(ids, 12)
        yield f"{len(start)} prompt tokens: the 12 new ones are those without a cache", right
        once = sum(read) - len(start) in (11, 12) and max(read) == len(start)
        yield "the prompt is read once, then one token at a time", once
        yield "the prompt is left as it was", ids.tolist() == [start]
    free = without_cache(ids, 12)
    end = free[4]
    stopped = with_cache(ids, 12, end) == free[: free.index(end) + 1]
    yield "it stops at the end token, and gives that back too", stopped
    yield "one new token, if one is asked for", with_cache(ids, 1, never) == free[:1]


def check_peeking_coin(fn):
    def counted(flips, looks):
        hits = 0
        for outcome in product((0, 1), repeat=flips * looks):
            heads = [sum(outcome[: flips * look]) for look in range(1, looks + 1)]
            z = [abs(2 * h - flips * k) / (flips * k) ** 0.5 for k, h in enumerate(heads, 1)]
            hits += any(value > 1.96 for value in z)
        return hits / 2 ** (flips * looks)

    tails = [math.comb(100, h) for h in range(101) if abs(2 * h - 100) / 10 > 1.96]
    one_look = close(fn(100, 1), sum(tails) / 2**100)
    yield "one look after 100 flips: the two tails of the binomial", one_look
    twelve = close(fn(1, 12), counted(1, 12))
    yield "a look after each of 12 flips: all 4,096 outcomes counted", twelve
    yield "a look after every 4 of 16", close(fn(4, 4), counted(4, 4))
    yield "more looks, more false alarms", fn(20, 10) > fn(40, 5) > fn(200, 1)
    rate = fn(20, 10)
    yield "ten looks at 200 fair flips: a false alarm in 15 to 25 % of runs", 0.15 < rate < 0.25
