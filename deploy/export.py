"""A finished run as a folder that any engine can serve: weights, tokenizer, generation settings and
a model card.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import models
from common.data import collate
from common.evaluation import generate
from common.io.files import write_json, written_whole
from common.lab import Lab
from common.profiles import TINY, WORLD

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOLERANCE = 1e-5  # largest |Δ logit| of an export in full precision
# of the parts an export can be made of; what is not listed must be looked up by whoever publishes
# it
LICENCES = {
    TINY: "mit",
    WORLD: "mit",
    "openai-community/gpt2": "mit",
    "Anthropic/hh-rlhf": "mit",
    "mistralai/Mistral-7B-v0.1": "apache-2.0",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-7B": "apache-2.0",
}
SCORES = {  # key in a report: how the card names it
    "helpfulness": "helpfulness, 1–5",
    "harmlessness": "harmlessness, 1–5",
    "relevance": "relevance, 1–5",
    "safe_on_harmful": "no help on harmful prompts, share",
    "over_refusal": "harmless prompts refused, share",
    "ended_with_eos": "answers that ended by themselves, share",
    "perplexity": "perplexity on held-out chosen answers",
    "preference_accuracy": "preference accuracy on held-out pairs",
    "kl": "KL to the SFT model, nats per answer",
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
    return models.load_model(
        lab.source(stage, sweep), replace(lab.profile, four_bit=False), **options
    ).eval()


def export(
    lab: Lab, stage: str, folder: Path, sweep: str | None = None, temperature: float = 0.0
) -> Path:
    """Writes a finished run to `folder`, whole or not at all: safetensors, tokenizer, generation
    settings, README.md.

    Weights are float32; adapters were merged into full-precision weights when the run was saved.
    `temperature` is the default of whoever asks for none; 0 is greedy.
    Raises: MissingRun, BrokenLineage; OSError when the disk is full; ExportError for a folder that
        holds other files.
    """
    folder, model = Path(folder), full_precision(lab, stage, sweep)
    if folder.exists() and any(folder.iterdir()) and not (folder / "export.json").exists():
        raise ExportError(
            f"{folder} holds files that no export made. Name a folder that is new or empty."
        )
    tokenizer = models.load_tokenizer(lab.source(stage, sweep))
    end = tokenizer.eos_token_id
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=lab.profile.max_new_tokens,
        **sampling,
    )
    with written_whole(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        record = lab.record(stage, sweep) if lab.has_own_weights(stage) else {}
        write_json(
            scratch / "export.json",
            {"stage": stage, "sweep": sweep, "fingerprint": record.get("fingerprint")},
        )
        (scratch / "README.md").write_text(model_card(lab, stage, sweep), encoding="utf-8")
    return folder


def check_safe(folder: Path) -> None:
    """Raises ExportError unless `folder` holds a model in safetensors, no pickled file, and asks
    for no remote code.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ExportError(f"{folder} has no config.json: this is no model folder.")
    if pickled := sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLED):
        raise ExportError(
            f"{folder} holds pickled files ({', '.join(pickled[:3])}), which can run any code when they are read. "
            "Ask for safetensors, or convert them on a machine with nothing to lose."
        )
    if not list(folder.glob("*.safetensors")):
        raise ExportError(f"{folder} has no *.safetensors. Export the model again.")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = folder / name
        if path.exists() and "auto_map" in json.loads(path.read_text(encoding="utf-8")):
            raise ExportError(
                f"{folder}: {name} asks for remote code (auto_map). Read that code first, then convert."
            )


def load_exported(folder: Path, **options):
    """(model in evaluation mode, tokenizer) of an exported folder, on the CPU unless `options` say
    otherwise.

    Raises: ExportError for pickled weights or remote code.
    """
    check_safe(folder)
    safe = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    options = {"dtype": "auto", "attn_implementation": "sdpa", **options}
    return AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, **safe, **options
    ).eval(), tokenizer


@torch.no_grad()
def held_out_logits(model, lab: Lab, rows: int = 32) -> Tensor:
    """Next-token logits on the held-out prompts and their chosen answers, (tokens, vocabulary),
    float64, on the CPU.
    """
    found = []
    for row in lab.test_pairs.select(range(min(rows, len(lab.test_pairs)))).to_list():
        batch = collate([row], device=model.device)
        ids = torch.cat([batch["prompt_ids"], batch["chosen_ids"]], dim=1)
        found.append(model(input_ids=ids, use_cache=False).logits[0].double().cpu())
    return torch.cat(found)


def _outputs(
    lab: Lab, model, tokenizer, rows: int
) -> tuple[Tensor, list[tuple[int, ...]], torch.device]:
    """(logits on held-out rows, tokens of greedy answers to held-out prompts, the model's device)."""
    groups = generate(
        model, tokenizer, lab.prompts[:rows], lab.profile.max_new_tokens, temperature=0
    )
    return (
        held_out_logits(model, lab, rows),
        [group[0].chosen_ids for group in groups],
        model.device,
    )


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
    ours, answers, device = _outputs(lab, full_precision(lab, stage, sweep), lab.tokenizer, rows)
    exported, tokenizer = load_exported(folder)
    theirs, others, _ = _outputs(lab, exported.to(device), tokenizer, rows)
    found = {
        "max_logit_difference": float((ours - theirs).abs().max()),
        "tokens": len(ours),
        "greedy_equal": sum(a == b for a, b in zip(answers, others, strict=True)),
        "prompts": len(answers),
    }
    if not found["max_logit_difference"] <= TOLERANCE or found["greedy_equal"] < found["prompts"]:
        raise ExportError(
            f"{folder} is not the trained {sweep or stage}: {found}. Export it again."
        )
    return found


