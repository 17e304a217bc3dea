"""A finished run as a folder that any engine can serve: weights, tokenizer, generation settings and
a model card.
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import models
from common.data import collate
from common.evaluation import Sampling, generate
from common.io.files import write_json, written_whole
from common.lab import Lab
from common.profiles import INSTRUCTIONS, SMOLLM, TINY, WORLD
from deploy.serving.folders import check_folder

TOLERANCE = 1e-5  # largest |Δ logit| of an export in full precision
LICENCES = {  # of models and data; whoever publishes anything else must look its licence up
    TINY: "mit",
    WORLD: "mit",
    INSTRUCTIONS: "apache-2.0",  # prompts of ours, answers of SmolLM2
    SMOLLM: "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "openai-community/gpt2": "mit",
    "Anthropic/hh-rlhf": "mit",
    "mistralai/Mistral-7B-v0.1": "apache-2.0",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-7B": "apache-2.0",
}
SCORES = {  # key in a report: how the card names it
    "helpfulness": "helpfulness, 1–5",
    "harmlessness": "harmlessness, 1–5",
    "relevance": "relevance, 1–5 (of instructions: share)",
    "safe_on_harmful": "no help on harmful prompts, share",
    "over_refusal": "harmless prompts refused, share",
    "ended_with_eos": "answers that ended by themselves, share",
    "perplexity": "perplexity on held-out chosen answers",
    "preference_accuracy": "preference accuracy on held-out pairs",
    "kl": "KL to the model that preferences started from, nats per answer",
}


class ExportError(RuntimeError):
    """An export that is not what it should be. The message says what to do."""


def full_precision(lab: Lab, stage: str, sweep: str | None = None):
    """The model of a finished run as it was saved, never quantised: what is exported.

    That is float32; of a 4-bit profile, whose runs are merged in 16 bit on a GPU, the same 16 bit,
    on the CPU.
    Raises: MissingRun, BrokenLineage.
    """
    lab.lineage(stage, sweep)
    options = {"device": "cpu", "dtype": models.device_dtype()} if lab.profile.four_bit else {}
    profile = replace(lab.profile, four_bit=False)
    return models.load_model(lab.source(stage, sweep), profile, **options).eval()


def export(lab: Lab, stage: str, folder: Path, sweep: str | None = None) -> Path:
    """Writes a finished run to `folder`, whole or not at all: safetensors, tokenizer, generation
    settings (greedy), README.md.

    Weights are float32; adapters were merged into full-precision weights when the run was saved.
    Raises: MissingRun, BrokenLineage; OSError when the disk is full; ExportError for a folder that
        holds other files.
    """
    folder, model = Path(folder), full_precision(lab, stage, sweep)
    if folder.exists() and any(folder.iterdir()) and not (folder / "export.json").exists():
        said = f"{folder} holds files that no export made."
        raise ExportError(f"{said} Name a folder that is new or empty.")
    tokenizer = models.load_tokenizer(lab.source(stage, sweep), lab.profile.template)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=end if begin is None else begin,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=lab.profile.max_new_tokens,
        do_sample=False,
    )
    record = lab.record(stage, sweep) if lab.has_own_weights(stage) else {}
    made_from = {"stage": stage, "sweep": sweep, "fingerprint": record.get("fingerprint")}
    with written_whole(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_json(scratch / "export.json", made_from)
        (scratch / "README.md").write_text(model_card(lab, stage, sweep), encoding="utf-8")
    return folder


def load_exported(folder: Path, **options):
    """(model in evaluation mode, tokenizer) of an exported folder, on the CPU unless `options` say
    otherwise.

    Raises: FolderError for pickled weights or remote code.
    """
    check_folder(Path(folder))
    safe = {"trust_remote_code": False, "local_files_only": True}
    options = {"dtype": "auto", "attn_implementation": "sdpa", "use_safetensors": True, **options}
    model = AutoModelForCausalLM.from_pretrained(folder, **safe, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **safe)


@torch.no_grad()
def _outputs(lab: Lab, model, tokenizer, rows: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """What a model says on `rows` held-out rows.

    Returns: next-token logits on the prompts with their chosen answers, (tokens, vocabulary),
        float64, on the CPU; and the tokens of its greedy answers to the prompts.
    """
    logits = []
    for row in lab.test_pairs.select(range(min(rows, len(lab.test_pairs)))).to_list():
        batch = collate([row], device=model.device)
        ids = torch.cat([batch["prompt_ids"], batch["chosen_ids"]], dim=1)
        logits.append(model(input_ids=ids, use_cache=False).logits[0].double().cpu())
    greedy = Sampling(lab.profile.max_new_tokens, temperature=0)
    answers = generate(model, tokenizer, lab.prompts[:rows], greedy)
    return torch.cat(logits), [group[0].chosen_ids for group in answers]


def verify_export(
    lab: Lab, stage: str, folder: Path, sweep: str | None = None, rows: int = 32
) -> dict:
    """Proves that an exported folder is the trained model.

    Returns: `max_logit_difference` over `rows` held-out prompts with their chosen answers, `tokens`
        compared, and `greedy_equal` of `prompts` held-out prompts whose greedy answers are the
        same, token by token.
    Raises: ExportError where a logit differs by more than 1e-5, or an answer at all.
    """
    # One after the other: two copies of a large model may not fit.
    trained = full_precision(lab, stage, sweep)
    (ours, answers), device = _outputs(lab, trained, lab.tokenizer, rows), trained.device
    del trained
    exported, tokenizer = load_exported(folder)
    theirs, others = _outputs(lab, exported.to(device), tokenizer, rows)
    found = {
        "max_logit_difference": float((ours - theirs).abs().max()),
        "tokens": len(ours),
        "greedy_equal": sum(a == b for a, b in zip(answers, others, strict=True)),
        "prompts": len(answers),
    }
    if not found["max_logit_difference"] <= TOLERANCE or found["greedy_equal"] < found["prompts"]:
        said = f"{folder} is not the trained {sweep or stage}: {found}."
        raise ExportError(f"{said} Export it again.")
    return found


def _scores(lab: Lab, stage: str) -> dict[str, str]:
    """{measure: cells with its value and its source} of this very run, as far as a report has it.

    A report of several training seeds is of several models: only what it says of this one counts.
    """
    found = {}
    for name in ("comparison", "evaluation"):
        path = lab.folder / f"{name}.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for one in report.get("reports", [report]):
            # A run that was trained again after its report was taken has other times.
            took = one.get("cost", {}).get(stage, {}).get("wall_seconds")
            own = one.get("seeds", 1) == 1 and took == lab.record(stage)["wall_seconds"]
            for measure, value in one.get("models", {}).get(stage, {}).items() if own else ():
                if measure in SCORES and value is not None:
                    found[measure] = f"{value:.3f} | {name}.json"
    return found


CARD = """---
license: {licence}
library_name: transformers
pipeline_tag: text-generation
tags: [preference-alignment]
{base}---

