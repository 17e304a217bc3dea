"""Instant checks of the exercises: `check("name", fn)` says which properties of a student's function hold or broke.

A check computes its expected values itself, by another route than the worked answer.
"""

from collections.abc import Callable, Iterator

import torch

CHECKS: dict[str, Callable[[Callable], Iterator[tuple[str, bool]]]] = {}


def exercise(name: str):
    """Registers a check: a generator that calls the student's function and yields (property, does it hold?)."""

    def register(function):
        CHECKS[name] = function
        return function

    return register


def check(name: str, fn: Callable) -> None:
    """Prints which properties of `fn` hold or broke, up to the first error it raises.

    Raises: KeyError for an unknown exercise; AssertionError, with the broken properties, unless all hold.
    """
    if name not in CHECKS:
        raise KeyError(f"No exercise is called {name!r}. They are: {', '.join(sorted(CHECKS))}.")
    broken = []
    properties = CHECKS[name](fn)
    while True:
        try:
            text, holds = next(properties)
        except StopIteration:
            break
        except NotImplementedError:
            text, holds = f"{fn.__name__} is not written yet", False
        except Exception as error:
            text, holds = f"{fn.__name__} raised {type(error).__name__}: {error}", False
        print(f"{'ok    ' if holds else 'BROKEN'}  {text}")
        if not holds:
            broken.append(text)
    if broken:
        raise AssertionError(f"{name}: {len(broken)} of its properties broke: {'; '.join(broken)}")


# Lab 1.7, notebook 01


@exercise("split_transcript")
def _split_transcript(split):
    turns = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is the tea?\n\nAssistant:"
    result = split(turns + " In the kitchen.")
    yield "it returns a prompt and a response", isinstance(result, tuple | list) and len(result) == 2
    prompt, response = result
    yield "the prompt ends at the last assistant turn, not at the first", prompt == turns
    yield "the response keeps its leading space", response == " In the kitchen."
    echo = turns + " You said: Hi. Where is the tea? In the kitchen."
    yield "prompt + response is the transcript again, word for word", "".join(split(echo)) == echo
    yield "a transcript that ends at the mark has an empty response", tuple(split(turns)) == (turns, "")
    yield "without an assistant turn it returns None", split("\n\nHuman: Hi") is None and split("") is None


@exercise("response_mask")
def _response_mask(mask):
    prompts, responses = [2, 4, 1], [3, 1, 5]
    result = mask(torch.tensor(prompts), torch.tensor(responses))
    yield "it is a tensor of booleans", isinstance(result, torch.Tensor) and result.dtype == torch.bool
    yield "its shape is (rows, longest prompt + response)", result.shape == (3, 6)
    marked = [[place for place, on in enumerate(row) if on] for row in result.tolist()]
    yield "as many tokens are marked as the responses have, EOS counted", list(map(len, marked)) == responses
    yield "no prompt token is marked", all(row[0] >= start for row, start in zip(marked, prompts, strict=True))
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
    yield 'the others are counted as "duplicate"', dropped["duplicate"] == 2 and sum(dropped.values()) == 2
    kept, dropped = deduplicate([good, other, row("p", "b", "a")])
    yield "rows with the same answers in both orders all go: nobody knows who was right", kept == [other]
    yield 'they are counted as "contradiction"', dropped["contradiction"] == 2 and sum(dropped.values()) == 2
    rows = [good, row("p", "b", "a"), dict(good), other, dict(other)]
    before = [dict(entry) for entry in rows]
    kept, dropped = deduplicate(rows)
    yield "a contradicted row is no duplicate, however often it occurs", dict(dropped) == {
        "contradiction": 3, "duplicate": 1}  # fmt: skip
    yield "rows read = rows kept + rows dropped", len(rows) == len(kept) + sum(dropped.values())
    yield "the input is left as it was", rows == before


