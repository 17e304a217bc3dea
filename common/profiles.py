"""Hardware tiers. A profile says which model and data a machine gets, and how each stage is trained
on it.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.io.files import ROOT as ROOT  # where others look for it
from common.io.files import folder_name, local_path, runs_folder

WORLD = "toyworld"  # data: the embedded preference world
INSTRUCTIONS = "instructions"  # data: instructions in open English that code can verify
TINY = "tiny-gpt2"  # model: a GPT-2 built from a config, with its own tokenizer
SMOLLM = "smollm2"  # model: SmolLM2-135M-Instruct, as `make model` writes it


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained. A batch is what one optimiser step sees, over all processes."""

    lr: float
    epochs: float = 1.0
    batch_size: int = 16  # rows per optimiser step, over all processes and micro-batches
    micro_batch: int = 16  # rows per forward pass on one process
    beta: float = 0.1  # DPO: weight of the KL penalty (Rafailov et al. 2023, Eq. 3)
    loss: str = "sigmoid"  # DPO: "sigmoid" or "ipo"
    label_smoothing: float = 0.0  # DPO: assumed share of flipped labels
    nll_weight: float = 0.0  # DPO: weight of the chosen answer's token-mean NLL
    lambda_or: float = 0.0  # ORPO: weight of the odds-ratio term (Hong et al. 2024, Eq. 6)
    contrast: str = "odds"  # ORPO: of means; or "logps" (their difference), "sums" (odds of sums)
    nll_on_prompt: bool = False  # ORPO: does the NLL cover the prompt? TRL and the authors: yes
    warmup: float = 0.1  # share of the steps
    schedule: str = "linear"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    path: str = "packed"  # of the log-probabilities: common.packed, or "simple": common.logprobs
    cache_reference: bool = False  # DPO: compute the reference once, before training; no KL then
    clip: float = 1.0
    evaluations: int = 6  # how often the held-out metrics are taken
    patience: int = 0  # stop after so many evaluations without a better held-out loss; 0: never
    keep_best: bool = False  # end with the weights of the best held-out loss instead of the last


@dataclass(frozen=True)
class Profile:
    """One hardware tier. `folder` is where its runs go; `reason` says why it was chosen."""

    name: str
    recipes: dict[str, Recipe]
    sources: dict[str, str] = field(default_factory=dict)  # stage → where its numbers come from
    model: str = TINY
    data: str = WORLD
    sft_data: str = ""  # demonstrations for SFT; "": the chosen answers of `data`
    template: str = "hh"  # prompts are read as HH-RLHF's transcripts, or in the model's "own" one
    start: str = "sft"  # the stage that preferences start from and are measured against, or "base"
    # The embedded world and the tiny GPT-2.
    objects: int = 8
    plain_lines: int = 8000
    demonstrations: int = 3000
    layers: int = 2
    width: int = 64
    heads: int = 4
    vocabulary: int = 800
    # Sizes.
    pairs: int | None = 3000  # training pairs; None: all
    held_out: int = 250  # held-out pairs and evaluation prompts
    samples: int = 4  # answers per evaluation prompt
    sampled_prompts: int = 64  # prompts answered while a stage trains, for KL and win rate
    sweep_epochs: float = 1.0  # length of each run in a notebook's sweep
    seeds: int = 3  # of the comparison in Lab 1.8-03: this seed and the next ones
    flaw_rates: tuple[float, ...] = (0.0, 0.15, 0.3, 0.5)  # of the pairs there; (): no world
    max_length: int = 128  # tokens of prompt and response together
    max_new_tokens: int = 64
    # Full-size models.
    eval_batch: int = 64  # rows per forward pass without gradients
    lora: int = 0  # rank; 0: full fine-tuning
    four_bit: bool = False
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"  # or "paged_adamw_8bit"
    cpu_bfloat16: bool = False  # autocast on a CPU too, where it has the instructions
    reason: str = ""
    overrides: tuple[str, ...] = ()  # names of LAB_MODEL, LAB_DATA and LAB_SFT_DATA, when set

    @property
    def run_name(self) -> str:
        """`cpu`, or `cpu@mydata` where LAB_MODEL or LAB_DATA replaces the profile's own."""
        return "@".join((self.name, "+".join(self.overrides))) if self.overrides else self.name

    @property
    def folder(self) -> Path:
        """Where its runs are kept: `$LAB_RUNS/<run_name>`, relative to the root of the course."""
        return runs_folder() / self.run_name


