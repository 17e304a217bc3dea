"""Checks of the exercises of Lab 1.8, in the order of its notebooks.

The expected values are computed here, by another route than the worked answers.
"""

import math
from itertools import product

import torch

from common.checks import close
from common.logprobs import PairLogps, SideLogps

# Notebook 01


def check_length_bias(fn):
    def bias(*lengths):
        rows = [{"chosen_ids": [5] * c, "rejected_ids": [900] * r} for c, r in lengths]
        return fn(rows)

    yield "one pair whose chosen answer is longer: 1", bias((4, 3)) == 1
    yield "one pair whose chosen answer is shorter: 0", bias((3, 40)) == 0
    yield "equal lengths are half right", bias((6, 6)) == 0.5
    mixed = [(2, 1), (9, 1), (3, 3), (1, 2), (1, 30), (1, 3), (2, 3), (7, 8)]
    yield "2 longer, 1 equal, 5 shorter: 2.5 of 8", close(bias(*mixed), 0.3125)
    yield "by how much does not count: only which is longer", bias((2, 1), (1, 500)) == 0.5
    swapped = bias(*((rejected, chosen) for chosen, rejected in mixed))
    yield "swapping chosen and rejected gives 1 minus it", close(swapped, 0.6875)


def check_shared_rise(fn):
    def logps(chosen, rejected, lengths):
        sums = [torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected)]
        return PairLogps(*(SideLogps(*side) for side in zip(sums, lengths, strict=True)))

    def share(chosen, rejected, rejected_lengths=(4, 6)):
        lengths = torch.tensor([2, 8]), torch.tensor(rejected_lengths)
        before = logps([-20.0, -60.0], [-30.0, -50.0], lengths)
        return fn(before, logps(chosen, rejected, lengths))

    half = share([-10.0, -50.0], [-25.0, -45.0])
    yield "chosen up 20 nats, rejected up 10, 10 tokens each: one half", close(half, 0.5)
    equal = share([-15.0, -55.0], [-26.0, -44.0])
    yield "rejected rise as much as chosen: 1", close(equal, 1)
    yield "rejected fall: negative", close(share([-10.0, -50.0], [-32.0, -53.0]), -0.25)
    halved = share([-10.0, -50.0], [-20.0, -40.0], rejected_lengths=(4, 16))
    yield "per token: the same nats over twice the tokens are half the rise", close(halved, 0.5)
    # 34 nats and 17 nats, over 10 tokens each
    uneven = share([-18.0, -28.0], [-30.0, -33.0])
    yield "every token counts the same: not the mean of row ratios", close(uneven, 0.5)
    try:
        share([-21.0, -60.0], [-20.0, -40.0])
        refused = False
    except ValueError:
        refused = True
    yield "where the chosen answers fall, it raises a ValueError", refused


def check_cohens_kappa(fn):
    a, b, tie = 1, -1, 0
    same = fn([a, b, tie, a], [a, b, tie, a])
    yield "full agreement on votes that vary: 1", close(same, 1)
    yield "agreement as by chance: 0", close(fn([a, a, b, b], [a, b, a, b]), 0)
    yield "always the opposite, evenly: -1", close(fn([a, b, a, b], [b, a, b, a]), -1)
    # Cohen's textbook case: 20 + 15 agree, 5 + 10 do not
    first, second = [a] * 25 + [b] * 25, [a] * 20 + [b] * 5 + [a] * 10 + [b] * 15
    yield "35 of 50 agree, half of that by chance: 0.4", close(fn(first, second), 0.4)
    # 90 agree, but p_e = 0.905
    rare = fn([a] * 95 + [b] * 5, [a] * 90 + [b] * 5 + [a] * 5)
    worthless = close(rare, -0.05 / 0.95, 1e-9)
    yield "90 % agreement on a vote that is nearly always A is worth nothing", worthless
    # p_o = 4/6, p_e = (2·3 + 2·1 + 2·2) / 36 = 1/3
    third = fn([a, a, b, b, tie, tie], [a, a, b, tie, tie, a])
    yield '"no difference" is a vote like the others', close(third, 0.5)
    constant = fn([a, a], [a, a])
    yield "one and the same vote throughout: not defined, nan", math.isnan(constant)


