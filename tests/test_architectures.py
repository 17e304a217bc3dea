"""Architectures without a download, and models of them with random weights."""

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common import models
from common.memory.architectures import KNOWN_MODELS, model_config, random_model
from common.profiles import PROFILES

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def parameters(source: str) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(source)).num_parameters()


@pytest.mark.parametrize(
    ("source", "millions"),
    [
        ("openai-community/gpt2", 124.44),
        ("smollm2", 134.52),
        ("Qwen/Qwen2.5-0.5B", 494.03),
        ("Qwen/Qwen2.5-7B", 7615.62),
        ("mistralai/Mistral-7B-v0.1", 7241.73),
        ("meta-llama/Llama-2-7b-hf", 6738.42),
    ],
)
def test_a_known_architecture_has_the_published_number_of_parameters(source, millions):
    """As on the model's page of the hub, in millions, a tied head counted once."""
    assert parameters(source) / 1e6 == pytest.approx(millions, abs=0.01)


def test_every_full_size_profile_is_known():
    assert {
        profile.model for profile in PROFILES.values() if not models.is_tiny(profile)
    } <= KNOWN_MODELS.keys()


def test_rotation_and_window_are_those_of_the_model():
    """Qwen 2.5 turns by base 1e6, and looks back without a window."""
    assert model_config("Qwen/Qwen2.5-0.5B").rope_parameters["rope_theta"] == 1e6
    assert model_config("Qwen/Qwen2.5-0.5B").sliding_window is None
    assert model_config("mistralai/Mistral-7B-v0.1").sliding_window == 4096


def test_another_model_is_read_from_its_folder_and_a_missing_one_says_what_to_do(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert model_config(str(tmp_path)).hidden_size == 64
    with pytest.raises(models.ModelError, match="point LAB_MODEL to a folder"):
        model_config("nobody/nothing")


@pytest.fixture
def llama(tmp_path) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    return model


def described(model) -> dict[str, tuple]:
    """Shape, type and trainability of every weight and buffer, and what the library keeps beside a
    4-bit weight.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = {
        name: (tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors
    }
    states = {
        name: sorted(tensor.quant_state.as_dict(packed=True))
        for name, tensor in tensors
        if hasattr(tensor, "quant_state")
    }
    return {
        "tensors": shapes,
        "quantised": states,
        "four_bit": getattr(model, "is_loaded_in_4bit", False),
    }


def test_in_4_bits_everything_is_as_loading_leaves_it(llama, tmp_path):
    """14 linear layers of nf4 in two blocks of seven; embedding, norms and head are in the compute
    type.
    """
    profile = tiny.micro_profile(model=str(tmp_path), four_bit=True, lora=4)
    loaded, random = models.load_model(tmp_path, profile), random_model(profile, "cpu")
    assert described(random) == described(loaded)
    assert len(described(random)["quantised"]) == 14
    assert random.model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "nf4"
    assert random.model.layers[0].mlp.up_proj.weight.quant_state.nested
    assert random.config._attn_implementation == "sdpa"


def test_a_4_bit_model_has_values_and_trains_through_its_adapter(llama, tmp_path):
    """What was never filled would be NaN or 0 sooner or later; rotations are those of the loaded
    model.
    """
    profile = tiny.micro_profile(model=str(tmp_path), four_bit=True, lora=4)
    random = random_model(profile, "cpu")
    assert torch.equal(random.model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq)
    weight = random.model.layers[1].self_attn.q_proj
    spread = weight(torch.eye(64)).std().item()
    assert spread == pytest.approx(0.02, rel=0.2)
    model = models.add_lora(random, profile).train()
    ids = torch.arange(12)[None]
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert 3 < loss.item() < 6  # ln 96 = 4.56 where nothing was learnt
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder, profile: models.load_model(folder, profile),
        lambda folder, profile: random_model(profile, "cpu"),
    ],
)
def test_gradients_of_a_4_bit_model_are_the_same_after_an_evaluation(llama, tmp_path, load):
    """Left alone, bitsandbytes repacks the weights in it on some CPUs, and stops the gradients from
    then on.
    """
    profile = tiny.micro_profile(model=str(tmp_path), four_bit=True, lora=4)
    model, ids = models.add_lora(load(tmp_path, profile), profile), torch.arange(12)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]

    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"model": "llama"}])
def test_in_full_precision_it_is_an_ordinary_model(llama, tmp_path, changes):
    """The tiny profiles' own GPT-2, or the Llama of the folder."""
    profile = replace(tiny.micro_profile(), **changes and {"model": str(tmp_path)})
    model = random_model(profile, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if changes:
        assert model.num_parameters() == llama.num_parameters()
    else:
        assert (model.config.n_embd, model.config.vocab_size) == (profile.width, profile.vocabulary)
