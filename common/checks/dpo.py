"""Checks of the exercises of notebook 1.7-03 and its deep dives.

The expected values are computed here, by another route than the worked answers.
"""

import copy
import math

import torch
from torch import Tensor

from common.checks import close
from common.data import collate

_EOS = 10  # EOS of the toy vocabulary below


def _near(found, expected) -> bool:
    """Within float32's tolerance, for answers that may be tensors of one number."""
    return close(found, expected, 1e-5)


def _by_hand(sums: tuple[Tensor, ...], beta: float) -> list[float]:
    """-log sigmoid of beta times the margin, pair by pair in plain Python."""
    rows = zip(*(each.tolist() for each in sums), strict=True)
    return [math.log1p(math.exp(-beta * ((w - rw) - (lo - rl)))) for w, lo, rw, rl in rows]


def check_dpo_loss(fn):
    random = torch.Generator().manual_seed(5)
    sums = tuple(-30 * torch.rand(7, generator=random, dtype=torch.float64) for _ in range(4))
    before = [each.clone() for each in sums]
    found = fn(*sums, beta=0.3)
    yield "one loss a pair, shape (batch,)", tuple(torch.as_tensor(found).shape) == (7,)
    yield (
        "it is -log sigmoid of beta times the margin of log-ratios",
        _near(found, _by_hand(sums, 0.3)),
    )
    yield "beta is 0.1 unless it is given", _near(fn(*sums), _by_hand(sums, 0.1))
    same = sums[0], sums[1], sums[0], sums[1]
    yield "where policy and reference agree it is ln 2", _near(fn(*same), [math.log(2)] * 7)
    single = fn(*(each.float() for each in sums), beta=0.3)
    yield "float32 in, the same values out", _near(single, _by_hand(sums, 0.3))
    far = torch.tensor([-2e4, 2e4], requires_grad=True)
    zero = torch.zeros(2)
    value = fn(far, zero, zero, zero, beta=1.0)
    yield "a margin of 20,000 nats gives no infinity", bool(torch.isfinite(value).all())
    (slope,) = torch.autograd.grad(value.sum(), far)
    yield "and gradients of -1 and 0 there", close(slope, [-1.0, 0.0], 1e-6)
    policy = sums[0].clone().requires_grad_(), sums[1].clone().requires_grad_()
    chosen, rejected = torch.autograd.grad(fn(*policy, *sums[2:], beta=0.3).sum(), policy)
    yield "the gradients on both answers are equal and opposite", close(chosen, -rejected, 1e-9)
    kept = all(torch.equal(a, b) for a, b in zip(before, sums, strict=True))
    yield "the inputs are left as they were", kept


def check_dpo_metrics(fn):
    sums = [[-10.0, -9.0, -20.0, -8.0], [-14.0, -9.5, -11.0, -8.5]]
    sums += [[-13.0, -8.0, -15.0, -7.0], [-12.0, -8.5, -16.0, -8.5]]
    sums = [torch.tensor(each, dtype=torch.float64) for each in sums]
    # Log-ratios: chosen 3, -1, -5, -1; rejected -2, -1, 5, 0. One right, one tie, two wrong.
    found = fn(*sums, 0.2)
    names = {"rewards_chosen", "rewards_rejected", "margin", "accuracy"}
    whole = isinstance(found, dict) and set(found) == names
    yield f"it returns a dict with {', '.join(sorted(names))}", whole
    if not whole:
        return
    yield (
        "rewards_chosen: 0.2 times the mean of 3, -1, -5, -1",
        _near(found["rewards_chosen"], -0.2),
    )
    yield (
        "rewards_rejected: 0.2 times the mean of -2, -1, 5, 0",
        _near(found["rewards_rejected"], 0.1),
    )
    yield "the margin is their difference, beta in it", _near(found["margin"], -0.3)
    yield "accuracy: one right, one tie, two wrong are 0.375", _near(found["accuracy"], 0.375)
    twice = fn(*sums, 0.4)
    yield "twice the beta: twice the margin", _near(twice["margin"], -0.6)
    yield "and the same accuracy", _near(twice["accuracy"], 0.375)
    against_itself = fn(sums[0], sums[1], sums[0], sums[1], 0.1)
    yield (
        "a model against itself: margin 0, accuracy one half",
        [float(against_itself[name]) for name in ("margin", "accuracy")] == [0.0, 0.5],
    )
    graph = fn(*(each.clone().requires_grad_() for each in sums), 0.2)["margin"]
    yield "metrics hold no gradients", not getattr(graph, "requires_grad", False)


