"""Checks of the exercises of Lab 1.8. Expected values are computed here, by another route than the
worked answers.
"""

import torch

from common.checks import exercise

# Lab 1.8, notebook 01


@exercise("length_bias")
def _length_bias(fn):
    def pair(chosen, rejected):
        return {"chosen_ids": [5] * chosen, "rejected_ids": [900] * rejected}

    yield "one pair whose chosen answer is longer: 1", fn([pair(4, 3)]) == 1
    yield "one pair whose chosen answer is shorter: 0", fn([pair(3, 40)]) == 0
    yield "equal lengths are half right", fn([pair(6, 6)]) == 0.5
    mixed = [
        pair(2, 1),
        pair(9, 1),
        pair(3, 3),
        pair(1, 2),
        pair(1, 30),
        pair(1, 3),
        pair(2, 3),
        pair(7, 8),
    ]
    yield "2 longer, 1 equal, 5 shorter: 2.5 of 8", abs(fn(mixed) - 0.3125) < 1e-12
    yield "by how much does not count: only which is longer", fn([pair(2, 1), pair(1, 500)]) == 0.5
    swapped = [
        {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in mixed
    ]
    yield "swapping chosen and rejected gives 1 minus it", abs(fn(swapped) - 0.6875) < 1e-12


@exercise("shared_rise")
def _shared_rise(fn):
    from common.logprobs import PairLogps, SideLogps

    def logps(chosen, rejected, lengths=((2, 8), (4, 6))):
        sums = (torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected))
        return PairLogps(
            *(SideLogps(s, torch.tensor(n)) for s, n in zip(sums, lengths, strict=True))
        )

    before = logps([-20.0, -60.0], [-30.0, -50.0])
    yield (
        "chosen up 20 nats, rejected up 10, 10 tokens each: one half",
        abs(fn(before, logps([-10.0, -50.0], [-25.0, -45.0])) - 0.5) < 1e-12,
    )
    yield (
        "rejected rise as much as chosen: 1",
        abs(fn(before, logps([-15.0, -55.0], [-26.0, -44.0])) - 1) < 1e-12,
    )
    yield (
        "rejected fall: negative",
        abs(fn(before, logps([-10.0, -50.0], [-32.0, -53.0])) + 0.25) < 1e-12,
    )
    short = ((2, 8), (4, 16))  # the rejected answers have twice as many tokens
    halved = fn(
        logps([-20.0, -60.0], [-30.0, -50.0], short), logps([-10.0, -50.0], [-20.0, -40.0], short)
    )
    yield (
        "per token: the same nats over twice the tokens are half the rise",
        abs(halved - 0.5) < 1e-12,
    )
    uneven = fn(
        before, logps([-18.0, -28.0], [-30.0, -33.0])
    )  # 34 nats and 17 nats, over 10 tokens each
    yield "every token counts the same: not the mean of row ratios", abs(uneven - 0.5) < 1e-12
    try:
        fn(before, logps([-21.0, -60.0], [-20.0, -40.0]))
        refused = False
    except ValueError:
        refused = True
    yield "where the chosen answers fall, it raises a ValueError", refused


@exercise("cohens_kappa")
def _cohens_kappa(fn):
    a, b, tie = 1, -1, 0
    yield (
        "full agreement on votes that vary: 1",
        abs(fn([a, b, tie, a], [a, b, tie, a]) - 1) < 1e-12,
    )
    yield "agreement as by chance: 0", abs(fn([a, a, b, b], [a, b, a, b])) < 1e-12
    yield "always the opposite, evenly: -1", abs(fn([a, b, a, b], [b, a, b, a]) + 1) < 1e-12
    first = [a] * 25 + [b] * 25  # Cohen's textbook case: 20 + 15 agree, 5 + 10 do not
    second = [a] * 20 + [b] * 5 + [a] * 10 + [b] * 15
    yield "35 of 50 agree, half of that by chance: 0.4", abs(fn(first, second) - 0.4) < 1e-12
    rare = [a] * 95 + [b] * 5, [a] * 90 + [b] * 5 + [a] * 5  # 90 agree, but p_e = 0.905
    yield (
        "90 % agreement on a vote that is nearly always A is worth nothing",
        abs(fn(*rare) + 0.05 / 0.95) < 1e-9,
    )
    third = fn(
        [a, a, b, b, tie, tie], [a, a, b, tie, tie, a]
    )  # p_o = 4/6, p_e = (2·3 + 2·1 + 2·2) / 36 = 1/3
    yield '"no difference" is a vote like the others', abs(third - 0.5) < 1e-12
    yield (
        "one and the same vote throughout: not defined, nan",
        fn([a, a], [a, a]) != fn([a, a], [a, a]),
    )


