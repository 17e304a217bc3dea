"""Tokenizers and models: from a config, a folder or the hub; LoRA, 4-bit; the frozen reference."""

import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from common.io.formats import Unusable
from common.io.templates import CHAT_TEMPLATE, HH, read_as
from common.profiles import TINY, Profile, device_and_precision

# Loading a small model again and again would bury the notebook's own output.
transformers.utils.logging.disable_progress_bar()
logging.getLogger("accelerate").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

END, PAD = "<|endoftext|>", "<|pad|>"
REWARD_HEAD = "reward_head.safetensors"


class ModelError(RuntimeError):
    """A model or tokenizer that cannot be loaded. The message says what to do."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`, with EOS and pad tokens apart, and our template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _from_hub(load, source: str, **options):
    """`load(source)`, never running code that came with it; one clear sentence for all errors."""
    from common.io.pretrained import located

    try:
        name, pinned = located(source)
    except FileNotFoundError as error:
        raise ModelError(str(error)) from error
    try:
        found = load(name, trust_remote_code=False, **pinned, **options)  # None: it would ask
        # Where transformers knows the model, it leaves such code alone in silence.
        if "auto_map" in vars(found) | getattr(found, "init_kwargs", {}):
            raise ValueError("auto_map is there, and trust_remote_code is off")
        return found
    except (OSError, ValueError, SafetensorError) as error:
        advice = (
            "To go on offline, point LAB_MODEL to a folder saved with save_pretrained, or use "
            "LAB_PROFILE=cpu, which needs no download. A gated model needs its licence accepted on "
            "the hub and `hf auth login`."
        )
        if "trust_remote_code" in str(error):
            advice = "It asks for code of its own (auto_map), never run here. Name another model."
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ModelError(f"Could not load {source!r} ({said}). {advice}") from error


def load_tokenizer(source: str | Path, template: str = HH):
    """The tokenizer of a local folder or hub id, with a pad token, and the `template` to read in.

    Raises: ModelError, also for one without an end token or character offsets; see `read_as`.
    """
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, str(source))
    name = f"The tokenizer of {str(source)!r}"
    try:
        read_as(template, tokenizer)
    except Unusable as error:
        raise ModelError(f"{name}: {error}. Name a chat model, or another profile.") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name} has no end token (EOS): name another LAB_MODEL.")
    if not tokenizer.is_fast:
        raise ModelError(f"{name} gives no character offsets (it is slow): name another LAB_MODEL.")
    if tokenizer.pad_token is None:  # masks come from lengths, so EOS is still scored
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tiny_config(profile: Profile, vocabulary: int, **token_ids: int) -> GPT2Config:
    """The architecture of the embedded profiles: a small GPT-2 without dropout."""
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=profile.max_length,
        n_embd=profile.width,
        n_layer=profile.layers,
        n_head=profile.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own "gelu_new" in one fused kernel
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **token_ids,
    )


def new_tiny_model(profile: Profile, tokenizer, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 with random weights from the seed. The global random state is left alone."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
    config = tiny_config(profile, len(tokenizer), **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def four_bit_settings(compute: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with double quantisation, as in QLoRA (Dettmers et al. 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def with_fused_gelu(config):
    """The configuration, with GPT-2's "gelu_new" in its fused form: same values, less memory."""
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def device_dtype() -> torch.dtype:
    """The precision in which this machine's device computes."""
    return getattr(torch, device_and_precision()[1])


