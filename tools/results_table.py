"""SFT, DPO and ORPO side by side, as the notebooks measured them: `python tools/results_table.py [RUN_FOLDER]`."""

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
    """The value, with its spread over seeds where there is one. A value that was not measured is a dash."""
    value, spread = values.get(measure), values.get("std", {}).get(measure)
    if value is None:
        return "–"
    return f"{value:{MEASURES[measure]}}" + ("" if spread is None else f" ± {spread:{MEASURES[measure]}}")


def results_table(folder: Path) -> str:
    """From evaluation.json (Lab 1.7-04) and, unless it is older, comparison.json (Lab 1.8-03)."""
    evaluation, comparison = folder / "evaluation.json", folder / "comparison.json"
    if not evaluation.exists():
        return f"There is no {evaluation} yet: notebook 04 of Lab 1.7 writes it."
    files = [evaluation]
    if comparison.exists() and comparison.stat().st_mtime >= evaluation.stat().st_mtime:
        files.append(comparison)
    models, win_rates = {}, {}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
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
    return "\n".join([f"From {' and '.join(map(str, files))}:", "", *lines])


if __name__ == "__main__":
    print(results_table(Path(sys.argv[1]) if len(sys.argv) > 1 else get_profile().folder))
