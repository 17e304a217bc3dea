"""The checks of notebook 1.8-04: its answers pass, other right ones too, and wrong ones do not."""

import ast
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from scipy.stats import norm

from common.checks import check

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "Lab-1.8-ORPO_Alignment" / "04-Production_Deploy.ipynb"
TOOLS = {"torch": torch, "np": np}


def answers() -> dict:
    """{exercise: its answer} of the notebook."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    sources = [cell.source for cell in cells if "### BEGIN SOLUTION" in cell.source]
    found = {}
    for source in sources:
        own = dict(TOOLS)
        exec(source, own)
        name = ast.parse(source).body[-1].name
        found[name] = own[name]
    return found


@pytest.mark.parametrize(
    "name", ["round_in_blocks", "cached_decode", "cache_bytes", "peeking_coin"]
)
def test_the_answer_of_the_notebook_passes(name):
    check(name, answers()[name])


def with_clamp(weights, bits, block):
    flat = weights.view(-1, block)
    top = 2 ** (bits - 1) - 1
    step = (flat.abs().max(dim=1, keepdim=True).values / top).clamp_min(1e-12)
    return torch.clamp(torch.round(flat / step), -top, top).mul(step).view_as(weights)


def with_other_names(model, ids, new_tokens, end):
    found, past, feed = [], None, ids
    with torch.inference_mode():
        while len(found) < new_tokens and end not in found:
            outputs = model(feed, past_key_values=past, use_cache=True, return_dict=True)
            past, feed = outputs["past_key_values"], outputs["logits"][:, -1].argmax(-1)[:, None]
            found.append(feed[0, 0])
    return found


def by_dictionaries(flips, looks):
    alive, stopped = {0: 1.0}, np.float64(0)
    for n in range(1, flips * looks + 1):
        more = {}
        for heads, p in alive.items():
            more[heads] = more.get(heads, 0) + p / 2
            more[heads + 1] = more.get(heads + 1, 0) + p / 2
        alive = more
        if n % flips == 0:
            odd = [h for h in alive if abs(2 * h - n) > 1.96 * n**0.5]
            stopped += sum(alive.pop(h) for h in odd)
    return stopped


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("round_in_blocks", with_clamp),
        ("cached_decode", with_other_names),
        ("cache_bytes", lambda *sizes: np.prod([2, *sizes], dtype=np.int64)),
        ("peeking_coin", by_dictionaries),
    ],
)
def test_another_right_answer_passes(name, right):
    check(name, right)


def rounding(weights, bits, block, levels=None, scale=None, safe=True):
    flat = weights.reshape(-1, block)
    largest = scale(flat) if scale else flat.abs().amax(1, keepdim=True)
    step = largest / (levels or 2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, 1.0) if safe else step
    return ((flat / step).round() * step).reshape(weights.shape)


def one_level_too_many(weights, bits, block):
    return rounding(weights, bits, block, levels=2 ** (bits - 1))


def no_care_for_zeros(weights, bits, block):
    return rounding(weights, bits, block, safe=False)


def one_step_for_all(weights, bits, block):
    return rounding(weights, bits, block, scale=lambda flat: flat.abs().max())


def largest_with_its_sign(weights, bits, block):
    return rounding(weights, bits, block, scale=lambda flat: flat.amax(1, keepdim=True))


def in_place(weights, bits, block):
    return weights.copy_(rounding(weights, bits, block))


def decode(model, ids, new_tokens, end, cache=True, keep_end=True, late=False, whole=False):
    found, past, feed = [], None, ids
    for _ in range(new_tokens):
        with torch.no_grad():
            step = model(feed, past_key_values=past, use_cache=cache)
        logits = step.logits[:, :1] if late else step.logits[:, -1:]
        token = logits.argmax(-1)
        if token.item() == end and not keep_end:
            break
        found.append(token.item())
        if token.item() == end:
            break
        past = step.past_key_values if cache else None
        feed = token if cache and not whole else torch.cat([feed, token], dim=1)
    return found


def without_a_cache(*given):
    return decode(*given, cache=False)


def all_tokens_into_the_cache_again(*given):
    return decode(*given, whole=True)


def the_end_left_out(*given):
    return decode(*given, keep_end=False)


def the_end_overlooked(model, ids, new_tokens, end):
    return decode(model, ids, new_tokens, None)


def the_first_position_for_the_last(*given):
    return decode(*given, late=True)


def keys_only(layers, kv_heads, head_width, tokens, rows, bytes_per_value):
    return layers * kv_heads * head_width * tokens * rows * bytes_per_value


def one_row(layers, kv_heads, head_width, tokens, rows, bytes_per_value):
    return 2 * layers * kv_heads * head_width * tokens * bytes_per_value


def always_float32(layers, kv_heads, head_width, tokens, rows, bytes_per_value):
    return 2 * layers * kv_heads * head_width * tokens * rows * 4


def independent_looks(flips, looks):
    return 1 - (1 - by_dictionaries(flips, 1)) ** looks


def only_the_last_look(flips, looks):
    return by_dictionaries(flips * looks, 1)


def nobody_stops(flips, looks):
    return sum(by_dictionaries(flips * look, 1) for look in range(1, looks + 1))


def the_normal_tail(flips, looks):
    return 2 * norm.sf(1.96) if looks == 1 else by_dictionaries(flips, looks)


WRONG = {
    "round_in_blocks": (
        one_level_too_many,
        no_care_for_zeros,
        one_step_for_all,
        largest_with_its_sign,
        in_place,
    ),
    "cached_decode": (
        without_a_cache,
        all_tokens_into_the_cache_again,
        the_end_left_out,
        the_end_overlooked,
        the_first_position_for_the_last,
    ),
    "cache_bytes": (keys_only, one_row, always_float32),
    "peeking_coin": (independent_looks, only_the_last_look, nobody_stops, the_normal_tail),
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, them in WRONG.items() for wrong in them]
)
def test_a_wrong_answer_does_not_pass(name, wrong, capsys):
    with pytest.raises(AssertionError, match=f"{name}: "):
        check(name, wrong)
    assert "BROKEN" in capsys.readouterr().out
