"""Checks of the exercises of Lab 1.7. Expected values are computed here, by another route than the
worked answers.
"""

import torch

from common.checks import exercise

# Lab 1.7, notebook 01


@exercise("split_transcript")
def _split_transcript(split):
    turns = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is the tea?\n\nAssistant:"
    result = split(turns + " In the kitchen.")
    yield (
        "it returns a prompt and a response",
        isinstance(result, tuple | list) and len(result) == 2,
    )
    prompt, response = result
    yield "the prompt ends at the last assistant turn, not at the first", prompt == turns
    yield "the response keeps its leading space", response == " In the kitchen."
    echo = turns + " You said: Hi. Where is the tea? In the kitchen."
    yield "prompt + response is the transcript again, word for word", "".join(split(echo)) == echo
    yield (
        "a transcript that ends at the mark has an empty response",
        tuple(split(turns)) == (turns, ""),
    )
    yield (
        "without an assistant turn it returns None",
        split("\n\nHuman: Hi") is None and split("") is None,
    )


@exercise("response_mask")
def _response_mask(mask):
    prompts, responses = [2, 4, 1], [3, 1, 5]
    result = mask(torch.tensor(prompts), torch.tensor(responses))
    yield (
        "it is a tensor of booleans",
        isinstance(result, torch.Tensor) and result.dtype == torch.bool,
    )
    yield "its shape is (rows, longest prompt + response)", result.shape == (3, 6)
    marked = [[place for place, on in enumerate(row) if on] for row in result.tolist()]
    yield (
        "as many tokens are marked as the responses have, EOS counted",
        list(map(len, marked)) == responses,
    )
    yield (
        "no prompt token is marked",
        all(row[0] >= start for row, start in zip(marked, prompts, strict=True)),
    )
    yield "no padding is marked", marked == [[2, 3, 4], [4], [1, 2, 3, 4, 5]]
    alone = mask(torch.tensor([3]), torch.tensor([2]))
    yield "a single row works too", alone.tolist() == [[False, False, False, True, True]]


@exercise("deduplicate")
def _deduplicate(deduplicate):
    def row(prompt, chosen, rejected):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    good, other = row("p", "a", "b"), row("q", "a", "b")
    kept, dropped = deduplicate([good, other])
    yield "rows that differ in their prompt only are kept, in order", kept == [good, other]
    yield "nothing dropped, nothing counted", sum(dropped.values()) == 0
    kept, dropped = deduplicate([good, dict(good), other, dict(good)])
    yield "of equal rows the first one stays", kept == [good, other]
    yield (
        'the others are counted as "duplicate"',
        dropped["duplicate"] == 2 and sum(dropped.values()) == 2,
    )
    kept, dropped = deduplicate([good, other, row("p", "b", "a")])
    yield (
        "rows with the same answers in both orders all go: nobody knows who was right",
        kept == [other],
    )
    yield (
        'they are counted as "contradiction"',
        dropped["contradiction"] == 2 and sum(dropped.values()) == 2,
    )
    rows = [good, row("p", "b", "a"), dict(good), other, dict(other)]
    before = [dict(entry) for entry in rows]
    kept, dropped = deduplicate(rows)
    yield (
        "a contradicted row is no duplicate, however often it occurs",
        dict(dropped) == {"contradiction": 3, "duplicate": 1},
    )
    yield "rows read = rows kept + rows dropped", len(rows) == len(kept) + sum(dropped.values())
    yield "the input is left as it was", rows == before


@exercise("implicit_reward")
def _implicit_reward(fn):
    import torch

    policy = torch.tensor([-3.0, -12.5, -40.0], dtype=torch.float64)
    reference = torch.tensor([-5.0, -12.5, -31.0], dtype=torch.float64)
    found = fn(policy, reference, 0.25)
    yield "the shape is (batch,)", tuple(found.shape) == (3,)
    yield (
        "exp(reward / beta) is the ratio of probabilities (Eq. 5)",
        torch.allclose(
            torch.exp(found / 0.25), torch.exp(policy) / torch.exp(reference), rtol=1e-12
        ),
    )
    yield (
        "it is 0 where policy and reference agree",
        float(fn(policy, policy, 0.25).abs().max()) == 0.0,
    )
    yield (
        "twice the beta, twice the reward",
        torch.allclose(fn(policy, reference, 0.5), 2 * found, rtol=1e-12),
    )
    swapped = fn(reference, policy, 0.25)
    yield (
        "swapping policy and reference changes the sign",
        torch.allclose(swapped, -found, rtol=1e-12),
    )


