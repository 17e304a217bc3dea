"""The losses, against arithmetic done by hand, mpmath and autograd."""

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from tiny import assert_same
from torch import tensor

from common.logprobs import PairLogps, SideLogps
from common.losses import (
    bradley_terry_loss,
    dpo_logits,
    dpo_loss,
    ipo_loss,
    log1mexp,
    log_odds,
    objective,
    odds_ratio_loss,
    orpo_loss,
    scored_tokens,
    sft_loss,
    share_positive,
    simpo_loss,
)
from common.profiles import Recipe

LN2 = 0.6931471805599453


def f64(*values: float, grad: bool = False) -> torch.Tensor:
    return tensor(values, dtype=torch.float64, requires_grad=grad)


def random_logps(rows: int = 6, count: int = 4) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [-20 * torch.rand(rows, generator=draw, dtype=torch.float64) - 0.5 for _ in range(count)]


# --- DPO


def test_dpo_loss_by_hand():
    """beta 0.5. Row 1: 0.5 * ((-10 + 11) - (-14 + 13)) = 1, so ln(1 + e^-1) = 0.313261687518223.
    Row 2: 0.5 * ((-6 + 4) - (-7 + 9)) = -2, so ln(1 + e^2) = 2.126928011042973."""
    loss = dpo_loss(f64(-10, -6), f64(-14, -7), f64(-11, -4), f64(-13, -9), beta=0.5)
    assert_same(loss, f64(0.31326168751822286, 2.1269280110429727))


def test_dpo_loss_by_hand_in_float32():
    """The same first row, within what float32 can hold."""
    loss = dpo_loss(tensor([-10.0]), tensor([-14.0]), tensor([-11.0]), tensor([-13.0]), beta=0.5)
    assert loss.dtype == torch.float32
    assert_same(loss, f64(0.31326168751822286), 1e-5)


def test_dpo_default_beta_is_a_tenth():
    """0.1 * (30 - 10) = 2, so ln(1 + e^-2) = 0.126928011042973."""
    assert_same(dpo_loss(f64(-10), f64(-20), f64(-40), f64(-30)), f64(0.12692801104297249))


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_dpo_loss_is_ln_2_at_the_reference(beta):
    """Policy = reference makes every log-ratio 0, and -ln sigmoid(0) = ln 2, whatever beta and
    smoothing.
    """
    chosen, rejected = random_logps()[:2]
    for smoothing in (0.0, 0.2):
        assert_same(dpo_loss(chosen, rejected, chosen, rejected, beta, smoothing), [LN2] * 6)


def test_swapping_chosen_and_rejected_negates_the_logit():
    """-ln s(x) + ln s(-x) = -x, so the losses of the two orders differ by the logit itself."""
    a, b, c, d = random_logps()
    logit = dpo_logits(a, b, c, d)
    assert_same(dpo_logits(b, a, d, c), -logit)
    assert_same(dpo_loss(a, b, c, d, 0.3) - dpo_loss(b, a, d, c, 0.3), -0.3 * logit)


def test_a_shared_offset_of_a_prompt_cancels():
    """Adding the same log p(prompt) to both sides of a model leaves the logit alone: why DPO takes
    sums.
    """
    a, b, c, d = random_logps()
    assert_same(dpo_loss(a - 7.5, b - 7.5, c - 3.25, d - 3.25), dpo_loss(a, b, c, d))


def test_label_smoothing_mixes_both_orders():
    """Conservative DPO: (1 - e) * loss + e * loss of the flipped pair; e = 0.25 at logit 1 (beta
    0.5, as above): 0.75 * 0.313261687518223 + 0.25 * 1.313261687518223 = 0.563261687518223.
    """
    pair = f64(-10), f64(-14), f64(-11), f64(-13)
    assert_same(dpo_loss(*pair, beta=0.5, label_smoothing=0.25), f64(0.56326168751822286))