def _tiny_recipes(base, sft, dpo, plain, orpo, **common) -> dict[str, Recipe]:
    """Recipes of the two embedded profiles, which differ in learning rates and epochs only."""
    return {
        "base": Recipe(**base, **common),
        "sft": Recipe(**sft, keep_best=True, **common),
        "sft_chosen": Recipe(**sft, **common),
        "reward": Recipe(lr=sft["lr"] / 3, epochs=2, **common),
        "dpo_plain": Recipe(**plain, **common),
        "dpo": Recipe(**dpo, nll_weight=1.0, **common),
        # NLL on the response only, as in SFT: λ = 0 is then SFT on the chosen answers. (The paper
        # adds the prompt.)
        "orpo": Recipe(**orpo, lambda_or=0.5, **common),
        "orpo_lambda0": Recipe(**orpo, **common),
    }


BEST = {"patience": 4, "keep_best": True}


def _hub_recipes(sft, dpo, orpo, nll=1.0, odds=0.1, prompt=True, best=BEST, **common):
    """Recipes of pre-trained models: AdamW (0.9, 0.95), cosine, warm-up, 16 pairs a step."""
    adamw = {"betas": (0.9, 0.95), "schedule": "cosine"}
    common = {**adamw, "micro_batch": 2, "evaluations": 10} | common
    return {
        "sft": Recipe(lr=sft, epochs=2, **best, **common),
        "sft_chosen": Recipe(lr=sft, epochs=2, **common),
        "reward": Recipe(lr=sft, **common),
        "dpo_plain": Recipe(lr=dpo, **best, **common),
        "dpo": Recipe(lr=dpo, nll_weight=nll, **best, **common),
        "orpo": Recipe(lr=orpo, lambda_or=odds, nll_on_prompt=prompt, **best, **common),
        "orpo_lambda0": Recipe(lr=orpo, nll_on_prompt=prompt, **best, **common),
    }