@exercise("implicit_reward")
def _implicit_reward(fn):
    import torch

    policy = torch.tensor([-3.0, -12.5, -40.0], dtype=torch.float64)
    reference = torch.tensor([-5.0, -12.5, -31.0], dtype=torch.float64)
    found = fn(policy, reference, 0.25)
    yield "the shape is (batch,)", tuple(found.shape) == (3,)
    yield "exp(reward / beta) is the ratio of probabilities (Eq. 5)", torch.allclose(
        torch.exp(found / 0.25), torch.exp(policy) / torch.exp(reference), rtol=1e-12)
    yield "it is 0 where policy and reference agree", float(fn(policy, policy, 0.25).abs().max()) == 0.0
    yield "twice the beta, twice the reward", torch.allclose(fn(policy, reference, 0.5), 2 * found, rtol=1e-12)
    swapped = fn(reference, policy, 0.25)
    yield "swapping policy and reference changes the sign", torch.allclose(swapped, -found, rtol=1e-12)


@exercise("diagnose")
def _diagnose(fn):
    def run(accuracy=0.8, **end):
        start = {"step": 0, "held_out_margin": 0.0, "held_out_logps_chosen": -20.0, "held_out_kl": 0.0}
        last = {"held_out_margin": 0.9, "held_out_kl": 3.0, "held_out_accuracy": 0.8, "held_out_logps_chosen": -20.5}
        return [start, *({"step": n, "accuracy": 0.5 if n < 10 else accuracy} for n in range(1, 30)),
                {"step": 30, "accuracy": accuracy, **last, **end}]  # fmt: skip

    shifted = run()
    shifted[0]["held_out_margin"] = -0.4
    yield "a healthy run has no sign", set(fn(run())) == set()
    yield "a margin at step 0", set(fn(shifted)) == {"wrong reference"}
    yield "a KL of 25", set(fn(run(held_out_kl=25.0))) == {"too far"}
    yield "a KL of 20 is not above 20", set(fn(run(held_out_kl=20.0))) == set()
    yield "training accuracy far above the held-out one", set(fn(run(accuracy=0.98))) == {"learnt by heart"}
    yield "high on held-out pairs too is no overfitting", set(fn(run(accuracy=0.98, held_out_accuracy=0.96))) == set()
    yield "the chosen answer became less likely", set(fn(run(held_out_logps_chosen=-23.0))) == {"displacement"}
    both = run(held_out_logps_chosen=-23.0, held_out_kl=40.0)
    yield "two signs at once", set(fn(both)) == {"displacement", "too far"}


@exercise("conservative_dpo_loss")
def _conservative_dpo_loss(fn):
    import math

    import torch

    h = torch.tensor([-7.0, 0.0, 2.5, 30.0], dtype=torch.float64)
    logistic = torch.tensor([math.log1p(math.exp(-0.2 * value)) for value in h.tolist()], dtype=torch.float64)
    flipped = torch.tensor([math.log1p(math.exp(0.2 * value)) for value in h.tolist()], dtype=torch.float64)
    yield "with epsilon 0 it is the DPO loss", torch.allclose(fn(h, 0.2, 0.0), logistic, rtol=1e-12)
    yield "it is ln 2 at the reference, for every epsilon", abs(float(fn(h, 0.2, 0.3)[1]) - math.log(2)) < 1e-12
    expected = 0.9 * logistic + 0.1 * flipped
    yield "it is the expected loss when a tenth of the labels is flipped", torch.allclose(fn(h, 0.2, 0.1), expected)
    best = torch.tensor([math.log(0.9 / 0.1) / 0.2], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fn(best, 0.2, 0.1).sum(), best)
    yield "its minimum is at log((1 - epsilon) / epsilon) / beta", abs(float(slope)) < 1e-12
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = fn(far, 1.0, 0.1)
    (slope,) = torch.autograd.grad(value.sum(), far)
    yield "it is finite far out, in float32", bool(torch.isfinite(value).all())
    yield "so is its gradient: -0.9 and 0.1", torch.allclose(slope, torch.tensor([-0.9, 0.1]), atol=1e-6)


