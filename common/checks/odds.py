"""Checks of the exercises of notebook 1.8-02.

The expected values are computed here, by another route than the worked answers.
"""

import math

import torch

from common.checks import close


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
