"""Checks of the exercises of notebook 1.8-01.

The expected values are computed here, by another route than the worked answers.
"""

import math

import torch

from common.checks import close
from common.logprobs import PairLogps, SideLogps


def check_length_bias(fn):
    def bias(*lengths):
        rows = [{"chosen_ids": [5] * c, "rejected_ids": [900] * r} for c, r in lengths]
        return fn(rows)

    yield "one pair whose chosen answer is longer: 1", bias((4, 3)) == 1
    yield "one pair whose chosen answer is shorter: 0", bias((3, 40)) == 0
    yield "equal lengths are half right", bias((6, 6)) == 0.5
    mixed = [(2, 1), (9, 1), (3, 3), (1, 2), (1, 30), (1, 3), (2, 3), (7, 8)]
    yield "2 longer, 1 equal, 5 shorter: 2.5 of 8", close(bias(*mixed), 0.3125)
    yield "by how much does not count: only which is longer", bias((2, 1), (1, 500)) == 0.5
    swapped = bias(*((rejected, chosen) for chosen, rejected in mixed))
    yield "swapping chosen and rejected gives 1 minus it", close(swapped, 0.6875)
    ids = [{"chosen_ids": (7, 7, 2), "rejected_ids": torch.tensor([7, 2])}]
    yield "tuples and tensors of ids will do as well", fn(ids) == 1


def _rise():
    """Two scorings: chosen up 20 nats over 10 tokens, rejected up 10."""
    before, after = ((-20.0, -60.0), (-30.0, -50.0)), ((-10.0, -50.0), (-25.0, -45.0))
    lengths = torch.tensor([2, 8]), torch.tensor([4, 6])
    for sides in (before, after):
        sums = (torch.tensor(side, dtype=torch.float64) for side in sides)
        yield PairLogps(*(SideLogps(*side) for side in zip(sums, lengths, strict=True)))


def _in_float32(logps):
    return PairLogps(
        *(SideLogps(s.sums.float(), s.lengths) for s in (logps.chosen, logps.rejected))
    )


def check_shared_rise(fn):
    def logps(chosen, rejected, lengths):
        sums = [torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected)]
        return PairLogps(*(SideLogps(*side) for side in zip(sums, lengths, strict=True)))

    def share(chosen, rejected, rejected_lengths=(4, 6)):
        lengths = torch.tensor([2, 8]), torch.tensor(rejected_lengths)
        before = logps([-20.0, -60.0], [-30.0, -50.0], lengths)
        return fn(before, logps(chosen, rejected, lengths))

    half = share([-10.0, -50.0], [-25.0, -45.0])
    yield "chosen up 20 nats, rejected up 10, 10 tokens each: one half", close(half, 0.5)
    equal = share([-15.0, -55.0], [-26.0, -44.0])
    yield "rejected rise as much as chosen: 1", close(equal, 1)
    yield "rejected fall: negative", close(share([-10.0, -50.0], [-32.0, -53.0]), -0.25)
    halved = share([-10.0, -50.0], [-20.0, -40.0], rejected_lengths=(4, 16))
    yield "per token: the same nats over twice the tokens are half the rise", close(halved, 0.5)
    # 34 nats and 17 nats, over 10 tokens each
    uneven = share([-18.0, -28.0], [-30.0, -33.0])
    yield "every token counts the same: not the mean of row ratios", close(uneven, 0.5)
    single = fn(*(_in_float32(side) for side in _rise()))
    yield "sums in float32 will do as well", close(single, 0.5, 1e-5)
    yield "it is a plain number, not a tensor", isinstance(half, float)
    try:
        share([-21.0, -60.0], [-20.0, -40.0])
        refused = False
    except ValueError:
        refused = True
    yield "where the chosen answers fall, it raises a ValueError", refused


def check_cohens_kappa(fn):
    a, b, tie = 1, -1, 0
    same = fn([a, b, tie, a], [a, b, tie, a])
    yield "full agreement on votes that vary: 1", close(same, 1)
    yield "agreement as by chance: 0", close(fn([a, a, b, b], [a, b, a, b]), 0)
    yield "always the opposite, evenly: -1", close(fn([a, b, a, b], [b, a, b, a]), -1)
    # Cohen's textbook case: 20 + 15 agree, 5 + 10 do not
    first, second = [a] * 25 + [b] * 25, [a] * 20 + [b] * 5 + [a] * 10 + [b] * 15
    yield "35 of 50 agree, half of that by chance: 0.4", close(fn(first, second), 0.4)
    # 90 agree, but p_e = 0.905
    rare = fn([a] * 95 + [b] * 5, [a] * 90 + [b] * 5 + [a] * 5)
    worthless = close(rare, -0.05 / 0.95, 1e-9)
    yield "90 % agreement on a vote that is nearly always A is worth nothing", worthless
    # p_o = 4/6, p_e = (2·3 + 2·1 + 2·2) / 36 = 1/3
    third = fn([a, a, b, b, tie, tie], [a, a, b, tie, tie, a])
    yield '"no difference" is a vote like the others', close(third, 0.5)
    # 3 of 4 agree; p_e = (3·2 + 1·2) / 16 = 1/2
    as_arrays = fn(torch.tensor([a, a, a, b]).numpy(), torch.tensor([a, a, b, b]).numpy())
    yield "arrays of votes will do as well", close(as_arrays, 0.5)
    yield "it makes no difference who is first", close(fn(second, first), 0.4)
    constant = fn([a, a], [a, a])
    yield "one and the same vote throughout: not defined, nan", math.isnan(constant)