# Lab 1.7, notebook 02


@exercise("perplexity_from_logps")
def _perplexity_from_logps(perplexity):
    one = perplexity(torch.tensor([-6.0]), torch.tensor([3]))
    yield "one answer of 3 tokens at -6 nats: e to the 2nd", abs(float(one) - 7.389056) < 1e-5
    sure = perplexity(torch.tensor([0.0, 0.0]), torch.tensor([4, 9]))
    yield "a model that is sure and right has perplexity 1", float(sure) == 1.0
    guess = perplexity(torch.tensor([-3.0, -5.0]) * 6.684612, torch.tensor([3, 5]))
    yield "guessing among 800 words has perplexity 800", abs(float(guess) - 800.0) < 0.01
    ragged = perplexity(torch.tensor([-1.0, -9.0]), torch.tensor([1, 3]))  # 10 nats over 4 tokens; rows: 1 and 3
    yield "every token counts the same: not the mean of row means", abs(float(ragged) - 12.182494) < 1e-4
    yield "it is a plain number, not a tensor", isinstance(one, float)


@exercise("response_logps_by_hand")
def _response_logps_by_hand(fn):
    class Counting(torch.nn.Module):
        """After token t it expects t + 1 (of 7), with probability 1/2; the other six share the rest."""

        device = torch.device("cpu")

        def forward(self, input_ids, **_):
            expected = torch.nn.functional.one_hot((input_ids + 1) % 7, 7).bool()
            return type("Output", (), {"logits": torch.where(expected, 0.5, 1 / 12).log() + 3.0})()

    hit, miss = -0.6931472, -2.4849066  # ln(1/2), ln(1/12)
    found = fn(Counting(), [0, 1], [2, 3, 4])
    yield "it returns one log-probability per response token", tuple(found.shape) == (3,)
    yield "logits are normalised, and position t predicts token t + 1", torch.allclose(
        found.double(), torch.full((3,), hit).double(), atol=1e-5)  # fmt: skip
    first = fn(Counting(), [5, 5, 5], [1])
    yield "the prompt is not scored, and its last token predicts the first response token", torch.allclose(
        first.double(), torch.tensor([miss]).double(), atol=1e-5)  # fmt: skip
    end = fn(Counting(), [0], [1, 5, 6])
    yield "the last token, EOS, is scored as well", torch.allclose(
        end.double(), torch.tensor([hit, miss, hit]).double(), atol=1e-5)  # fmt: skip
    yield "the sum can be taken in float64: the result is at least float32", found.dtype in (
        torch.float32, torch.float64)  # fmt: skip


@exercise("best_checkpoint")
def _best_checkpoint(fn):
    losses = [5.0, 3.0, 2.0, 2.5, 2.4, 1.0]
    yield "patience 0 never stops: all is seen, the lowest loss is kept", tuple(fn(losses, 0)) == (5, 5)
    yield "patience 2 stops after two evaluations without a better loss", tuple(fn(losses, 2)) == (2, 4)
    yield "patience 3 lives to see the better one", tuple(fn(losses, 3)) == (5, 5)
    yield "a better loss sets the count back to 0", tuple(fn([3.0, 4.0, 2.0, 4.0, 1.0], 2)) == (4, 4)
    yield "an equal loss is not a better one: the first stays", tuple(fn([2.0, 2.0, 2.0], 2)) == (0, 2)
    yield "where it only gets worse, the model before training is kept", tuple(fn([1.0, 2.0, 3.0, 4.0], 1)) == (0, 1)
    yield "a NaN is never better", tuple(fn([2.0, float("nan"), 1.0], 0)) == (2, 2)
    yield "not even at the start", tuple(fn([float("nan"), 3.0, 4.0], 0)) == (1, 2)