@exercise("diagnose")
def _diagnose(fn):
    def run(accuracy=0.8, **end):
        start = {
            "step": 0,
            "held_out_margin": 0.0,
            "held_out_logps_chosen": -20.0,
            "held_out_kl": 0.0,
        }
        last = {
            "held_out_margin": 0.9,
            "held_out_kl": 3.0,
            "held_out_accuracy": 0.8,
            "held_out_logps_chosen": -20.5,
        }
        return [
            start,
            *({"step": n, "accuracy": 0.5 if n < 10 else accuracy} for n in range(1, 30)),
            {"step": 30, "accuracy": accuracy, **last, **end},
        ]

    shifted = run()
    shifted[0]["held_out_margin"] = -0.4
    yield "a healthy run has no sign", set(fn(run())) == set()
    yield "a margin at step 0", set(fn(shifted)) == {"wrong reference"}
    yield "a KL of 25", set(fn(run(held_out_kl=25.0))) == {"too far"}
    yield "a KL of 20 is not above 20", set(fn(run(held_out_kl=20.0))) == set()
    yield (
        "training accuracy far above the held-out one",
        set(fn(run(accuracy=0.98))) == {"learnt by heart"},
    )
    yield (
        "high on held-out pairs too is no overfitting",
        set(fn(run(accuracy=0.98, held_out_accuracy=0.96))) == set(),
    )
    yield (
        "the chosen answer became less likely",
        set(fn(run(held_out_logps_chosen=-23.0))) == {"displacement"},
    )
    both = run(held_out_logps_chosen=-23.0, held_out_kl=40.0)
    yield "two signs at once", set(fn(both)) == {"displacement", "too far"}


@exercise("conservative_dpo_loss")
def _conservative_dpo_loss(fn):
    import math

    import torch

    h = torch.tensor([-7.0, 0.0, 2.5, 30.0], dtype=torch.float64)
    logistic = torch.tensor(
        [math.log1p(math.exp(-0.2 * value)) for value in h.tolist()], dtype=torch.float64
    )
    flipped = torch.tensor(
        [math.log1p(math.exp(0.2 * value)) for value in h.tolist()], dtype=torch.float64
    )
    yield "with epsilon 0 it is the DPO loss", torch.allclose(fn(h, 0.2, 0.0), logistic, rtol=1e-12)
    yield (
        "it is ln 2 at the reference, for every epsilon",
        abs(float(fn(h, 0.2, 0.3)[1]) - math.log(2)) < 1e-12,
    )
    expected = 0.9 * logistic + 0.1 * flipped
    yield (
        "it is the expected loss when a tenth of the labels is flipped",
        torch.allclose(fn(h, 0.2, 0.1), expected),
    )
    best = torch.tensor([math.log(0.9 / 0.1) / 0.2], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fn(best, 0.2, 0.1).sum(), best)
    yield "its minimum is at log((1 - epsilon) / epsilon) / beta", abs(float(slope)) < 1e-12
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = fn(far, 1.0, 0.1)
    (slope,) = torch.autograd.grad(value.sum(), far)
    yield "it is finite far out, in float32", bool(torch.isfinite(value).all())
    yield (
        "so is its gradient: -0.9 and 0.1",
        torch.allclose(slope, torch.tensor([-0.9, 0.1]), atol=1e-6),
    )


# Lab 1.7, notebook 02


@exercise("perplexity_from_logps")
def _perplexity_from_logps(perplexity):
    one = perplexity(torch.tensor([-6.0]), torch.tensor([3]))
    yield "one answer of 3 tokens at -6 nats: e to the 2nd", abs(float(one) - 7.389056) < 1e-5
    sure = perplexity(torch.tensor([0.0, 0.0]), torch.tensor([4, 9]))
    yield "a model that is sure and right has perplexity 1", float(sure) == 1.0
    guess = perplexity(torch.tensor([-3.0, -5.0]) * 6.684612, torch.tensor([3, 5]))
    yield "guessing among 800 words has perplexity 800", abs(float(guess) - 800.0) < 0.01
    ragged = perplexity(
        torch.tensor([-1.0, -9.0]), torch.tensor([1, 3])
    )  # 10 nats over 4 tokens; rows: 1 and 3
    yield (
        "every token counts the same: not the mean of row means",
        abs(float(ragged) - 12.182494) < 1e-4,
    )
    yield "it is a plain number, not a tensor", isinstance(one, float)


@exercise("response_logps_by_hand")
def _response_logps_by_hand(fn):
    class Counting(torch.nn.Module):
        """After token t it expects t + 1 (of 7), with probability 1/2; the other six share the
        rest.
        """

        device = torch.device("cpu")

        def forward(self, input_ids, **_):
            expected = torch.nn.functional.one_hot((input_ids + 1) % 7, 7).bool()
            return type("Output", (), {"logits": torch.where(expected, 0.5, 1 / 12).log() + 3.0})()

    hit, miss = -0.6931472, -2.4849066  # ln(1/2), ln(1/12)
    found = fn(Counting(), [0, 1], [2, 3, 4])
    yield "it returns one log-probability per response token", tuple(found.shape) == (3,)
    yield (
        "logits are normalised, and position t predicts token t + 1",
        torch.allclose(found.double(), torch.full((3,), hit).double(), atol=1e-5),
    )
    first = fn(Counting(), [5, 5, 5], [1])
    yield (
        "the prompt is not scored, and its last token predicts the first response token",
        torch.allclose(first.double(), torch.tensor([miss]).double(), atol=1e-5),
    )
    end = fn(Counting(), [0], [1, 5, 6])
    yield (
        "the last token, EOS, is scored as well",
        torch.allclose(end.double(), torch.tensor([hit, miss, hit]).double(), atol=1e-5),
    )
    yield (
        "the sum can be taken in float64: the result is at least float32",
        found.dtype in (torch.float32, torch.float64),
    )


