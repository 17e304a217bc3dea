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
from common.memory.meter import resident_bytes
from common.memory.simulate import PARTS, Forecast, full_rows, predict
from common.profiles import ROOT, Profile, Recipe, device_and_precision, gpu_gigabytes

FORECAST_METHODS = ("sft", "dpo", "orpo")
GPU_RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
ASIDE_GB = 1.0  # of a GPU, for the CUDA context and what the allocator cannot use


def fits(forecast: Forecast, gigabytes: float) -> bool:
    return forecast.peak / 1e9 + ASIDE_GB <= gigabytes


def with_changes(profile: Profile, **changes) -> Profile:
    """The profile with other fields; those of a recipe change in all recipes."""
    own = {name: changes.pop(name) for name in Recipe.__dataclass_fields__ if name in changes}
    recipes = {name: replace(recipe, **own) for name, recipe in profile.recipes.items()}
    return replace(profile, recipes=recipes, **changes)


def remedies(profile: Profile, method: str) -> list[dict]:
    """Settings that save memory, those first that cost the least quality and time."""
    recipe = profile.recipes[method]
    needs_copy = method == "dpo" and not recipe.cache_reference and not profile.lora
    shorter = {name: getattr(profile, name) // 2 for name in ("max_length", "max_new_tokens")}
    found = [
        (profile.eval_batch > 1, {"eval_batch": 1}),
        (recipe.micro_batch > 1, {"micro_batch": 1}),
        (not profile.gradient_checkpointing, {"gradient_checkpointing": True}),
        (needs_copy, {"cache_reference": True}),
        (True, shorter),
        (not profile.lora, {"lora": 16}),
        (not profile.four_bit, {"four_bit": True, "lora": profile.lora or 16}),
    ]
    return [changes for useful, changes in found if useful]


def what_would_fit(
    profile: Profile, now: Forecast, gigabytes: float, **options
) -> tuple[dict, Forecast]:
    """Changes of settings that help, added one by one until it fits, and the forecast with them.

    With all of them it may still not fit.
    """
    changes, lengths = {}, now.lengths
    for remedy in remedies(profile, now.method):
        if fits(now, gigabytes):
            break
        changed = with_changes(profile, **changes | remedy)
        rows = lengths[: changed.recipes[now.method].micro_batch]
        if "max_length" in remedy:
            rows = full_rows(changed, len(rows), len(rows[0]) - 1)
        new = predict(changed, now.method, lengths=rows, **options)
        if new.peak < 0.99 * now.peak:
            changes, now = changes | remedy, new
    return changes, now


def forecast_table(forecasts: list[Forecast]) -> str:
    """One line per forecast: each part at the peak of a step, and the peaks of all phases."""
    large = max(each.peak for each in forecasts) >= 1e9
    unit, divisor, digits = ("GB", 1e9, 2) if large else ("MB", 1e6, 1)
    parts = [part for part in PARTS if any(forecast.parts[part] for forecast in forecasts)]
    heads = [*parts, *max((forecast.phases for forecast in forecasts), key=len)]
    rows = [[f"{unit} at the peak of", *heads]]
    for each in forecasts:
        found = each.parts | each.phases
        sizes = [f"{found[head] / divisor:.{digits}f}" if head in found else "–" for head in heads]
        rows.append([f"{each.profile} {each.method}", *sizes])
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(map(str.rjust, row[1:], widths[1:])) for row in rows
    )


def fit_advice(profile: Profile, forecast: Forecast, gigabytes: float, **options) -> str:
    """Does it fit, and if not, which setting to change?"""
    aside = f"{forecast.peak / 1e9:.2f} GB and {ASIDE_GB:g} GB set aside"
    if fits(forecast, gigabytes):
        return f"{forecast.method}: fits in {gigabytes:.3g} GB ({aside})"
    changes, then = what_would_fit(profile, forecast, gigabytes, path=forecast.path, **options)
    named = ", ".join(f"{name}={value}" for name, value in changes.items())
    says, peak = (
        f"{forecast.method}: does not fit in {gigabytes:.3g} GB ({aside}).",
        then.peak / 1e9,
    )
    if fits(then, gigabytes):
        return f"{says} In common/profiles.py set {named}: {peak:.2f} GB."
    return f"{says} Nor with {named or 'other settings'}: {peak:.2f} GB. Take a smaller model."


def describe(profile: Profile, forecast: Forecast, dtype: str) -> str:
    """What was predicted: model, precision, adapters, lengths."""
    weights = "4-bit weights" if profile.four_bit else "float32 weights"
    tuned = f"LoRA of rank {profile.lora}" if profile.lora else "all weights trained"
    tokens = " + ".join(map(str, forecast.lengths[0]))
    millions, count = forecast.parameters / 1e6, len(forecast.lengths)
    return (
        f"{profile.run_name}: {profile.model}, {millions:,.1f} million parameters, {weights}, "
        f"{tuned}, in {dtype}; micro-batches of {count} × {tokens} tokens, {forecast.path} path"
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
    recipe = lab.profile.recipes[stage]
    rows = lab.demonstrations if stage_of(stage).rows == "demonstrations" else lab.train_pairs
    parts = [f"{part}_ids" for part in ("prompt", "chosen", "rejected")]
    columns = [rows[part] for part in parts if part in rows.column_names]
    lengths = [list(map(len, row)) for row in zip(*columns, strict=True)]

    def padded(row: list[int]) -> int:  # the simple path pads to the longest row
        return row[0] + max(row[1:])

    def packed(row: list[int]) -> int:  # every token once; only responses are scored
        return sum(row) + sum(row[1:])

    lengths.sort(key=packed if recipe.path == "packed" else padded, reverse=True)
    return lengths[: min(recipe.micro_batch, recipe.batch_size)]


def expect(lab: Lab, stage: str) -> Expected:
    """Predicts what training a stage takes with the lab's longest rows on this machine, and prints
    it.

    Raises: ValueError for another stage than "sft", "dpo" and "orpo".
    """
    if stage not in FORECAST_METHODS:
        known = ", ".join(FORECAST_METHODS)
        raise ValueError(f"Memory is predicted for {known}, not for {stage!r}.")
    profile = lab.profile
    device, dtype, _ = device_and_precision(profile)
    path, rows = profile.recipes[stage].path, longest_rows(lab, stage)
    forecast = predict(profile, stage, path, dtype, device, rows)
    print(describe(profile, forecast, dtype))
    print(forecast_table([forecast]))
    if device == "cuda":
        gc.collect()  # models that are no longer used
        held = torch.cuda.memory_allocated()
        print(f"{held / 1e9:.2f} GB of the GPU are in use already")
        room = gpu_gigabytes() - held / 1e9
        print(fit_advice(profile, forecast, room, dtype=dtype, device=device))
        return Expected(forecast, held)
    free, needed = psutil.virtual_memory().available / 1e9, forecast.peak / 1e9
    print(f"{needed:.2f} GB, beside Python and its libraries; {free:.1f} GB of memory are free")
    return Expected(forecast, resident_bytes())


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
    """What `python -m benchmarks.gpu` measured for a profile and method by the recipe's path, or
    "not measured".
    """
    results = {"profiles": {}}
    if GPU_RESULTS.exists():
        results = json.loads(GPU_RESULTS.read_text(encoding="utf-8"))
    profile = results["profiles"].get(forecast.profile, {"methods": {}})
    method = profile["methods"].get(forecast.method, {"path": "", "paths": {}})
    found = method["paths"].get(method["path"], {})
    if "peak_bytes" not in found:
        return "not measured"
    return f"{found['peak_bytes'] / 1e9:.2f} GB, {results['gpu']}"