@exercise("wilson_interval")
def _wilson_interval(fn):
    low, high = fn(7, 10)
    yield "7 wins of 10 are 40 % to 89 %", (round(float(low), 2), round(float(high), 2)) == (0.40, 0.89)
    z, ends = 1.5, [float(end) for end in fn(30, 80, z=1.5)]
    distances = [(0.375 - p) ** 2 - z**2 * p * (1 - p) / 80 for p in ends]
    yield "both ends solve the equation, for any z", max(map(abs, distances)) < 1e-12 and ends[0] < 0.375 < ends[1]
    none, every = fn(0, 20), fn(20, 20)
    yield "0 of 20 begins at 0, and does not end there", abs(float(none[0])) < 1e-12 and float(none[1]) > 0.05
    yield "20 of 20 ends at 1, and does not begin there", abs(float(every[1]) - 1) < 1e-12 and float(every[0]) < 0.95


@exercise("swap_consistent")
def _swap_consistent(fn):
    seen = []

    def fair(prompt, first, second):
        seen.append((prompt, first, second))
        return (len(first) > len(second)) - (len(first) < len(second))

    yield "the better answer always wins", (fn(fair, "p", "long", "s"), fn(fair, "p", "s", "long")) == (1, -1)
    yield "both orders are shown to the judge, with the prompt", set(seen) == {("p", "long", "s"), ("p", "s", "long")}
    yield "a tie in both orders is a tie", fn(lambda *_: 0, "p", "a", "b") == 0
    yield "a judge that always takes the first answer decides nothing", fn(lambda *_: 1, "p", "a", "b") == 0
    yield "one that always takes the second decides nothing either", fn(lambda *_: -1, "p", "a", "b") == 0
    yield "a win in one order and a tie in the other is a tie", fn(lambda _, x, y: int(x == "a"), "p", "a", "b") == 0


@exercise("bradley_terry_strengths")
def _bradley_terry_strengths(fn):
    two = [float(s) for s in fn([[0, 7], [3, 0]])]
    yield "7 wins against 3: strengths 0.7 and 0.3", max(abs(two[0] - 0.7), abs(two[1] - 0.3)) < 1e-9
    wins = [[0, 6, 8.5], [4, 0, 5], [1.5, 5, 0]]
    three = [float(s) for s in fn(wins)]
    yield "the strengths sum to 1", abs(sum(three) - 1) < 1e-9

    def excess(i):  # wins seen minus wins predicted
        met = [(wins[i][j], wins[i][j] + wins[j][i], three[i] / (three[i] + three[j])) for j in range(3) if j != i]
        return sum(won - games * chance for won, games, chance in met)

    yield "every player wins as often as predicted", max(abs(excess(i)) for i in range(3)) < 1e-6
    more = [float(s) for s in fn([[10 * won for won in row] for row in wins])]
    yield "ten times as many matches with the same results change nothing", max(
        abs(a - b) for a, b in zip(three, more, strict=True)) < 1e-6


# Lab 1.8, notebook 01


