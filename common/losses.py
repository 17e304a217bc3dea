"""The losses of the course, each a few lines. All arguments are log-probabilities in nats."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.logprobs import PairLogps
from common.profiles import Recipe

CERTAIN = -1e-12  # nats; log1mexp is right in value and gradient up to here


def _same_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"All log-probabilities must have one shape (batch,); found {sorted(shapes)}."
        )


def sft_loss(logp_sums: Tensor, lengths: Tensor) -> Tensor:
    """Negative log-likelihood per token over the whole batch, the loss of supervised fine-tuning.

    Args: summed log-probabilities and the number of scored tokens, each of shape (batch,).
    Returns: a scalar, in nats per token.
    Pitfall: the mean over tokens, not the mean of row means: short answers must not count more per
        token.
    """
    return -logp_sums.sum() / lengths.sum()


def dpo_logits(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
) -> Tensor:
    """Log-ratio of chosen minus log-ratio of rejected, (batch,). Eq. 7 multiplies it by beta."""
    _same_shape(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (policy_chosen_logps - reference_chosen_logps) - (
        policy_rejected_logps - reference_rejected_logps
    )


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Per-pair DPO loss, Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7.

    Args: summed response log-probabilities, each of shape (batch,); `label_smoothing`: the assumed
        share of flipped labels (conservative DPO, Mitchell 2023).
    Returns: shape (batch,). Equals ln 2 where policy and reference agree.
    Raises: ValueError if shapes differ.
    Pitfall: the *sum* over tokens, not the mean: with the mean the prompt template no longer
        cancels.
    """
    logits = beta * dpo_logits(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Per-pair IPO loss, Azar et al. 2023 (arXiv 2310.12036), Eq. 17.

    It pulls the margin to 1 / (2 beta), and no further.
    Args and Raises: as `dpo_loss`; the paper takes sums, TRL the means per token.
    Returns: shape (batch,). Equals 1 / (4 beta²) where policy and reference agree.
    """
    margin = dpo_logits(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (margin - 1 / (2 * beta)) ** 2


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Per-pair loss of a reward model, Ouyang et al. 2022 (arXiv 2203.02155), Eq. 1.

    Args: rewards of shape (batch,). Returns: shape (batch,); ln 2 where both are equal.
    Raises: ValueError if shapes differ. Source: Bradley and Terry 1952.
    """
    _same_shape(chosen_rewards, rejected_rewards)
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


class _Log1mExp(torch.autograd.Function):
    """log(1 - exp(x)) with its own gradient: each textbook form has a wrong one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Mächler 2012: each branch is exact where the other one cancels. -log 2 is where they meet.
        near_zero = x > -0.6931471805599453
        return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # This is -1 / (exp(-x) - 1), without overflow for large -x.
        return -upstream * torch.exp(x) / -torch.expm1(x)


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) = log(1 - p), right in value and gradient from -1e-12 to -1e4 and below.

    Args: log-probabilities below 0, any shape. Returns: the same shape; -inf at exactly 0.
    Source: Mächler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    return _Log1mExp.apply(log_p)


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), same shape.

    A certain answer (mean exactly 0) counts as p = 1 - 1e-12, finer than float32 can tell from 1.
    Its log odds are then 27.6 instead of infinity, and their gradient is 0 instead of NaN.
    """
    mean_logps = mean_logps.clamp(max=CERTAIN)
    return mean_logps - log1mexp(mean_logps)


def odds_ratio_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """Per-pair odds-ratio loss, Hong et al. 2024 (ORPO, arXiv 2403.07691), Eq. 7.

    It is -log sigmoid(log odds ratio).
    Args: *mean* log-probabilities per token, below 0, each of shape (batch,).
    Returns: shape (batch,). Equals ln 2 where both are equal. Raises: ValueError if shapes differ.
    Pitfall: with sums 1 - P is almost 1, and the odds ratio degenerates into a ratio of
        probabilities.
    """
    _same_shape(chosen_mean_logps, rejected_mean_logps)
    return -F.logsigmoid(log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps))


