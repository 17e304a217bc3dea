"""SFT, DPO and ORPO side by side, as the notebooks measured them: `python tools/results_table.py
[RUN_FOLDER]`.
"""

import json
import sys
from pathlib import Path

from common.profiles import get_profile

MODELS = {"sft": "SFT", "dpo": "DPO", "orpo": "ORPO"}
MEASURES = {  # key in the file → how it is printed
    "perplexity": ".2f",
    "helpfulness": ".2f",
    "harmlessness": ".2f",
    "relevance": ".2f",
    "safe_on_harmful": ".1%",
    "over_refusal": ".1%",
    "ended_with_eos": ".1%",
    "length_tokens": ".1f",
    "reward_margin": ".3f",
    "preference_accuracy": ".1%",
    "kl": ".2f",
}


def cell(values: dict, measure: str) -> str:
    """The value, with its spread over seeds where there is one. A value that was not measured is a
    dash.
    """
    value, spread = values.get(measure), values.get("std", {}).get(measure)
    if value is None:
        return "–"
    return f"{value:{MEASURES[measure]}}" + (
        "" if spread is None else f" ± {spread:{MEASURES[measure]}}"
    )


def results_table(folder: Path) -> str:
    """From evaluation.json (Lab 1.7-04) and, unless it is older, comparison.json (Lab 1.8-03)."""
    evaluation, comparison = folder / "evaluation.json", folder / "comparison.json"
    if not evaluation.exists():
        return f"There is no {evaluation} yet: notebook 04 of Lab 1.7 writes it."
    files = [evaluation]
    if comparison.exists() and comparison.stat().st_mtime >= evaluation.stat().st_mtime:
        files.append(comparison)
    models, win_rates, judges = {}, {}, {}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        judges |= (
            {content["judge"]: content.get("judge_beats_a_coin", True)}
            if "judge" in content
            else {}
        )
        models |= content["models"]
        win_rates |= content["win_rate"]
    shown = [name for name in MODELS if name in models]
    rows = [["", *(MODELS[name] for name in shown)]]
    rows += [[measure, *(cell(models[name], measure) for name in shown)] for measure in MEASURES]
    lines = [f"{row[0]:22}" + "".join(f"{text:>18}" for text in row[1:]) for row in rows]
    for name, rate in win_rates.items():
        low, high = rate["ci95"]
        counts = f"{rate['wins']} wins, {rate['ties']} ties, {rate['losses']} losses"
        lines.append(f"{name:26}{rate['rate']:.1%} [{low:.1%}, {high:.1%}]  {counts}")
    for judge, beats_a_coin in judges.items():
        lines.append(f"Judge: {judge}.")
        if not beats_a_coin:
            lines.append(
                "On held-out pairs it is no better than a coin: its win rates say nothing about quality."
            )
    return "\n".join([f"From {' and '.join(map(str, files))}:", "", *lines])


QUALITY_MEASURES = {  # key in benchmarks/results/quality.json → heading
    "perplexity": "perplexity",
    "reward_margin": "margin (β = 0.1)",
    "preference_accuracy": "held-out accuracy",
    "kl": "KL to SFT (nats)",
    "helpfulness": "helpfulness (1–5)",
    "harmlessness": "harmlessness (1–5)",
    "relevance": "relevance (1–5)",
    "safe_on_harmful": "safe on harmful",
    "over_refusal": "over-refusal",
    "ended_with_eos": "ended with EOS",
    "length_tokens": "length (tokens)",
}


def mean_and_spread(value: float, spread: float | None) -> str:
    """`0.824 ± 0.026`, or the value alone where there is one seed."""
    return f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def quality_markdown(results: dict) -> str:
    """What `benchmarks/quality.py` measured, for the READMEs: one column per stage, mean ±
    deviation over seeds.
    """
    lines = []
    for profile, result in results["profiles"].items():
        reports, models, rates = result["reports"], result["models"], result["win_rate"]
        numbers = ", ".join(str(report["seed"]) for report in reports)
        size = f"{reports[0]['prompts']} held-out prompts × {reports[0]['samples']} samples at temperature 1"
        lines += [f"`{profile}`, {'seeds' if len(reports) > 1 else 'seed'} {numbers}; {size}:", ""]
        lines += [
            "| | " + " | ".join(f"`{stage}`" for stage in models) + " |",
            "|---|" + "---|" * len(models),
        ]
        cells = []
        for stage in models:
            rate = rates.get(f"{stage}_vs_sft")
            cells.append(
                mean_and_spread(rate["rate"], rate["std"]) if rate else "0.5 by definition"
            )
        lines.append("| **win rate against SFT** | " + " | ".join(cells) + " |")
        for name, heading in QUALITY_MEASURES.items():
            cells = [
                mean_and_spread(values[name], values["std"][name]) for values in models.values()
            ]
            lines.append(f"| {heading} | " + " | ".join(cells) + " |")
        basis = "over seeds" if len(reports) > 1 else "over prompts"
        lines += [
            "",
            f"Head to head, 95 % interval {basis}: "
            + "; ".join(
                f"`{first}` against `{second}` {rate_cell(rate)}"
                for first, second in (
                    ("orpo", "dpo"),
                    ("orpo", "orpo_lambda0"),
                    ("dpo", "orpo_lambda0"),
                )
                for rate in [rates[f"{first}_vs_{second}"]]
            )
            + ".",
        ]
        for name, arm in result["arms"].items():
            rate = arm["win_rate"]["orpo_vs_orpo_lambda0"]
            lines.append(f"On {name} pairs: `orpo` against `orpo_lambda0` {rate_cell(rate)}.")
        lines.append("")
    return "\n".join(lines)


