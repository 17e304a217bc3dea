"""Checks of the exercises of notebook 1.8-02.

The expected values are computed here, by another route than the worked answers.
"""

import copy
import math

import numpy as np
import torch

from common.checks import close


def check_orpo_from_logits(fn):
    draw = torch.Generator().manual_seed(3)
    sides = []
    for length in (6, 8):
        logits = torch.randn(length, 5, generator=draw, dtype=torch.float64)
        ids = torch.randint(0, 5, (length,), generator=draw)
        ids[:3] = torch.tensor([1, 4, 2])  # the prompt
        ids[-1] = 0  # EOS
        sides.append((logits, ids))
    before = copy.deepcopy(sides)

    def by_hand(weight, on_prompt):
        means, nlls = [], []
        for logits, ids in before:
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
    unmoved = close(float(fn((other, ids), rejected, 3, 0.4, True)), by_hand(0.4, True), 1e-10)
    yield "the last row of logits predicts nothing: other values there change nothing", unmoved
    free = [(logits.clone().requires_grad_(), ids) for logits, ids in sides]
    slopes = torch.autograd.grad(fn(*free, 3, 0.4, False), [logits for logits, _ in free])
    reached = [slope.abs().sum(1) > 0 for slope in slopes]
    answers = [[False] * 2 + [True] * (len(ids) - 3) + [False] for _, ids in sides]
    found = [places.tolist() for places in reached]
    yield (
        "the gradient reaches both answers, and without the prompt's NLL nothing else",
        (found == answers),
    )
    narrow = [(logits.float(), ids) for logits, ids in sides]
    single = close(float(fn(*narrow, 3, 0.4, True)), by_hand(0.4, True), 1e-5)
    yield "float32 logits give the same, as far as float32 goes", single
    kept = all(torch.equal(a, b) for a, b in zip(sum(sides, ()), sum(before, ()), strict=True))
    yield "logits and ids are left as they were", kept


def _tiny_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 11, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return GPT2LMHeadModel(GPT2Config(**sizes, **off)).double()


def _orpo_by_rows(model, rows, lambda_or):
    """Eq. 6 one row at a time, without padding: the NLL over all chosen tokens of the batch."""
    nll, tokens, terms = 0.0, 0, []
    for prompt, *answers in rows:
        odds = []
        for side, answer in enumerate(answers):
            logits = model(torch.tensor([prompt + answer])).logits[0]
            p = logits.exp() / logits.exp().sum(-1, keepdim=True)
            first = len(prompt) - 1
            logps = [p[first + place, token].log() for place, token in enumerate(answer)]
            mean = (sum(logps) / len(logps)).exp()
            odds.append(mean / (1 - mean))
            nll, tokens = (nll - sum(logps), tokens + len(logps)) if not side else (nll, tokens)
        terms.append((1 + odds[1] / odds[0]).log())
    return nll / tokens + lambda_or * sum(terms) / len(terms)


def check_orpo_train_step(fn):
    from common.data import collate

    rows = [([1, 2, 3], [4, 5, 0], [6, 0]), ([7, 8], [9, 0], [10, 9, 4, 1, 0]), ([3], [2] * 6, [5])]
    names = "prompt_ids", "chosen_ids", "rejected_ids"
    dicts = [dict(zip(names, row, strict=True)) for row in rows]
    start = _tiny_model()

    def after(lambda_or, pad=0, stale=False):
        """(what it returned, the model after one step of SGD, the batch before and after)."""
        model, batch = copy.deepcopy(start), collate(dicts, pad)
        kept = copy.deepcopy(batch)
        if stale:
            for weight in model.parameters():
                weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return fn(model, batch, optimizer, lambda_or), model, kept, batch

    def expected(lambda_or):
        model = copy.deepcopy(start)
        loss = _orpo_by_rows(model, rows, lambda_or)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        return loss.item(), model

    def same(one, other):
        weights = zip(one.parameters(), other.parameters(), strict=True)
        return all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in weights)

    imitated, plain = expected(0.0), after(0.0)
    value = close(float(plain[0]), imitated[0], 1e-6)
    yield "lambda 0: the NLL over all chosen tokens of the batch, not the mean of rows", value
    yield "lambda 0: the weights after one step of it", same(plain[1], imitated[1])
    right, full = expected(0.7), after(0.7)
    yield "lambda 0.7: the loss before the step", close(float(full[0]), right[0], 1e-6)
    yield "the weights after the step: both answers pull", same(full[1], right[1])
    yield (
        "gradients that were there before are not added",
        same(after(0.7, stale=True)[1], right[1]),
    )
    padded = after(0.7, pad=9)
    yield "what stands in the padding changes nothing", same(padded[1], right[1])
    kept = all(torch.equal(full[2][name], full[3][name]) for name in full[2])
    yield "the batch is left as it was", kept