def orpo_loss(
    nll: Tensor, chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, lambda_or: float = 0.1
) -> Tensor:
    """ORPO loss, Hong et al. 2024, Eq. 6: the NLL plus lambda times the odds ratio.

    Args: `nll`: scalar, nats per token; mean log-probabilities of shape (batch,).
    Returns: a scalar. `lambda_or` is called `beta` in TRL and `alpha` in the authors' code.
    """
    return nll + lambda_or * odds_ratio_loss(chosen_mean_logps, rejected_mean_logps).mean()


def simpo_loss(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float = 2.0, gamma: float = 0.5
) -> Tensor:
    """Per-pair SimPO loss, Meng et al. 2024 (arXiv 2405.14734), Eq. 6.

    It takes the margin of means, less a wanted gap.
    Args: *mean* log-probabilities per token, each of shape (batch,); `gamma`: the gap, in units of
        beta * nats.
    Returns: shape (batch,). Equals -log sigmoid(-gamma) where both are equal. Raises: ValueError if
        shapes differ.
    """
    _same_shape(chosen_mean_logps, rejected_mean_logps)
    return -F.logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def share_positive(margins: Tensor) -> float:
    """Share of positive margins, a margin of exactly 0 counted as half: the preference accuracy."""
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())


def scored_tokens(rows: list[dict], recipe: Recipe) -> int:
    """Tokens that the NLL of these rows covers."""
    prompt = sum(len(row["prompt_ids"]) - 1 for row in rows) if recipe.nll_on_prompt else 0
    return prompt + sum(len(row["chosen_ids"]) for row in rows)


CONTRASTS = {  # what ORPO's term compares (`Recipe.contrast`): the odds, or two other choices
    "odds": lambda side: log_odds(side.means),
    "logps": lambda side: side.means,
    "sums": lambda side: log_odds(side.sums),
}


def objective(
    method: str,
    recipe: Recipe,
    policy: PairLogps,
    reference: PairLogps | None,
    pairs: int,
    tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of one micro-batch; over a whole step they add up to the step's own.

    Args: `pairs`, `tokens`: of the whole step, over all micro-batches and processes. With them two
        processes, or accumulation, give the same loss as one large batch, however ragged the rows.
    """
    # 1. The NLL of the chosen answers, which every method has.
    chosen, rejected = policy.chosen, policy.rejected
    nll = -(chosen.sums.sum() + (policy.prompt.sums.sum() if policy.prompt else 0.0)) / tokens
    metrics = {"nll": nll, "logps_chosen": chosen.sums.sum() / pairs}
    if rejected is not None:
        metrics["logps_rejected"] = rejected.sums.sum() / pairs
    # 2. Imitation stops here: SFT, and ORPO with lambda 0, which has no rejected answers.
    if rejected is None or method in ("lm", "sft"):
        return nll, metrics
    # 3. ORPO adds the odds ratio of mean log-probabilities, or what an experiment puts there.
    if method == "orpo":
        score = CONTRASTS[recipe.contrast]
        margin = score(chosen) - score(rejected)
        odds = -F.logsigmoid(margin).sum() / pairs
        metrics |= {"odds_ratio_loss": odds, "log_odds_margin": margin.sum() / pairs}
        metrics["accuracy"] = share_positive(margin) * len(margin) / pairs
        return nll + recipe.lambda_or * odds, metrics
    # 4. DPO compares the sums with those of the reference; its rewards are beta times log-ratios.
    sums = chosen.sums, rejected.sums, reference.chosen.sums, reference.rejected.sums
    if recipe.loss == "ipo":
        per_pair = ipo_loss(*sums, beta=recipe.beta)
    else:
        per_pair = dpo_loss(*sums, beta=recipe.beta, label_smoothing=recipe.label_smoothing)
    reward_chosen = recipe.beta * (sums[0] - sums[2]).detach()
    reward_rejected = recipe.beta * (sums[1] - sums[3]).detach()
    margin = reward_chosen - reward_rejected
    metrics |= {
        "rewards_chosen": reward_chosen.sum() / pairs,
        "rewards_rejected": reward_rejected.sum() / pairs,
        "margin": margin.sum() / pairs,
        "accuracy": share_positive(margin) * len(margin) / pairs,
    }
    return per_pair.sum() / pairs + recipe.nll_weight * nll, metrics
