"""What a step costs: passes, FLOPs by formula against counted ones, and memory by part."""

import time

import pytest
import tiny
import torch
from tiny import assert_same
from torch.utils.flop_counter import FlopCounterMode

from common import costs, losses
from common.costs import formula_flops, measure_memory, measure_method, pass_cost, pass_units
from common.data import collate
from common.logprobs import response_logps
from common.profiles import Recipe

RECIPE = Recipe(lr=1e-3, lambda_or=0.5, nll_weight=1.0)
WIDTH, LAYERS, TOKENS, POSITIONS = (
    64,
    2,
    50257,
    1024,
)  # of the small GPT-2 that memory is measured on


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


# --- memory


def small(method: str, lora: bool = False) -> dict:
    return measure_method(method, lora, pairs=1, length=24, layers=LAYERS, width=WIDTH, steps=2)


def weights_by_hand() -> int:
    """Embeddings; a block: 12 · width² weights, 13 · width biases and norms; the last norm."""
    block = 12 * WIDTH**2 + 13 * WIDTH
    return (TOKENS + POSITIONS) * WIDTH + LAYERS * block + 2 * WIDTH


def optimizer_by_hand(weights: int, tensors: int) -> int:
    """AdamW: two moments of 4 bytes a weight, and a step counter of 4 bytes a tensor."""
    return 8 * weights + 4 * tensors


TENSORS = 2 + 12 * LAYERS + 2  # two embeddings, 12 a block, the last norm


@pytest.mark.parametrize("method", ["sft", "dpo_cached", "orpo"])
def test_full_fine_tuning_holds_weights_gradients_and_two_moments(method):
    found, weights = small(method), weights_by_hand()
    assert found["parameters"] == weights and found["model_copies"] == 1
    assert (found["weights_bytes"], found["gradient_bytes"], found["reference_bytes"]) == (
        4 * weights,
        4 * weights,
        0,
    )
    assert found["optimizer_bytes"] == optimizer_by_hand(weights, TENSORS)


def test_dpo_holds_its_reference_beside_the_same_parts():
    found, weights = small("dpo"), weights_by_hand()
    assert found["model_copies"] == 2 and found["reference_bytes"] == 4 * weights
    assert (found["weights_bytes"], found["gradient_bytes"]) == (4 * weights, 4 * weights)
    assert found["optimizer_bytes"] == optimizer_by_hand(weights, TENSORS)


def test_under_lora_the_reference_is_free_and_only_adapters_are_learned():
    """Rank 16 on the four matrices of a block, with (in + out) of 4, 2, 5 and 5 widths: 16 · 16 ·
    width a block.
    """
    found, adapters = small("dpo", lora=True), LAYERS * 16 * 16 * WIDTH
    assert found["model_copies"] == 1 and found["reference_bytes"] == 0
    assert found["weights_bytes"] == 4 * (weights_by_hand() + adapters)
    assert found["gradient_bytes"] == 4 * adapters
    assert found["optimizer_bytes"] == optimizer_by_hand(adapters, 2 * 4 * LAYERS)


def test_the_parts_and_the_rest_make_up_the_peak():
    found = small("orpo")
    parts = sum(
        found[f"{part}_bytes"] for part in ("weights", "reference", "gradient", "optimizer", "rest")
    )
    assert parts == found["peak_bytes"]
    assert found["step_seconds"] > 0


def test_peak_memory_sees_what_a_block_held_and_gave_back(monkeypatch):
    """100 MB, held until they were seen (a busy machine takes a while), are still in the peak when
    given back.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before, deadline = costs._resident(), time.monotonic() + 20
    with costs.PeakMemory() as memory:
        held = torch.ones(25_000_000)
        while memory.peak - before < 60e6 and time.monotonic() < deadline:
            time.sleep(0.002)
        del held
    assert memory.peak - before > 60e6


def test_a_method_is_measured_in_a_process_of_its_own():
    """What this process holds is not counted: the child's peak is little more than its parts."""
    held, seen = torch.ones(100_000_000), []  # 400 MB
    sizes = {"pairs": 1, "length": 24, "layers": LAYERS, "width": 128, "steps": 2}
    (dpo,) = measure_memory(
        [("dpo", False)], **sizes, progress=lambda jobs: seen.extend(jobs) or jobs
    )
    assert (dpo["method"], dpo["model_copies"], dpo["width"]) == ("dpo", 2, 128) and seen == [
        ("dpo", False)
    ]
    assert dpo["reference_bytes"] == dpo["weights_bytes"] > 25e6
    assert 0.5 * dpo["reference_bytes"] < dpo["peak_bytes"] < held.nbytes


def test_an_error_of_the_child_says_what_went_wrong():
    """Three heads do not divide a width of 200: the model's own check refuses it."""
    with pytest.raises(
        RuntimeError, match=r"Measuring sft, LoRA False, ended with 1: ValueError: .*200"
    ):
        measure_memory([("sft", False)], pairs=1, length=24, layers=1, width=200, steps=1)
