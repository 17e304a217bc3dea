"""Checks of the exercises of notebook 1.8-03.

The expected values are computed here, by another route than the worked answers.
"""

from common.checks import close


def check_interval_over_seeds(fn):
    low, high = fn([0.6, 0.7, 0.8])
    yield "three seeds: the mean is in the middle", close(low + high, 1.4)
    student = close((high - low) / 2, 0.24841, 1e-4)
    yield "its half-width is 4.303 · 0.1 / sqrt(3): 2 degrees of freedom, not 3", student
    two = close(fn([0.5, 0.6]), [-0.0853, 1.1853], 1e-3)
    yield "two seeds tell little: 0.55 ± 0.635", two
    six = fn([0.55, 0.59, 0.61, 0.57, 0.63, 0.65])
    yield "six seeds tell more", close(six, [0.560739, 0.639261], 1e-5)
    yield "seeds that agree have no spread", close(fn([0.75, 0.75, 0.75]), [0.75, 0.75])
    yield "one seed says nothing of another: None", fn([0.7]) is None


def check_cost_ratio(fn):
    def gives(expected, *epochs, **options):
        return close(fn(*epochs, **options), expected)

    yield "one epoch each: 6 passes over 3 + 8", gives(6 / 11, 1, 1, 1)
    yield "two epochs each: the same", gives(6 / 11, 2, 2, 2)
    three = gives(18 / 17, 3, 1, 3)
    yield "ORPO for three epochs, SFT for three, DPO for one: 18 over 9 + 8", three
    yield "three epochs of DPO: 6 over 3 + 24", gives(6 / 27, 1, 3, 1)
    cached = gives(6 / 11, 1, 1, 1, cached=True)
    yield "with one epoch, caching costs what it saves", cached
    cached = gives(6 / 23, 1, 3, 1, cached=True)
    yield "cached, three epochs of DPO: 6 over 3 + 18 + 2", cached
    yield "LoRA: 4 over 2 + 6", gives(0.5, 1, 1, 1, lora=True)
    both = gives(8 / 14, 2, 2, 2, cached=True, lora=True)
    yield "LoRA and cached, two epochs of all: 8 over 4 + 8 + 2", both


def check_worth_contrast(fn):
    lost, won, open_ = [0.44, 0.45, 0.46], [0.57, 0.58, 0.59], [0.40, 0.52, 0.60]

    def gives(expected, *rates):
        return tuple(fn([0.0, 0.1, 0.3, 0.5], list(rates))) == expected

    yield "clear at both ends, open between", gives((0.0, 0.3), lost, open_, won, won)
    yield "no gap", gives((0.1, 0.3), lost, lost, won, won)
    yield "it always pays", gives((None, 0.0), won, won, won, won)
    yield "it always costs", gives((0.5, None), lost, lost, lost, lost)
    yield "nothing is decided", gives((None, None), open_, open_, open_, open_)
    later = gives((0.0, 0.5), lost, won, open_, won)
    yield "a clear rate in the middle is not 'from there on'", later
    after = gives((None, 0.5), open_, lost, open_, won)
    yield "nor is a clear loss in the middle 'up to there'", after
    wide = gives((0.1, 0.5), lost, lost, [0.49, 0.55, 0.61], won)
    yield "a mean above one half does not suffice: the interval decides", wide
    yield "one seed decides nothing", gives((None, None), [0.4], [0.45], [0.6], [0.7])
