"""Checks of the exercises of notebook 1.7-03.

The expected values are computed here, by another route than the worked answers.
"""

import math

import torch

from common.checks import close


def check_implicit_reward(fn):
    policy = torch.tensor([-3.0, -12.5, -40.0], dtype=torch.float64)
    reference = torch.tensor([-5.0, -12.5, -31.0], dtype=torch.float64)
    found = fn(policy, reference, 0.25)
    yield "the shape is (batch,)", tuple(found.shape) == (3,)
    ratio = torch.exp(policy) / torch.exp(reference)
    is_ratio = torch.allclose(torch.exp(found / 0.25), ratio, rtol=1e-12)
    yield "exp(reward / beta) is the ratio of probabilities (Eq. 5)", is_ratio
    at_reference = fn(policy, policy, 0.25)
    yield "it is 0 where policy and reference agree", float(at_reference.abs().max()) == 0.0
    yield "twice the beta, twice the reward", close(fn(policy, reference, 0.5), 2 * found)
    swapped = fn(reference, policy, 0.25)
    yield "swapping policy and reference changes the sign", close(swapped, -found)


def check_diagnose(fn):
    end = {
        "held_out_margin": 0.9,
        "held_out_kl": 3.0,
        "held_out_accuracy": 0.8,
        "held_out_logps_chosen": -20.5,
    }

    def signs(accuracy=0.8, first_margin=0.0, **last):
        start = {"held_out_margin": first_margin, "held_out_logps_chosen": -20.0}
        steps = [{"step": n, "accuracy": 0.5 if n < 10 else accuracy} for n in range(1, 31)]
        return set(
            fn([{"step": 0, "held_out_kl": 0.0, **start}, *steps[:-1], steps[-1] | end | last])
        )

    yield "a healthy run has no sign", signs() == set()
    yield "a margin at step 0", signs(first_margin=-0.4) == {"wrong reference"}
    yield "a KL of 25", signs(held_out_kl=25.0) == {"too far"}
    yield "a KL of 20 is not above 20", signs(held_out_kl=20.0) == set()
    by_heart = signs(accuracy=0.98) == {"learnt by heart"}
    yield "training accuracy far above the held-out one", by_heart
    learnt = signs(accuracy=0.98, held_out_accuracy=0.96) == set()
    yield "high on held-out pairs too is no overfitting", learnt
    fallen = signs(held_out_logps_chosen=-23.0)
    yield "the chosen answer became less likely", fallen == {"displacement"}
    both = signs(held_out_logps_chosen=-23.0, held_out_kl=40.0)
    yield "two signs at once", both == {"displacement", "too far"}


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
