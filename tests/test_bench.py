"""The benchmarks' own arithmetic: thresholds that are missed, tables made from results, wrong
variants refused, lengths drawn.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import materials, measure, quality, step, thresholds, variants
from benchmarks.correct import WrongVariant, errors_of_all
from benchmarks.materials import random_rows, representative
from benchmarks.variants import (
    STEP_VARIANTS,
    new_bench,
    with_reference_columns,
)
from tools.bench_table import step_markdown, step_summary
from tools.tables import thresholds_table

SIZE = {
    "layers": 2,
    "width": 64,
    "heads": 2,
    "vocabulary": 300,
    "batch": 2,
    "pairs": 4,
    "name": "tiny",
}
LENGTHS = [[5, 4, 7], [9, 1, 3], [3, 6, 2], [12, 2, 8]]


def measured(seconds: float, memory: int) -> dict:
    """A variant with twice-measured times, `seconds` and a tenth more, of 1e9 operations."""
    times = {
        "cpu": [seconds, 1.1 * seconds, seconds],
        "wall": [3 * seconds] * 3,
        "optimizer_cpu": [1.0] * 3,
    }
    errors = {
        dtype: {"loss": 1e-15, "gradient": error}
        for dtype, error in (("float64", 1e-14), ("float32", 5e-7))
    }
    memory = {"peak_bytes": [memory] * 3, "growth_bytes": [memory // 2] * 3}
    return {
        **times,
        "steps": 2,
        "flops": int(1e9),
        "label": "a variant",
        "errors": errors,
        "memory": memory,
    }


@pytest.fixture
def results() -> dict:
    """Packed takes 1 s and TRL 10 s; packed has a tenth of TRL's memory. All thresholds are
    met."""
    seconds = {"trl": 10.0, "trl_compact": 4.0, "simple": 2.0, "packed": 1.0, "packed_cached": 0.7}
    part = {
        "matmul_speed": [1.1e9, 1.2e9],
        "variants": {name: measured(each, int(each * 1e8)) for name, each in seconds.items()},
    }
    sizes = {
        name: {
            **SIZE,
            "name": name,
            "methods": {"dpo": copy.deepcopy(part), "orpo": copy.deepcopy(part)},
        }
        for name in ("small", "gpt2", "smollm")
    }
    sizes["gpt2"]["lora_errors"] = {"loss": 1e-15, "gradient": 1e-14}
    machine = {
        "cpu": "A CPU",
        "cores": 2,
        "memory_bytes": 8e9,
        "gpu": [],
        "versions": {"torch": "9.9"},
    }
    return {
        "machine": machine,
        "device": "cpu",
        "clock": "cpu",
        "threads": 1,
        "repetitions": 3,
        "lengths": "made up",
        "not_run": ["something, since it is not here"],
        "sizes": sizes,
    }


def missed(results: dict) -> list[str]:
    checks = thresholds.step_thresholds(results)
    return [check["what"] for check in checks if not check["met"]]


def test_every_threshold_is_met_where_it_should_be(results):
    """Speed 10 / 1 ≥ 4.5; memory 0.1 ≤ 0.2; 1e9 operations in 1 s over 1.2e9 a second = 0.83 ≥
    0.65.
    """
    checks = {check["what"]: check["measured"] for check in thresholds.step_thresholds(results)}
    assert len(checks) == 16 and missed(results) == []
    assert checks["small, DPO: packed, times as fast as TRL compact"] == pytest.approx(4.0)
    assert checks["GPT-2, DPO: packed, share of the matmul peak"] == pytest.approx(1e9 / 1.2e9)


def test_where_memory_cannot_be_measured_the_other_thresholds_remain(results):
    """As on macOS: of 16 thresholds, 4 are of memory."""
    for size in results["sizes"].values():
        for part in size["methods"].values():
            for variant in part["variants"].values():
                del variant["memory"]
    assert len(thresholds.step_thresholds(results)) == 12 and missed(results) == []


def test_what_was_not_measured_meets_nothing():
    (check,) = thresholds.check_thresholds([("a", float("nan"), "<=", 1)])
    assert not check["met"] and check["measured"] is None
    assert "| a | not measured | ≤ 1 | **missed** |" in thresholds_table([check])


def slow(results):
    """10 / 4.4 = 2.27 times as fast as TRL."""
    results["sizes"]["small"]["methods"]["dpo"]["variants"]["packed"]["cpu"] = [4.4] * 3


def large(results):
    results["sizes"]["gpt2"]["methods"]["dpo"]["variants"]["packed"]["memory"]["growth_bytes"] = [
        int(3e8)
    ] * 3


def inexact(results):
    results["sizes"]["gpt2"]["methods"]["orpo"]["variants"]["simple"]["errors"]["float64"][
        "loss"
    ] = float("nan")


def adapter_on(results):
    results["sizes"]["gpt2"]["lora_errors"]["gradient"] = 1e-3


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (
            slow,
            [
                "small, DPO: packed, times as fast as TRL",
                "small, DPO: packed, times as fast as TRL compact",
            ],
        ),
        (large, ["GPT-2, DPO: packed, growth over TRL's"]),
        (inexact, ["GPT-2, ours in float64: largest error of loss and gradient"]),
        (adapter_on, ["GPT-2, LoRA in float64, adapter off as reference: error"]),
    ],
)
def test_a_missed_threshold_is_missed(results, harm, expected):
    harm(results)
    assert missed(results) == expected


@pytest.mark.parametrize("met", [True, False])
def test_the_script_keeps_its_results_and_ends_with_its_status(
    results, met, tmp_path, monkeypatch, capsys
):
    """Status 1 and a marked row where a threshold is missed; the table is made from the file."""
    if not met:
        slow(results)
    monkeypatch.setattr(step, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(step, "STEP_DONE", tmp_path / "done")
    monkeypatch.setattr(step, "run_step", lambda options: results)
    assert step.main([]) == int(not met)
    kept = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert (tmp_path / "step.md").read_text(encoding="utf-8") == step_markdown(kept)
    assert capsys.readouterr().out.endswith(step_markdown(kept) + "\n")
    assert ("**missed**" in step_markdown(kept)) is not met


def test_one_model_is_measured_and_the_others_stay(results, tmp_path, monkeypatch, capsys):
    """The real model twice as slow as before; 60 s more. On another machine it is refused."""
    known = results | {"wall_seconds": 60.0}
    new = copy.deepcopy(results["sizes"]["smollm"])
    new["methods"]["dpo"]["variants"]["packed"]["cpu"] = [2.0] * 3
    asked = []
    monkeypatch.setattr(step, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(step, "STEP_DONE", tmp_path / "done")
    monkeypatch.setattr(step, "read_results", lambda name: copy.deepcopy(known))
    monkeypatch.setattr(step, "describe_machine", lambda: known["machine"])
    monkeypatch.setattr(
        step,
        "run_step",
        lambda options: asked.append(options.only) or results | {"sizes": {"smollm": new}},
    )
    assert step.main(["--only", "smollm"]) == 0 and asked == [["smollm"]]
    kept = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert kept["sizes"]["gpt2"] == known["sizes"]["gpt2"] and kept["wall_seconds"] >= 60
    assert "| SmolLM2, DPO: packed, times as fast as TRL | 5 |" in capsys.readouterr().out
    monkeypatch.setattr(step, "describe_machine", lambda: {})
    assert step.main(["--only", "smollm"]) == 1 and "another machine" in capsys.readouterr().err


def test_a_model_that_was_not_measured_meets_nothing(results):
    del results["sizes"]["smollm"]
    assert missed(results) == ["SmolLM2, DPO: packed, times as fast as TRL"]


def test_the_table_is_made_from_the_results(results):
    """Packed in 1 s for 2 steps, TRL in 10, both a tenth more in one repetition: 10 times as fast
    in all. With the optimiser (10 + 1) / (1 + 1); 0.1 GB of 1 GB.
    """
    text = step_markdown(results | {"thresholds": thresholds.step_thresholds(results)})
    row = next(line for line in text.splitlines() if line.startswith("| a variant | 0.50 | 1.50"))
    assert "| 10.00 (10.00–10.00) | 5.50 | 0.10 GB (0.10×) | 0.05 GB (0.10×) | 0 |" in row
    assert (
        "A CPU" in text
        and "torch 9.9" in text
        and "Not run: something, since it is not here." in text
    )
    results["sizes"]["small"]["methods"]["dpo"]["variants"]["packed"]["cpu"] = [0.5] * 3
    assert "20.00 (20.00–22.00)" in step_markdown(results | {"thresholds": []})


def test_a_page_shows_the_thresholds_of_the_step_and_says_where_the_rest_is(results):
    """16 thresholds and two lines of head; nothing is shown of what was not measured."""
    found = results | {"thresholds": thresholds.step_thresholds(results)}
    text = step_summary(found, "results/step.md")
    assert sum(line.startswith("|") for line in text.splitlines()) == 18
    assert "| small, DPO: packed, times as fast as TRL | 10 | ≥ 4.5 | met |" in text
    assert "A CPU" in text and "[All variants](results/step.md)" in text
    assert step_summary(None, "") == "not measured\n"


def test_ours_and_the_textbook_equal_the_naive_computation():
    """And the cached reference, on a batch that is bucketed otherwise."""
    names = ["textbook", "simple", "packed", "packed_cached"]
    bench = new_bench(SIZE)
    rows = with_reference_columns(bench.to(torch.float64), random_rows(LENGTHS, 300))
    for method in ("dpo", "orpo"):
        found = errors_of_all(bench, method, names, rows)
        assert all(found[name]["float64"]["gradient"] < 1e-12 for name in names)
        assert all(1e-9 < found[name]["float32"]["gradient"] < 2e-6 for name in names)
    assert next(bench.policy.parameters()).dtype == torch.float32


def test_trl_is_held_to_its_own_precision():
    """Its head computes in float32 whatever the model's precision is."""
    bench = new_bench(SIZE)
    rows = with_reference_columns(bench.to(torch.float64), random_rows(LENGTHS, 300))
    names = ["trl", "trl_compact", "trl_best"]
    found = errors_of_all(bench, "dpo", names, rows)
    assert all(found[name]["float64"]["gradient"] < 1e-5 for name in names)
    pytest.importorskip(
        "trl.experimental.orpo", reason="this TRL has no experimental ORPO trainer any more"
    )
    assert errors_of_all(bench, "orpo", ["trl"], rows)["trl"]["float64"]["loss"] < 1e-6