@exercise("best_checkpoint")
def _best_checkpoint(fn):
    losses = [5.0, 3.0, 2.0, 2.5, 2.4, 1.0]
    yield (
        "patience 0 never stops: all is seen, the lowest loss is kept",
        tuple(fn(losses, 0)) == (5, 5),
    )
    yield (
        "patience 2 stops after two evaluations without a better loss",
        tuple(fn(losses, 2)) == (2, 4),
    )
    yield "patience 3 lives to see the better one", tuple(fn(losses, 3)) == (5, 5)
    yield (
        "a better loss sets the count back to 0",
        tuple(fn([3.0, 4.0, 2.0, 4.0, 1.0], 2)) == (4, 4),
    )
    yield (
        "an equal loss is not a better one: the first stays",
        tuple(fn([2.0, 2.0, 2.0], 2)) == (0, 2),
    )
    yield (
        "where it only gets worse, the model before training is kept",
        tuple(fn([1.0, 2.0, 3.0, 4.0], 1)) == (0, 1),
    )
    yield "a NaN is never better", tuple(fn([2.0, float("nan"), 1.0], 0)) == (2, 2)
    yield "not even at the start", tuple(fn([float("nan"), 3.0, 4.0], 0)) == (1, 2)


@exercise("wilson_interval")
def _wilson_interval(fn):
    low, high = fn(7, 10)
    yield (
        "7 wins of 10 are 40 % to 89 %",
        (round(float(low), 2), round(float(high), 2)) == (0.40, 0.89),
    )
    z, ends = 1.5, [float(end) for end in fn(30, 80, z=1.5)]
    distances = [(0.375 - p) ** 2 - z**2 * p * (1 - p) / 80 for p in ends]
    yield (
        "both ends solve the equation, for any z",
        max(map(abs, distances)) < 1e-12 and ends[0] < 0.375 < ends[1],
    )
    none, every = fn(0, 20), fn(20, 20)
    yield (
        "0 of 20 begins at 0, and does not end there",
        abs(float(none[0])) < 1e-12 and float(none[1]) > 0.05,
    )
    yield (
        "20 of 20 ends at 1, and does not begin there",
        abs(float(every[1]) - 1) < 1e-12 and float(every[0]) < 0.95,
    )


@exercise("swap_consistent")
def _swap_consistent(fn):
    seen = []

    def fair(prompt, first, second):
        seen.append((prompt, first, second))
        return (len(first) > len(second)) - (len(first) < len(second))

    yield (
        "the better answer always wins",
        (fn(fair, "p", "long", "s"), fn(fair, "p", "s", "long")) == (1, -1),
    )
    yield (
        "both orders are shown to the judge, with the prompt",
        set(seen) == {("p", "long", "s"), ("p", "s", "long")},
    )
    yield "a tie in both orders is a tie", fn(lambda *_: 0, "p", "a", "b") == 0
    yield (
        "a judge that always takes the first answer decides nothing",
        fn(lambda *_: 1, "p", "a", "b") == 0,
    )
    yield (
        "one that always takes the second decides nothing either",
        fn(lambda *_: -1, "p", "a", "b") == 0,
    )
    yield (
        "a win in one order and a tie in the other is a tie",
        fn(lambda _, x, y: int(x == "a"), "p", "a", "b") == 0,
    )


@exercise("bradley_terry_strengths")
def _bradley_terry_strengths(fn):
    two = [float(s) for s in fn([[0, 7], [3, 0]])]
    yield (
        "7 wins against 3: strengths 0.7 and 0.3",
        max(abs(two[0] - 0.7), abs(two[1] - 0.3)) < 1e-9,
    )
    wins = [[0, 6, 8.5], [4, 0, 5], [1.5, 5, 0]]
    three = [float(s) for s in fn(wins)]
    yield "the strengths sum to 1", abs(sum(three) - 1) < 1e-9

    def excess(i):  # wins seen minus wins predicted
        met = [
            (wins[i][j], wins[i][j] + wins[j][i], three[i] / (three[i] + three[j]))
            for j in range(3)
            if j != i
        ]
        return sum(won - games * chance for won, games, chance in met)

    yield "every player wins as often as predicted", max(abs(excess(i)) for i in range(3)) < 1e-6
    more = [float(s) for s in fn([[10 * won for won in row] for row in wins])]
    yield (
        "ten times as many matches with the same results change nothing",
        max(abs(a - b) for a, b in zip(three, more, strict=True)) < 1e-6,
    )