def test_dpo_gradient_weight_is_sigmoid_of_the_rejected_lead():
    """d loss / d log p(chosen) = -beta * s(r_l - r_w), and the opposite for rejected (Rafailov et
    al., Sec. 4).
    """
    chosen, rejected, ref_chosen, ref_rejected = random_logps()
    chosen.requires_grad_(), rejected.requires_grad_()
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3).sum().backward()
    lead = [
        0.3 * ((rejected[i] - ref_rejected[i]) - (chosen[i] - ref_chosen[i])).item()
        for i in range(6)
    ]
    weight = f64(*(1 / (1 + math.exp(-value)) for value in lead))
    assert_same(chosen.grad, -0.3 * weight)
    assert_same(rejected.grad, 0.3 * weight)


def test_dpo_loss_stays_finite_where_the_naive_form_overflows():
    """At logit -1000 the loss is 1000; -log(sigmoid(x)) says inf, and its gradient is nan."""
    policy = f64(-1000, grad=True)
    loss = dpo_loss(policy, f64(0), f64(0), f64(0), beta=1.0)
    loss.backward()
    assert_same(loss, f64(1000))
    assert_same(policy.grad, f64(-1))
    naive = f64(-1000, grad=True)
    value = -torch.log(torch.sigmoid(naive))
    value.backward()
    assert value.item() == math.inf and not math.isfinite(naive.grad.item())


def test_ipo_loss_by_hand():
    """beta 0.25 aims at a margin of 1 / 0.5 = 2. Margin 2 gives 0, margin 5 gives 9, the reference
    gives 4.
    """
    policy, zero = f64(-8, -5, -10), f64(-10, -10, -10)
    assert_same(ipo_loss(policy, zero, zero, zero, beta=0.25), f64(0, 9, 4))


def test_ipo_default_beta_at_the_reference():
    """1 / (4 beta^2) = 25 at beta 0.1."""
    assert_same(ipo_loss(f64(-3), f64(-4), f64(-3), f64(-4)), f64(25))


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, dpo_logits])
def test_dpo_losses_refuse_shapes_that_would_broadcast(loss):
    """(3,) with (1,) would broadcast without a word, whichever of the four it is."""
    for odd in range(4):
        arguments = [torch.zeros(3) for _ in range(4)]
        arguments[odd] = torch.zeros(1)
        with pytest.raises(ValueError, match=r"\(1,\), \(3,\)"):
            loss(*arguments)


# --- SFT and the reward model


def test_sft_loss_is_the_mean_over_tokens_not_over_rows():
    """(4 + 1) nats over (8 + 1) tokens = 5/9; the mean of row means is (0.5 + 1) / 2 = 0.75."""
    assert_same(sft_loss(f64(-4, -1), tensor([8, 1])), 5 / 9)


def test_bradley_terry_loss_by_hand():
    """Rewards 2 and 1: ln(1 + e^-1); equal rewards: ln 2; 0 and 3: ln(1 + e^3) = 3.0485873516."""
    loss = bradley_terry_loss(f64(2, 5, 0), f64(1, 5, 3))
    assert_same(loss, f64(0.31326168751822286, LN2, 3.048587351573742))


def test_bradley_terry_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(1))


# --- log(1 - exp(x)) and ORPO

POINTS = [-1e-12, -1e-8, -1e-3, -0.69, -0.7, -1.0, -50.0, -1e4]


def exact_log1mexp(x: float) -> tuple[float, float]:
    """Value and gradient, in 60 digits: log(1 - e^x) and -e^x / (1 - e^x)."""
    with mpmath.workdps(60):
        x = mpmath.mpf(x)
        return float(mpmath.log1p(-mpmath.exp(x))), float(-mpmath.exp(x) / (1 - mpmath.exp(x)))


def relative_error(actual: float, expected: float) -> float:
    if not math.isfinite(actual):
        return math.inf
    return abs(actual - expected) / abs(expected) if expected else abs(actual)


def value_and_gradient(function, x: float, dtype=torch.float64) -> tuple[float, float]:
    argument = tensor(x, dtype=dtype, requires_grad=True)
    value = function(argument)
    value.backward()
    return value.item(), argument.grad.item()