# Lab 1.8, notebook 02


@exercise("safe_log_odds")
def _safe_log_odds(fn):
    import math

    def tensor(*values, **options):
        return torch.tensor(values, dtype=torch.float64, **options)

    known = fn(tensor(math.log(0.5), math.log(0.75), math.log(0.2)))
    yield (
        "p = 1/2, 3/4, 1/5: odds 1, 3, 1/4",
        torch.allclose(known, tensor(0, math.log(3), -math.log(4)), atol=1e-12),
    )
    for x in (-1e-12, -1e-8, -1e-3, -0.69, -1.0, -50.0, -1e4):
        argument = tensor(x, requires_grad=True)
        value = fn(argument)
        (slope,) = torch.autograd.grad(value.sum(), argument)
        right = x + math.exp(x) if x < -40 else -math.log(math.expm1(-x))
        yield f"log p = {x:g}: the value", abs(value.item() - right) <= 1e-12 * max(1.0, abs(right))
        yield (
            f"log p = {x:g}: the gradient, 1 / (1 - p)",
            abs(slope.item() * -math.expm1(x) - 1) < 1e-12,
        )
    mixed = tensor(-1e-12, -1e4, -0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(fn(mixed).sum(), mixed)
    yield "all of them in one tensor: every gradient is finite", bool(torch.isfinite(slope).all())


@exercise("orpo_gradient_weight")
def _orpo_gradient_weight(fn):
    w, l = torch.tensor([[0.75, 0.2, 0.5], [0.5, 0.5, 0.5]], dtype=torch.float64).log()
    delta, dw, dl = fn(w, l)
    yield (
        "odds 3, 1/4 and 1 against 1: delta is 1/4, 4/5 and 1/2",
        torch.allclose(delta, torch.tensor([1 / 4, 4 / 5, 1 / 2], dtype=torch.float64), rtol=1e-12),
    )
    swapped = fn(l, w)[0]
    yield "swapping the answers gives 1 - delta", torch.allclose(swapped, 1 - delta, rtol=1e-12)
    yield (
        "chosen: -delta / (1 - P), so the loss falls as P rises",
        torch.allclose(dw, torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64), rtol=1e-12),
    )
    yield (
        "rejected: +delta / (1 - P)",
        torch.allclose(dl, torch.tensor([1 / 2, 8 / 5, 1.0], dtype=torch.float64), rtol=1e-12),
    )
    step = 1e-6

    def loss(a, b):  # log(1 + odds(b) / odds(a)), with plain exponentials
        return torch.log1p(b.exp() / (1 - b.exp()) * (1 - a.exp()) / a.exp())

    numeric = (loss(w + step, l) - loss(w - step, l)) / (2 * step)
    yield (
        "it is the slope of the loss, measured with a small step",
        torch.allclose(dw, numeric, rtol=1e-6),
    )
    sure = fn(
        torch.tensor([-1e-9], dtype=torch.float64),
        torch.tensor([-0.6931471805599453], dtype=torch.float64),
    )
    yield (
        "a pair learnt by heart: all three are finite",
        all(bool(torch.isfinite(part).all()) for part in sure),
    )
    yield (
        "its chosen answer is still pulled, by the rejected one's odds, here 1",
        abs(float(sure[1]) + 1) < 1e-6,
    )


