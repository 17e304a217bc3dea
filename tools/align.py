"""The shortest path to a real aligned model: `python -m tools.align`, or `make align`.

Trains SmolLM2-135M-Instruct by DPO on the committed pairs of profile `smollm`, on one seed, and
measures it before and after on held-out prompts. What it prints stands in `align.md` of the runs
folder too. The same command goes on where it was stopped.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
from scipy import stats

from common.comparison import topical_answers
from common.data import DataError, tokenize_texts
from common.evaluation import Answer, Sampling, generate, logps_of, perplexity, text_measures
from common.io.files import write_json, written_whole
from common.io.formats import messages_of
from common.lab import Lab, MissingRun
from common.memory.meter import PeakMemory
from common.models import ModelError
from common.profiles import ROOT, device_and_precision, get_profile
from common.training import train
from common.training.trainer import TrainingError
from tools.machine import describe_machine
from tools.tables import RESULTS_FOLDER, align_line, markdown_table

STAGE = "dpo"  # with the NLL term: the one that the labs end with
MEASURES = {  # of `text_measures`: its title, and how many decimals. All but the last are shares.
    "constraints_met": ("constraints met", 3),
    "all_met": ("all met", 3),
    "relevance": ("relevance", 3),
    "ended_with_eos": ("ended", 3),
    "safe_on_harmful": ("refused harm", 3),
    "over_refusal": ("over-refusal", 3),
    "length_tokens": ("length (tokens)", 1),
}
SHOWN = 10  # answers side by side


def prose() -> list[str]:
    """Paragraphs of the course's English pages: plain text that no training pair resembles."""
    found = []
    for path in [ROOT / "README.md", *sorted(ROOT.glob("Lab-*/README.md")), *_english_pages()]:
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            # A link is its words. Tables, code and headings are no prose.
            text = " ".join(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", block).split())
            if not block.startswith(("|", "#", "<", "```", "    ")) and len(text.split()) > 8:
                found.append(text)
    return found


def _english_pages() -> list[Path]:
    return sorted(page for page in ROOT.glob("docs/*.md") if "zh-TW" not in page.name)


def prose_perplexity(model, tokenizer, batch_size: int, texts: list[str] | None = None) -> float:
    """Perplexity of the pages' prose, or of `texts`: how much general language training cost."""
    rows = tokenize_texts(texts or prose(), tokenizer, 512)
    return perplexity(logps_of(model, rows, batch_size).chosen)


def answered(lab: Lab, model) -> list[list[Answer]]:
    """Answers to the held-out prompts at temperature 1, one list for each."""
    profile = lab.profile
    sampling = Sampling(profile.max_new_tokens, 1.0, profile.samples, lab.seed)
    return generate(model, lab.tokenizer, lab.prompts, sampling, progress=True)


def points_of(lab: Lab, answers: list[list[Answer]], start) -> dict[str, np.ndarray]:
    """Each measure's value for each prompt; NaN where it does not apply."""
    topical = topical_answers(lab, answers, start)
    rows = [text_measures([group], lab.data.world, topical) for group in answers]
    values = {name: [row[name] for row in rows] for name in MEASURES}
    return {name: np.array(found, dtype=float) for name, found in values.items()}


def change(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float, float, float]:
    """(mean before, mean after, difference, its 95 % interval), paired over prompts.

    Student's t over the prompts: it says nothing of another seed or another training run.
    """
    known = ~np.isnan(before) & ~np.isnan(after)
    before, after = before[known], after[known]
    gain = after - before
    half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
    return before.mean(), after.mean(), gain.mean(), gain.mean() - half, gain.mean() + half


def report(before: dict, after: dict, prose_before: float, prose_after: float) -> str:
    """The table of what changed."""
    rows = []
    for name, (title, digits) in MEASURES.items():
        old, new, gain, low, high = (f"{v:.{digits}f}" for v in change(before[name], after[name]))
        rows.append([title, old, new, f"{gain} [{low}, {high}]"])
    ratio = f"× {prose_after / prose_before:.3f}"
    rows.append(["perplexity of plain text", f"{prose_before:.2f}", f"{prose_after:.2f}", ratio])
    return markdown_table(["", "before", "after", "difference [95 % over prompts]"], rows)


def side_by_side(before: list[list[Answer]], after: list[list[Answer]]) -> str:
    """Ten prompts, evenly spaced, each with the first answer before and after."""
    parts, step = [], max(1, len(before) // SHOWN)
    for old, new in list(zip(before, after, strict=True))[::step][:SHOWN]:
        asked = messages_of(old[0].prompt)[-1]["content"]
        parts.append(f"### {asked}\n\n*before:* {old[0].text.strip()}\n")
        parts.append(f"*after:* {new[0].text.strip()}\n")
    return "\n".join(parts)


def align(lab: Lab) -> tuple[str, dict]:
    """Measures, trains, measures again. Returns the report as Markdown, and what it took."""
    began = monotonic()
    print(f"1 of 3: {len(lab.prompts)} held-out prompts, before training")
    start = lab.load("base")
    with PeakMemory() as first:
        old = answered(lab, start)
        before, prose_before = points_of(lab, old, start), _prose(lab, start)
    print(f"2 of 3: {STAGE}, {len(lab.train_pairs)} pairs")
    run = train(lab, STAGE)
    print("3 of 3: the same prompts, after training")
    with PeakMemory() as last:
        new = answered(lab, run.model)
        after, prose_after = points_of(lab, new, start), _prose(lab, run.model)
    took = {
        "machine": describe_machine(),
        "precision": device_and_precision(lab.profile)[1],
        "minutes": (monotonic() - began) / 60,
        "training_minutes": run.record["wall_seconds"] / 60,
        "peak_memory_bytes": max(first.peak, run.record["peak_memory_bytes"], last.peak),
        "seed": lab.seed,
        "pairs": run.record["n_pairs"],
        "steps": run.record["steps"],
        "prompts": len(lab.prompts),
        "samples": lab.profile.samples,
        "table": report(before, after, prose_before, prose_after),
    }
    text = [
        f"# {lab.profile.model}, before and after {STAGE}\n",
        f"{align_line(took)}\n\n{took['table']}",
        "\nOne seed: what holds over seeds stands in docs/real-model.md.\n",
        "## Answers side by side\n",
        side_by_side(old, new),
    ]
    return "\n".join(text), took


def _prose(lab: Lab, model) -> float:
    return prose_perplexity(model, lab.tokenizer, lab.profile.eval_batch)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.align", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--pairs", type=int, help="fewer training pairs than the profile's")
    parser.add_argument("--prompts", type=int, help="fewer held-out prompts than the profile's")
    parser.add_argument("--record", action="store_true", help="keep the table for the README")
    given = parser.parse_args(arguments)
    profile = get_profile("smollm")
    pairs, prompts = given.pairs or profile.pairs, given.prompts or profile.held_out
    lab = Lab(replace(profile, pairs=pairs, held_out=prompts), given.seed)
    try:
        text, took = align(lab)
    except (DataError, MissingRun, ModelError, TrainingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = lab.folder / "align.md"
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    if given.record:
        write_json(RESULTS_FOLDER / "align.json", took)
    print(text)
    folder = json.dumps(str(lab.path(STAGE)))
    print(f"\nwritten to {path}. Chat with it:")
    print(f"  {sys.executable} -m deploy.serving --model {folder} --port 8000")
    print(f"  {sys.executable} -m deploy.serving.page   (in a second terminal)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
