"""The methods side by side: `python -m tools.results_table [RUN_FOLDER]` prints what the notebooks
measured; the pages show what the quality benchmark and the comparison of Lab 1.8 measured.
"""

import json
import sys
from pathlib import Path

from common.profiles import get_profile
from tools.tables import GB, markdown_table

MEASURE_NAMES = {  # key in a report → name of the row
    "perplexity": "perplexity",
    "reward_margin": "margin (β = 0.1)",
    "preference_accuracy": "held-out accuracy",
    "kl": "KL to SFT (nats)",
    "constraints_met": "constraints met",
    "all_met": "all met",
    "helpfulness": "helpfulness (1–5)",
    "harmlessness": "harmlessness (1–5)",
    "relevance": "relevance (1–5)",
    "safe_on_harmful": "safe on harmful",
    "over_refusal": "over-refusal",
    "ended_with_eos": "ended with EOS",
    "length_tokens": "length (tokens)",
}
STAGE_NAMES = {
    "base": "the start",
    "sft": "SFT",
    "orpo_lambda0": "λ = 0",
    "dpo_plain": "DPO plain",
    "dpo": "DPO + NLL",
    "orpo": "ORPO",
    "chosen_dpo": "SFT on chosen, then DPO",
}
PART_NAMES = {
    "weights_bytes": "weights",
    "reference_bytes": "reference",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser",
    "rest_bytes": "rest",
    "peak_bytes": "peak",
}


def _cell(value: float | None, spread: float | None) -> str:
    """`0.824 ± 0.026`; the value alone where there is one seed; a dash if it was not measured."""
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _rate_cell(rate: dict) -> str:
    """`0.58 [0.52, 0.64]`: the interval over seeds, or over prompts where there is one seed."""
    low, high = rate["ci95"]
    return f"{rate['rate']:.2f} [{low:.2f}, {high:.2f}]"


def results_table(folder: Path) -> str:
    """SFT, DPO and ORPO from evaluation.json (Lab 1.7-04) and, unless it is older, comparison.json
    (Lab 1.8-03), with every win rate and its judge.
    """
    evaluation, comparison = folder / "evaluation.json", folder / "comparison.json"
    if not evaluation.exists():
        return f"There is no {evaluation} yet: notebook 04 of Lab 1.7 writes it."
    files = [evaluation]
    if comparison.exists() and comparison.stat().st_mtime >= evaluation.stat().st_mtime:
        files.append(comparison)
    models, win_rates, judges = {}, {}, {}
    for report in [json.loads(file.read_text(encoding="utf-8")) for file in files]:
        models |= report["models"]
        win_rates |= report["win_rate"]
        if "judge" in report:
            judges[report["judge"]] = report.get("judge_beats_a_coin", True)
    # Where preferences start from the base, it is what the others are compared with.
    first = ["base"] if any(name.endswith("_vs_base") for name in win_rates) else []
    stages = [stage for stage in (*first, "sft", "dpo", "orpo") if stage in models]
    names = {stage: "START" if stage == "base" else stage.upper() for stage in stages}
    rates = [
        [name, f"{rate['rate']:.1%} [{rate['ci95'][0]:.1%}, {rate['ci95'][1]:.1%}]"]
        + [str(rate[outcome]) for outcome in ("wins", "ties", "losses")]
        for name, rate in win_rates.items()
    ]
    blocks = [
        f"From {' and '.join(map(str, files))}:",
        _stage_table(models, names),
        markdown_table(["win rate", "95 % interval", "wins", "ties", "losses"], rates),
    ]
    for judge, beats_a_coin in judges.items():
        warning = " On held-out pairs it is no better than a coin: its win rates say nothing."
        blocks.append(f"Judge: {judge}." + ("" if beats_a_coin else warning))
    return "\n\n".join(blocks)


def _stage_table(models: dict, names: dict[str, str], first=(), last=()) -> str:
    """One column per stage, one row per measure that this world has. `first`, `last`: further rows.

    Where code verifies constraints, relevance is a share.
    """
    rows, shares = [], any(models[stage].get("constraints_met") is not None for stage in names)
    for key, name in MEASURE_NAMES.items():
        found = [(models[stage].get(key), models[stage].get("std", {}).get(key)) for stage in names]
        name = name.replace(" (1–5)", "") if shares else name
        name = name.replace("SFT", "the start") if "base" in names else name
        if any(value is not None for value, _ in found):
            rows.append([name, *(_cell(*each) for each in found)])
    return markdown_table(["", *names.values()], [*first, *rows, *last])