@exercise("orpo_from_logits")
def _orpo_from_logits(fn):
    import math

    draw = torch.Generator().manual_seed(3)
    sides = [
        (
            torch.randn(n, 5, generator=draw, dtype=torch.float64),
            torch.randint(0, 5, (n,), generator=draw),
        )
        for n in (6, 8)
    ]
    for ids in (sides[0][1], sides[1][1]):
        ids[:3] = torch.tensor([1, 4, 2])  # the prompt
        ids[-1] = 0  # EOS

    def by_hand(weight, on_prompt):
        means, nlls = [], []
        for logits, ids in sides:
            rows = [[math.exp(z) for z in row] for row in logits.tolist()]
            logps = [math.log(rows[t - 1][ids[t]] / sum(rows[t - 1])) for t in range(1, len(ids))]
            means.append(sum(logps[2:]) / len(logps[2:]))
            nlls.append(-sum(logps) / len(logps) if on_prompt else -means[-1])
        odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
        return nlls[0] + weight * math.log(1 + odds[1] / odds[0])

    def same(value, expected):
        return abs(float(value) - expected) < 1e-10

    yield "it is a scalar", torch.as_tensor(fn(*sides, 3)).numel() == 1
    yield (
        "lambda 0 with the prompt: NLL of prompt and answer, shifted by one",
        same(fn(*sides, 3, 0.0, True), by_hand(0, True)),
    )
    yield (
        "lambda 0 without the prompt: NLL of the answer, EOS included",
        same(fn(*sides, 3, 0.0, False), by_hand(0, False)),
    )
    yield (
        "the odds are taken of means, over the answer only",
        same(fn(*sides, 3, 1.0, False), by_hand(1, False)),
    )
    yield "the whole loss", same(fn(*sides, 3, 0.4, True), by_hand(0.4, True))
    other = sides[0][0].clone()
    other[-1] = torch.arange(5.0)
    yield (
        "the last row of logits predicts nothing: other values there change nothing",
        same(fn((other, sides[0][1]), sides[1], 3, 0.4), by_hand(0.4, True)),
    )


# Lab 1.8, notebook 03


@exercise("interval_over_seeds")
def _interval_over_seeds(fn):
    low, high = fn([0.6, 0.7, 0.8])
    yield "three seeds: the mean is in the middle", abs(low + high - 1.4) < 1e-12
    yield (
        "its half-width is 4.303 · 0.1 / sqrt(3): 2 degrees of freedom, not 3",
        abs((high - low) / 2 - 0.24841) < 1e-4,
    )
    low, high = fn([0.5, 0.6])
    yield (
        "two seeds tell little: 0.55 ± 0.635",
        abs(low + 0.0853) < 1e-3 and abs(high - 1.1853) < 1e-3,
    )
    low, high = fn([0.55, 0.59, 0.61, 0.57, 0.63, 0.65])
    yield "six seeds tell more", abs(low - 0.560739) < 1e-5 and abs(high - 0.639261) < 1e-5
    low, high = fn([0.75, 0.75, 0.75])
    yield "seeds that agree have no spread", abs(low - 0.75) < 1e-12 and abs(high - 0.75) < 1e-12
    yield "one seed says nothing of another: None", fn([0.7]) is None


@exercise("cost_ratio")
def _cost_ratio(fn):
    def same(value, expected):
        return abs(value - expected) < 1e-12

    yield "one epoch each: 6 passes over 3 + 8", same(fn(1, 1, 1), 6 / 11)
    yield "two epochs each: the same", same(fn(2, 2, 2), 6 / 11)
    yield (
        "ORPO for three epochs, SFT for three, DPO for one: 18 over 9 + 8",
        same(fn(3, 1, 3), 18 / 17),
    )
    yield "three epochs of DPO: 6 over 3 + 24", same(fn(1, 3, 1), 6 / 27)
    yield "with one epoch, caching costs what it saves", same(fn(1, 1, 1, cached=True), 6 / 11)
    yield "cached, three epochs of DPO: 6 over 3 + 18 + 2", same(fn(1, 3, 1, cached=True), 6 / 23)
    yield "LoRA: 4 over 2 + 6", same(fn(1, 1, 1, lora=True), 0.5)
    yield (
        "LoRA and cached, two epochs of all: 8 over 4 + 8 + 2",
        same(fn(2, 2, 2, cached=True, lora=True), 8 / 14),
    )