METHODS = {
    "sft": "SFT",
    "orpo_lambda0": "λ = 0",
    "dpo_plain": "DPO plain",
    "dpo": "DPO + NLL",
    "orpo": "ORPO",
}
MEMORY = {
    "weights_bytes": "weights",
    "reference_bytes": "reference",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser",
    "rest_bytes": "rest",
    "peak_bytes": "peak",
}


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table as lines, an empty one after it."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def rate_cell(rate: dict) -> str:
    """`0.58 [0.52, 0.64]`: the interval over seeds, or over prompts where there is one seed."""
    low, high = rate["seed_ci95"] or rate["ci95"]
    return f"{rate['rate']:.2f} [{low:.2f}, {high:.2f}]"


def _methods(report: dict) -> list[str]:
    """Every method on the profile's own pairs."""
    models, rates, cost = report["models"], report["win_rate"], report["cost"]
    against = [
        rate_cell(rates[f"{stage}_vs_sft"]) if stage != "sft" else "0.5 by definition"
        for stage in METHODS
    ]
    rows = [["**win rate against SFT**", *against]]
    for name, heading in QUALITY_MEASURES.items():
        values = [models[stage].get(name) for stage in METHODS]
        if None not in values:
            spreads = [models[stage]["std"].get(name) for stage in METHODS]
            rows.append([heading, *map(mean_and_spread, values, spreads)])
    rows.append(
        [
            "TFLOPs of the stage, unpacked",
            *(f"{cost[stage]['simple_flops'] / 1e12:.3f}" for stage in METHODS),
        ]
    )
    return _table(["", *METHODS.values()], rows)


def _flaw_rates(report: dict) -> list[str]:
    """When does the contrast pay? Nothing where there is no embedded world."""
    if not report["flaw_rates"]:
        return []
    arms = {rate: report["arms"].get(name, report) for rate, name in report["flaw_rates"].items()}
    arms["tiers"] = report["arms"]["tiers"]
    pairs = {
        "orpo_vs_orpo_lambda0": "ORPO against λ = 0",
        "dpo_vs_orpo_lambda0": "DPO + NLL against λ = 0",
    }
    rows = [
        [text, *(rate_cell(arm["win_rate"][name]) for arm in arms.values())]
        for name, text in pairs.items()
    ]
    return _table(["flaw rate of the pairs", *arms], rows)


def _memory(runs: list[dict]) -> list[str]:
    """Measured in one process per method."""
    size = runs[0]
    rows = [
        [
            f"`{run['method']}`{' + LoRA' if run['lora'] else ''}",
            *(f"{run[key] / 1e9:.2f}" for key in MEMORY),
        ]
        for run in runs
    ]
    head = (
        f"Memory in GB (1e9 bytes), a GPT-2 of {size['parameters'] / 1e6:.0f} M random weights, "
        f"{size['pairs']} pairs of up to {size['length']} tokens, {size['device']}:"
    )
    return [head, "", *_table(["method", *MEMORY.values()], rows)]


def comparison_markdown(results: dict) -> str:
    """What notebook 1.8-03 measured, {profile: comparison.json}, for the READMEs of Lab 1.8."""
    lines = []
    for profile, report in results.items():
        seeds, ratio = report["seeds"], report["compute_ratio"]
        basis = (
            f"{seeds} seeds, interval over seeds"
            if seeds > 1
            else "one seed, interval over prompts"
        )
        lines += [f"`{profile}`: {basis} (95 %); judge: {report['judge']}.", "", *_methods(report)]
        counted = "; ".join(
            f"{name} {values['counted']:.3f} (formula {values['formula']:.3f})"
            for name, values in ratio.items()
            if name != "passes"
        )
        lines += [
            f"FLOPs of ORPO over those of SFT + DPO: {counted}; by passes {ratio['passes']:.3f}.",
            "",
        ]
        lines += _flaw_rates(report)
        if "twice" in report["arms"]:
            rate = report["arms"]["twice"]["win_rate"]["orpo_vs_orpo_lambda0"]
            lines += [f"ORPO against λ = 0 trained twice as long: {rate_cell(rate)}.", ""]
        lines += _memory(report["memory"])
    return "\n".join(lines)


if __name__ == "__main__":
    print(results_table(Path(sys.argv[1]) if len(sys.argv) > 1 else get_profile().folder))