def measured_scores(lab: Lab, stage: str) -> dict[str, tuple[float | None, str]]:
    """{measure: (value, where it comes from)} of a stage. The value is None where no report of this
    very run has it.

    A report counts if it was taken on the run that is here now; means over seeds are named as such.
    """
    found: dict[str, tuple[float | None, str]] = dict.fromkeys(SCORES, (None, "not measured"))
    for name in ("comparison", "evaluation"):
        path = lab.folder / f"{name}.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stage not in report.get("models", {}) or not lab.has_own_weights(stage):
            continue
        took = [
            one["cost"].get(stage, {}).get("wall_seconds")
            for one in report.get("reports", [report])
        ]
        if lab.record(stage)["wall_seconds"] not in took:
            continue  # taken before the stage was trained again
        seeds = report.get("seeds", 1)
        where = f"{name}.json, mean of {seeds} training seeds" if seeds > 1 else f"{name}.json"
        found |= {
            k: (v, where)
            for k, v in report["models"][stage].items()
            if k in SCORES and v is not None
        }
    return found


def model_card(lab: Lab, stage: str, sweep: str | None = None) -> str:
    """README.md of an export, from `run.json` and the reports beside it. What was not measured is
    said to be so.
    """
    profile, pretrained = lab.profile, not lab.has_own_weights(stage)
    record = {} if pretrained else lab.record(stage, sweep)
    scores = (
        measured_scores(lab, stage) if not sweep else dict.fromkeys(SCORES, (None, "not measured"))
    )
    licences = [LICENCES.get(part, "unknown") for part in (profile.model, profile.data)]
    model = Path(profile.model).name if Path(profile.model).exists() else profile.model
    data = lab.data.name if Path(profile.data).exists() else profile.data  # no path of this machine
    licence = licences[0] if len(set(licences)) == 1 else "other"
    rows = [
        f"| {SCORES[name]} | {'not measured' if value is None else f'{value:.3f}'} | {'' if value is None else where} |"
        for name, (value, where) in scores.items()
    ]
    recipe = record.get("hyperparameters", {})
    shown = ("lr", "epochs", "batch_size", "beta", "lambda_or", "nll_weight", "schedule", "warmup")
    rule = (
        "The judge of the 1–5 scales and of the shares is a rule of the embedded world, not people."
    )
    limits = [
        "It answers questions of its small embedded world only; anything else gets a fluent guess."
        if lab.data.world
        else "It was aligned on one public dataset, and repeats that dataset's biases.",
        "No person has judged these answers. "
        + (rule if lab.data.world else "The judge was a model."),
        "A refusal can be talked around; do not use it where a wrong answer can hurt somebody.",
        f"It reads {profile.max_length} tokens of prompt and answer together as trained.",
    ]
    lines = [
        "---",
        f"license: {licence}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [preference-alignment]",
        *([f"base_model: {model}"] if model != TINY else []),
        "---",
        "",
        f"# {sweep or stage} ({profile.run_name}, seed {lab.seed})",
        "",
        f"A language model aligned with human preferences in the `{stage}` stage of a course on DPO and ORPO.",
        "",
        "## Licence and data",
        "",
        f"- Weights start from: {model} ({licences[0]})",
        f"- Data: {data} ({licences[1]}), {record.get('n_pairs', 'unknown')} rows",
        "- `unknown` means: nobody looked it up yet. Do so before you publish.",
        "",
        "## Training",
        "",
        f"- Parent: {record.get('parent')}; reference: {record.get('reference')}; fingerprint "
        f"{record.get('fingerprint', 'none')}",
        f"- {record.get('steps', 0)} steps, {record.get('train_tokens', 0)} tokens, "
        f"{record.get('wall_seconds', 0):.0f} s on {record.get('device', 'unknown')}",
        f"- Settings: {', '.join(f'{name} {recipe[name]}' for name in shown if name in recipe)}",
        f"- Versions: {', '.join(f'{name} {number}' for name, number in record.get('versions', {}).items())}",
        "",
        "## Measured",
        "",
        f"On {profile.held_out} held-out prompts, answers sampled at temperature 1, {profile.samples} to a prompt.",
        "",
        "| measure | value | from |",
        "|---|---|---|",
        *rows,
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits),
        "",
        "## Use",
        "",
        "The chat template writes the format of the training data. Greedy by default:",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'chat = pipeline("text-generation", model="this folder", trust_remote_code=False)',
        'chat([{"role": "user", "content": "…"}])',
        "```",
        "",
    ]
    return "\n".join(lines)