@exercise("length_bias")
def _length_bias(fn):
    def pair(chosen, rejected):
        return {"chosen_ids": [5] * chosen, "rejected_ids": [900] * rejected}

    yield "one pair whose chosen answer is longer: 1", fn([pair(4, 3)]) == 1
    yield "one pair whose chosen answer is shorter: 0", fn([pair(3, 40)]) == 0
    yield "equal lengths are half right", fn([pair(6, 6)]) == 0.5
    mixed = [pair(2, 1), pair(9, 1), pair(3, 3), pair(1, 2), pair(1, 30), pair(1, 3), pair(2, 3), pair(7, 8)]
    yield "2 longer, 1 equal, 5 shorter: 2.5 of 8", abs(fn(mixed) - 0.3125) < 1e-12
    yield "by how much does not count: only which is longer", fn([pair(2, 1), pair(1, 500)]) == 0.5
    swapped = [{"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in mixed]
    yield "swapping chosen and rejected gives 1 minus it", abs(fn(swapped) - 0.6875) < 1e-12


@exercise("shared_rise")
def _shared_rise(fn):
    from common.logprobs import PairLogps, SideLogps

    def logps(chosen, rejected, lengths=((2, 8), (4, 6))):
        sums = (torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected))
        return PairLogps(*(SideLogps(s, torch.tensor(n)) for s, n in zip(sums, lengths, strict=True)))

    before = logps([-20.0, -60.0], [-30.0, -50.0])
    yield "chosen up 20 nats, rejected up 10, 10 tokens each: one half", abs(
        fn(before, logps([-10.0, -50.0], [-25.0, -45.0])) - 0.5) < 1e-12  # fmt: skip
    yield "rejected rise as much as chosen: 1", abs(fn(before, logps([-15.0, -55.0], [-26.0, -44.0])) - 1) < 1e-12
    yield "rejected fall: negative", abs(fn(before, logps([-10.0, -50.0], [-32.0, -53.0])) + 0.25) < 1e-12
    short = ((2, 8), (4, 16))  # the rejected answers have twice as many tokens
    halved = fn(logps([-20.0, -60.0], [-30.0, -50.0], short), logps([-10.0, -50.0], [-20.0, -40.0], short))
    yield "per token: the same nats over twice the tokens are half the rise", abs(halved - 0.5) < 1e-12
    uneven = fn(before, logps([-18.0, -28.0], [-30.0, -33.0]))  # 34 nats and 17 nats, over 10 tokens each
    yield "every token counts the same: not the mean of row ratios", abs(uneven - 0.5) < 1e-12
    try:
        fn(before, logps([-21.0, -60.0], [-20.0, -40.0]))
        refused = False
    except ValueError:
        refused = True
    yield "where the chosen answers fall, it raises a ValueError", refused


@exercise("cohens_kappa")
def _cohens_kappa(fn):
    a, b, tie = 1, -1, 0
    yield "full agreement on votes that vary: 1", abs(fn([a, b, tie, a], [a, b, tie, a]) - 1) < 1e-12
    yield "agreement as by chance: 0", abs(fn([a, a, b, b], [a, b, a, b])) < 1e-12
    yield "always the opposite, evenly: -1", abs(fn([a, b, a, b], [b, a, b, a]) + 1) < 1e-12
    first = [a] * 25 + [b] * 25  # Cohen's textbook case: 20 + 15 agree, 5 + 10 do not
    second = [a] * 20 + [b] * 5 + [a] * 10 + [b] * 15
    yield "35 of 50 agree, half of that by chance: 0.4", abs(fn(first, second) - 0.4) < 1e-12
    rare = [a] * 95 + [b] * 5, [a] * 90 + [b] * 5 + [a] * 5  # 90 agree, but p_e = 0.905
    yield "90 % agreement on a vote that is nearly always A is worth nothing", abs(fn(*rare) + 0.05 / 0.95) < 1e-9
    third = fn([a, a, b, b, tie, tie], [a, a, b, tie, tie, a])  # p_o = 4/6, p_e = (2·3 + 2·1 + 2·2) / 36 = 1/3
    yield '"no difference" is a vote like the others', abs(third - 0.5) < 1e-12
    yield "one and the same vote throughout: not defined, nan", fn([a, a], [a, a]) != fn([a, a], [a, a])


# Lab 1.8, notebook 02


@exercise("safe_log_odds")
def _safe_log_odds(fn):
    import math

    def tensor(*values, **options):
        return torch.tensor(values, dtype=torch.float64, **options)

    known = fn(tensor(math.log(0.5), math.log(0.75), math.log(0.2)))
    yield "p = 1/2, 3/4, 1/5: odds 1, 3, 1/4", torch.allclose(known, tensor(0, math.log(3), -math.log(4)), atol=1e-12)
    for x in (-1e-12, -1e-8, -1e-3, -0.69, -1.0, -50.0, -1e4):
        argument = tensor(x, requires_grad=True)
        value = fn(argument)
        (slope,) = torch.autograd.grad(value.sum(), argument)
        right = x + math.exp(x) if x < -40 else -math.log(math.expm1(-x))
        yield f"log p = {x:g}: the value", abs(value.item() - right) <= 1e-12 * max(1.0, abs(right))
        yield f"log p = {x:g}: the gradient, 1 / (1 - p)", abs(slope.item() * -math.expm1(x) - 1) < 1e-12
    mixed = tensor(-1e-12, -1e4, -0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(fn(mixed).sum(), mixed)
    yield "all of them in one tensor: every gradient is finite", bool(torch.isfinite(slope).all())


@exercise("orpo_gradient_weight")
def _orpo_gradient_weight(fn):
    w, l = torch.tensor([[0.75, 0.2, 0.5], [0.5, 0.5, 0.5]], dtype=torch.float64).log()
    delta, dw, dl = fn(w, l)
    yield "odds 3, 1/4 and 1 against 1: delta is 1/4, 4/5 and 1/2", torch.allclose(
        delta, torch.tensor([1 / 4, 4 / 5, 1 / 2], dtype=torch.float64), rtol=1e-12)  # fmt: skip
    swapped = fn(l, w)[0]
    yield "swapping the answers gives 1 - delta", torch.allclose(swapped, 1 - delta, rtol=1e-12)
    yield "chosen: -delta / (1 - P), so the loss falls as P rises", torch.allclose(
        dw, torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64), rtol=1e-12)  # fmt: skip
    yield "rejected: +delta / (1 - P)", torch.allclose(
        dl, torch.tensor([1 / 2, 8 / 5, 1.0], dtype=torch.float64), rtol=1e-12)  # fmt: skip
    step = 1e-6

    def loss(a, b):  # log(1 + odds(b) / odds(a)), with plain exponentials
        return torch.log1p(b.exp() / (1 - b.exp()) * (1 - a.exp()) / a.exp())

    numeric = (loss(w + step, l) - loss(w - step, l)) / (2 * step)
    yield "it is the slope of the loss, measured with a small step", torch.allclose(dw, numeric, rtol=1e-6)
    sure = fn(torch.tensor([-1e-9], dtype=torch.float64), torch.tensor([-0.6931471805599453], dtype=torch.float64))
    yield "a pair learnt by heart: all three are finite", all(bool(torch.isfinite(part).all()) for part in sure)
    yield "its chosen answer is still pulled, by the rejected one's odds, here 1", abs(float(sure[1]) + 1) < 1e-6


@exercise("orpo_from_logits")
def _orpo_from_logits(fn):
    import math

    draw = torch.Generator().manual_seed(3)
    sides = [(torch.randn(n, 5, generator=draw, dtype=torch.float64), torch.randint(0, 5, (n,), generator=draw))
             for n in (6, 8)]  # fmt: skip
    for ids in (sides[0][1], sides[1][1]):
        ids[:3] = torch.tensor([1, 4, 2])  # the prompt
        ids[-1] = 0  # EOS

    def by_hand(weight, on_prompt):
        means, nlls = [], []
        for logits, ids in sides:
            rows = [[math.exp(z) for z in row] for row in logits.tolist()]
            logps = [math.log(rows[t - 1][ids[t]] / sum(rows[t - 1])) for t in range(1, len(ids))]
            means.append(sum(logps[2:]) / len(logps[2:]))
            nlls.append(-sum(logps) / len(logps) if on_prompt else -means[-1])
        odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
        return nlls[0] + weight * math.log(1 + odds[1] / odds[0])

    def same(value, expected):
        return abs(float(value) - expected) < 1e-10

    yield "it is a scalar", torch.as_tensor(fn(*sides, 3)).numel() == 1
    yield "lambda 0 with the prompt: NLL of prompt and answer, shifted by one", same(
        fn(*sides, 3, 0.0, True), by_hand(0, True))  # fmt: skip
    yield "lambda 0 without the prompt: NLL of the answer, EOS included", same(
        fn(*sides, 3, 0.0, False), by_hand(0, False))  # fmt: skip
    yield "the odds are taken of means, over the answer only", same(fn(*sides, 3, 1.0, False), by_hand(1, False))
    yield "the whole loss", same(fn(*sides, 3, 0.4, True), by_hand(0.4, True))
    other = sides[0][0].clone()
    other[-1] = torch.arange(5.0)
    yield "the last row of logits predicts nothing: other values there change nothing", same(
        fn((other, sides[0][1]), sides[1], 3, 0.4), by_hand(0.4, True))  # fmt: skip


# Lab 1.8, notebook 04


@exercise("cache_bytes")
def _cache_bytes(fn):
    yield "keys and values: 1 layer, 1 head of width 1, 1 token, 1 byte each are 2 bytes", fn(1, 1, 1, 1, 1, 1) == 2
    yield "GPT-2 (12 layers, 12 heads of 64), 1,024 tokens in 2 bytes: 36 MiB", fn(12, 12, 64, 1024, 1, 2) == 36 * 2**20
    yield "8 rows need 8 times as much", fn(2, 4, 16, 100, 8, 4) == 8 * fn(2, 4, 16, 100, 1, 4)
    yield "grouped-query attention: Mistral 7B keeps 8 heads of 128 in 32 layers, 4 GiB at 32,768 tokens", (
        fn(32, 8, 128, 32768, 1, 2) == 4 * 2**30
    )


@exercise("round_in_blocks")
def _round_in_blocks(fn):
    weights = torch.tensor([[1.0, -2.0, 0.5, 4.0], [100.0, 30.0, 0.0, 0.0]])
    result = fn(weights, 3, 2)
    yield "the shape stays", result.shape == weights.shape
    # 3 bits: levels -3 … 3. Blocks of 2: steps 2/3, 4/3, 100/3; a block of zeros.
    expected = torch.tensor([[4 / 3, -2.0, 0.0, 4.0], [100.0, 100 / 3, 0.0, 0.0]])
    yield "3 bits, blocks of 2: each block has its own step", torch.allclose(result, expected, atol=1e-5)
    yield "a block of zeros stays zeros, not NaN", bool((result[1, 2:] == 0).all())
    yield "the largest of each block is kept exactly", bool((result[0, 1] == -2) & (result[0, 3] == 4))
    again = fn(result, 3, 2)
    yield "what is rounded already does not change again", torch.allclose(again, result, atol=1e-5)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    worst = (fn(noise, 8, 64) - noise).abs().amax(1)
    half_steps = noise.abs().amax(1) / 127 / 2
    yield "8 bits: no weight moves by more than half a step", bool((worst <= half_steps + 1e-7).all())


@exercise("peeking_coin")
def _peeking_coin(fn):
    from itertools import product
    from math import comb

    def counted(flips, looks):
        hits = 0
        for outcome in product((0, 1), repeat=flips * looks):
            heads = [sum(outcome[: flips * look]) for look in range(1, looks + 1)]
            z = [abs(2 * h - flips * k) / (flips * k) ** 0.5 for k, h in enumerate(heads, 1)]
            hits += any(value > 1.96 for value in z)
        return hits / 2 ** (flips * looks)

    tails = sum(comb(100, h) for h in range(101) if abs(2 * h - 100) / 10 > 1.96) / 2**100
    yield "one look after 100 flips: the two tails of the binomial", abs(fn(100, 1) - tails) < 1e-12
    yield "a look after each of 12 flips: all 4,096 outcomes counted", abs(fn(1, 12) - counted(1, 12)) < 1e-12
    yield "a look after every 4 of 16", abs(fn(4, 4) - counted(4, 4)) < 1e-12
    yield "more looks, more false alarms", fn(20, 10) > fn(40, 5) > fn(200, 1)
    yield "ten looks at 200 fair flips raise a false alarm in 15 to 25 % of experiments", 0.15 < fn(20, 10) < 0.25