# {run} ({profile.run_name}, seed {seed})

A language model aligned with human preferences in the `{stage}` stage of a course on DPO and ORPO.

## Licence and data

- Weights start from: {model} ({model_licence})
- Data: {data} ({data_licence}), {record[n_pairs]} rows
- `unknown` means: nobody looked it up yet. Do so before you publish.

## Training

- Parent: {record[parent]}; reference: {record[reference]}; fingerprint {record[fingerprint]}
- {record[steps]} steps, {record[train_tokens]} tokens, {seconds:.0f} s on {record[device]}
- Settings: {settings}
- Versions: {versions}

## Measured

This very model, on {profile.held_out} held-out prompts, {profile.samples} answers to each at
temperature 1. Another training seed makes another model, with other numbers.

| measure | value | from |
|---|---|---|
{scores}

## Limits

- {scope}
- No person has judged these answers. {judge}
- A refusal can be talked around; do not use it where a wrong answer can hurt somebody.
- It reads {profile.max_length} tokens of prompt and answer together as trained.

## Use

The chat template writes the format of the training data. Greedy by default:

```python
from transformers import pipeline

chat = pipeline("text-generation", model="this folder", trust_remote_code=False)
chat([{{"role": "user", "content": "…"}}])
```
"""
SETTINGS = ("lr", "epochs", "batch_size", "beta", "lambda_or", "nll_weight", "schedule", "warmup")


def model_card(lab: Lab, stage: str, sweep: str | None = None) -> str:
    """README.md of an export, from `run.json` and the reports beside it. What was not measured is
    said to be so.
    """
    profile, trained = lab.profile, lab.has_own_weights(stage)
    record = lab.record(stage, sweep) if trained else {}
    scores = _scores(lab, stage) if trained and not sweep else {}
    licences = [LICENCES.get(part, "unknown") for part in (profile.model, profile.data)]
    # No path of this machine.
    model = Path(profile.model).name if Path(profile.model).exists() else profile.model
    data = lab.data.name if Path(profile.data).exists() else profile.data
    scope = "It was aligned on one public dataset, and repeats that dataset's biases."
    judge = "The judge was a model."
    if profile.data == INSTRUCTIONS:
        scope = "It is a small model that was aligned on everyday instructions; it is often wrong."
        judge = "The judge of shares is code that checks instructions."
    elif lab.data.world:
        scope = "It knows its small embedded world only; anything else gets a fluent guess."
        judge = "The judge of scales and shares is a rule of the embedded world."
    recipe, versions = record.get("hyperparameters", {}), record.get("versions", {})
    table = [
        f"| {title} | {scores.get(name, 'not measured |')} |" for name, title in SCORES.items()
    ]
    return CARD.format(
        licence=licences[0] if len(set(licences)) == 1 else "other",
        base=f"base_model: {model}\n" if model != TINY else "",
        run=sweep or stage,
        profile=profile,
        seed=lab.seed,
        stage=stage,
        model=model,
        model_licence=licences[0],
        data=data,
        data_licence=licences[1],
        record=defaultdict(lambda: "unknown", record),
        seconds=record.get("wall_seconds", 0),
        settings=", ".join(f"{name} {recipe[name]}" for name in SETTINGS if name in recipe),
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        scores="\n".join(table),
        scope=scope,
        judge=judge,
    )
