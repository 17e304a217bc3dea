"""The architecture of each profile's model without a download, and a model with random weights of
that architecture.

What a training step takes, in memory and time, depends on the architecture alone and not on what
the weights are.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

from common import models
from common.profiles import Profile, device_and_precision

# As in the config.json of each model on the hub; what is not here is the default of its model type.
KNOWN = {
    "openai-community/gpt2": {"model_type": "gpt2"},
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}


def model_config(source: str) -> PretrainedConfig:
    """The configuration of a model: built in for those in `KNOWN`, else read from a local folder or
    the hub.

    Raises: ModelError.
    """
    if source in KNOWN:
        return AutoConfig.for_model(**KNOWN[source])
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
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )


def _random_four_bit(config: PretrainedConfig, device: str):
    """The library itself decides which layers are quantised, and how: head and embeddings are not."""
    compute = (
        getattr(torch, device_and_precision()[1])
        if torch.device(device).type == "cuda"
        else torch.float32
    )
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
    """Gives a module's own weights memory and random values; those of a 4-bit layer are rounded at
    once.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    if not isinstance(module, Linear4bit):
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        return
    shape, settings = (module.out_features, module.in_features), vars(module.weight)
    full = torch.empty(shape, dtype=compute, device=device).normal_(std=0.02)
    module.weight = Params4bit(full, requires_grad=False, **settings).to(
        device
    )  # moving it rounds it
    if module.bias is not None:
        module.bias = torch.nn.Parameter(
            torch.zeros(module.out_features, dtype=compute, device=device), False
        )