def check_safe_log_odds(fn):
    def tensor(*values, **options):
        return torch.tensor(values, dtype=torch.float64, **options)

    known = fn(tensor(math.log(0.5), math.log(0.75), math.log(0.2)))
    expected = [0.0, math.log(3), -math.log(4)]
    yield "p = 1/2, 3/4, 1/5: odds 1, 3, 1/4", close(known, expected)
    for x in (-1e-12, -1e-8, -1e-3, -0.69, -1.0, -50.0, -800.0, -1e4):
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
    table = tensor(-0.2, -3.0, -0.7, -9.0).reshape(2, 2)
    kept = table.clone()
    yield "a table of (2, 2) gives a table of (2, 2)", fn(table).shape == (2, 2)
    yield "its input is left as it was", torch.equal(table, kept)
    single = fn(torch.tensor([-1e-6, -2.0]))
    right = [-math.log(math.expm1(1e-6)), -math.log(math.expm1(2.0))]
    yield "in float32 it is right as far as float32 goes", close(single, right, 1e-5)


def check_choose_lambda(fn):
    draw = np.random.default_rng(7)
    hard = draw.random(40) * 0.6  # how hard each prompt is, for every lambda
    jitter = np.where(np.arange(40) % 2, 0.01, -0.01)
    yield "only one lambda: that one", fn({0.3: [0.2, 0.9, 0.4]}) == 0.3
    equal = {0.5: [0.5, 1.0, 0.0], 0.1: [1.0, 0.5, 0.0], 2.0: [0.0, 0.5, 0.5]}
    yield "equal means: the smallest, in whatever order they come", fn(equal) == 0.1
    ahead = {0.0: hard.tolist(), 0.5: (hard + 0.05 + jitter).tolist()}
    yield "ahead by .05 on every prompt, hard or easy: the larger one (paired)", fn(ahead) == 0.5
    noisy = {0.0: [0.0, 1.0] * 20 + [0.0] * 4, 1.0: [1.0, 0.0] * 20 + [1.0] * 4}
    # Ahead by 4 / 44 in the mean; the differences are 1 or -1, so their standard error is .15.
    yield "ahead by .09, with differences that jump by 2: still the smaller one", fn(noisy) == 0.0
    steps = {0.0: hard, 0.1: hard + 0.29 + 3 * jitter, 0.5: hard + 0.3 - 3 * jitter}
    yield "the smallest that is not behind, not the smallest of all", fn(steps) == 0.1
    # d = 1, 1, 1, 0, 0: mean .6, standard error .245 with n - 1 and .219 with n.
    third = {0.0: [0.0] * 5, 1.0: [1.0, 1.0, 1.0, 0.0, 0.0]}
    yield "behind by 2.4 standard errors: no", fn(third) == 1.0
    half = {0.0: [0.0] * 4, 1.0: [1.0, 1.0, 0.0, 0.0]}  # mean .5, standard error .289
    yield "behind by 1.7 standard errors: yes, two are allowed", fn(half) == 0.0
    # d = .82 four times and -.18 three times: mean .391, 1.94 standard errors; with n 2.09.
    edge = {0.0: [0.18] * 7, 1.0: [1.0] * 4 + [0.0] * 3}
    yield "the standard deviation is that with n - 1", fn(edge) == 0.0
    arrays = {value: np.asarray(points) for value, points in third.items()}
    yield "arrays will do as well", fn(arrays) == 1.0
    kept = third[1.0] == [1.0, 1.0, 1.0, 0.0, 0.0] and list(ahead) == [0.0, 0.5]
    yield "its input is left as it was", kept
