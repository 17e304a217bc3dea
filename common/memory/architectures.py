"""The architecture of each profile's model without a download, and a model with random weights.

The memory and the time of a training step depend on the architecture alone, not on the weights.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

from common import models
from common.profiles import SMOLLM, Profile

# As in the config.json of each model on the hub; what is not here is the default of its model type.
SIZE_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta"),
)


def _sizes(model_type: str, *values: float, **others) -> dict:
    """Fields of a configuration. Args: `values`: of SIZE_FIELDS; `others`: further fields."""
    return {"model_type": model_type, **dict(zip(SIZE_FIELDS, values, strict=True)), **others}


_QWEN = {"bos_token_id": 151643, "eos_token_id": 151643}
_LLAMA = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
KNOWN_MODELS = {
    "openai-community/gpt2": {"model_type": "gpt2"},
    SMOLLM: _sizes(
        *("llama", 576, 1536, 30, 9, 3, 49152, 8192, 1e5),
        **{"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-0.5B": _sizes(
        *("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, 1e6), tie_word_embeddings=True, **_QWEN
    ),
    "Qwen/Qwen2.5-7B": _sizes(
        *("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, 1e6), tie_word_embeddings=False, **_QWEN
    ),
    "mistralai/Mistral-7B-v0.1": _sizes(
        *("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e4), sliding_window=4096, **_LLAMA
    ),
    "meta-llama/Llama-2-7b-hf": _sizes(
        *("llama", 4096, 11008, 32, 32, 32, 32000, 4096, 1e4), **_LLAMA
    ),
}


def model_config(source: str) -> PretrainedConfig:
    """The configuration of a model: built in for KNOWN_MODELS, else read from a local folder or the
    hub. Raises: ModelError.
    """
    if source in KNOWN_MODELS:
        return AutoConfig.for_model(**KNOWN_MODELS[source])
    return models._from_hub(AutoConfig.from_pretrained, source)


def profile_config(profile: Profile) -> PretrainedConfig:
    """The configuration of a profile's model as `models.load_model` has it. Raises: ModelError."""
    if models.is_tiny(profile):
        return models.tiny_config(profile, profile.vocabulary, bos_token_id=0, eos_token_id=0)
    return models.with_fused_gelu(model_config(profile.model))


def random_model(profile: Profile, device: str):
    """A model as `models.load_model` would load the profile's, but with random weights, on
    `device`.

    A 4-bit one is made layer by layer: never more than one layer is there in full precision.
    Raises: ModelError.
    """
    config = profile_config(profile)
    if profile.four_bit:
        return _random_four_bit(config, device)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, **options)


def _random_four_bit(config: PretrainedConfig, device: str):
    """The library decides which layers are quantised, and how: head and embeddings are not."""
    compute = models.device_dtype() if torch.device(device).type == "cuda" else torch.float32
    with torch.device("meta"):  # shapes only
        model = AutoModelForCausalLM.from_config(config, dtype=compute, attn_implementation="sdpa")
    quantizer = AutoHfQuantizer.from_config(models.four_bit_settings(compute), pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": device})
    for module in model.modules():
        _fill(model, module, compute, device)
    model.tie_weights()
    model.hf_quantizer = quantizer
    return models.without_repacking(quantizer.postprocess_model(model))


def _fill(model, module: torch.nn.Module, compute: torch.dtype, device: str) -> None:
    """Gives a module's own weights memory and random values, rounded at once in a 4-bit layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    if not isinstance(module, Linear4bit):
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        return
    shape, settings = (module.out_features, module.in_features), vars(module.weight)
    full = torch.empty(shape, dtype=compute, device=device).normal_(std=0.02)
    # Moving it rounds it.
    module.weight = Params4bit(full, requires_grad=False, **settings).to(device)
    if module.bias is not None:
        zeros = torch.zeros(module.out_features, dtype=compute, device=device)
        module.bias = torch.nn.Parameter(zeros, requires_grad=False)