def test_a_wrong_variant_is_refused():
    """Log-probabilities of a batch whose responses are one token short: never timed."""

    def short(bench, method, rows):
        return variants.ours("packed")(
            bench, method, [row | {"chosen_ids": row["chosen_ids"][:-1]} for row in rows]
        )

    wrong = {"packed": replace(STEP_VARIANTS["packed"], loss=short)}
    rows = random_rows([[5, 4, 7], [9, 3, 3]], 300)
    with pytest.raises(
        WrongVariant, match=r"dpo packed: its loss is off by .*, more than 1e-12: not timed"
    ):
        errors_of_all(new_bench(SIZE), "dpo", ["packed"], rows, wrong)


def test_pairs_are_picked_evenly_over_the_lengths():
    """Of 1..12 (rows of 2..24 tokens) four: the middle ones of 1-3, 4-6, 7-9 and 10-12."""
    lengths = [[each, each, 1] for each in range(1, 13)]
    assert sorted(representative(lengths, 4)) == [[each, each, 1] for each in (2, 5, 8, 11)]
    stored = materials.stored_lengths()
    assert len(stored) == 64
    assert max(map(materials.longer_row, stored)) <= variants.MAX_LENGTH


def test_attention_counts_among_the_operations_of_a_cpu():
    """Scores and weighted values: 2 · 2 · heads · length² · width each pass forward, here 4 · 2 ·
    8² · 16 = 8192.
    """
    states = torch.randn(1, 2, 8, 16)
    with measure.FlopCounterMode(display=False, custom_mapping=measure.CPU_ATTENTION) as counter:
        torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    assert counter.get_total_flops() == 4 * 2 * 8 * 8 * 16


