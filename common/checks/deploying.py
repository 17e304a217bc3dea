"""Checks of the exercises of notebook 1.8-04.

The expected values are computed here, by another route than the worked answers.
"""

import math
from itertools import product

import torch

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
    result = fn(weights, 3, 2)
    yield "the shape stays", result.shape == weights.shape
    # 3 bits: levels -3 … 3. Blocks of 2: steps 2/3, 4/3, 100/3; a block of zeros.
    expected = [[4 / 3, -2.0, 0.0, 4.0], [100.0, 100 / 3, 0.0, 0.0]]
    yield "3 bits, blocks of 2: each block has its own step", close(result, expected, 1e-5)
    yield "a block of zeros stays zeros, not NaN", bool((result[1, 2:] == 0).all())
    largest = [float(result[0, 1]), float(result[0, 3])]
    yield "the largest of each block is kept exactly", largest == [-2.0, 4.0]
    again = close(fn(result, 3, 2), result, 1e-5)
    yield "what is rounded already does not change again", again
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    moved = (fn(noise, 8, 64) - noise).abs().amax(1)
    half_steps = noise.abs().amax(1) / 127 / 2
    are_small = bool((moved <= half_steps + 1e-7).all())
    yield "8 bits: no weight moves by more than half a step", are_small


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
