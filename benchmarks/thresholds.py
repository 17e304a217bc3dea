"""What must hold of the benchmarks' results: measured values beside their thresholds."""

from math import isnan
from statistics import median

RELATIONS = {">=": float.__ge__, "<=": float.__le__, "<": float.__lt__}
TITLES = {"gpt2": "GPT-2", "smollm": "SmolLM2", "trl": "TRL", "trl_compact": "TRL compact"}
OURS = ("simple", "packed", "packed_cached")
MEMORY_RATIOS = (  # DPO: model, what of memory, packed over TRL at most
    ("small", "peak", 0.40),
    ("gpt2", "peak", 0.60),
    ("small", "growth", 0.20),
    ("gpt2", "growth", 0.28),
)
SPEED_UPS = (  # model, method, variant, slower variant, times as fast at least
    ("small", "dpo", "packed", "trl", 4.5),
    ("small", "dpo", "packed", "trl_compact", 2.2),
    ("small", "dpo", "simple", "trl", 2.5),
    ("small", "orpo", "packed", "trl", 2.8),
    ("gpt2", "dpo", "packed", "trl", 3.5),
    ("gpt2", "orpo", "packed", "trl", 2.0),
    ("smollm", "dpo", "packed", "trl", 3.5),
)
MATMUL_SHARE = 0.65  # of the fastest matrix product's speed


def check_thresholds(limits: list[tuple]) -> list[dict]:
    """(what, measured, relation, bound) as a dict each, with `met`.

    NaN, which stands for what was not measured, meets nothing and becomes None.
    """
    return [
        {
            "what": what,
            "measured": None if isnan(measured) else float(measured),
            "relation": relation,
            "bound": float(bound),
            "met": RELATIONS[relation](float(measured), float(bound)),
        }
        for what, measured, relation, bound in limits
    ]


def _worst(values) -> float:
    """The largest, or NaN if one of them is NaN: `max` would pass it over."""
    return max(values, key=lambda value: (isnan(value), value))


def matmul_share(part: dict, name: str, clock: str) -> float:
    """Operations per second up to the gradients over those of the run's fastest matrix product."""
    variant = part["variants"][name]
    return variant["flops"] / median(variant[clock]) / max(part["matmul_speed"])


def step_thresholds(results: dict) -> list[dict]:
    """What the packed path promises on a CPU. Memory is left out where it was not measured; any
    other part that was not measured meets nothing.
    """
    sizes, clock = results["sizes"], results["clock"]
    limits = []
    for size, what, bound in MEMORY_RATIOS:
        variants = sizes[size]["methods"]["dpo"]["variants"] if size in sizes else {"packed": {}}
        if "memory" in variants["packed"]:
            mine, theirs = (
                median(variants[name]["memory"][f"{what}_bytes"]) for name in ("packed", "trl")
            )
            named = {"peak": "peak memory", "growth": "growth"}[what]
            title = f"{TITLES.get(size, size)}, DPO: packed, {named} over TRL's"
            limits.append((title, mine / theirs, "<=", bound))
    for size, method, name, over, bound in SPEED_UPS:
        title = (
            f"{TITLES.get(size, size)}, {method.upper()}: {name}, times as fast as {TITLES[over]}"
        )
        measured = float("nan")
        if size in sizes:
            variants = sizes[size]["methods"][method]["variants"]
            measured = median(variants[over][clock]) / median(variants[name][clock])
        limits.append((title, measured, ">=", bound))
    if "gpt2" not in sizes:
        return check_thresholds(limits)
    errors, gpt2 = [], sizes["gpt2"]
    for method, part in gpt2["methods"].items():
        title = f"GPT-2, {method.upper()}: packed, share of the matmul peak"
        limits.append((title, matmul_share(part, "packed", clock), ">=", MATMUL_SHARE))
        variants = part["variants"]
        errors += [variants[name]["errors"] for name in OURS if name in variants]
    exact = [each["float64"][what] for each in errors for what in ("loss", "gradient")]
    single = [each["float32"]["gradient"] for each in errors]
    title = "GPT-2, ours in float64: largest error of loss and gradient"
    limits.append((title, _worst(exact), "<=", 1e-12))
    title = "GPT-2, LoRA in float64, adapter off as reference: error"
    limits.append((title, _worst(gpt2["lora_errors"].values()), "<=", 1e-12))
    title = "GPT-2, ours in float32: error of the gradient"
    limits.append((title, _worst(single), "<=", 2e-6))
    return check_thresholds(limits)
