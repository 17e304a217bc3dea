"""Will it fit? The peak memory of training, predicted part by part.

It needs neither the GPU nor the model's weights, and says which setting to change where it does
not fit. Notebooks call `expect` before they train and `compare_expected` after.
"""

import gc
import json
from dataclasses import dataclass, replace

import psutil
import torch

from common.lab import Lab, stage_of
from common.memory.simulate import PARTS, Forecast, full_rows, predict
from common.profiles import (
    ROOT,
    Profile,
    Recipe,
    device_and_precision,
    gpu_gigabytes,
)

FORECAST_METHODS = ("sft", "dpo", "orpo")
GPU_RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
ASIDE_GB = 1.0  # of a GPU, for the CUDA context and what the allocator cannot use


def fits(forecast: Forecast, gigabytes: float) -> bool:
    return forecast.peak / 1e9 + ASIDE_GB <= gigabytes


def with_changes(profile: Profile, **changes) -> Profile:
    """The profile with other fields; those of a recipe change in all recipes."""
    of_recipe = {
        name: value for name, value in changes.items() if name in Recipe.__dataclass_fields__
    }
    recipes = {name: replace(recipe, **of_recipe) for name, recipe in profile.recipes.items()}
    rest = {name: value for name, value in changes.items() if name not in of_recipe}
    return replace(profile, recipes=recipes, **rest)