HUB = {
    "data": "Anthropic/hh-rlhf",
    "pairs": None,
    "held_out": 256,
    "samples": 1,
    "sweep_epochs": 0.02,
    "max_length": 512,
    "max_new_tokens": 128,
    "eval_batch": 16,
    "seeds": 1,
    "flaw_rates": (),
}
# Where the numbers come from: `tools.readme_table` makes a table of these and of the recipes.
DPO_PAPER = "[DPO](https://arxiv.org/abs/2305.18290), App. B"
HANDBOOK = "https://github.com/huggingface/alignment-handbook/tree/main/recipes/zephyr-7b-beta"
TRL = "https://github.com/huggingface/trl/blob"
TRL_ORPO = (
    f"[TRL's example]({TRL}/004c86793d6698f370d31a562f1c67da124a1152/examples/scripts/orpo.py)"
)
TRL_SCRIPTS = f"{TRL}/v1.16.0/trl/scripts"
AUTHORS = "https://github.com/xfactlab/orpo/blob/main/scripts/run_mistral_orpo_beta.sh"
TRIAL = "rate: a trial on one seed, not tuned"
OWN_SOURCES = {
    "sft": "rate: ours, tuned on seeds 0–2",
    "dpo": f"rate: ours, tuned on seeds 0–2; β: {DPO_PAPER}",
    "orpo": "rate: ours, tuned on seeds 0–2; λ: the lab page",
}
PROFILES = {
    "smoke": Profile(
        name="smoke",
        sources=OWN_SOURCES,
        sweep_epochs=0.5,
        seeds=1,
        flaw_rates=(0.0, 0.3),
        objects=4,
        plain_lines=4000,
        demonstrations=2400,
        pairs=600,
        held_out=100,
        heads=2,
        recipes=_tiny_recipes(
            base={"lr": 5e-3, "epochs": 1.5},
            sft={"lr": 5e-3, "epochs": 3},
            dpo={"lr": 4e-4, "epochs": 3},
            plain={"lr": 1e-4, "epochs": 3},
            orpo={"lr": 5e-3, "epochs": 4},
            evaluations=4,
        ),
    ),
    "cpu": Profile(
        name="cpu",
        sources=OWN_SOURCES,
        recipes=_tiny_recipes(
            # SFT, DPO and ORPO get equal epochs: only then can their costs be compared.
            base={"lr": 5e-3, "epochs": 2},
            sft={"lr": 5e-3, "epochs": 2},
            dpo={"lr": 3e-4, "epochs": 2},
            plain={"lr": 4e-5, "epochs": 2},
            orpo={"lr": 5e-3, "epochs": 2},
        ),
    ),
    # A real chat model on a laptop: no hub, no GPU. DPO and ORPO start from the model itself.
    "smollm": Profile(
        name="smollm",
        model=SMOLLM,
        data=INSTRUCTIONS,
        template="own",
        start="base",
        recipes=_hub_recipes(
            *(5e-5, 1e-5, 5e-5, 0.2, 0.5), prompt=False, best={}, micro_batch=4, evaluations=2
        ),
        sources={
            "sft": TRIAL,
            "dpo": f"{TRIAL}; β: {DPO_PAPER}",
            "orpo": f"{TRIAL}; λ: the lab page",
        },
        pairs=304,  # as many as the file of pairs gives while it is not whole; then 512
        held_out=100,  # then 128
        sampled_prompts=32,
        flaw_rates=(),
        max_length=512,
        max_new_tokens=96,
        eval_batch=8,
        cpu_bfloat16=True,
    ),
    "gpt2": Profile(
        name="gpt2",
        model="openai-community/gpt2",
        recipes=_hub_recipes(5e-5, 5e-6, 8e-6),
        **HUB,
        sources={
            "sft": "rate: the default of transformers' Trainer; not tuned",
            "dpo": f"rate: the upper end of the lab pages' 5e-7 to 5e-6, not tuned; β: {DPO_PAPER}",
            "orpo": f"rate: {TRL_ORPO} for GPT-2; λ: its default; not tuned",
        },
    ),
    # Full fine-tuning under autocast: weights, gradients, moments and the reference take 9.9 GB.
    "qwen-0.5b": Profile(
        name="qwen-0.5b",
        model="Qwen/Qwen2.5-0.5B",
        recipes=_hub_recipes(2e-5, 5e-7, 8e-6, micro_batch=1),
        gradient_checkpointing=True,
        **{**HUB, "eval_batch": 4},  # the logits of 152k words are large
        sources={
            "sft": f"rate: [TRL's example]({TRL_SCRIPTS}/sft.py) for Qwen2-0.5B; not tuned",
            "dpo": f"rate: [TRL's example]({TRL_SCRIPTS}/dpo.py) for Qwen2-0.5B-Instruct, "
            f"not tuned; β: {DPO_PAPER}",
            "orpo": f"rate: {TRL_ORPO} for GPT-2; λ: its default; not tuned",
        },
    ),
    "qlora-7b": Profile(
        name="qlora-7b",
        model="mistralai/Mistral-7B-v0.1",
        recipes=_hub_recipes(2e-4, 5e-6, 5e-5, micro_batch=1),
        lora=16,
        four_bit=True,
        gradient_checkpointing=True,
        optimizer="paged_adamw_8bit",
        **{**HUB, "eval_batch": 4},
        sources={
            "sft": "rate: [QLoRA](https://arxiv.org/abs/2305.14314) at 7B, and "
            f"[Zephyr's QLoRA recipe]({HANDBOOK}/sft); not tuned",
            "dpo": f"rate: [Zephyr's QLoRA recipe]({HANDBOOK}/dpo) (its β: 0.01), not tuned; "
            f"β: {DPO_PAPER}",
            "orpo": f"rate: ten times that of the [ORPO authors' script for Mistral-7B]({AUTHORS}),"
            " since only an adapter learns; not tuned; λ: the same script",
        },
    ),
}


