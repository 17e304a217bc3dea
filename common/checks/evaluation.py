"""Checks of the exercises of notebook 1.7-04.

The expected values are computed here, by another route than the worked answers.
"""

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutput

from common.checks import close


class _Chain(torch.nn.Module):
    """A model of few tokens: the sum of all tokens so far, modulo 5, decides what comes next."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float32))
        self.seen = []

    def forward(self, input_ids):
        self.seen.append(input_ids[0].tolist())
        sums = input_ids.cumsum(dim=1) % len(self.table)
        return CausalLMOutput(logits=self.table[sums])


def check_sample_until_eos(fn):
    sure = [[50.0 * (token == (row + 2) % 5) for token in range(5)] for row in range(5)]
    # From a sum of 1: token 3 (sum 4), then 1 (sum 0), then 2 (sum 2), then 4 …
    model, prompt = _Chain(sure), [1]
    answer = fn(model, prompt, 4, 10)
    yield "every token is drawn from the whole context: 3, 1, 2, 4", list(answer) == [3, 1, 2, 4]
    yield "EOS is kept, and nothing follows it", list(fn(model, [1], 2, 10)) == [3, 1, 2]
    yield "it stops at the limit of tokens", list(fn(model, [1], 4, 2)) == [3, 1]
    yield "EOS in the prompt does not end the answer", list(fn(model, [4, 2], 4, 3))[:1] == [3]
    yield "the prompt is left as it was", prompt == [1]
    yield "ids are numbers, with no gradient", all(isinstance(int(token), int) for token in answer)
    mixed = _Chain([[0.0, 1.2, -50.0, -50.0, -50.0]] * 5)
    torch.manual_seed(5)
    drawn = [int(fn(mixed, [3], 9, 1)[0]) for _ in range(600)]
    share = 1 / (1 + np.exp(1.2))
    yield "tokens are drawn by their probabilities", abs(drawn.count(0) / 600 - share) < 0.07
    first, again = (
        fn(_Chain([[0.0] * 5] * 5), [0], 9, 20, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    yield "the same generator gives the same answer", list(first) == list(again)


def check_win_rate(fn):
    yield (
        "two wins, one tie, one loss of four prompts: 2.5 / 4",
        close(fn([[1], [1], [0], [-1]]), 0.625),
    )
    yield "a model against itself, all ties: one half", close(fn([[0, 0], [0, 0]]), 0.5)
    yield "every prompt counts the same, however many samples", close(fn([[1], [-1, -1, -1]]), 0.5)
    table = np.array([[1, 1, 0], [-1, 1, -1], [0, 0, 1]])
    before, won = table.copy(), float(fn(table))
    yield "an array is fine: 0.611", close(won, (5 / 6 + 1 / 3 + 2 / 3) / 3)
    yield "the other side's rate is what is left", close(fn(-table), 1 - won)
    yield "the verdicts are left as they were", bool((table == before).all())


def check_bootstrap_interval(fn):
    points = np.random.default_rng(3).random((80, 2)).round(1)
    low, high = (float(end) for end in fn(points))
    half = 1.96 * points.mean(axis=1).std() / 80**0.5
    yield "the mean lies inside", low < points.mean() < high
    yield (
        "its width is that of the normal interval over prompts",
        abs((high - low) / 2 / half - 1) < 0.15,
    )
    repeated = np.repeat(points[:, :1], 4, axis=1)
    narrow = np.diff(fn(repeated)) / np.diff(fn(points[:, :1]))
    yield (
        "four copies of an answer do not narrow it: prompts are drawn",
        0.85 < float(narrow[0]) < 1.15,
    )
    skewed = np.array([[0.0]] * 57 + [[1.0]] * 3)
    low, high = (float(end) for end in fn(skewed))
    yield (
        "quantiles, not mean ± 2 s: 3 of 60 won leaves 0 to .12",
        0 <= low <= 0.02 and 0.08 <= high <= 0.14,
    )
    yield "where all prompts agree it has no width", close(fn(np.full((30, 3), 0.5)), [0.5, 0.5])
    wider = float(np.diff(fn(points[:20]))[0] / np.diff(fn(points))[0])
    yield "a quarter of the prompts: about twice as wide", 1.4 < wider < 2.8


def check_wilson_interval(fn):
    low, high = (round(float(end), 2) for end in fn(7, 10))
    yield "7 wins of 10 are 40 % to 89 %", (low, high) == (0.40, 0.89)
    z, ends = 1.5, [float(end) for end in fn(30, 80, z=1.5)]
    distances = [(0.375 - p) ** 2 - z**2 * p * (1 - p) / 80 for p in ends]
    are_roots = close(distances, [0.0, 0.0]) and ends[0] < 0.375 < ends[1]
    yield "both ends solve the equation, for any z", are_roots
    low, high = (float(end) for end in fn(0, 20))
    yield "0 of 20 begins at 0, and does not end there", close(low, 0) and high > 0.05
    low, high = (float(end) for end in fn(20, 20))
    yield "20 of 20 ends at 1, and does not begin there", close(high, 1) and low < 0.95


def check_swap_consistent(fn):
    seen = []

    def fair(prompt, first, second):
        seen.append((prompt, first, second))
        return (len(first) > len(second)) - (len(first) < len(second))

    results = fn(fair, "p", "long", "s"), fn(fair, "p", "s", "long")
    yield "the better answer always wins", results == (1, -1)
    orders = {("p", "long", "s"), ("p", "s", "long")}
    yield "both orders are shown to the judge, with the prompt", set(seen) == orders
    yield "a tie in both orders is a tie", fn(lambda *_: 0, "p", "a", "b") == 0
    first, second = fn(lambda *_: 1, "p", "a", "b"), fn(lambda *_: -1, "p", "a", "b")
    yield "a judge that always takes the first answer decides nothing", first == 0
    yield "one that always takes the second decides nothing either", second == 0
    once = fn(lambda _, x, y: int(x == "a"), "p", "a", "b")
    yield "a win in one order and a tie in the other is a tie", once == 0


def check_bradley_terry(fn):
    def strengths(wins):
        return [float(s) for s in fn(wins)]

    yield (
        "7 wins against 3: strengths 0.7 and 0.3",
        close(strengths([[0, 7], [3, 0]]), [0.7, 0.3], 1e-9),
    )
    wins = [[0, 6, 8.5], [4, 0, 5], [1.5, 5, 0]]
    three = strengths(wins)
    yield "the strengths sum to 1", close(sum(three), 1, 1e-9)

    def predicted(i):
        others = [j for j in range(3) if j != i]
        return sum((wins[i][j] + wins[j][i]) * three[i] / (three[i] + three[j]) for j in others)

    expected = [predicted(i) for i in range(3)]
    seen = [sum(row) for row in wins]
    yield "every player wins as often as predicted", close(expected, seen, 1e-6)
    # A chain of seven: neighbours meet, 9 wins to 1. Every step of strength is a factor of 9.
    chain = np.zeros((7, 7))
    for place in range(6):
        chain[place, place + 1], chain[place + 1, place] = 9, 1
    found = strengths(chain)
    steps = [a / b for a, b in zip(found, found[1:], strict=False)]
    yield "a long chain of matches too: go on until nothing moves", close(steps, [9.0] * 6, 1e-3)
    more = strengths([[10 * won for won in row] for row in wins])
    yield "ten times as many matches with the same results change nothing", close(more, three, 1e-6)
