"""Tokenizers and models: from a config, a local folder or the hub; LoRA and 4-bit; the frozen
reference.
"""

import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from common.profiles import TINY, Profile, device_and_precision

# Loading a small model again and again would bury the notebook's own output.
transformers.utils.logging.disable_progress_bar()
logging.getLogger("accelerate").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

END, PAD = "<|endoftext|>", "<|pad|>"
# Writes the same text as the data: "\n\nHuman: {x}\n\nAssistant:" and " {y}" after it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] | trim }}"
    "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}"
    "{% else %}{{ '\n\nHuman: ' + message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


class ModelError(RuntimeError):
    """A model or tokenizer that cannot be loaded. The message says what to do."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with separate EOS and pad tokens and our chat
    template.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _from_hub(load, source: str, **options):
    """`load(source)`, with one clear sentence in place of the library's many errors."""
    if Path(source).is_absolute() and not Path(source).exists():
        raise ModelError(f"No model folder at {source}. Check LAB_MODEL.")
    try:
        return load(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"Could not load {source!r} ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "To go on offline, point LAB_MODEL to a folder saved with save_pretrained, or use LAB_PROFILE=cpu, "
            "which needs no download. "
            "A gated model needs its licence accepted on the hub and `hf auth login`."
        ) from error


def load_tokenizer(source: str | Path):
    """The tokenizer of a local folder or hub id, with a pad token and the course's chat template.

    Raises: ModelError, also for one without an end token or without character offsets.
    """
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, str(source))
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        lacks = (
            "has no end token (EOS)"
            if tokenizer.is_fast
            else "gives no character offsets (it is a slow one)"
        )
        raise ModelError(
            f"The tokenizer of {str(source)!r} {lacks}, which training needs: name another LAB_MODEL."
        )
    if (
        tokenizer.pad_token is None
    ):  # Harmless here: masks come from lengths, so EOS is still scored.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(profile: Profile, vocabulary: int, **token_ids: int) -> GPT2Config:
    """The architecture of the embedded profiles: a small GPT-2 without dropout."""
    # "gelu_pytorch_tanh" is GPT-2's own "gelu_new" in one fused kernel instead of seven small ones.
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=profile.max_length,
        n_embd=profile.width,
        n_layer=profile.layers,
        n_head=profile.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **token_ids,
    )


def new_tiny_model(profile: Profile, tokenizer, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, sized by the profile. The seed decides the weights; the global
    RNG is left alone.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = tiny_config(
        profile, len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=pad
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def four_bit_settings(compute: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with double quantisation, as in QLoRA (Dettmers et al. 2023); products are computed in
    `compute`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def with_fused_gelu(config):
    """The configuration, GPT-2's "gelu_new" in its fused form: the same function, with far fewer
    tensors kept.
    """
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def device_dtype() -> torch.dtype:
    """The precision in which this machine's device computes."""
    return getattr(torch, device_and_precision()[1])


def load_model(
    source: str | Path,
    profile: Profile,
    reward_head: bool = False,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
):
    """A causal language model (or, with `reward_head`, the same body with one output) on this
    machine's device.

    Weights stay in float32 and are run in the device's precision by the training loop; only a 4-bit
    profile loads them quantised. Pickled weights and remote code are refused. Raises: ModelError.
    """
    device = device or device_and_precision()[0]
    adapter = (
        Path(source) / "adapter_config.json"
    )  # a sweep of a 4-bit profile leaves one: its base has the config
    base = (
        json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if adapter.exists()
        else source
    )
    config = with_fused_gelu(_from_hub(AutoConfig.from_pretrained, str(base)))
    options = {
        "config": config,
        "dtype": dtype,
        "use_safetensors": True,
        "attn_implementation": "sdpa",
    }
    if profile.four_bit:
        compute = device_dtype()
        options |= {"dtype": compute, "quantization_config": four_bit_settings(compute)}
    kind = AutoModelForSequenceClassification if reward_head else AutoModelForCausalLM
    before = transformers.utils.logging.get_verbosity()
    if reward_head:  # The library would warn that the head is new: it is meant to be.
        config.num_labels = 1
        transformers.utils.logging.set_verbosity_error()
    try:
        model = _from_hub(kind.from_pretrained, str(source), **options)
    finally:
        transformers.utils.logging.set_verbosity(before)
    return without_repacking(model) if profile.four_bit else model.to(device)


def without_repacking(model):
    """The 4-bit model itself, whose layers will not repack their weights.

    On a CPU with AVX512-BF16 bitsandbytes repacks them in the first evaluation forward, and from
    then on no gradient passes through the layer: training after an evaluation would be silently
    wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def check_fits(model, tokenizer, profile: Profile) -> None:
    """Raises ModelError if the model has fewer positions than the profile's max_length, or fewer
    words than its tokenizer.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and positions < profile.max_length:
        raise ModelError(
            f"The model has {positions} positions, the profile needs {profile.max_length}: too short. "
            "Name another LAB_MODEL, or another profile."
        )
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise ModelError(
            f"The model knows {words} words, its tokenizer {len(tokenizer)}: they do not belong together. "
            "Save both with save_pretrained in the folder that LAB_MODEL names."
        )


def lora_settings(model, profile: Profile):
    """LoRA of the profile's rank on all linear layers but the head."""
    from peft import LoraConfig

    rank, task = profile.lora or 8, "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type=task
    )


def add_lora(model, profile: Profile):
    """The model with a fresh LoRA adapter on its linear layers (Hu et al. 2021). Adapter off = the
    model as it was.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if profile.four_bit:
        model = prepare_model_for_kbit_training(
            model,
            profile.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return get_peft_model(model, lora_settings(model, profile))


def merge_lora(model, source: str | Path, profile: Profile):
    """A plain model with the adapter merged into weights that were never quantised.

    A 4-bit model is not merged in place, since its weights are rounded to four bits: the base is
    loaded again from `source`, and the adapter's weights are merged there. The sum is taken in
    float32 and rounded once, to the precision from which the 4-bit loader quantises: bfloat16 on
    most GPUs, half the memory and disk of float32.
    """
    if not profile.four_bit:
        return model.merge_and_unload()
    from dataclasses import replace

    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapter = get_peft_model_state_dict(model)
    # On the CPU: the quantised model still fills the GPU, and full precision would not fit beside
    # it.
    head, dtype = hasattr(model, "score"), device_dtype()
    plain = load_model(
        source, replace(profile, four_bit=False), reward_head=head, device="cpu", dtype=dtype
    )
    full = get_peft_model(plain, model.peft_config["default"])
    set_peft_model_state_dict(full, adapter)
    return full.merge_and_unload()


def disable_dropout(model) -> None:
    """Sets every dropout rate to 0, as TRL does for preference training."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def freeze(model):
    """The model itself, in evaluation mode, its parameters without gradient: fit to be a reference."""
    return model.eval().requires_grad_(False)


def frozen_copy(model):
    """A frozen copy, for a reference that must not move while the model is trained."""
    return freeze(copy.deepcopy(model))


def is_tiny(profile: Profile) -> bool:
    """Does this profile build its own model and tokenizer from its data?"""
    return profile.model == TINY
