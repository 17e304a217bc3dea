"""Measuring speed: every setting does the same work, and gives the same answers."""

import json

import pytest
from tiny import micro_profile

from common.lab import Lab
from common.models import new_tiny_model
from deploy.inference import (
    at_real_size,
    continuous_batches,
    forward_tokens,
    idle_share,
    percentiles,
    speed,
    static_batches,
)


@pytest.fixture(scope="module")
def lab():
    return Lab(micro_profile(), seed=42)


@pytest.fixture(scope="module")
def model(lab):
    return new_tiny_model(lab.profile, lab.tokenizer).eval()


@pytest.mark.parametrize("use_cache", [True, False])
def test_speed_counts_exactly_the_tokens_asked_for(lab, model, use_cache):
    """2 rows of 5 tokens in a batch: tokens per second times mean seconds is 10, EOS or not."""
    found = speed(model, lab.tokenizer, lab.prompts, 5, batch=2, use_cache=use_cache, runs=1)
    assert found.tokens_per_second * found.latency_p50 == pytest.approx(10)
    assert 0 < found.first_token_p50 <= found.latency_p50 == found.latency_p95


def test_the_cache_is_really_off(lab, model, monkeypatch):
    """Tokens that enter the model: prompt + 3 with the cache; without it prompt, then one more at
    each step.
    """
    prompt, seen = len(lab.tokenizer(lab.prompts[0])["input_ids"]), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for use_cache in (True, False):
        seen.clear()
        speed(model, lab.tokenizer, lab.prompts[:1], 4, use_cache=use_cache, runs=1)
        assert sum(seen) == 2 * forward_tokens(prompt, 4, use_cache)  # the warm-up, and the run
    model._forward_pre_hooks.clear()


def test_forward_tokens_by_hand():
    """Prompt 10, 3 new: 10 + 1 + 1 with the cache, 10 + 11 + 12 without."""
    assert forward_tokens(10, 3, True) == 12 and forward_tokens(10, 3, False) == 33


def test_answers_too_long_for_the_context_are_refused(lab, model):
    with pytest.raises(ValueError, match="within 160"):
        speed(model, lab.tokenizer, lab.prompts, 160)


def test_continuous_batching_answers_as_static_batches_do(lab, model):
    """5 prompts of different lengths, greedy, with room for 3 at a time."""
    prompts = lab.prompts[:5]
    continuous, _ = continuous_batches(model, lab.tokenizer, prompts, 12, rows=3)
    assert continuous == static_batches(model, lab.tokenizer, prompts, 12, batch=2)[0]


def test_percentiles():
    assert percentiles([1.0, 2.0, 3.0]) == {"p50": 2.0, "p95": pytest.approx(2.9), "requests": 3}
    with pytest.raises(ValueError):
        percentiles([])


def test_the_figures_of_a_real_model_are_those_of_its_recorded_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("common.io.evidence.EVIDENCE", tmp_path)
    assert at_real_size("variants") is None and "not measured: variants" in capsys.readouterr().out
    variants = {"float32": {"weight_bytes": 8, "win_rate": {}}, "int8": {"weight_bytes": 2}}
    inference = {"kv_cache": {"8": {"with": 1.0}}, "batches": {"4": {"latency_p50": 2.0}}}
    report = {"smollm": {"variants": variants, "inference": inference}}
    (tmp_path / "deployment.json").write_text(json.dumps(report))
    assert at_real_size("variants").to_dict() == {"weight_bytes": {"float32": 8, "int8": 2}}
    both = at_real_size("kv_cache", "batches")
    assert (
        both.loc[("kv_cache", "8"), "with"] == 1 and both.loc[("batches", "4"), "latency_p50"] == 2
    )


def test_idle_places_by_hand():
    """Batches of 2: answers of 4 and 2 tokens take 8 places, then 3 alone takes 3: 9 of 11 work."""
    assert idle_share([[1] * 4, [1] * 2, [1] * 3], 2) == pytest.approx(2 / 11)
