"""The benchmarks' own arithmetic: bars that fail, tables made from results, wrong variants refused,
lengths drawn.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import bars, measure, scaling, step, variants
from benchmarks.correct import WrongVariant, errors_of_all
from benchmarks.variants import VARIANTS, new_bench, random_rows, spread, with_reference_columns
from tools.bench_table import scaling_markdown, step_markdown, step_summary

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
    """Packed takes 1 s and TRL 10 s; packed has a tenth of TRL's memory. All bars are met."""
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
        for name in ("small", "gpt2")
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
    return [bar["what"] for bar in bars.step_bars(results) if not bar["met"]]


def test_every_bar_is_met_where_it_should_be(results):
    """Speed 10 / 1 ≥ 4.5; memory 0.1 ≤ 0.2; 1e9 operations in 1 s over 1.2e9 a second = 0.83 ≥
    0.65.
    """
    assert len(bars.step_bars(results)) == 15 and missed(results) == []
    share = bars.share_of_matmul(results["sizes"]["gpt2"]["methods"]["dpo"], "packed", "cpu")
    assert share == pytest.approx(1e9 / 1.0 / 1.2e9)


def test_where_memory_cannot_be_measured_the_other_bars_remain(results):
    """As on macOS: 15 bars, 4 of them of memory."""
    for size in results["sizes"].values():
        for part in size["methods"].values():
            for variant in part["variants"].values():
                del variant["memory"]
    assert len(bars.step_bars(results)) == 11 and missed(results) == []


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
def test_a_missed_bar_is_missed(results, harm, expected):
    harm(results)
    assert missed(results) == expected


@pytest.mark.parametrize("met", [True, False])
def test_the_script_keeps_its_results_and_ends_with_the_verdict(
    results, met, tmp_path, monkeypatch, capsys
):
    """Status 1 and a marked row where a bar is missed; the file holds what the table was made from."""
    if not met:
        slow(results)
    monkeypatch.setattr(step, "RESULTS", tmp_path / "step.json")
    monkeypatch.setattr(step, "run", lambda options: results)
    assert step.main([]) == int(not met)
    kept = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert (tmp_path / "step.md").read_text(encoding="utf-8") == step_markdown(kept)
    assert capsys.readouterr().out.endswith(step_markdown(kept) + "\n")
    assert ("**missed**" in step_markdown(kept)) is not met


def test_the_table_is_made_from_the_results(results):
    """Packed in 1 s for 2 steps, TRL in 10, both a tenth more in one repetition: 10 times as fast
    in all. With the optimiser (10 + 1) / (1 + 1); 0.1 GB of 1 GB.
    """
    text = step_markdown(results | {"bars": bars.step_bars(results)})
    row = next(line for line in text.splitlines() if line.startswith("| a variant | 0.50 | 1.50"))
    assert "| 10.00 (10.00–10.00) | 5.50 | 0.10 GB (0.10×) | 0.05 GB (0.10×) | 0 |" in row
    assert (
        "A CPU" in text
        and "torch 9.9" in text
        and "Not run: something, since it is not here." in text
    )
    results["sizes"]["small"]["methods"]["dpo"]["variants"]["packed"]["cpu"] = [0.5] * 3
    assert "20.00 (20.00–22.00)" in step_markdown(results | {"bars": []})


def test_the_readme_shows_the_bars_of_the_step_and_says_where_the_rest_is(results):
    """15 bars and two lines of head; nothing is shown of what was not measured."""
    text = step_summary(results | {"bars": bars.step_bars(results)})
    assert sum(line.startswith("|") for line in text.splitlines()) == 17
    assert "| small, DPO: packed, times as fast as TRL | 10 | ≥ 4.5 | met |" in text
    assert "A CPU" in text and "[All variants](benchmarks/results/step.md)" in text
    assert step_summary(None) == "not measured\n" and step_summary(None, "zh") == "未測量\n"


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

    wrong = {"packed": replace(VARIANTS["packed"], loss=short)}
    rows = random_rows([[5, 4, 7], [9, 3, 3]], 300)
    with pytest.raises(
        WrongVariant, match=r"dpo packed: its loss is off by .*, more than 1e-12: not timed"
    ):
        errors_of_all(new_bench(SIZE), "dpo", ["packed"], rows, wrong)


def test_pairs_are_spread_over_the_lengths(monkeypatch):
    """Of 1..12 (rows of 2..24 tokens) four: the middle ones of 1-3, 4-6, 7-9 and 10-12."""
    lengths = [[each, each, 1] for each in range(1, 13)]
    assert sorted(spread(lengths, 4)) == [[each, each, 1] for each in (2, 5, 8, 11)]
    monkeypatch.setattr(variants, "sample_file", lambda: None)
    stored, source = variants.pair_lengths()
    assert (
        len(stored) == 64
        and max(map(variants.row_length, stored)) <= variants.MAX_LENGTH
        and "hh_lengths" in source
    )


def growing(power: float) -> dict:
    values = [2, 4, 8, 16]
    found = {
        "seconds": [value**power for value in values],
        "growth_bytes": [1e6 * (1 + value) for value in values],
    }
    found |= {
        f"{what}_exponent": scaling.exponent(values, found[kind])
        for what, kind in (("time", "seconds"), ("memory", "growth_bytes"))
    }
    return {
        "axes": {"pairs": {"values": values, **dict.fromkeys(scaling.NAMES, found)}},
        "base": scaling.BASE,
    }


def test_scaling_misses_its_bar_where_time_is_quadratic():
    """Memory with a fixed part is on a line, with an exponent below 1. 4 · 2 · 28672 · 448 bytes
    are one matrix.
    """
    matrix = 4 * 2 * (32768 - 4096) * (512 - 64)
    growths = [10, 30, 50, 70 + 3 * matrix]  # 3 matrices where both are large
    for power, expected in ((1.0, [True] * 4), (2.0, [False, False, True, True])):
        results = growing(power)
        assert results["axes"]["pairs"]["packed"]["time_exponent"] == pytest.approx(power)
        assert [bar["met"] for bar in scaling.scaling_bars(results)] == expected
    assert scaling.interaction(growths, 2) == pytest.approx(3)
    results["interaction"] = {"packed": scaling.interaction(growths, 2)}
    results["bars"] = scaling.scaling_bars(results)
    assert not results["bars"][-1]["met"]
    assert "| time, packed | 2.00 |" in scaling_markdown(
        results
    ) and "**missed**" in scaling_markdown(results)
    assert len(scaling.figure(results).axes) == 2


def test_attention_counts_among_the_operations_of_a_cpu():
    """Scores and weighted values: 2 · 2 · heads · length² · width each pass forward, here 4 · 2 ·
    8² · 16 = 8192.
    """
    states = torch.randn(1, 2, 8, 16)
    with measure.FlopCounterMode(display=False, custom_mapping=measure.CPU_ATTENTION) as counter:
        torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    assert counter.get_total_flops() == 4 * 2 * 8 * 8 * 16