@exercise("worth_contrast")
def _worth_contrast(fn):
    places = [0.0, 0.1, 0.3, 0.5]
    lost, won, open_ = [0.44, 0.45, 0.46], [0.57, 0.58, 0.59], [0.40, 0.52, 0.60]
    yield (
        "clear at both ends, open between",
        tuple(fn(places, [lost, open_, won, won])) == (0.0, 0.3),
    )
    yield "no gap", tuple(fn(places, [lost, lost, won, won])) == (0.1, 0.3)
    yield "it always pays", tuple(fn(places, [won] * 4)) == (None, 0.0)
    yield "it always costs", tuple(fn(places, [lost] * 4)) == (0.5, None)
    yield "nothing is decided", tuple(fn(places, [open_] * 4)) == (None, None)
    yield (
        "a clear rate in the middle is not 'from there on'",
        tuple(fn(places, [lost, won, open_, won])) == (0.0, 0.5),
    )
    yield (
        "a mean above one half does not suffice: the interval decides",
        tuple(fn(places, [lost, lost, [0.49, 0.55, 0.61], won])) == (0.1, 0.5),
    )
    yield (
        "one seed decides nothing",
        tuple(fn(places, [[0.4], [0.45], [0.6], [0.7]])) == (None, None),
    )


# Lab 1.8, notebook 04


@exercise("cache_bytes")
def _cache_bytes(fn):
    yield (
        "keys and values: 1 layer, 1 head of width 1, 1 token, 1 byte each are 2 bytes",
        fn(1, 1, 1, 1, 1, 1) == 2,
    )
    yield (
        "GPT-2 (12 layers, 12 heads of 64), 1,024 tokens in 2 bytes: 36 MiB",
        fn(12, 12, 64, 1024, 1, 2) == 36 * 2**20,
    )
    yield "8 rows need 8 times as much", fn(2, 4, 16, 100, 8, 4) == 8 * fn(2, 4, 16, 100, 1, 4)
    yield (
        "grouped-query attention: Mistral 7B keeps 8 heads of 128 in 32 layers, 4 GiB at 32,768 tokens",
        (fn(32, 8, 128, 32768, 1, 2) == 4 * 2**30),
    )


@exercise("round_in_blocks")
def _round_in_blocks(fn):
    weights = torch.tensor([[1.0, -2.0, 0.5, 4.0], [100.0, 30.0, 0.0, 0.0]])
    result = fn(weights, 3, 2)
    yield "the shape stays", result.shape == weights.shape
    # 3 bits: levels -3 … 3. Blocks of 2: steps 2/3, 4/3, 100/3; a block of zeros.
    expected = torch.tensor([[4 / 3, -2.0, 0.0, 4.0], [100.0, 100 / 3, 0.0, 0.0]])
    yield (
        "3 bits, blocks of 2: each block has its own step",
        torch.allclose(result, expected, atol=1e-5),
    )
    yield "a block of zeros stays zeros, not NaN", bool((result[1, 2:] == 0).all())
    yield (
        "the largest of each block is kept exactly",
        bool((result[0, 1] == -2) & (result[0, 3] == 4)),
    )
    again = fn(result, 3, 2)
    yield "what is rounded already does not change again", torch.allclose(again, result, atol=1e-5)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    worst = (fn(noise, 8, 64) - noise).abs().amax(1)
    half_steps = noise.abs().amax(1) / 127 / 2
    yield (
        "8 bits: no weight moves by more than half a step",
        bool((worst <= half_steps + 1e-7).all()),
    )


@exercise("peeking_coin")
def _peeking_coin(fn):
    from itertools import product
    from math import comb

    def counted(flips, looks):
        hits = 0
        for outcome in product((0, 1), repeat=flips * looks):
            heads = [sum(outcome[: flips * look]) for look in range(1, looks + 1)]
            z = [abs(2 * h - flips * k) / (flips * k) ** 0.5 for k, h in enumerate(heads, 1)]
            hits += any(value > 1.96 for value in z)
        return hits / 2 ** (flips * looks)

    tails = sum(comb(100, h) for h in range(101) if abs(2 * h - 100) / 10 > 1.96) / 2**100
    yield "one look after 100 flips: the two tails of the binomial", abs(fn(100, 1) - tails) < 1e-12
    yield (
        "a look after each of 12 flips: all 4,096 outcomes counted",
        abs(fn(1, 12) - counted(1, 12)) < 1e-12,
    )
    yield "a look after every 4 of 16", abs(fn(4, 4) - counted(4, 4)) < 1e-12
    yield "more looks, more false alarms", fn(20, 10) > fn(40, 5) > fn(200, 1)
    yield (
        "ten looks at 200 fair flips raise a false alarm in 15 to 25 % of experiments",
        0.15 < fn(20, 10) < 0.25,
    )