class RewardModel(torch.nn.Module):
    """A language model's body, and one linear unit that reads the last token of each row.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), Sec. 3.5.
    """

    def __init__(self, body):
        super().__init__()
        self.body, self.config = body, body.config
        self.head = torch.nn.Linear(body.config.hidden_size, 1, bias=False, device=body.device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Rewards, (rows,), of token ids padded on the right, (rows, length)."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        last = attention_mask.sum(1) - 1
        return self.head(hidden[torch.arange(len(last)), last].to(self.head.weight.dtype))[:, 0]

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def get_input_embeddings(self):
        return self.body.get_input_embeddings()

    def save_pretrained(self, folder: Path, state_dict: dict | None = None) -> None:
        """Saves the body as transformers does, and the head beside it."""
        weights = state_dict or self.state_dict()
        body = {name[5:]: weight for name, weight in weights.items() if name.startswith("body.")}
        self.body.save_pretrained(folder, state_dict=body)
        save_file({"weight": weights["head.weight"].contiguous()}, Path(folder) / REWARD_HEAD)


def load_model(
    source: str | Path,
    profile: Profile,
    reward_head: bool = False,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
):
    """A causal language model or, with `reward_head`, a RewardModel, on this machine's device.

    Weights are float32, run in the device's precision by the training loop, or 4-bit in a 4-bit
    profile. Pickled weights and remote code are refused. Raises: ModelError.
    """
    device = device or device_and_precision()[0]
    # A sweep of a 4-bit profile leaves an adapter; its base has the configuration.
    adapter, base = Path(source) / "adapter_config.json", source
    if adapter.exists():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    config = with_fused_gelu(_from_hub(AutoConfig.from_pretrained, str(base)))
    options = {"config": config, "use_safetensors": True, "attn_implementation": "sdpa"}
    if profile.four_bit:
        dtype = device_dtype()
        options["quantization_config"] = four_bit_settings(dtype)
    kind = AutoModel if reward_head else AutoModelForCausalLM
    model = _from_hub(kind.from_pretrained, str(source), dtype=dtype, **options)
    model = without_repacking(model) if profile.four_bit else model.to(device)
    if reward_head:
        model = RewardModel(model)
        if (head := Path(source) / REWARD_HEAD).exists():
            model.head.load_state_dict(load_file(head))
    return model


def without_repacking(model):
    """The 4-bit model itself, whose layers will not repack their weights.

    On a CPU with AVX512-BF16 bitsandbytes repacks them in the first evaluation forward. From then
    on no gradient passes through the layer, and training is silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def check_fits(model, tokenizer, profile: Profile) -> None:
    """Raises ModelError if the model has too few positions or too few words."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and positions < profile.max_length:
        raise ModelError(
            f"The model has {positions} positions, the profile needs {profile.max_length}: too "
            "short. Name another LAB_MODEL, or another profile."
        )
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise ModelError(
            f"The model knows {words} words, its tokenizer {len(tokenizer)}: they do not belong "
            "together. Save both with save_pretrained in the folder that LAB_MODEL names."
        )


def cache_bytes(config) -> int:
    """Bytes of a token's keys and values in all layers, in float32."""
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * key_heads * per_head * 4


def answers_at_once(config, tokens: int) -> int:
    """How many answers to write at once: 256, or as many as have their keys and values in 2 GB."""
    return max(1, min(256, int(2e9 / (tokens * cache_bytes(config)))))


def lora_settings(profile: Profile):
    """LoRA of the profile's rank on all linear layers but the head."""
    from peft import LoraConfig

    rank = profile.lora or 8
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")


def add_lora(model, profile: Profile):
    """The model with a fresh LoRA adapter on its linear layers (Hu et al. 2021).

    With the adapter off it is the model as it was.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if profile.four_bit:
        checkpoint = profile.gradient_checkpointing
        model = prepare_model_for_kbit_training(model, checkpoint, {"use_reentrant": False})
    return get_peft_model(model, lora_settings(profile))


def merge_lora(model, source: str | Path, profile: Profile):
    """The plain model W₀ + Δ: the adapter merged into weights that were never quantised.

    A 4-bit run trained Q(W₀) + Δ, which is another model. But whatever starts from this one rounds
    it again: Q(Q(W₀) + Δ) loses a small Δ, and Q(W₀ + Δ) keeps it on average. The sum is taken in
    float32 and rounded once, to the precision from which the 4-bit loader quantises.
    """
    if isinstance(model, RewardModel):
        model.body = merge_lora(model.body, source, profile)
        return model
    if not profile.four_bit:
        return model.merge_and_unload()
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    # On the CPU: the quantised model still fills the GPU.
    options = {"use_safetensors": True, "dtype": device_dtype(), "attn_implementation": "sdpa"}
    plain = _from_hub(type(model.get_base_model()).from_pretrained, str(source), **options)
    full = get_peft_model(plain, model.peft_config["default"])
    set_peft_model_state_dict(full, get_peft_model_state_dict(model))
    return full.merge_and_unload()


def prepared_policy(model, profile: Profile, method: str, lora: bool):
    """The model as training has it: adapter, gradient checkpointing, dropout.

    Preference methods train without dropout, as in TRL: noise in the policy alone would move it
    away from its reference. The head of a reward model is trained whole, beside the adapter.
    """
    if isinstance(model, RewardModel):
        model.body = prepared_policy(model.body, profile, method, lora)
        return model
    model = add_lora(model, profile) if lora else model
    if profile.gradient_checkpointing and not profile.four_bit:
        plain = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=plain)
    for module in model.modules() if method not in ("lm", "sft") else ():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def freeze(model):
    """The model itself, in evaluation mode and without gradients: fit to be a reference."""
    return model.eval().requires_grad_(False)


def frozen_copy(model):
    """A frozen copy: a reference that does not move while the model is trained."""
    return freeze(copy.deepcopy(model))


def is_tiny(profile: Profile) -> bool:
    """Does this profile build its own model and tokenizer from its data?"""
    return profile.model == TINY
