"""How far judges agree, and what sways one: order, length. And how sure a reward model is."""

from collections import defaultdict

import numpy as np
from scipy.special import expit

from common.evaluation import prompt_interval
from common.judges import Judge

Interval = tuple[float, float]


def _by_prompt(prompts, values) -> tuple[float, Interval] | None:
    """Mean over prompts of a value from 0 to 1, with its 95 % interval; None for no value."""
    groups = defaultdict(list)
    for prompt, value in zip(prompts, values, strict=True):
        groups[prompt].append(float(value))
    if not groups:
        return None
    points = [np.mean(group) for group in groups.values()]
    return float(np.mean(points)), prompt_interval(points)


def kappa(one, other, prompts=None) -> tuple[float, Interval] | None:
    """Cohen's κ of two lists of verdicts, of any labels, and its 95 % interval.

    κ = (agreement - chance) / (1 - chance); chance: two judges who give each label as often as
    these two do, but independently. 1: always the same; 0: no better than that.
    Source: Cohen 1960, Eq. 1; the interval is that of the share of agreement over prompts, with
        chance held fixed, as in his Eq. 7 (the normal distribution there, `prompt_interval` here).
    Args: `prompts`: the prompt of each verdict, whose answers are alike; default: all differ.
    Returns: None where both judges gave one and the same label throughout: κ says nothing then.
    Raises: ValueError for lists of different lengths, or without a verdict.
    """
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.size == 0:
        raise ValueError("Both judges must judge the same questions, at least one.")
    labels = np.union1d(one, other)
    chance = float(sum((one == label).mean() * (other == label).mean() for label in labels))
    if chance == 1:
        return None
    agreed = one == other
    _, (low, high) = _by_prompt(range(len(one)) if prompts is None else prompts, agreed)
    value, low, high = ((share - chance) / (1 - chance) for share in (agreed.mean(), low, high))
    return float(value), (low, high)


def agreement(judges: list[Judge], questions: list[tuple[str, str, str]]) -> list[dict]:
    """One row a judge, the first one being the yardstick, on (prompt, one answer, another).

    Each judge sees every pair in both orders; a pair on which it changes its mind is a tie, one on
    which it cannot be read in both orders has no verdict. Rows hold, as (value, 95 % interval) or
    None where nothing was to be measured:
    `kappa`: with the first judge, of three labels (one, the other, tie) and "no verdict", which
        agrees with nothing; `first`: how often the answer that is shown first wins, of all verdicts
        that decide, .5 for a judge whom the order does not sway; `longer`: how often the longer
        answer wins (in words), of the pairs of different length that it decides. The yardstick's
        own `longer` is what is right for these pairs.
    And counts: `questions`, `won` (one answer wins in both orders), `ties` (in both orders),
    `changed` (with the order), `unreadable` (in at least one order). They add up.
    """
    swapped = [(prompt, second, first) for prompt, first, second in questions]
    prompts, rows, yardstick = np.array([prompt for prompt, _, _ in questions]), [], None
    words = np.array([(len(one.split()), len(other.split())) for _, one, other in questions])
    longer = np.sign(words[:, 0] - words[:, 1])  # 1 where the first of a pair is the longer one
    for judge in judges:
        votes = list(zip(judge.prefer(questions), judge.prefer(swapped), strict=True))
        clear = np.array([all(getattr(vote, "clear", True) for vote in pair) for pair in votes])
        pairs = np.array(votes)
        stable = pairs[:, 0] == -pairs[:, 1]
        # The verdict on each pair: 1, -1, 0 for a tie or another mind, 9 where there is none.
        verdict = np.where(clear, np.where(stable, pairs[:, 0], 0), 9)
        # What won in each order: the answer that was shown first? People say it themselves.
        told = []
        for prompt, pair in zip(prompts, votes, strict=True):
            told += [(prompt, vote > 0) for vote in pair if vote]
        told = getattr(judge, "first_chosen", told)
        decides = (np.abs(verdict) == 1) & (longer != 0)
        # Which answer of a pair stands first is arbitrary: κ counts each pair both ways.
        labels = np.concatenate([verdict, np.where(clear, -verdict, 9)])
        yardstick = np.where(labels == 9, -9, labels) if yardstick is None else yardstick
        rows.append(
            {
                "judge": judge.name,
                "questions": len(questions),
                "won": int((np.abs(verdict) == 1).sum()),
                "ties": int((clear & stable & (pairs[:, 0] == 0)).sum()),
                "changed": int((clear & ~stable).sum()),
                "unreadable": int((~clear).sum()),
                "kappa": kappa(yardstick, labels, [*prompts] * 2) if rows else None,
                "first": _by_prompt(*zip(*told, strict=True)) if told else None,
                "longer": _by_prompt(prompts[decides], (verdict == longer)[decides]),
            }
        )
    return rows


def calibration(margin, bins: int = 5) -> list[dict]:
    """Does a reward model know how sure it is? Its held-out pairs in bins of equal size.

    Bradley-Terry says that the answer with the larger reward is better with probability
    σ(|margin|). Args: `margin`: `RewardJudge.held_out_margin`, shape (pairs,).
    Returns: for each bin, from unsure to sure: `pairs`, `said` (mean of σ(|margin|)), `right`
        (how often the chosen answer has the larger reward) and its interval `ci95`.
    """
    margin = np.asarray(margin, dtype=float)
    order, rows = np.argsort(np.abs(margin), kind="stable"), []
    for part in np.array_split(margin[order], min(bins, len(margin))):
        right = np.where(part == 0, 0.5, part > 0)
        said = float(expit(np.abs(part)).mean())
        row = {"pairs": len(part), "said": said, "right": float(right.mean())}
        rows.append(row | {"ci95": prompt_interval(right)})
    return rows


def table(rows: list[dict]) -> str:
    """The rows of `agreement` as text: shares and κ with their 95 % intervals; "" for no row."""
    if not rows:
        return ""
    names = ("kappa", "first", "longer")
    heads = ("κ with the first", "shown first wins", "longer wins")
    head = "".join(f"{name:>22}" for name in heads)
    counts = ("questions", "won", "ties", "changed", "unreadable")
    lines = [f"{'':40}{''.join(f'{name:>11}' for name in counts)}{head}"]
    for row in rows:
        cells = "".join(f"{row[name]:>11}" for name in counts)
        for name in names:
            value, (low, high) = row[name] or (None, (None, None))
            cells += f"{'-':>22}" if value is None else f"{value:>8.2f} [{low:5.2f}, {high:4.2f}]"
        lines.append(f"{row['judge'][:39]:40}{cells}")
    return "\n".join(lines)
