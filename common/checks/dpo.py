"""Checks of the exercises of Lab 1.7, in the order of its notebooks.

The expected values are computed here, by another route than the worked answers.
"""

import math
from types import SimpleNamespace

import torch

from common.checks import close

# Notebook 01


def check_split_transcript(split):
    turns = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is the tea?\n\nAssistant:"
    result = split(turns + " In the kitchen.")
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    yield "it returns a prompt and a response", is_pair
    prompt, response = result
    yield "the prompt ends at the last assistant turn, not at the first", prompt == turns
    yield "the response keeps its leading space", response == " In the kitchen."
    echo = turns + " You said: Hi. Where is the tea? In the kitchen."
    yield "prompt + response is the transcript again, word for word", "".join(split(echo)) == echo
    empty = tuple(split(turns))
    yield "a transcript that ends at the mark has an empty response", empty == (turns, "")
    others = [split("\n\nHuman: Hi"), split("")]
    yield "without an assistant turn it returns None", others == [None, None]


def check_response_mask(mask):
    prompts, responses = [2, 4, 1], [3, 1, 5]
    result = mask(torch.tensor(prompts), torch.tensor(responses))
    is_boolean = isinstance(result, torch.Tensor) and result.dtype == torch.bool
    yield "it is a tensor of booleans", is_boolean
    yield "its shape is (rows, longest prompt + response)", result.shape == (3, 6)
    marked = [[place for place, on in enumerate(row) if on] for row in result.tolist()]
    counts = [len(row) for row in marked]
    yield "as many tokens are marked as the responses have, EOS counted", counts == responses
    after = [row[0] >= start for row, start in zip(marked, prompts, strict=True)]
    yield "no prompt token is marked", all(after)
    yield "no padding is marked", marked == [[2, 3, 4], [4], [1, 2, 3, 4, 5]]
    alone = mask(torch.tensor([3]), torch.tensor([2])).tolist()
    yield "a single row works too", alone == [[False, False, False, True, True]]


def check_deduplicate(deduplicate):
    def row(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    good, other = row("p", "a", "b"), row("q", "a", "b")
    turned = row("p", "b", "a")
    kept, dropped = deduplicate([good, other])
    yield "rows that differ in their prompt only are kept, in order", kept == [good, other]
    yield "nothing dropped, nothing counted", sum(dropped.values()) == 0
    kept, dropped = deduplicate([good, dict(good), other, dict(good)])
    yield "of equal rows the first one stays", kept == [good, other]
    counts = dropped["duplicate"], sum(dropped.values())
    yield 'the others are counted as "duplicate"', counts == (2, 2)
    kept, dropped = deduplicate([good, other, turned])
    yield "of two rows with the same answers in both orders, neither stays", kept == [other]
    counts = dropped["contradiction"], sum(dropped.values())
    yield 'they are counted as "contradiction"', counts == (2, 2)
    rows = [good, turned, dict(good), other, dict(other)]
    before = [dict(entry) for entry in rows]
    kept, dropped = deduplicate(rows)
    counts = {"contradiction": 3, "duplicate": 1}
    yield "a contradicted row is no duplicate, however often it occurs", dict(dropped) == counts
    yield "rows read = rows kept + rows dropped", len(rows) == len(kept) + sum(dropped.values())
    yield "the input is left as it was", rows == before


# Notebook 02


def check_perplexity_from_logps(perplexity):
    one = perplexity(torch.tensor([-6.0]), torch.tensor([3]))
    yield "one answer of 3 tokens at -6 nats: e to the 2nd", close(one, 7.389056, 1e-5)
    sure = perplexity(torch.tensor([0.0, 0.0]), torch.tensor([4, 9]))
    yield "a model that is sure and right has perplexity 1", float(sure) == 1.0
    guess = perplexity(torch.tensor([-3.0, -5.0]) * 6.684612, torch.tensor([3, 5]))
    yield "guessing among 800 words has perplexity 800", close(guess, 800, 1e-5)
    # 10 nats over 4 tokens; the means of the rows are 1 and 3
    ragged = perplexity(torch.tensor([-1.0, -9.0]), torch.tensor([1, 3]))
    yield "every token counts the same: not the mean of row means", close(ragged, 12.182494, 1e-5)
    yield "it is a plain number, not a tensor", isinstance(one, float)


class _Counting(torch.nn.Module):
    """A model of 7 tokens: after token t it expects t + 1 with probability 1/2, the others 1/12."""

    device = torch.device("cpu")

    def forward(self, input_ids, **_):
        expected = torch.nn.functional.one_hot((input_ids + 1) % 7, 7).bool()
        return SimpleNamespace(logits=torch.where(expected, 0.5, 1 / 12).log() + 3.0)


def check_response_logps_by_hand(fn):
    hit, miss = math.log(1 / 2), math.log(1 / 12)
    found = fn(_Counting(), [0, 1], [2, 3, 4])
    yield "it returns one log-probability per response token", tuple(found.shape) == (3,)
    shifted = close(found, [hit, hit, hit], 1e-5)
    yield "logits are normalised, and position t predicts token t + 1", shifted
    first = close(fn(_Counting(), [5, 5, 5], [1]), [miss], 1e-5)
    yield "the prompt is not scored; its last token predicts the first response token", first
    end = fn(_Counting(), [0], [1, 5, 6])
    yield "the last token, EOS, is scored as well", close(end, [hit, miss, hit], 1e-5)
    is_precise = found.dtype in (torch.float32, torch.float64)
    yield "the sum can be taken in float64: the result is at least float32", is_precise


def check_best_checkpoint(fn):
    nan, losses = float("nan"), [5.0, 3.0, 2.0, 2.5, 2.4, 1.0]

    def gives(values, patience, expected):
        return tuple(fn(values, patience)) == expected

    yield "patience 0 never stops, and keeps the lowest loss of all", gives(losses, 0, (5, 5))
    yield "patience 2 stops after two evaluations without a better loss", gives(losses, 2, (2, 4))
    yield "patience 3 lives to see the better one", gives(losses, 3, (5, 5))
    again = gives([3.0, 4.0, 2.0, 4.0, 1.0], 2, (4, 4))
    yield "a better loss sets the count back to 0", again
    yield "an equal loss is not a better one: the first stays", gives([2.0] * 3, 2, (0, 2))
    worse = gives([1.0, 2.0, 3.0, 4.0], 1, (0, 1))
    yield "where it only gets worse, the model before training is kept", worse
    yield "a NaN is never better", gives([2.0, nan, 1.0], 0, (2, 2))
    yield "not even at the start", gives([nan, 3.0, 4.0], 0, (1, 2))


# Notebook 03


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


# Notebook 04


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
