"""Ratings with intervals: Bradley-Terry and Elo by `evalica`, and how much each can be trusted."""

import random

import numpy as np
from scipy.sparse.csgraph import connected_components

SCALE, MIDDLE = 400.0, 1000.0  # of Elo: 400 points are odds of ten to one


def _fit(pairs: list[tuple[int, int]], counts: np.ndarray, players: int) -> np.ndarray:
    """Points of each player, with mean `MIDDLE`. `counts`: (pairs, 3): won, tied, lost."""
    import evalica

    # Who did not lose against whom? Where somebody never lost, no finite strength exists.
    beat = np.zeros((players, players))
    for (a, b), (won, tied, lost) in zip(pairs, counts, strict=True):
        beat[a, b] += won + tied
        beat[b, a] += lost + tied
    if connected_components(beat, connection="strong")[0] > 1:
        counts = counts + [0, 1, 0]  # one tie for every pair that can meet
    outcomes = (evalica.Winner.X, evalica.Winner.Draw, evalica.Winner.Y)
    cases = [(*pair, outcome) for pair in pairs for outcome in outcomes]
    first, second, winners = zip(*cases, strict=True)
    found = evalica.bradley_terry(first, second, winners, weights=counts.ravel().astype(float))
    points = SCALE * np.log10(found.scores.sort_index().to_numpy())
    return points - points.mean() + MIDDLE


def rating_intervals(
    matches: list[tuple[str, str, int]], prompts=None, resamples: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Bradley-Terry points of each player with a 95 % interval for other prompts.

    The points are log-strengths on Elo's scale around their mean, 1000; a tie is half a win for
    both, so they tell the expected score. The bootstrap resamples prompts, not matches: answers to
    one prompt are alike. The intervals hold together, for all players at once: they are so many
    standard deviations wide that in 95 % of the resamples no player is farther off.
    They are drawn after adding a won and a lost prompt, as in `prompt_interval`: in simulation of
    two players they cover 94 % or more from 3 prompts up.
    Where somebody never lost, one tie is added to every pair that met.
    Sources: Bradley and Terry 1952; Efron 1979 for the bootstrap.
    Args: `matches`: (A, B, verdict) as in `evaluation.ratings`. `prompts`: the prompt of each
        match; None: all differ.
    Returns: {player: {"points", "ci95": (low, high), "matches"}}, the best first.
    Raises: ValueError where some players never met, even through others.
    """
    names = sorted({name for match in matches for name in match[:2]})
    place = {name: at for at, name in enumerate(names)}
    pairs = sorted({tuple(sorted((place[a], place[b]))) for a, b, _ in matches})
    met = np.zeros((len(names), len(names)))
    for a, b in pairs:
        met[a, b] = 1
    if not matches or connected_components(met, connection="weak")[0] > 1:
        raise ValueError(
            "These players never met, not even through others: no rating can compare them."
        )
    # Count once what each prompt says: a resample is then a sum of rows.
    prompts = range(len(matches)) if prompts is None else prompts
    rows = {prompt: at for at, prompt in enumerate(dict.fromkeys(prompts))}
    counts = np.zeros((len(rows), len(pairs), 3))
    for (a, b, verdict), prompt in zip(matches, prompts, strict=True):
        first, second = place[a], place[b]
        if first > second:
            first, second, verdict = second, first, -verdict
        counts[rows[prompt], pairs.index((first, second)), 1 - verdict] += 1
    points = _fit(pairs, counts.sum(0), len(names))
    # Two prompts more, one on which all that met won and one on which all lost: few prompts, or
    # prompts that all say the same, still leave an interval with a width.
    one = np.broadcast_to([[1, 0, 0]], (len(pairs), 3))
    counts = np.concatenate([counts, [one, one[:, ::-1]]])
    middle = _fit(pairs, counts.sum(0), len(names))
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)))
        drawn.append(_fit(pairs, np.tensordot(times, counts, 1), len(names)))
    spread = np.std(drawn, axis=0)
    off = np.abs(np.array(drawn) - np.mean(drawn, axis=0)) / np.maximum(spread, 1e-9)
    half = spread * np.quantile(off.max(axis=1), 0.95)
    played = {name: sum(name in match[:2] for match in matches) for name in names}
    found = {}
    for at in np.argsort(-points, kind="stable"):
        interval = float(middle[at] - half[at]), float(middle[at] + half[at])
        row = {"points": float(points[at]), "ci95": interval, "matches": played[names[at]]}
        found[names[at]] = row
    return found


def elo_orders(
    matches: list[tuple[str, str, int]], orders: int = 200, seed: int = 0, k: float = 4.0
) -> dict[str, dict]:
    """Elo of the same matches, played in other orders: Elo forgets, so the order decides.

    Args: `k`: points that a match can move, evalica's default; chess takes 10 to 40.
    Returns: {player: {"given": in the order as given, "low", "median", "high": of the orders}};
        low and high leave out a fortieth at each end.
    """
    import evalica

    winners = {1: evalica.Winner.X, 0: evalica.Winner.Draw, -1: evalica.Winner.Y}

    def rated(played):
        first, second, verdicts = zip(*played, strict=True)
        found = evalica.elo(first, second, [winners[verdict] for verdict in verdicts], k=k)
        return found.scores.sort_index()

    given, draw, scores = rated(matches), random.Random(seed), []
    for _ in range(orders):
        scores.append(rated(draw.sample(matches, len(matches))))
    low, median, high = np.quantile(scores, (0.025, 0.5, 0.975), axis=0).tolist()
    columns = zip(given.tolist(), low, median, high, strict=True)
    keys = ("given", "low", "median", "high")
    return {
        name: dict(zip(keys, row, strict=True))
        for name, row in zip(given.index, columns, strict=True)
    }
