"""The bars of the benchmarks: what must hold, beside what was measured."""

from math import isnan
from statistics import median

HOLDS = {">=": float.__ge__, "<=": float.__le__}
OURS = ("simple", "packed", "packed_cached")


def worst(values) -> float:
    """The largest, or NaN if one of them is: `max` would pass it over."""
    return max(values, key=lambda value: (isnan(value), value))


def judged(bars: list[tuple]) -> list[dict]:
    """(what, measured, relation, bound) as a dict each, with `met`. NaN meets nothing."""
    return [
        {
            "what": what,
            "measured": float(measured),
            "relation": relation,
            "bound": bound,
            "met": HOLDS[relation](float(measured), float(bound)),
        }
        for what, measured, relation, bound in bars
    ]


def seconds(variant: dict, clock: str, optimizer: bool = False) -> list[float]:
    """Seconds of each repetition up to the gradients; with `optimizer` of the whole step."""
    if not optimizer:
        return variant[clock]
    return [sum(pair) for pair in zip(variant[clock], variant[f"optimizer_{clock}"], strict=True)]


def speed_up(part: dict, name: str, over: str, clock: str) -> float:
    """How many times faster, by medians over the repetitions."""
    return median(seconds(part["variants"][over], clock)) / median(
        seconds(part["variants"][name], clock)
    )


def memory_ratio(part: dict, name: str, over: str, what: str) -> float:
    mine, theirs = (median(part["variants"][which]["memory"][what]) for which in (name, over))
    return mine / theirs


def share_of_matmul(part: dict, name: str, clock: str) -> float:
    """Operations per second up to the gradients over those of the fastest matrix product of the
    same run.
    """
    variant = part["variants"][name]
    return variant["flops"] / median(variant[clock]) / max(part["matmul_speed"])


def step_bars(results: dict) -> list[dict]:
    """What the packed path promises, on a CPU (on a GPU the results are printed without bars)."""
    peak, growth = "peak_bytes", "growth_bytes"
    small, gpt2, clock = results["sizes"]["small"], results["sizes"]["gpt2"], results["clock"]
    dpo, orpo, gpt2_dpo, gpt2_orpo = (
        size["methods"][m] for size in (small, gpt2) for m in ("dpo", "orpo")
    )
    ours = [
        part["variants"][name]["errors"]
        for part in (gpt2_dpo, gpt2_orpo)
        for name in OURS
        if name in part["variants"]
    ]
    exact = worst(errors["float64"][what] for errors in ours for what in ("loss", "gradient"))
    memory = (
        [
            (
                "small, DPO: packed, peak memory over TRL's",
                memory_ratio(dpo, "packed", "trl", peak),
                "<=",
                0.40,
            ),
            (
                "GPT-2, DPO: packed, peak memory over TRL's",
                memory_ratio(gpt2_dpo, "packed", "trl", peak),
                "<=",
                0.60,
            ),
            (
                "small, DPO: packed, growth over TRL's",
                memory_ratio(dpo, "packed", "trl", growth),
                "<=",
                0.20,
            ),
            (
                "GPT-2, DPO: packed, growth over TRL's",
                memory_ratio(gpt2_dpo, "packed", "trl", growth),
                "<=",
                0.28,
            ),
        ]
        if "memory" in dpo["variants"]["packed"]
        else []
    )  # measured on Linux and on a GPU
    return judged(
        [
            *memory,
            (
                "small, DPO: packed, times as fast as TRL",
                speed_up(dpo, "packed", "trl", clock),
                ">=",
                4.5,
            ),
            (
                "small, DPO: packed, times as fast as TRL compact",
                speed_up(dpo, "packed", "trl_compact", clock),
                ">=",
                2.2,
            ),
            (
                "small, DPO: simple, times as fast as TRL",
                speed_up(dpo, "simple", "trl", clock),
                ">=",
                2.5,
            ),
            (
                "small, ORPO: packed, times as fast as TRL",
                speed_up(orpo, "packed", "trl", clock),
                ">=",
                2.8,
            ),
            (
                "GPT-2, DPO: packed, times as fast as TRL",
                speed_up(gpt2_dpo, "packed", "trl", clock),
                ">=",
                3.5,
            ),
            (
                "GPT-2, ORPO: packed, times as fast as TRL",
                speed_up(gpt2_orpo, "packed", "trl", clock),
                ">=",
                2.0,
            ),
            (
                "GPT-2, DPO: packed, share of the matmul peak",
                share_of_matmul(gpt2_dpo, "packed", clock),
                ">=",
                0.65,
            ),
            (
                "GPT-2, ORPO: packed, share of the matmul peak",
                share_of_matmul(gpt2_orpo, "packed", clock),
                ">=",
                0.65,
            ),
            ("GPT-2, ours in float64: largest error of loss and gradient", exact, "<=", 1e-12),
            (
                "GPT-2, LoRA in float64, adapter off as reference: error",
                worst(gpt2["lora_errors"].values()),
                "<=",
                1e-12,
            ),
            (
                "GPT-2, ours in float32: error of the gradient",
                worst(e["float32"]["gradient"] for e in ours),
                "<=",
                2e-6,
            ),
        ]
    )