# Notebook 02


def check_safe_log_odds(fn):
    def tensor(*values, **options):
        return torch.tensor(values, dtype=torch.float64, **options)

    known = fn(tensor(math.log(0.5), math.log(0.75), math.log(0.2)))
    expected = [0.0, math.log(3), -math.log(4)]
    yield "p = 1/2, 3/4, 1/5: odds 1, 3, 1/4", close(known, expected)
    for x in (-1e-12, -1e-8, -1e-3, -0.69, -1.0, -50.0, -1e4):
        argument = tensor(x, requires_grad=True)
        value = fn(argument)
        (slope,) = torch.autograd.grad(value.sum(), argument)
        right = x + math.exp(x) if x < -40 else -math.log(math.expm1(-x))
        yield f"log p = {x:g}: the value", close(value, [right])
        is_right = close(slope * -math.expm1(x), [1.0])
        yield f"log p = {x:g}: the gradient, 1 / (1 - p)", is_right
    mixed = tensor(-1e-12, -1e4, -0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(fn(mixed).sum(), mixed)
    yield "all of them in one tensor: every gradient is finite", bool(torch.isfinite(slope).all())


def check_orpo_gradient_weight(fn):
    w, l = torch.tensor([[0.75, 0.2, 0.5], [0.5, 0.5, 0.5]], dtype=torch.float64).log()
    delta, dw, dl = fn(w, l)
    is_delta = close(delta, [1 / 4, 4 / 5, 1 / 2])
    yield "odds 3, 1/4 and 1 against 1: delta is 1/4, 4/5 and 1/2", is_delta
    yield "swapping the answers gives 1 - delta", close(fn(l, w)[0], 1 - delta)
    falls = close(dw, [-1.0, -1.0, -1.0])
    yield "chosen: -delta / (1 - P), so the loss falls as P rises", falls
    yield "rejected: +delta / (1 - P)", close(dl, [1 / 2, 8 / 5, 1.0])
    step = 1e-6

    def loss(a, b):  # log(1 + odds(b) / odds(a)), with plain exponentials
        return torch.log1p(b.exp() / (1 - b.exp()) * (1 - a.exp()) / a.exp())

    numeric = (loss(w + step, l) - loss(w - step, l)) / (2 * step)
    is_slope = close(dw, numeric, 1e-6)
    yield "it is the slope of the loss, measured with a small step", is_slope
    sure = fn(*torch.tensor([[-1e-9], [math.log(0.5)]], dtype=torch.float64))
    are_finite = all(bool(torch.isfinite(part).all()) for part in sure)
    yield "a pair learnt by heart: all three are finite", are_finite
    pulled = close(sure[1], [-1.0], 1e-6)
    yield "its chosen answer is still pulled, by the rejected one's odds, here 1", pulled


def check_orpo_from_logits(fn):
    draw = torch.Generator().manual_seed(3)
    sides = []
    for length in (6, 8):
        logits = torch.randn(length, 5, generator=draw, dtype=torch.float64)
        ids = torch.randint(0, 5, (length,), generator=draw)
        ids[:3] = torch.tensor([1, 4, 2])  # the prompt
        ids[-1] = 0  # EOS
        sides.append((logits, ids))

    def by_hand(weight, on_prompt):
        means, nlls = [], []
        for logits, ids in sides:
            rows = [[math.exp(z) for z in row] for row in logits.tolist()]
            logps = [math.log(rows[t - 1][ids[t]] / sum(rows[t - 1])) for t in range(1, len(ids))]
            means.append(sum(logps[2:]) / len(logps[2:]))
            nlls.append(-sum(logps) / len(logps) if on_prompt else -means[-1])
        odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
        return nlls[0] + weight * math.log(1 + odds[1] / odds[0])

    def same(weight, on_prompt):
        return close(float(fn(*sides, 3, weight, on_prompt)), by_hand(weight, on_prompt), 1e-10)

    yield "it is a scalar", torch.as_tensor(fn(*sides, 3)).numel() == 1
    yield "lambda 0 with the prompt: NLL of prompt and answer, shifted by one", same(0.0, True)
    yield "lambda 0 without the prompt: NLL of the answer, EOS included", same(0.0, False)
    yield "the odds are taken of means, over the answer only", same(1.0, False)
    yield "the whole loss", same(0.4, True)
    (logits, ids), rejected = sides
    other = torch.cat([logits[:-1], torch.arange(5.0)[None]])
    unmoved = close(float(fn((other, ids), rejected, 3, 0.4)), by_hand(0.4, True), 1e-10)
    yield "the last row of logits predicts nothing: other values there change nothing", unmoved


# Notebook 03


def check_interval_over_seeds(fn):
    low, high = fn([0.6, 0.7, 0.8])
    yield "three seeds: the mean is in the middle", close(low + high, 1.4)
    student = close((high - low) / 2, 0.24841, 1e-4)
    yield "its half-width is 4.303 · 0.1 / sqrt(3): 2 degrees of freedom, not 3", student
    two = close(fn([0.5, 0.6]), [-0.0853, 1.1853], 1e-3)
    yield "two seeds tell little: 0.55 ± 0.635", two
    six = fn([0.55, 0.59, 0.61, 0.57, 0.63, 0.65])
    yield "six seeds tell more", close(six, [0.560739, 0.639261], 1e-5)
    yield "seeds that agree have no spread", close(fn([0.75, 0.75, 0.75]), [0.75, 0.75])
    yield "one seed says nothing of another: None", fn([0.7]) is None


def check_cost_ratio(fn):
    def gives(expected, *epochs, **options):
        return close(fn(*epochs, **options), expected)

    yield "one epoch each: 6 passes over 3 + 8", gives(6 / 11, 1, 1, 1)
    yield "two epochs each: the same", gives(6 / 11, 2, 2, 2)
    three = gives(18 / 17, 3, 1, 3)
    yield "ORPO for three epochs, SFT for three, DPO for one: 18 over 9 + 8", three
    yield "three epochs of DPO: 6 over 3 + 24", gives(6 / 27, 1, 3, 1)
    cached = gives(6 / 11, 1, 1, 1, cached=True)
    yield "with one epoch, caching costs what it saves", cached
    cached = gives(6 / 23, 1, 3, 1, cached=True)
    yield "cached, three epochs of DPO: 6 over 3 + 18 + 2", cached
    yield "LoRA: 4 over 2 + 6", gives(0.5, 1, 1, 1, lora=True)
    both = gives(8 / 14, 2, 2, 2, cached=True, lora=True)
    yield "LoRA and cached, two epochs of all: 8 over 4 + 8 + 2", both


def check_worth_contrast(fn):
    lost, won, open_ = [0.44, 0.45, 0.46], [0.57, 0.58, 0.59], [0.40, 0.52, 0.60]

    def gives(expected, *rates):
        return tuple(fn([0.0, 0.1, 0.3, 0.5], list(rates))) == expected

    yield "clear at both ends, open between", gives((0.0, 0.3), lost, open_, won, won)
    yield "no gap", gives((0.1, 0.3), lost, lost, won, won)
    yield "it always pays", gives((None, 0.0), won, won, won, won)
    yield "it always costs", gives((0.5, None), lost, lost, lost, lost)
    yield "nothing is decided", gives((None, None), open_, open_, open_, open_)
    later = gives((0.0, 0.5), lost, won, open_, won)
    yield "a clear rate in the middle is not 'from there on'", later
    wide = gives((0.1, 0.5), lost, lost, [0.49, 0.55, 0.61], won)
    yield "a mean above one half does not suffice: the interval decides", wide
    yield "one seed decides nothing", gives((None, None), [0.4], [0.45], [0.6], [0.7])


# Notebook 04


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