def remedies(profile: Profile, method: str) -> list[dict]:
    """Settings that save memory, those first that cost the least quality and time."""
    recipe = profile.recipes[method]
    return [
        {"eval_batch": 1} if profile.eval_batch > 1 else {},
        {"micro_batch": 1} if recipe.micro_batch > 1 else {},
        {"gradient_checkpointing": True} if not profile.gradient_checkpointing else {},
        {"cache_reference": True}
        if method == "dpo" and not recipe.cache_reference and not profile.lora
        else {},
        {"max_length": profile.max_length // 2, "max_new_tokens": profile.max_new_tokens // 2},
        {"lora": 16} if not profile.lora else {},
        {"four_bit": True, "lora": profile.lora or 16} if not profile.four_bit else {},
    ]


def what_would_fit(
    profile: Profile, now: Forecast, gigabytes: float, **options
) -> tuple[dict, Forecast]:
    """Changes of settings that help, added one by one until it fits; and what is then predicted,
    which may not fit.
    """
    changes, lengths = {}, now.lengths
    for remedy in remedies(profile, now.method):
        if fits(now, gigabytes):
            break
        changed = with_changes(profile, **changes | remedy)
        rows = lengths[: changed.recipes[now.method].micro_batch]
        if "max_length" in remedy:
            rows = full_rows(changed, len(rows), len(rows[0]) - 1)
        new = predict(changed, now.method, lengths=rows, **options) if remedy else now
        if new.peak < 0.99 * now.peak:
            changes, now = changes | remedy, new
    return changes, now


def forecast_table(forecasts: list[Forecast]) -> str:
    """Each part at the peak of a training step, and the peaks of the other phases; one line per
    forecast.
    """
    unit, divisor, digits = (
        ("GB", 1e9, 2) if max(each.peak for each in forecasts) >= 1e9 else ("MB", 1e6, 1)
    )
    parts = [part for part in PARTS if any(forecast.parts[part] for forecast in forecasts)]
    heads = [*parts, *max((forecast.phases for forecast in forecasts), key=len)]
    lines = [
        f"{unit + ' at the peak of':20s}"
        + "".join(f"{head:>{max(8, len(head) + 2)}s}" for head in heads)
    ]
    for each in forecasts:
        found = each.parts | each.phases
        sizes = [f"{found[head] / divisor:.{digits}f}" if head in found else "–" for head in heads]
        cells = [
            f"{size:>{max(8, len(head) + 2)}s}" for head, size in zip(heads, sizes, strict=True)
        ]
        lines.append(f"{each.profile + ' ' + each.method:20s}" + "".join(cells))
    return "\n".join(lines)


def fit_advice(profile: Profile, forecast: Forecast, gigabytes: float, **options) -> str:
    """Does it fit, and if not, which setting to change?"""
    aside = f"{forecast.peak / 1e9:.2f} GB and {ASIDE_GB:g} GB set aside"
    if fits(forecast, gigabytes):
        return f"{forecast.method}: fits in {gigabytes:.3g} GB ({aside})"
    changes, then = what_would_fit(profile, forecast, gigabytes, path=forecast.path, **options)
    named = ", ".join(f"{name}={value}" for name, value in changes.items())
    says = f"{forecast.method}: does not fit in {gigabytes:.3g} GB ({aside})."
    if not fits(then, gigabytes):
        return f"{says} Nor with {named or 'other settings'}: {then.peak / 1e9:.2f} GB. Take a smaller model."
    return f"{says} In common/profiles.py set {named}: {then.peak / 1e9:.2f} GB."


def describe(profile: Profile, forecast: Forecast, dtype: str) -> str:
    """What was predicted: model, precision, adapters, lengths."""
    weights = "4-bit weights" if profile.four_bit else "float32 weights"
    tuned = f"LoRA of rank {profile.lora}" if profile.lora else "all weights trained"
    tokens = " + ".join(map(str, forecast.lengths[0]))
    return (
        f"{profile.run_name}: {profile.model}, {forecast.parameters / 1e6:,.1f} million parameters, {weights}, {tuned},"
        f" in {dtype}; micro-batches of {len(forecast.lengths)} × {tokens} tokens, {forecast.path} path"
    )


@dataclass
class Expected:
    """A forecast for a stage of this lab, and what was held when it was made."""

    forecast: Forecast
    held: int  # bytes of the GPU's memory; without one, of this process's resident memory


def longest_rows(lab: Lab, stage: str) -> list[list[int]]:
    """Lengths of the rows that take most, as many as a micro-batch has: [prompt, chosen, …] in
    tokens.
    """
    recipe, sides = lab.profile.recipes[stage], ["chosen", "rejected"]
    rows = lab.demonstrations if stage_of(stage).rows == "demonstrations" else lab.train_pairs
    columns = [
        name
        for name in ("prompt_ids", *(f"{side}_ids" for side in sides))
        if name in rows.column_names
    ]
    lengths = [list(map(len, row)) for row in zip(*(rows[name] for name in columns), strict=True)]
    packed = (
        recipe.path == "packed"
    )  # which keeps every token once; the simple path pads to the longest row
    lengths.sort(
        key=lambda row: sum(row) + sum(row[1:]) if packed else row[0] + max(row[1:]), reverse=True
    )
    return lengths[: min(recipe.micro_batch, recipe.batch_size)]


def expect(lab: Lab, stage: str) -> Expected:
    """Predicts what training a stage takes with the lab's longest rows on this machine, and prints
    it.

    Raises: ValueError for another stage than "sft", "dpo" and "orpo".
    """
    if stage not in FORECAST_METHODS:
        raise ValueError(
            f"Memory is predicted for {', '.join(FORECAST_METHODS)}, not for {stage!r}."
        )
    device, dtype, _ = device_and_precision()
    forecast = predict(
        lab.profile, stage, lab.profile.recipes[stage].path, dtype, device, longest_rows(lab, stage)
    )
    print(describe(lab.profile, forecast, dtype))
    print(forecast_table([forecast]))
    if device == "cuda":
        gc.collect()  # models that are no longer used
        held = torch.cuda.memory_allocated()
        print(f"{held / 1e9:.2f} GB of the GPU are in use already")
        print(
            fit_advice(
                lab.profile, forecast, gpu_gigabytes() - held / 1e9, dtype=dtype, device=device
            )
        )
        return Expected(forecast, held)
    free = psutil.virtual_memory().available / 1e9
    print(
        f"{forecast.peak / 1e9:.2f} GB, beside Python and its libraries; {free:.1f} GB of memory are free"
    )
    return Expected(forecast, psutil.Process().memory_info().rss)


def compare_expected(expected: Expected, record: dict) -> None:
    """Prints the prediction beside what the run took, of which `record` is the `run.json`."""
    more, predicted = record["peak_memory_bytes"] - expected.held, expected.forecast.peak / 1e9
    if more < 0:
        print(f"predicted {predicted:.2f} GB; not measured in this process: the run was reused")
        return
    held = expected.held / 1e9
    print(
        f"predicted {predicted:.2f} GB; {held:.2f} GB were held before, and at most "
        f"{more / 1e9:.2f} GB more were measured"
    )
    if record["device"] == "cpu":
        print(
            "(On a CPU that is the resident memory after each step, with freed memory that the C "
            "library keeps.)"
        )


def measured_peak(forecast: Forecast) -> str:
    """What `python -m benchmarks.gpu` measured for a profile and method, by the course's path; or
    "not measured".
    """
    if not GPU_RESULTS.exists():
        return "not measured"
    results = json.loads(GPU_RESULTS.read_text(encoding="utf-8"))
    part = (
        results["profiles"]
        .get(forecast.profile, {})
        .get("methods", {})
        .get(forecast.method, {"paths": {}})
    )
    found = part["paths"].get(part.get("path"), {})
    return (
        f"{found['peak_bytes'] / 1e9:.2f} GB, {results['gpu']}"
        if "peak_bytes" in found
        else "not measured"
    )