def _against_sft(rates: dict, stages, cell) -> list[list[str]]:
    """The row of win rates against SFT."""
    found = [rates.get(f"{stage}_vs_sft") for stage in stages]
    return [["**win rate against SFT**", *(cell(r) if r else "0.5 by definition" for r in found)]]


def quality_markdown(results: dict) -> str:
    """What `python -m benchmarks.quality` measured: means ± deviation over seeds, by profile."""
    blocks = []
    for profile, result in results["profiles"].items():
        reports, models, rates = result["reports"], result["models"], result["win_rate"]
        first = _against_sft(rates, models, lambda rate: _cell(rate["rate"], rate["std"]))
        seeds = ", ".join(str(report["seed"]) for report in reports)
        several = len(reports) > 1
        pairs = ("orpo", "dpo"), ("orpo", "orpo_lambda0"), ("dpo", "orpo_lambda0")
        duels = "; ".join(
            f"`{a}` against `{b}` {_rate_cell(rates[f'{a}_vs_{b}'])}" for a, b in pairs
        )
        arms = [
            f"On {name} pairs: `orpo` against `orpo_lambda0` "
            f"{_rate_cell(arm['win_rate']['orpo_vs_orpo_lambda0'])}."
            for name, arm in result["arms"].items()
        ]
        basis = f"Head to head, 95 % interval over {'seeds' if several else 'prompts'}: {duels}."
        blocks += [
            f"`{profile}`, {'seeds' if several else 'seed'} {seeds}; {reports[0]['prompts']} "
            f"held-out prompts × {reports[0]['samples']} samples at temperature 1:",
            _stage_table(models, {stage: f"`{stage}`" for stage in models}, first),
            "\n".join([basis, *arms]),
        ]
    return "\n\n".join(blocks) + "\n"


def _memory_table(runs: list[dict]) -> list[str]:
    """Peak memory by part, measured in one process per method."""
    size = runs[0]
    rows = [
        [f"`{run['method']}`{' + LoRA' if run['lora'] else ''}"]
        + [f"{run[key] / GB:.2f}" for key in PART_NAMES]
        for run in runs
    ]
    return [
        f"Memory in GB (1e9 bytes), a GPT-2 of {size['parameters'] / 1e6:.0f} M random weights, "
        f"{size['pairs']} pairs of up to {size['length']} tokens, {size['device']}:",
        markdown_table(["method", *PART_NAMES.values()], rows),
    ]


def comparison_markdown(results: dict) -> str:
    """What notebook 1.8-03 measured, {profile: comparison.json}."""
    blocks = []
    for profile, report in results.items():
        seeds, ratio, cost = report["seeds"], dict(report["compute_ratio"]), report["cost"]
        passes = ratio.pop("passes")
        several = f"{seeds} seeds, interval over seeds"
        basis = several if seeds > 1 else "one seed, interval over prompts"
        names = {key: name for key, name in STAGE_NAMES.items() if key in report["models"]}
        found = [cost.get(stage, {}).get("simple_flops") for stage in names]
        flops = ["–" if value is None else f"{value / 1e12:.3f}" for value in found]
        first = _against_sft(report["win_rate"], names, _rate_cell)
        last = [["TFLOPs of the stage, unpacked", *flops]]
        counted = "; ".join(
            f"{name} {values['counted']:.3f}, by formula {values['formula']:.3f}"
            for name, values in ratio.items()
        )
        blocks += [
            f"`{profile}`: {basis} (95 %); judge: {report['judge']}.",
            _stage_table(report["models"], names, first, last),
            f"FLOPs of ORPO over those of SFT + DPO: {counted}; by passes {passes:.3f}.",
            *_memory_table(report["memory"]),
        ]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    print(results_table(Path(sys.argv[1]) if len(sys.argv) > 1 else get_profile().folder))
