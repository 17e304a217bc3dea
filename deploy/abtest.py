"""Which of two models do users like better? Proportions, the sample size they need, and what
peeking costs, exactly.
"""

from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from scipy.stats import binom, binomtest, norm


@dataclass(frozen=True)
class TwoShares:
    """Shares of thumbs up of two arms. `difference` is B minus A with its 95 % interval; `p_value`
    is two-sided.
    """

    share_a: float
    share_b: float
    difference: float
    ci95: tuple[float, float]
    p_value: float


def _z_score(up_a, n_a, up_b, n_b) -> np.ndarray:
    """(share B - share A) in standard errors, with the pooled share; 0 where all or none are up."""
    pooled = (up_a + up_b) / (n_a + n_b)
    spread = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    zero = np.zeros_like(spread, dtype=float)
    return np.divide(up_b / n_b - up_a / n_a, spread, out=zero, where=spread > 0)


def two_shares(up_a: int, n_a: int, up_b: int, n_b: int) -> TwoShares:
    """Compares two arms, each user counted once. The interval is Newcombe's (1998, method 10),
    from the Wilson interval of each arm.

    Raises: ValueError for an arm without votes, or more thumbs up than votes.
    """
    if min(n_a, n_b) < 1 or not (0 <= up_a <= n_a and 0 <= up_b <= n_b):
        counts = f"{up_a}/{n_a}, {up_b}/{n_b}"
        raise ValueError(f"Each arm needs votes, and no more thumbs up than votes: {counts}.")
    a, b = up_a / n_a, up_b / n_b
    low_a, high_a = binomtest(up_a, n_a).proportion_ci(method="wilson")
    low_b, high_b = binomtest(up_b, n_b).proportion_ci(method="wilson")
    below = sqrt((b - low_b) ** 2 + (high_a - a) ** 2)
    above = sqrt((high_b - b) ** 2 + (a - low_a) ** 2)
    z = float(_z_score(*np.array([up_a, n_a, up_b, n_b], dtype=float)))
    interval = (b - a - below, b - a + above)
    return TwoShares(a, b, b - a, interval, float(2 * norm.sf(abs(z))))


def sample_size(share: float, lift: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Users per arm so that a true difference of `lift` from `share` is found with probability
    `power`.

    Two-sided test of two proportions at level `alpha` (normal approximation, Fleiss 1981, without
    continuity term).
    Raises: ValueError unless both shares lie between 0 and 1 and differ.
    """
    other = share + lift
    if not (0 < share < 1 and 0 < other < 1 and lift):
        raise ValueError(f"Shares must lie between 0 and 1 and differ, not {share} and {other}.")
    middle, z_alpha, z_power = (share + other) / 2, norm.isf(alpha / 2), norm.isf(1 - power)
    spread = z_alpha * sqrt(2 * middle * (1 - middle))
    spread += z_power * sqrt(share * (1 - share) + other * (1 - other))
    return ceil((spread / lift) ** 2)


def chance_of_a_winner(
    share_a: float, share_b: float, per_look: int, looks: int, alpha: float = 0.05
) -> np.ndarray:
    """Probability that a test has named a winner by each of `looks` looks, (looks,): exact, no
    simulation.

    After every `per_look` more users in each arm the pooled z test is taken, and the first |z|
    above the limit ends the experiment. With equal shares this is the chance of a false alarm. All
    pairs of counts are followed with their binomial probabilities.
    """
    limit, step = norm.isf(alpha / 2), np.arange(per_look + 1)
    alive, stopped, found = np.ones((1, 1)), 0.0, []
    for look in range(1, looks + 1):
        for axis, share in enumerate((share_a, share_b)):
            more = binom.pmf(step, per_look, share)
            alive = np.apply_along_axis(np.convolve, axis, alive, more)
        n, (up_a, up_b) = float(look * per_look), np.indices(alive.shape, dtype=float)
        named = np.abs(_z_score(up_a, n, up_b, n)) > limit
        stopped += float(alive[named].sum())
        alive = np.where(named, 0.0, alive)
        found.append(stopped)
    return np.array(found)


def votes_by_arm(rows: list[dict], horizon: int | None = None) -> dict[str, tuple[int, int]]:
    """{model: (users up, users who voted)} of answers that the A/B test assigned, each user's first
    vote only.

    Args: rows of `deploy.serving.reports.answers`, oldest first. Votes of one user are not
        independent, so a user counts once, however much he asks. `horizon`: the first so many users
        of each arm, as planned; later ones would be another look.
    """
    first: dict[str, dict[str, int]] = {}  # model → user → rating
    for row in rows:
        if row["assigned"] and row["user"] and row["rating"]:
            first.setdefault(row["model"], {}).setdefault(row["user"], row["rating"])
    votes = {model: list(first[model].values())[:horizon] for model in sorted(first)}
    return {model: (ratings.count(1), len(ratings)) for model, ratings in votes.items()}


def ab_decision(
    votes: dict[str, tuple[int, int]], control: str, candidate: str, horizon: int
) -> tuple[str, TwoShares]:
    """What the test says once both arms have `horizon` users, and not before: "wait", a winner's
    name, or "no winner".

    Raises: ValueError where an arm has no votes.
    """
    counts = [votes.get(name, (0, 0)) for name in (control, candidate)]
    shares = two_shares(*counts[0], *counts[1])
    if min(n for _, n in counts) < horizon:
        return "wait", shares
    if shares.ci95[0] <= 0 <= shares.ci95[1]:
        return "no winner", shares
    return candidate if shares.difference > 0 else control, shares