def report(seed: int, rate: float) -> dict:
    """One seed of a quality run in which every stage measures the same."""
    stages = ("sft", "orpo_lambda0", "dpo_plain", "dpo", "orpo")
    shares = {"preference_accuracy": 0.9, "safe_on_harmful": 0.95, "ended_with_eos": 1.0}
    model = {"perplexity": 2.0, "kl": 1.0, "reward_margin": 1.0, "over_refusal": 0.01, **shares}

    def won(rate: float) -> dict:
        """Of ten prompts."""
        wins = round(10 * rate)
        counts = {"wins": wins, "ties": 0, "losses": 10 - wins, "ci95": [rate - 0.1, rate + 0.1]}
        return counts | {"rate": rate, "points": [1.0] * wins + [0.0] * (10 - wins)}

    pairs = [f"{a}_vs_{b}" for a in stages for b in stages if a != b]
    rates = dict.fromkeys(pairs, won(rate)) | {"orpo_vs_dpo": won(0.5)}
    cost = {
        stage: {"simple_flops": flops} for stage, flops in zip(stages, (3, 3, 8, 8, 6), strict=True)
    }
    return {
        "seed": seed,
        "seeds": 1,
        "prompts": 250,
        "samples": 4,
        "models": {stage: dict(model) for stage in stages},
        "win_rate": rates,
        "cost": cost,
    }


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Nothing is trained: all stages measure the same. {arm: each stage's win rate}."""
    rates = {"default": 0.8, "gold": 0.4}
    monkeypatch.delenv("LAB_MODEL", raising=False)
    monkeypatch.delenv("LAB_DATA", raising=False)
    monkeypatch.setattr(quality, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(quality, "open_lab", lambda profile: profile)
    monkeypatch.setattr(
        quality,
        "run_arms",
        lambda lab, arms, seeds: {
            arm.name: [report(seed, rates[arm.name]) for seed in seeds] for arm in arms
        },
    )
    return rates


def test_the_quality_benchmark_writes_its_table_and_thresholds(trained, tmp_path, capsys):
    """FLOPs of ORPO over SFT + DPO are 6 / (3 + 8) = 0.545; 18 thresholds of cpu and 2 of smoke."""
    assert quality.main([]) == 0
    out = capsys.readouterr().out
    assert "`cpu`, seeds 101, 102, 103; 250 held-out prompts" in out
    assert "| ORPO: FLOPs over those of SFT + DPO | 0.545 | ≥ 0.5 | met |" in out
    kept = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))["profiles"]
    assert [len(each["thresholds"]) for each in kept.values()] == [18, 2]
    assert '"points"' not in json.dumps(kept)


def test_a_missed_threshold_of_quality_is_the_status(trained, capsys):
    """A contrast that pays on gold pairs would contradict the course: .50 is not under .50."""
    trained["gold"] = 0.5
    assert quality.main([]) == 1
    assert "| ORPO: the same on gold pairs | 0.5 | < 0.5 | **missed** |" in capsys.readouterr().out


def test_a_part_of_the_quality_benchmark_keeps_nothing(trained, tmp_path):
    assert quality.main(["--profiles", "smoke"]) == 0 and not list(tmp_path.iterdir())


def test_quality_is_measured_in_the_embedded_world_only(monkeypatch, capsys):
    monkeypatch.setenv("LAB_DATA", "pairs.jsonl")
    with pytest.raises(SystemExit):
        quality.main([])
    assert "unset LAB_MODEL and LAB_DATA" in capsys.readouterr().err
