"""Predicted memory: against what was measured, part by part by hand, and what is said where it does
not fit. Measured memory: by part, and at its peak.
"""

import time
from dataclasses import replace

import psutil
import pytest
import torch
from transformers import GPT2Config, MistralConfig

from common.memory import forecast, meter, simulate
from common.memory.__main__ import main
from common.memory.forecast import FORECAST_METHODS, compare_expected, fit_advice, with_changes
from common.memory.measured import MeasuredSize, _ragged_rows, measure_memory, measure_method
from common.memory.meter import PeakMemory, resident_bytes
from common.memory.simulate import PARTS, full_rows, predict
from common.profiles import PROFILES

VOCABULARY = 1000
# Of the small GPT-2 that memory is measured on:
WIDTH, LAYERS, TOKENS, POSITIONS = 64, 2, 50257, 1024


def profile_of(folder, config, name="gpt2", **changes):
    """A profile whose model is this architecture, in a local folder without weights."""
    config.save_pretrained(folder)
    return with_changes(
        PROFILES[name], model=str(folder), max_length=64, max_new_tokens=16, eval_batch=2, **changes
    )


@pytest.fixture
def small(tmp_path):
    config = GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=2,
        vocab_size=VOCABULARY,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return profile_of(tmp_path, config)


@pytest.fixture
def quantised(tmp_path):
    config = MistralConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    return profile_of(tmp_path, config, "qlora-7b")