def _models():
    """A policy and a reference: two GPT-2s of a few weights, without dropout, in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 32, "vocab_size": _EOS + 1}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**size, **still, bos_token_id=_EOS, eos_token_id=_EOS, pad_token_id=_EOS)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        models = [GPT2LMHeadModel(config).double().train() for _ in range(2)]
        for weight in models[0].parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    return models


ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, _EOS], "rejected_ids": [6, _EOS]},
    {"prompt_ids": [7], "chosen_ids": [8, 9, 1, 2, _EOS], "rejected_ids": [3, 3, 3, _EOS]},
    {"prompt_ids": [5, 5], "chosen_ids": [_EOS], "rejected_ids": [2, 9, _EOS]},
]


def _loss_of_rows(policy, reference, beta: float) -> Tensor:
    """The mean loss of ROWS, one row at a time, without padding."""

    def logp(model, row, side):
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        logps = torch.log_softmax(logits[0], -1)
        first = len(row["prompt_ids"])
        return sum(logps[place - 1, ids[0, place]] for place in range(first, ids.shape[1]))

    margins = []
    for row in ROWS:
        sides = [logp(policy, row, side) for side in ("chosen_ids", "rejected_ids")]
        with torch.no_grad():
            frozen = [logp(reference, row, side) for side in ("chosen_ids", "rejected_ids")]
        margins.append(sides[0] - frozen[0] - sides[1] + frozen[1])
    return torch.log1p(torch.exp(-beta * torch.stack(margins))).mean()


def _step_by_hand(policy, reference, beta: float, rate: float) -> tuple[float, list[Tensor]]:
    """The loss, and the weights after a step of plain gradient descent, clipped to norm 1."""
    weights = list(policy.parameters())
    loss = _loss_of_rows(policy, reference, beta)
    slopes = torch.autograd.grad(loss, weights)
    norm = torch.stack([slope.norm() for slope in slopes]).norm()
    scale = rate / max(1.0, float(norm))
    pairs = zip(weights, slopes, strict=True)
    return float(loss.detach()), [(w - scale * slope).detach() for w, slope in pairs]


def check_dpo_train_step(fn):
    batch = collate(ROWS, _EOS)

    def moved(beta, rate=0.5, dirty=False):
        policy, reference = _models()
        loss, expected = _step_by_hand(policy, reference, beta, rate)
        frozen = copy.deepcopy(reference.state_dict())
        if dirty:  # what an earlier step left behind
            for weight in policy.parameters():
                weight.grad = torch.ones_like(weight)
        found = fn(policy, reference, batch, torch.optim.SGD(policy.parameters(), rate), beta)
        pairs = list(zip(policy.parameters(), expected, strict=True))
        right = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
        kept = all(torch.equal(a, frozen[name]) for name, a in reference.state_dict().items())
        graded = any(weight.grad is not None for weight in reference.parameters())
        return found, loss, right, kept and not graded

    found, loss, right, frozen = moved(0.1)
    yield "it returns the loss of the batch, as it was before the step", _near(found, loss)
    yield "as a number that holds no graph", not getattr(found, "requires_grad", False)
    yield "the policy takes the step of the mean loss of the pairs", right
    yield "the reference stays as it was, and has no gradients", frozen
    yield "gradients that an earlier step left are cleared first", moved(0.1, dirty=True)[2]
    steep = moved(20.0)
    yield "beta reaches the loss", _near(steep[0], steep[1])
    yield "a gradient longer than 1 is clipped to length 1", steep[2]


class _Counting(torch.optim.SGD):
    """Gradient descent that counts its steps."""

    steps = 0

    def step(self, *arguments, **options):
        self.steps += 1
        return super().step(*arguments, **options)


def check_accumulate(fn):
    x = torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0, 1.5, 7.0], dtype=torch.float64)

    def run(sizes, stale=0.0):
        weight = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        weight.grad = torch.full_like(weight, stale) if stale else None
        optimizer, seen = _Counting([weight], lr=0.1), []

        def losses_of(batch):
            seen.append(None if weight.grad is None else float(weight.grad.abs().sum()))
            return torch.nn.functional.softplus(-(weight[0] * batch + weight[1] * batch**2))

        found = fn(list(x.split(sizes)), losses_of, optimizer)
        return found, weight.detach(), optimizer.steps, seen

    whole = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    loss = torch.log1p(torch.exp(-(whole[0] * x + whole[1] * x**2))).mean()
    (slope,) = torch.autograd.grad(loss, whole)
    expected = (whole - 0.1 * slope).detach()
    found, weight, steps, seen = run([1] * 7)
    yield "seven batches of one pair: one step of the optimiser", steps == 1
    yield "the step of one batch of seven", _near(weight, expected)
    yield "it returns the mean loss of the seven pairs", _near(found, float(loss.detach()))
    ragged = run([4, 2, 1])
    yield "unequal batches: every pair counts the same, not every batch", _near(ragged[1], expected)
    yield "in the loss that is returned too", _near(ragged[0], float(loss.detach()))
    yield "one batch is an ordinary step", _near(run([7])[1], expected)
    yield "gradients of an earlier step are cleared first", _near(run([4, 3], 9.0)[1], expected)
    grows = all(each for each in seen[1:])
    yield "each batch is done (backward) before the next begins: that saves the memory", grows


def check_diagnose(fn):
    end = {"held_out_margin": 0.9, "held_out_kl": 3.0, "held_out_accuracy": 0.8}

    def signs(accuracy=0.8, first_margin=0.0, noise=None, chosen=-20.5, ends=None, **last):
        start = {"held_out_margin": first_margin, "held_out_logps_chosen": -20.0}
        start |= {"held_out_kl": 0.0, "held_out_accuracy": 0.5}
        steps = [{"step": n, "accuracy": 0.1 if n < 10 else accuracy} for n in range(1, 31)]
        for row in (steps[10], steps[29]):
            row["accuracy"] = ends or accuracy
        final = steps[-1] | end | last | {"held_out_logps_chosen": chosen}
        metrics = [{"step": 0, **start}, *steps[:-1], final]
        before = copy.deepcopy(metrics)
        found = set(fn(metrics)) if noise is None else set(fn(metrics, noise))
        return found if metrics == before else {"the metrics were changed"}

    yield "a healthy run has no sign", signs() == set()
    yield "a margin at step 0", signs(first_margin=-0.4) == {"wrong reference"}
    yield "a KL of 25", signs(held_out_kl=25.0) == {"too far"}
    yield "a KL of 20 is not above 20", signs(held_out_kl=20.0) == set()
    yield "the chosen answer lost 3 nats", signs(chosen=-23.0) == {"displacement"}
    yield "a loss of 0.5 nats is none yet", signs(chosen=-20.5) == set()
    heart = {"learnt by heart"}
    yield "clean labels: 0.98 in training, 0.80 held out", signs(0.98) == heart
    learnt = signs(0.98, held_out_accuracy=0.96) == set()
    yield "clean labels: 0.98 and 0.96 is no sign, though above 95 %", learnt
    yield "two lucky batches among the last 20 are no sign", signs(ends=0.99) == set()
    # The truth, with 40 % of the labels flipped, agrees with 60 % of them.
    honest = signs(0.60, noise=0.4, held_out_accuracy=1.0) == set()
    yield "40 % flipped: 0.60 on them and 1.00 on clean pairs is the truth, not a sign", honest
    # 0.8 of clean labels are 0.8 · 0.6 + 0.2 · 0.4 = 0.56 of such labels.
    fooled = signs(0.75, noise=0.4, held_out_accuracy=0.8) == heart
    yield "40 % flipped: 0.75 on them is far more than 0.80 on clean pairs allows", fooled
    both = signs(chosen=-23.0, held_out_kl=40.0)
    yield "two signs at once", both == {"displacement", "too far"}


def check_choose_beta(fn):
    def row(beta, kl, margin, rate):
        return {"beta": beta, "kl": kl, "margin": margin, "win_rate": rate}

    sweep = [row(0.5, 2.0, 1.9, 0.61), row(0.3, 4.0, 1.5, 0.70)]
    sweep += [row(0.1, 9.0, 0.9, 0.66), row(0.05, 21.0, 2.6, 0.83)]
    before = copy.deepcopy(sweep)
    yield "of those within the KL limit, the one that wins most: 0.3", fn(sweep) == 0.3
    yield "not the largest margin, which is beta 0.5 here", fn(sweep, 10.0) != 0.5
    yield "a wider limit lets 0.05 in", fn(sweep, 30.0) == 0.05
    yield "a narrower one leaves 0.5 alone", fn(sweep, 3.0) == 0.5
    yield "exactly at the limit is too far", fn(sweep, 4.0) == 0.5
    yield "the order of the rows does not matter", fn(sweep[::-1]) == 0.3
    tied = [row(0.1, 3.0, 0.5, 0.7), row(0.4, 3.0, 0.5, 0.7), row(0.2, 3.0, 0.5, 0.7)]
    yield "equal win rates: the largest beta, which stays closest", fn(tied) == 0.4
    yield "none within the limit: None", fn(sweep, 1.0) is None
    yield "the rows are left as they were", sweep == before


def check_conservative_dpo_loss(fn):
    h = torch.tensor([-7.0, 0.0, 2.5, 30.0], dtype=torch.float64)

    def dpo(sign):  # the loss with beta 0.2, in plain Python
        losses = [math.log1p(math.exp(-0.2 * sign * value)) for value in h.tolist()]
        return torch.tensor(losses, dtype=torch.float64)

    yield "with epsilon 0 it is the DPO loss", close(fn(h, 0.2, 0.0), dpo(1))
    yield "it is ln 2 at the reference, for every epsilon", close(fn(h, 0.2, 0.3)[1], math.log(2))
    expected = close(fn(h, 0.2, 0.1), 0.9 * dpo(1) + 0.1 * dpo(-1))
    yield "it is the expected loss when a tenth of the labels is flipped", expected
    best = torch.tensor([math.log(0.9 / 0.1) / 0.2], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fn(best, 0.2, 0.1).sum(), best)
    yield "its minimum is at log((1 - epsilon) / epsilon) / beta", close(slope, [0.0])
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = fn(far, 1.0, 0.1)
    (slope,) = torch.autograd.grad(value.sum(), far)
    yield "it is finite far out, in float32", bool(torch.isfinite(value).all())
    yield "so is its gradient: -0.9 and 0.1", close(slope, [-0.9, 0.1], 1e-6)
