"""Verdicts on claims, by one rule, for the toy world's study and for the real model.

A *comparison* is one number per fresh seed: what the claim says, minus its opposite (a win rate
minus one half, or one arm's measure minus the other's). So it is positive where the claim is right.
A *family* is a handful of comparisons that the plan named before the runs. Only they get verdicts.
Everything else is described: a mean and an interval, and no verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # of a family: the share of families with a false verdict, at the most
MARGIN = 0.03  # differences of rates that are smaller count as equal
LARGEST_FAMILY = 4
FEWEST_SEEDS = 5


@dataclass(frozen=True)
class Finding:
    """A mean over seeds with its 95 % interval (Student's t, one comparison alone)."""

    mean: float
    ci95: tuple[float, float]
    seeds: int
    verdict: str = "described"  # or: holds, does not hold, equal, undecided
    p: float | None = None  # of the difference, two-sided, adjusted within its family
    p_equal: float | None = None  # that it lies outside the margin, adjusted likewise


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p-values of a family, in the order given. Holm 1979.

    The k-th smallest of m is multiplied by m − k + 1, and none may fall below the one before it.
    """
    p_values = np.asarray(p_values, dtype=float)
    order, count = np.argsort(p_values), len(p_values)
    raised = p_values[order] * np.arange(count, 0, -1)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted


def _checked(name: str, differences: Sequence[float], fewest: int) -> np.ndarray:
    """One comparison's differences as an array. Raises: ValueError."""
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or len(values) < fewest:
        said = f"{name}: {values.size} seeds. At least {fewest} are needed, one number for each."
        raise ValueError(said)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: a seed has no number. Run that seed again.")
    return values


def over_seeds(differences: Sequence[float]) -> Finding:
    """Mean and interval over seeds, without a verdict. Raises: ValueError for less than two."""
    values = _checked("this comparison", differences, 2)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    mean = float(values.mean())
    return Finding(mean, (float(mean - half), float(mean + half)), len(values))


def p_difference(values: np.ndarray) -> float:
    """Two-sided paired t test of the mean against 0. 1.0 where the seeds show no spread at all."""
    error = stats.sem(values)
    if error < 1e-12:
        return 1.0
    return float(2 * stats.t.sf(abs(values.mean()) / error, len(values) - 1))


def p_equal(values: np.ndarray, margin: float) -> float:
    """Two one-sided t tests, Schuirmann 1987: small where the mean surely lies within ± margin."""
    error = stats.sem(values)
    if error < 1e-12:
        return 1.0
    return float(stats.t.sf((margin - abs(values.mean())) / error, len(values) - 1))


def family_verdicts(
    family: Mapping[str, Sequence[float]], margin: float = MARGIN
) -> dict[str, Finding]:
    """The verdict on each comparison of one confirmatory family.

    *holds*: adjusted p < .05 and the mean is positive; *does not hold*: the mean is negative;
    *equal*: both one-sided tests say that it lies within ± `margin`, in the comparison's own unit;
    else *undecided*. Both p-values are adjusted by Holm within the family.
    Raises: ValueError for more than four comparisons, fewer than five seeds, or a missing number.
    """
    if not 1 <= len(family) <= LARGEST_FAMILY:
        said = f"A family has one to {LARGEST_FAMILY} comparisons, not {len(family)}."
        raise ValueError(f"{said} Describe the others.")
    found = {name: _checked(name, values, FEWEST_SEEDS) for name, values in family.items()}
    different = holm([p_difference(values) for values in found.values()])
    equal = holm([p_equal(values, margin) for values in found.values()])
    verdicts = {}
    for (name, values), p, p_same in zip(found.items(), different, equal, strict=True):
        if p < LEVEL:
            word = "holds" if values.mean() > 0 else "does not hold"
        elif p_same < LEVEL:
            word = "equal"
        else:
            word = "undecided"
        plain = over_seeds(values)
        verdicts[name] = Finding(
            plain.mean, plain.ci95, plain.seeds, word, p=float(p), p_equal=float(p_same)
        )
    return verdicts