@pytest.mark.parametrize(
    ("layers", "width", "pairs", "length", "method", "lora"),
    [
        (4, 256, 4, 192, "orpo", False),
        pytest.param(6, 384, 4, 128, "dpo", False, marks=pytest.mark.more),
        pytest.param(12, 768, 1, 96, "sft", False, marks=pytest.mark.more),
        (6, 384, 4, 128, "dpo", True),
    ],
)
def test_the_prediction_is_within_20_percent_of_the_measurement(
    tmp_path, monkeypatch, layers, width, pairs, length, method, lora
):
    """GPT-2s of 17, 30 and 124 million parameters, trained for two steps in a process of their own
    on the CPU.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # else glibc keeps what was freed
    sizes = {"pairs": pairs, "length": length, "layers": layers, "width": width}
    (measured,) = measure_memory([(method, lora)], **sizes, steps=2)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config.save_pretrained(tmp_path)
    profile = with_changes(
        PROFILES["gpt2"], model=str(tmp_path), nll_on_prompt=False, eval_batch=1, lora=16 * lora
    )
    parts = ("prompt", "chosen") if method == "sft" else ("prompt", "chosen", "rejected")
    rows = [
        [len(row[f"{part}_ids"]) for part in parts] for row in _ragged_rows(pairs, length, 50257)
    ]
    predicted = predict(profile, method, "simple", "float32", "cpu", rows)
    assert predicted.phases["step"] == pytest.approx(measured["peak_bytes"], rel=0.2)


def test_weights_gradients_and_moments_by_hand(small):
    """In float32: 4 bytes per weight, 8 for the two moments, 4 for the reference."""
    forecast = predict(small, "dpo", dtype="float32")
    bytes_of_weights = 4 * forecast.parameters
    assert forecast.parts["weights"] == forecast.parts["reference"] == bytes_of_weights
    assert forecast.parts["optimiser"] == 2 * bytes_of_weights
    assert forecast.parts["LoRA"] == forecast.parts["constants"] == 0
    assert (
        tuple(forecast.parts) == PARTS and sum(forecast.parts.values()) == forecast.phases["step"]
    )


def test_orpo_and_a_cached_reference_need_no_second_model(small):
    cached = with_changes(small, cache_reference=True)
    assert (
        predict(small, "orpo").parts["reference"] == predict(cached, "dpo").parts["reference"] == 0
    )


def test_logits_by_hand(small):
    """At the peak of evaluation the scored tokens of 2 pairs of 32 + 32 + 32 are 128; each has a
    logit per word in float32, and again as log-probabilities: at least 2 · 128 · 1000 · 4 bytes
    over the weights.
    """
    forecast = predict(small, "orpo", dtype="float32")
    assert full_rows(small, 2, 2) == [[32, 32, 32]] * 2
    assert forecast.phases["evaluation"] > 3 * 4 * forecast.parameters + 2 * 128 * VOCABULARY * 4


def test_four_bits_by_hand(quantised):
    """Linear layers: 2 · (128² + 2 · 64 · 128 + 128² + 3 · 128 · 256) weights = 294,912, half a
    byte each; an 8-bit constant per 64, a 32-bit one per 64 · 256. Embeddings and head (2 · 1000 ·
    128) and norms (5 · 128) in float32.
    """
    forecast = predict(quantised, "sft")
    layers, rest = 294_912, 2 * 1000 * 128 + 5 * 128
    assert forecast.parameters == layers + rest
    assert forecast.parts["weights"] == layers // 2 + 4 * rest
    each = [128 * 128, 64 * 128, 64 * 128, 128 * 128, 128 * 256, 128 * 256, 128 * 256]
    assert forecast.parts["constants"] == 2 * sum(n // 64 + 4 * (n // 64 // 256) for n in each)


def test_lora_by_hand(quantised):
    """Rank 16 on each linear layer: 16 · (inputs + outputs) weights in float32. Only they have
    moments: two of 32 bits, or where a matrix has 4096 weights, as 3 in a layer do, two of 8 bits
    with a 32-bit constant per 256 weights.
    """
    forecast = predict(quantised, "dpo")
    each = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
    adapters = 2 * sum(16 * (inputs + outputs) for inputs, outputs in each)
    assert forecast.parts["LoRA"] == 4 * adapters
    large = 2 * 3 * 4096
    assert forecast.parts["optimiser"] == 2 * (4 * (adapters - large) + large + 4 * large // 256)
    assert forecast.parts["reference"] == 0


def test_what_saves_memory_is_seen_to(small):
    """Fewer rows, shorter rows, checkpointing, and prompts that are there once."""
    step = predict(small, "dpo", "simple").phases["step"]
    for change in ({"micro_batch": 1}, {"max_length": 32}, {"gradient_checkpointing": True}):
        assert predict(with_changes(small, **change), "dpo", "simple").phases["step"] < step
    assert predict(small, "dpo", "packed").phases["step"] < step


@pytest.mark.parametrize(("kind", "method"), [("small", "sft"), ("quantised", "dpo")])
def test_a_deep_model_is_predicted_from_shallow_ones(request, monkeypatch, kind, method):
    """Nine layers from 3 and 6 of them: what they are predicted to take when all nine are
    simulated, to 1 %.
    """
    profile = request.getfixturevalue(kind)
    config = simulate._with_layers(simulate.profile_config(profile), 9)
    monkeypatch.setattr(simulate, "profile_config", lambda profile: config)
    found = predict(profile, method)
    plan = simulate._Plan(profile, method, "packed", "bfloat16", "cuda", found.lengths, 64)
    whole = simulate._simulate(plan, config)
    assert found.parameters == whole.parameters
    assert found.parts == pytest.approx(whole.parts, rel=0.01, abs=1e4)
    assert found.phases == pytest.approx(whole.phases, rel=0.01)


def test_a_large_model_is_predicted_without_its_memory(tmp_path):
    """Two layers as wide as Mistral-7B's hold 700 million weights, 2.8 GB: this process does not
    grow by a tenth.
    """
    config = MistralConfig(num_hidden_layers=2, hidden_size=4096, intermediate_size=14336)
    profile, before = profile_of(tmp_path, config), psutil.Process().memory_info().rss
    assert predict(profile, "sft").parts["weights"] > 2.7e9
    assert psutil.Process().memory_info().rss - before < 2.8e8


@pytest.mark.more
def test_the_real_model_fits_a_laptop_of_8_gb():
    """DPO takes most: the full context in every row, the reference beside the policy, and 0.8 GB
    for Python and its libraries.
    """
    forecast = predict(PROFILES["smollm"], "dpo", "packed", "bfloat16", "cpu")
    assert 4e9 < forecast.peak < 8e9 - 0.8e9


def test_where_it_does_not_fit_a_setting_that_helps_is_named(small, monkeypatch):
    """The limit is put between what the profile takes and what it takes with an evaluation of one
    pair at a time.
    """
    large = replace(small, eval_batch=64)
    alone = predict(replace(large, eval_batch=1), "orpo").peak
    monkeypatch.setattr(forecast, "ASIDE_GB", 0.0)
    found = predict(large, "orpo")
    assert found.peak > 1.1 * alone
    said = fit_advice(large, found, 1.05 * alone / 1e9)
    assert "does not fit" in said and "In common/profiles.py set eval_batch=1: " in said
    assert "fits in" in fit_advice(large, found, 1.01 * found.peak / 1e9)


def test_where_nothing_helps_a_smaller_model_is_advised(small):
    said = fit_advice(small, predict(small, "sft"), 0.5)
    assert "Nor with" in said and said.endswith("Take a smaller model.")


def test_the_command_prints_parts_and_verdicts(small, monkeypatch, capsys):
    monkeypatch.setitem(PROFILES, "gpt2", small)
    assert main(["--profile", "gpt2", "--gpu-gb", "16"]) == 0
    said = capsys.readouterr().out
    assert (
        all(f"{method}: fits in 16 GB" in said for method in FORECAST_METHODS)
        and "activations" in said
    )
    assert (
        main(["--profile", "gpt2", "--gpu-gb", "0.9", "--method", "dpo", "--micro-batch", "1"]) == 1
    )
    assert "dpo: does not fit in 0.9 GB" in capsys.readouterr().out


def test_a_model_that_cannot_be_looked_up_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setitem(PROFILES, "gpt2", replace(PROFILES["gpt2"], model="nobody/nothing"))
    assert main(["--profile", "gpt2", "--gpu-gb", "16"]) == 2
    assert capsys.readouterr().err.startswith("error: Could not load 'nobody/nothing'")


def test_a_lab_says_what_it_expects_and_what_it_took(trained_lab, capsys):
    """On a CPU the process has more in it than the step: what it held before is taken off."""
    expected = forecast.expect(trained_lab, "dpo")
    assert "reference" in capsys.readouterr().out
    assert expected.forecast.lengths == forecast.longest_rows(trained_lab, "dpo")
    took = expected.held + 2_000_000_000
    compare_expected(expected, {"peak_memory_bytes": took, "device": "cpu"})
    assert "at most 2.00 GB more" in capsys.readouterr().out
    compare_expected(expected, {"peak_memory_bytes": 1, "device": "cpu"})
    assert "not measured in this process" in capsys.readouterr().out
    took = expected.held + 10**9
    compare_expected(expected, {"peak_memory_bytes": took, "device": "cuda"})
    assert "at most 1.00 GB more" in (said := capsys.readouterr().out) and "CPU" not in said


def test_only_what_can_be_predicted_is(trained_lab):
    with pytest.raises(ValueError, match="predicted for sft, dpo, orpo, not for 'reward'"):
        forecast.expect(trained_lab, "reward")


def test_only_dpo_samples_answers_while_it_trains(small):
    """The others have nothing to compare them with: their table has no figure there."""
    forecasts = [predict(small, method) for method in FORECAST_METHODS]
    assert ["answers" in forecast.phases for forecast in forecasts] == [False, True, False]
    lines = forecast.forecast_table(forecasts).splitlines()
    assert lines[0].endswith("answers") and [line.endswith("–") for line in lines[1:]] == [
        True,
        False,
        True,
    ]


def test_the_longest_micro_batch_is_found(trained_lab):
    rows = forecast.longest_rows(trained_lab, "orpo")
    recipe = trained_lab.profile.recipes["orpo"]
    assert len(rows) == min(recipe.micro_batch, recipe.batch_size) and recipe.path == "packed"
    totals = [
        len(row["prompt_ids"]) + 2 * len(row["chosen_ids"] + row["rejected_ids"])
        for row in trained_lab.train_pairs
    ]
    assert rows[0][0] + 2 * sum(rows[0][1:]) == max(totals)
    assert len(forecast.longest_rows(trained_lab, "sft")[0]) == 2


def test_counting_is_of_storage_and_not_of_views():
    """A view shares its storage: 4000 bytes once; they are gone when the last of the two is."""
    with simulate.FakeTensorMode(), simulate._Count(7) as count:
        whole = torch.empty(1000)
        view = whole[:10]
        assert count.now == 4000
        del whole
        assert count.now == 4000
        del view
        assert count.now == 0 and count.peak == 4000


# --- measured


def measured(method: str, lora: bool = False) -> dict:
    size = MeasuredSize(pairs=1, length=24, layers=LAYERS, width=WIDTH, steps=2)
    return measure_method(method, lora, size)


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
    found, weights = measured(method), weights_by_hand()
    assert found["parameters"] == weights and found["model_copies"] == 1
    assert (found["weights_bytes"], found["gradient_bytes"], found["reference_bytes"]) == (
        4 * weights,
        4 * weights,
        0,
    )
    assert found["optimizer_bytes"] == optimizer_by_hand(weights, TENSORS)


def test_dpo_holds_its_reference_beside_the_same_parts():
    found, weights = measured("dpo"), weights_by_hand()
    assert found["model_copies"] == 2 and found["reference_bytes"] == 4 * weights
    assert (found["weights_bytes"], found["gradient_bytes"]) == (4 * weights, 4 * weights)
    assert found["optimizer_bytes"] == optimizer_by_hand(weights, TENSORS)


def test_under_lora_the_reference_is_free_and_only_adapters_are_learned():
    """Rank 16 on the four matrices of a block, with (in + out) of 4, 2, 5 and 5 widths: 16 · 16 ·
    width a block.
    """
    found, adapters = measured("dpo", lora=True), LAYERS * 16 * 16 * WIDTH
    assert found["model_copies"] == 1 and found["reference_bytes"] == 0
    assert found["weights_bytes"] == 4 * (weights_by_hand() + adapters)
    assert found["gradient_bytes"] == 4 * adapters
    assert found["optimizer_bytes"] == optimizer_by_hand(adapters, 2 * 4 * LAYERS)


def test_the_parts_and_the_rest_make_up_the_peak():
    found = measured("orpo")
    parts = sum(
        found[f"{part}_bytes"] for part in ("weights", "reference", "gradient", "optimizer", "rest")
    )
    assert parts == found["peak_bytes"]
    assert found["step_seconds"] > 0


def memory_seen() -> tuple[PeakMemory, int]:
    """The meter after a block that held 100 MB until they were seen, and what was held before."""
    before, deadline = resident_bytes(), time.monotonic() + 20
    with PeakMemory() as memory:
        held = torch.ones(25_000_000)
        while memory.peak - before < 60e6 and time.monotonic() < deadline:
            pass
        del held
    return memory, before


@pytest.mark.parametrize("kernel_keeps_it", [True, False])
def test_peak_memory_sees_what_a_block_held_and_gave_back(monkeypatch, tmp_path, kernel_keeps_it):
    """100 MB are still in the peak after they were given back; where the kernel keeps no peak, as
    on macOS, a thread looks.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not kernel_keeps_it:
        monkeypatch.setattr(meter, "SELF", tmp_path / "nowhere")
    memory, before = memory_seen()
    assert memory.peak - before > 60e6 and abs(memory.held - before) < 60e6


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
