"""The statistics of a service: which of two models users like better, and has anything changed?

The A/B test compares proportions, with the sample size they need and what peeking costs. Drift
compares traffic and answers with those of a quiet time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import mean

import numpy as np
from scipy.stats import binom, binomtest, norm

from common.data import tokenize_response
from common.evaluation import logps_of
from common.io.formats import dialogue


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

    def __str__(self) -> str:
        low, high = self.ci95
        return f"{self.difference:+.3f} [{low:+.3f}, {high:+.3f}], p = {self.p_value:.1g}"


def _z_score(up_a, n_a, up_b, n_b) -> np.ndarray:
    """(share B - share A) in standard errors, with the pooled share; 0 where all or none are up."""
    pooled = (up_a + up_b) / (n_a + n_b)
    spread = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    return np.divide(up_b / n_b - up_a / n_a, spread, out=np.zeros_like(spread), where=spread > 0)


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

    Args: rows of `deploy.serving.store.answers`, oldest first. Votes of one user are not
        independent, so a user counts once, however much he asks. `horizon`: the first so many users
        of each arm, as planned; later ones would be another look.
    """
    first: dict[str, dict[tuple[str, str], int]] = {}  # model → (caller, user) → rating
    for row in rows:
        if row["assigned"] and row["user"] and row["rating"]:
            person = row["caller"], row["user"]
            first.setdefault(row["model"], {}).setdefault(person, row["rating"])
    votes = {model: list(first[model].values())[:horizon] for model in sorted(first)}
    return {model: (ratings.count(1), len(ratings)) for model, ratings in votes.items()}


def ab_decision(
    votes: dict[str, tuple[int, int]], control: str, candidate: str, horizon: int
) -> tuple[str, TwoShares | None]:
    """What the test says once both arms have `horizon` users, and not before: "wait", a winner's
    name, or "no winner". Nothing is compared while an arm has no votes at all.
    """
    counts = [votes.get(name, (0, 0)) for name in (control, candidate)]
    if min(n for _, n in counts) < 1:
        return "wait", None
    shares = two_shares(*counts[0], *counts[1])
    if min(n for _, n in counts) < horizon:
        return "wait", shares
    if shares.ci95[0] <= 0 <= shares.ci95[1]:
        return "no winner", shares
    return candidate if shares.difference > 0 else control, shares


def signals(
    rows: list[dict], refused: Callable[[str, str], bool] | None, reference, tokenizer
) -> list[dict[str, float]]:
    """Per answer: `length_tokens`, `ended_with_eos`, `surprise` (its NLL per token under
    `reference`) and `refused`.

    Args: `rows` of `deploy.serving.store.answers` whose texts were not forgotten;
        `refused(prompt, answer)`: None where nobody can tell, and the signal is left out.
    """
    limit = getattr(reference.config, "max_position_embeddings", None) or 10**9
    texts = [(dialogue(row["messages"]), " " + row["answer"].strip()) for row in rows]
    ids = [tokenize_response(prompt, answer, tokenizer, limit)[:2] for prompt, answer in texts]
    scored = [{"prompt_ids": prompt, "chosen_ids": answer} for prompt, answer in ids]
    logps = logps_of(reference, scored, batch_size=16).chosen.means
    found = []
    for row, text, (_, answer), logp in zip(rows, texts, ids, logps, strict=True):
        signal = {"length_tokens": float(len(answer)), "surprise": -float(logp)}
        signal["ended_with_eos"] = float(row["finish_reason"] == "stop")
        found.append(signal | ({"refused": float(refused(*text))} if refused else {}))
    return found


def drift_limits(
    baseline: list[dict[str, float]], window: int, level: float = 0.01
) -> dict[str, tuple[float, float]]:
    """Of each signal, the band in which the mean of `window` answers stays if nothing has changed.

    The baseline's mean ± z standard errors, its own included. One z for all signals: about a share
    `level` of quiet windows leaves any band (max-t of Westfall & Young 1993, 1,000 resamples).
    Raises: ValueError for a baseline of fewer than 2 answers, or an empty window.
    """
    if len(baseline) < 2 or window < 1:
        raise ValueError("A baseline needs at least 2 answers, and a window at least 1.")
    size, rng = len(baseline), np.random.default_rng(0)
    values = np.array([[row[name] for name in baseline[0]] for row in baseline])
    share, centre = np.isin(values, (0, 1)).all(axis=0), np.array([*map(mean, values.T.tolist())])
    values -= centre  # exactly 0 where a signal never varied
    drawn = rng.integers(size, size=(1000, size + window))
    drawn[0, :size] = np.arange(size)  # the first is the baseline itself
    keys = drawn[:, :size] + size * np.arange(1000)[:, None]
    counts = np.bincount(keys.ravel(), minlength=keys.size).reshape(keys.shape)
    means = counts @ values / size
    # A share of 0 or 1 may vary later: one more answer of each kind is assumed.
    smooth = ((means + centre) * size + 1) / (size + 2)
    spread = np.where(share, smooth * (1 - smooth), counts @ values**2 / size - means**2)
    errors = np.sqrt(spread.clip(0) * (1 / window + 1 / size))
    distance = np.abs(values[drawn[:, size:]].mean(axis=1) - means)
    z = np.divide(distance, errors, out=np.zeros_like(errors), where=errors > 0).max(axis=1)
    half = np.quantile(z, 1 - level) * errors[0]
    bands = [np.where(share, end.clip(0, 1), end) for end in (centre - half, centre + half)]
    return dict(zip(baseline[0], map(tuple, np.transpose(bands).tolist()), strict=True))


def alarms(
    rows: list[dict[str, float]], limits: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """Signals whose mean over these answers is outside its limits, with that mean."""
    means = {name: mean(row[name] for row in rows) for name in limits}
    return {name: means[name] for name, (a, b) in limits.items() if not a <= means[name] <= b}
