"""Checks of the exercises of notebook 1.7-04.

The expected values are computed here, by another route than the worked answers.
"""

from common.checks import close


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


def check_bradley_terry_strengths(fn):
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
    more = strengths([[10 * won for won in row] for row in wins])
    yield "ten times as many matches with the same results change nothing", close(more, three, 1e-6)
