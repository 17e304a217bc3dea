"""Checks of the exercises of notebook 1.7-02.

The expected values are computed here, by another route than the worked answers.
"""

import math
from types import SimpleNamespace

import torch

from common.checks import close


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
