"""What a step costs: passes, and FLOPs by formula against counted ones."""

import pytest
import tiny
import torch
from tiny import assert_same
from torch.utils.flop_counter import FlopCounterMode

from common import losses
from common.costs import formula_flops, pass_cost, pass_units
from common.data import collate
from common.logprobs import response_logps
from common.profiles import Recipe

RECIPE = Recipe(lr=1e-3, lambda_or=0.5, nll_weight=1.0)


# --- passes


def test_passes_of_each_method():
    """Forward 1, backward 2 an answer: SFT 1 + 2; DPO 2 · (1 + 1 + 2); cached 2 · (1 + 2); ORPO 2 ·
    (1 + 2).
    """
    assert [pass_units(name) for name in ("sft", "dpo", "dpo_cached", "orpo")] == [3, 8, 6, 6]


def test_under_lora_a_backward_pass_costs_one():
    assert [pass_units(name, lora=True) for name in ("sft", "dpo", "dpo_cached", "orpo")] == [
        2,
        6,
        4,
        4,
    ]


def test_orpo_costs_six_elevenths_of_sft_and_dpo_at_equal_epochs():
    assert_same(pass_cost({"orpo": 1}) / pass_cost({"sft": 1, "dpo": 1}), 6 / 11)
    assert_same(pass_cost({"orpo": 3}) / pass_cost({"sft": 3, "dpo": 3}), 6 / 11)


def test_a_cached_reference_is_paid_once_whatever_the_epochs():
    """One epoch: 6 + 2, the same 8 as without; three: 18 + 2 in place of 24."""
    assert [pass_cost({"dpo_cached": times}) for times in (1, 3)] == [8, 20]
    assert [pass_cost({"dpo": times}) for times in (1, 3)] == [8, 24]


# --- FLOPs


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_the_formula_agrees_with_counted_flops_within_3_percent(method):
    """A model much wider than its rows are long, so that attention's own products hardly count.

    Inner weights: 12 · width² a layer; the head: width · vocabulary, for scored tokens only.
    """
    model = tiny.gpt2(torch.float32, width=128)
    reference = tiny.gpt2(torch.float32, width=128)
    sides = ("chosen",) if method == "sft" else ("chosen", "rejected")
    rows = tiny.ragged_rows(8)
    batch = collate(rows, 0, model.device, sides)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            known = response_logps(reference, batch) if method == "dpo" else None
        policy = response_logps(model, batch)
        losses.objective(
            method, RECIPE, policy, known, len(rows), losses.scored_tokens(rows, RECIPE)
        )[0].backward()
    longest = max(
        len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in sides
    )
    scored = sum(len(row[f"{side}_ids"]) for row in rows for side in sides)
    formula = formula_flops(model, method, len(sides) * len(rows) * longest, scored)
    assert abs(formula / counter.get_total_flops() - 1) < 0.03


def test_the_formula_by_hand():
    """Two layers of 12 · 16² weights, a head of 16 · 23; 100 padded tokens, 40 scored; SFT: 2 · 3
    FLOPs a weight.
    """
    expected = 6 * (2 * 12 * 16**2 * 100 + 16 * 23 * 40)
    assert formula_flops(tiny.gpt2(), "sft", 100, 40) == expected
    assert (
        formula_flops(tiny.gpt2(), "dpo", 100, 40) == expected * 8 / 6
    )  # of two answers: 8 in place of 2 · 3