@pytest.mark.parametrize("x", POINTS)
def test_log1mexp_in_f64(x):
    """Relative error against 60 digits, in value and gradient."""
    for actual, expected in zip(value_and_gradient(log1mexp, x), exact_log1mexp(x), strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("x", POINTS)
def test_log1mexp_in_float32(x):
    """The exact value at the float32 nearest to x."""
    nearest = tensor(x, dtype=torch.float32).item()
    for actual, expected in zip(
        value_and_gradient(log1mexp, x, torch.float32), exact_log1mexp(nearest), strict=True
    ):
        assert relative_error(actual, expected) < 1e-5


def naive(x):
    return torch.log1p(-torch.exp(x))


def one_branch(x):
    return torch.log(-torch.expm1(x))


def two_branches(x):
    return torch.where(x > -LN2, one_branch(x), naive(x))


def test_naive_log1mexp_fails_near_zero():
    """In float64 at -1e-8, exp rounds away half of the digits; in float32 it rounds to 1, and log 0
    = -inf.
    """
    for actual, expected in zip(
        value_and_gradient(naive, -1e-8), exact_log1mexp(-1e-8), strict=True
    ):
        assert 1e-11 < relative_error(actual, expected) < 1e-6
    value, gradient = value_and_gradient(naive, -1e-8, torch.float32)
    assert value == -math.inf and not math.isfinite(gradient)


def test_expm1_alone_fails_far_from_zero():
    """1 - e^-50 rounds to 1, so the value is 0 where it should be -1.9e-22."""
    value, _ = value_and_gradient(one_branch, -50.0)
    assert value == 0.0 and exact_log1mexp(-50.0)[0] < -1e-22


def test_where_alone_has_a_nan_gradient():
    """The value is right, but the gradient of the branch not taken is inf, and 0 * inf = nan."""
    x = -1e-8
    value, gradient = value_and_gradient(two_branches, x, torch.float32)
    assert relative_error(value, exact_log1mexp(x)[0]) < 1e-5 and math.isnan(gradient)


def test_log1mexp_backpropagates_the_upstream_gradient():
    """Gradient of 3 * log1mexp at p = 1/4, x = ln(1/4): -3 * (1/4) / (3/4) = -1; at p = 1/2: -3."""
    x = f64(math.log(0.25), math.log(0.5), grad=True)
    (3 * log1mexp(x)).sum().backward()
    assert_same(x.grad, f64(-1, -3))


def test_log_odds_by_hand():
    """p = 3/4 has odds 3, p = 1/5 has odds 1/4."""
    assert_same(log_odds(f64(math.log(0.75), math.log(0.2))), f64(math.log(3), -math.log(4)))


def test_odds_ratio_loss_by_hand():
    """p = 3/4 against 1/2: odds ratio 3 / 1, so -ln(3 / (1 + 3)) = ln(4/3); 1/5 against 1/2: ratio
    1/4, so ln 5.
    """
    half = math.log(0.5)
    loss = odds_ratio_loss(f64(math.log(0.75), math.log(0.2)), f64(half, half))
    assert_same(loss, f64(math.log(4 / 3), math.log(5)))


def test_odds_ratio_loss_is_ln_2_where_both_are_equal():
    logps = -f64(1e-12, 1e-3, 0.5, 3, 200)
    assert_same(odds_ratio_loss(logps, logps), [LN2] * 5)


def test_swapping_negates_the_log_odds_ratio():
    """-ln s(x) + ln s(-x) = -x with x the log odds ratio: here ln 3 - ln(1/4) = ln 12."""
    a, b = f64(math.log(0.75)), f64(math.log(0.2))
    assert_same(odds_ratio_loss(a, b) - odds_ratio_loss(b, a), f64(-math.log(12)))


def test_odds_ratio_gradient_is_finite_for_a_nearly_certain_answer():
    """At chosen log p = -1e-8, d/dx of -ln s(log odds) = -(1 - s) * (1 + e^x / (1 - e^x)): with
    odds 1e8 against 1, 1 - s = 1 / (1e8 + 1), times 1e8 + 1/2: about -1. The naive form in float32
    is not finite.
    """
    chosen = tensor([-1e-8], requires_grad=True)
    odds_ratio_loss(chosen, tensor([math.log(0.5)])).backward()
    assert abs(chosen.grad.item() + 1) < 1e-5
    wrong = tensor([-1e-8], requires_grad=True)
    odds = wrong - naive(wrong) - (math.log(0.5) - naive(tensor([math.log(0.5)])))
    (-torch.nn.functional.logsigmoid(odds)).backward()
    assert not math.isfinite(wrong.grad.item())


def test_odds_ratio_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        odds_ratio_loss(-torch.ones(3), -torch.ones(1))


def test_orpo_loss_by_hand():
    """NLL 2 plus 0.5 * mean(ln(4/3), ln 5) of the pairs above = 2 + 0.25 * ln(20/3)."""
    half = math.log(0.5)
    loss = orpo_loss(f64(2)[0], f64(math.log(0.75), math.log(0.2)), f64(half, half), lambda_or=0.5)
    assert_same(loss, 2 + 0.25 * math.log(20 / 3))


def test_orpo_loss_without_lambda_is_the_nll():
    a, b = -f64(0.1, 2.0), -f64(3.0, 0.2)
    assert_same(orpo_loss(f64(1.75)[0], a, b, lambda_or=0.0), 1.75)


def test_share_positive_counts_a_tie_as_half():
    """Two of four above 0, one equal: (2 + 0.5) / 4."""
    assert share_positive(f64(3, 0, -1, 1e-9)) == 0.625


# --- one step out of micro-batches


def pair_logps(rows: int = 5, prompts: bool = False) -> tuple[PairLogps, PairLogps, list[int]]:
    """Policy and reference log-probabilities of ragged rows, with gradients, and the tokens that
    the NLL covers.
    """
    draw = torch.Generator().manual_seed(1)
    lengths = [torch.randint(1, 9, (rows,), generator=draw) for _ in range(3)]

    def side(length):
        mean = -3 * torch.rand(rows, generator=draw, dtype=torch.float64) - 0.01
        return SideLogps((mean * length).requires_grad_(), length)

    policy = PairLogps(side(lengths[0]), side(lengths[1]), side(lengths[2]) if prompts else None)
    reference = PairLogps(side(lengths[0]).detach(), side(lengths[1]).detach())
    tokens = lengths[0] + (lengths[2] if prompts else 0)
    return policy, reference, tokens.tolist()


def part(logps: PairLogps, at: slice) -> PairLogps:
    def cut(side):
        return None if side is None else SideLogps(side.sums[at], side.lengths[at])

    return PairLogps(cut(logps.chosen), cut(logps.rejected), cut(logps.prompt))


METHODS = {
    "sft": ("sft", Recipe(lr=1)),
    "lm": ("lm", Recipe(lr=1)),
    "dpo": ("dpo", Recipe(lr=1, beta=0.2)),
    "dpo with NLL": ("dpo", Recipe(lr=1, beta=0.2, nll_weight=0.7, label_smoothing=0.1)),
    "ipo": ("dpo", Recipe(lr=1, beta=0.2, loss="ipo")),
    "orpo": ("orpo", Recipe(lr=1, lambda_or=0.4, nll_on_prompt=True)),
    "orpo of sums": ("orpo", Recipe(lr=1, lambda_or=0.4, contrast="sums")),
}


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_add_up_to_one_large_batch(name):
    """Rows 0-0, 1-2 and 3-4 as three micro-batches: loss, every metric, and the gradients are those
    of all five.
    """
    method, recipe = METHODS[name]

    def run(slices):
        policy, reference, tokens = pair_logps(prompts=recipe.nll_on_prompt)
        total, sums = 0.0, {}
        for at in slices:
            loss, metrics = objective(
                method, recipe, part(policy, at), part(reference, at), 5, sum(tokens)
            )
            loss.backward()
            total = total + loss.detach()
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + torch.as_tensor(value).detach()
        sides = policy.chosen, policy.rejected, policy.prompt
        return (
            total,
            sums,
            [side.sums.grad for side in sides if side and side.sums.grad is not None],
        )

    whole, pieces = run([slice(0, 5)]), run([slice(0, 1), slice(1, 3), slice(3, 5)])
    assert_same(pieces[0], whole[0])
    assert pieces[1].keys() == whole[1].keys()
    for key, value in whole[1].items():
        assert_same(pieces[1][key], value)
    for one, other in zip(pieces[2], whole[2], strict=True):
        assert_same(one, other)


def test_objective_of_sft_is_the_token_mean():
    """Sums of all chosen log-probabilities over all their tokens."""
    policy, _, tokens = pair_logps()
    loss, metrics = objective("sft", Recipe(lr=1), policy, None, 5, sum(tokens))
    assert_same(loss, -sum(policy.chosen.sums.tolist()) / sum(tokens))
    assert_same(metrics["nll"], loss)
    assert_same(metrics["logps_chosen"], sum(policy.chosen.sums.tolist()) / 5)


def test_objective_of_dpo_adds_the_weighted_nll():
    """mean(ln(1 + exp(-0.2 * margin))) + 0.7 * NLL, the margin by plain floats."""
    policy, reference, tokens = pair_logps()
    c, r, rc, rr = (
        logps.sums.tolist()
        for side in (policy, reference)
        for logps in (side.chosen, side.rejected)
    )
    margins = [(c[i] - rc[i]) - (r[i] - rr[i]) for i in range(5)]
    nll = -sum(c) / sum(tokens)
    dpo = sum(math.log1p(math.exp(-0.2 * margin)) for margin in margins) / 5
    recipe = Recipe(lr=1, beta=0.2, nll_weight=0.7)
    loss, metrics = objective("dpo", recipe, policy, reference, 5, sum(tokens))
    assert_same(loss, dpo + 0.7 * nll)
    assert_same(metrics["margin"], 0.2 * sum(margins) / 5)
    assert_same(metrics["rewards_chosen"], 0.2 * sum(c[i] - rc[i] for i in range(5)) / 5)
    assert_same(metrics["rewards_rejected"], 0.2 * sum(r[i] - rr[i] for i in range(5)) / 5)
    assert_same(metrics["logps_rejected"], sum(r) / 5)
    assert metrics["accuracy"] == sum(margin > 0 for margin in margins) / 5


def test_objective_of_dpo_uses_the_smoothing_and_the_variant_of_the_recipe():
    policy, reference, tokens = pair_logps()
    sums = policy.chosen.sums, policy.rejected.sums, reference.chosen.sums, reference.rejected.sums
    smoothed = replace(METHODS["dpo"][1], label_smoothing=0.3)
    assert_same(
        objective("dpo", smoothed, policy, reference, 5, sum(tokens))[0],
        dpo_loss(*sums, 0.2, 0.3).mean(),
    )
    ipo = METHODS["ipo"][1]
    assert_same(
        objective("dpo", ipo, policy, reference, 5, sum(tokens))[0], ipo_loss(*sums, 0.2).mean()
    )


def test_objective_of_orpo_by_plain_floats():
    """NLL over prompt and chosen tokens + 0.4 * mean(-ln(odds / (1 + odds))), odds from *mean*
    log-probabilities.
    """
    policy, _, tokens = pair_logps(prompts=True)
    nll = -(sum(policy.chosen.sums.tolist()) + sum(policy.prompt.sums.tolist())) / sum(tokens)
    odds = []
    for side in (policy.chosen, policy.rejected):
        p = [
            math.exp(total / length)
            for total, length in zip(side.sums.tolist(), side.lengths.tolist(), strict=True)
        ]
        odds.append([value / (1 - value) for value in p])
    ratios = [chosen / rejected for chosen, rejected in zip(*odds, strict=True)]
    expected = sum(math.log1p(1 / ratio) for ratio in ratios) / 5
    loss, metrics = objective("orpo", METHODS["orpo"][1], policy, None, 5, sum(tokens))
    assert_same(loss, nll + 0.4 * expected)
    assert_same(metrics["odds_ratio_loss"], expected)
    assert_same(metrics["log_odds_margin"], sum(map(math.log, ratios)) / 5)
    assert metrics["accuracy"] == sum(ratio > 1 for ratio in ratios) / 5


@pytest.mark.parametrize("contrast", ["logps", "sums"])
def test_what_may_replace_the_odds_of_means(contrast):
    """Answers of 2 and 4 tokens, sums -2 and -6 nats: means -1 and -1.5, so logps give a margin of
    .5; of sums the log odds are ln(e^-2 / (1 - e^-2)) and ln(e^-6 / (1 - e^-6)).
    """
    chosen, rejected = SideLogps(f64(-2.0), tensor([2])), SideLogps(f64(-6.0), tensor([4]))
    recipe = Recipe(lr=1.0, lambda_or=0.3, contrast=contrast)
    loss, metrics = objective("orpo", recipe, PairLogps(chosen, rejected), None, 1, 2)
    p, q = math.exp(-2), math.exp(-6)
    margin = {"logps": 0.5, "sums": math.log(p / (1 - p)) - math.log(q / (1 - q))}[contrast]
    assert_same(metrics["log_odds_margin"], margin)
    assert_same(loss, 1.0 + 0.3 * math.log1p(math.exp(-margin)))


def test_an_unknown_contrast_is_an_error():
    policy, _, tokens = pair_logps()
    with pytest.raises(KeyError, match="odd"):
        objective("orpo", Recipe(lr=1, contrast="odd"), policy, None, 5, sum(tokens))


def test_scored_tokens_count_the_prompt_from_its_second_token():
    """Chosen 3 + 1 tokens; with the prompt (2 - 1) + (5 - 1) more."""
    rows = [
        {"prompt_ids": [7] * 2, "chosen_ids": [7] * 3},
        {"prompt_ids": [7] * 5, "chosen_ids": [7]},
    ]
    assert scored_tokens(rows, Recipe(lr=1)) == 4
    assert scored_tokens(rows, Recipe(lr=1, nll_on_prompt=True)) == 9


def test_simpo_loss_by_hand():
    """beta 2, gamma 0.5, means -1.0 and -1.75: 2 * 0.75 - 0.5 = 1, and -log sigmoid(1) = log(1 +
    e^-1) = 0.31326…
    """
    value = simpo_loss(f64(-1.0), f64(-1.75), beta=2.0, gamma=0.5)
    assert_same(value, [math.log(1 + math.exp(-1))])


def test_simpo_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        simpo_loss(f64(-1.0), f64(-1.0, -2.0))


def test_without_rejected_answers_orpo_is_the_nll():
    """Two answers of 3 and 2 tokens, sums -3 and -1: 4 nats over 5 tokens are 0.8 a token."""
    recipe, chosen = Recipe(lr=1.0), SideLogps(f64(-3.0, -1.0), tensor([3, 2]))
    loss, metrics = objective("orpo", recipe, PairLogps(chosen), None, pairs=2, tokens=5)
    assert_same(loss, 0.8)
    assert set(metrics) == {"nll", "logps_chosen"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
def test_a_certain_answer_has_finite_odds(dtype, certain):
    """A mean log-probability of exactly 0 is p = 1, of infinite odds: it counts as 1 - 1e-12,
    with log odds of ln(1e12) = 27.63. The loss and all gradients are finite; the gradient of the
    certain side is 0. (Before: NaN or infinity.)
    """
    values = {side: 0.0 if certain in (side, "both") else -1.0 for side in ("chosen", "rejected")}
    sides = {
        side: torch.tensor([value], dtype=dtype, requires_grad=True)
        for side, value in values.items()
    }
    loss = odds_ratio_loss(sides["chosen"], sides["rejected"])
    loss.sum().backward()
    odds = {0.0: math.log(1e12), -1.0: math.log(math.exp(-1) / (1 - math.exp(-1)))}
    margin = odds[values["chosen"]] - odds[values["rejected"]]
    assert_same(loss.item(), math.log1p(math.exp(-margin)), 1e-5)
    for side, argument in sides.items():
        assert torch.isfinite(argument.grad).all()
        assert (argument.grad == 0).all() == (values[side] == 0.0)