def gpu_gigabytes() -> float:
    """Memory of the first CUDA GPU in GB (1e9 bytes), 0.0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def device_and_precision(profile: Profile | None = None) -> tuple[str, str, str]:
    """(device, dtype name, why). CUDA: bfloat16 from compute capability 8.0, float16 below. CPU:
    float32, or bfloat16 for a profile that asks for it, if the processor has the instructions.

    LAB_PRECISION=float32 wins. Raises: ValueError for another LAB_PRECISION.
    """
    import torch

    device, dtype, why = "cpu", "float32", "no CUDA GPU"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device, dtype = "cuda", "bfloat16" if major >= 8 else "float16"
        why = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        why += ": no bfloat16, so loss scaling" if major < 8 else ""
    elif profile and profile.cpu_bfloat16:
        has = torch.cpu.get_capabilities()
        names = [name for name in ("amx_bf16", "avx512_bf16") if has.get(name)]
        dtype = "bfloat16" if names else "float32"
        why += f"; this CPU has {names[0] if names else 'no instructions for bfloat16'}"
    if (asked := os.environ.get("LAB_PRECISION") or dtype) not in (dtype, "float32"):
        raise ValueError(f"LAB_PRECISION is {asked!r}: set it to float32, or unset it.")
    return device, asked, why if asked == dtype else "LAB_PRECISION is set"


def get_profile(name: str | None = None) -> Profile:
    """The profile to use: `name`, else LAB_PROFILE, else by hardware; LAB_MODEL, LAB_DATA,
    LAB_SFT_DATA applied.

    Raises: ValueError for an unknown profile.
    """
    reason = "asked for" if name else "LAB_PROFILE is set"
    if not (name := name or os.environ.get("LAB_PROFILE")):
        gigabytes = gpu_gigabytes()
        name = "gpt2" if gigabytes >= 8 else "cpu"
        here = f"a {gigabytes:.0f} GB CUDA GPU" if gigabytes else "no CUDA GPU"
        reason = f"LAB_PROFILE is not set; {here} is here"
    if name not in PROFILES:
        known = ", ".join(PROFILES)
        raise ValueError(f"Unknown profile {name!r}. Set LAB_PROFILE to one of: {known}.")
    profile = replace(PROFILES[name], reason=reason)
    names = ("LAB_MODEL", "LAB_DATA", "LAB_SFT_DATA")
    model, data, sft = (local_path(os.environ.get(name)) for name in names)
    context = max(profile.max_length, 256)
    if model:
        profile = replace(profile, model=model)
        # A pre-trained model needs the gentle recipes and a real context.
        if "base" in profile.recipes:
            profile = replace(profile, recipes=PROFILES["gpt2"].recipes, max_length=context)
    if data:
        profile = replace(profile, data=data, max_length=context)
        # Free text needs more words than the world, and more room for them.
        if profile.model == TINY:
            words = max(profile.vocabulary, 4096)
            profile = replace(profile, vocabulary=words, pairs=None, max_new_tokens=96)
    profile = replace(profile, sft_data=sft or "")
    names = tuple(folder_name(value) for value in (model, data, sft) if value)
    return replace(profile, overrides=names)
