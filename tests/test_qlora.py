"""The 4-bit path for real, on the CPU: a tiny Llama is trained in nf4 with LoRA, merged, saved and
loaded again.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import bitsandbytes
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import assert_same
from transformers import LlamaConfig, LlamaForCausalLM

from common import lab as runs
from common import models, training
from common.lab import Lab
from common.profiles import PROFILES
from common.toyworld import World
from common.training import Session, checkpoints, processes, train

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def save_tiny_llama(folder, tokenizer, vocabulary: int | None = None, positions: int = 256) -> None:
    """Weights ten times the usual size, so that predictions are far from uniform; saved as the hub
    keeps them.
    """
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        max_position_embeddings=positions,
        num_key_value_heads=1,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SIZES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small(model, data):
    """Profile `qlora-7b` with everything that makes it what it is, on a tiny Llama."""
    profile = PROFILES["qlora-7b"]
    recipes = {
        name: replace(
            recipe, lr=1e-2, epochs=1, batch_size=8, micro_batch=4, evaluations=2, patience=0
        )
        for name, recipe in profile.recipes.items()
    }
    return replace(
        profile,
        model=str(model),
        data=str(data),
        recipes=recipes,
        lora=4,
        held_out=8,
        eval_batch=8,
        max_length=200,
        max_new_tokens=8,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(model folder, data file)."""
    folder = tmp_path_factory.mktemp("llama")
    rows = World(4).pairs(80)
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    save_tiny_llama(folder / "model", tiny.metaspace_tokenizer(texts))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", folder / "pairs.jsonl"


@pytest.fixture(
    scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.more)]
)
def trained(request, source, tmp_path_factory):
    """(lab, its runs of SFT, DPO and ORPO). bfloat16 is what most GPUs take: here it is only
    slower.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_RUNS", str(tmp_path_factory.mktemp("runs")))
        for module in (models, processes, runs, training):
            patch.setattr(
                module, "device_and_precision", lambda *_: ("cpu", request.param, "a test")
            )
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # else a process keeps its first precision
        lab = Lab(small(*source))
        yield lab, {stage: train(lab, stage) for stage in ("sft", "dpo_plain", "orpo")}
    AcceleratorState._reset_state(reset_partial_state=True)


IDS = torch.tensor([[1, 9, 60, 31, 7, 12]])


def test_every_stage_lowers_its_held_out_loss(trained):
    for run in trained[1].values():
        losses = [row["held_out_loss"] for row in run.metrics if "held_out_loss" in row]
        assert min(losses[1:]) < losses[0]


def test_dpo_starts_at_ln_2(trained):
    """The reference is the policy with its adapter off: the merged SFT weights, quantised. A fresh
    adapter adds 0, so policy and reference agree to the last bit: -log sigmoid(0) = ln 2.
    """
    first, second = trained[1]["dpo_plain"].metrics[:2]
    assert_same(first["held_out_loss"], 0.6931471805599453)
    assert_same(second["loss"], 0.6931471805599453)
    assert first["held_out_margin"] == first["held_out_kl"] == 0


def test_a_finished_run_loads_as_it_was_returned(trained):
    lab, made = trained
    for stage, run in made.items():
        with torch.no_grad():
            assert torch.equal(lab.load(stage)(IDS).logits, run.model(IDS).logits)


def test_the_saved_weights_are_the_parents_plus_the_adapter(source, trained, tmp_path, monkeypatch):
    """W + (alpha / rank) B A = W + 2 B A, W as it was saved and not its rounding to four bits,
    summed in float32 and rounded once to the precision from which the loader quantises. The adapter
    is the best one, as the run kept it.
    """
    lab, _ = trained
    kept, load_best = {}, training.checkpoints.load_best

    def loaded(model, folder):
        load_best(model, folder)
        kept.update(
            {
                name: weight.detach().clone()
                for name, weight in model.named_parameters()
                if "lora_" in name
            }
        )

    monkeypatch.setattr(training.checkpoints, "load_best", loaded)
    run = train(lab, "dpo", sweep=None, epochs=0.5)
    parent, merged = (load_file(lab.path(stage) / "model.safetensors") for stage in ("sft", "dpo"))
    dtype = getattr(torch, training.device_and_precision()[1])
    adapted = {name.removesuffix(".lora_A.default.weight") for name in kept if ".lora_A." in name}
    assert len(adapted) == 2 * 7 and run.record["steps"] == 4
    for name, weight in merged.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        before = parent[name].float()
        if layer in adapted:
            change = (
                2 * kept[f"{layer}.lora_B.default.weight"] @ kept[f"{layer}.lora_A.default.weight"]
            )
            assert change.abs().max() > 0
            before = before + change
        assert weight.dtype == dtype and torch.equal(weight, before.to(dtype))


def test_what_a_run_learnt_is_still_there_when_the_next_stage_rounds_its_weights(source, tmp_path):
    """Why the adapter is merged into W₀, though what was trained is Q(W₀) + Δ. Δ is 2 % of the
    weights. Read again in four bits, W₀ + Δ has moved along Δ by about its length; Q(W₀) + Δ has
    fallen back to Q(W₀).
    """
    profile = small(*source)
    name = "model.layers.0.mlp.up_proj"
    model = models.add_lora(models.load_model(source[0], profile), profile)
    layer = model.get_submodule(f"base_model.model.{name}")
    start = load_file(source[0] / "model.safetensors")[f"{name}.weight"].float()
    draw = torch.Generator().manual_seed(0)
    pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for weight in pair:
            weight.copy_(torch.randn(weight.shape, generator=draw))
        pair[1].mul_(0.02 * start.norm() / (2 * pair[1] @ pair[0]).norm())
        change = 2 * pair[1] @ pair[0]

    def in_four_bits(model):
        inner = model.get_submodule(name).weight
        return bitsandbytes.functional.dequantize_4bit(inner.data, inner.quant_state).float()

    def kept(weight):
        moved = in_four_bits(models.load_model(weight, profile)) - rounded
        return float((moved * change).sum() / change.square().sum())

    rounded = in_four_bits(models.load_model(source[0], profile))
    into_start = models.merge_lora(model, source[0], profile)
    into_start.save_pretrained(tmp_path / "into-start")
    with torch.no_grad():
        into_start.get_submodule(name).weight.copy_(rounded + change)
    into_start.save_pretrained(tmp_path / "into-rounded")
    assert 0.7 < kept(tmp_path / "into-start") < 1.3
    assert kept(tmp_path / "into-rounded") < 0.3


def test_the_adapter_is_float32_whatever_the_base_is(source):
    """float16 with loss scaling needs it: gradients of float16 weights cannot be unscaled."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        base = models.load_model(source[0], PROFILES["gpt2"], dtype=dtype)
        model = models.add_lora(base, PROFILES["qlora-7b"])
        assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {
            torch.float32
        }
        assert all(
            "lora_" in name for name, weight in model.named_parameters() if weight.requires_grad
        )


@pytest.mark.parametrize(
    ("precision", "mixed"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "no")]
)
def test_a_4_bit_run_is_scaled_and_cast_as_any_other(monkeypatch, precision, mixed):
    """On a T4 (float16) Accelerate scales the loss. Accelerate itself refuses float16 on a CPU: it
    is stood in for.
    """
    asked = {}
    monkeypatch.setattr(processes, "device_and_precision", lambda *_: ("cuda", precision, "a test"))
    one = SimpleNamespace(num_processes=1, distributed_type="NO", is_main_process=False)
    monkeypatch.setattr(processes, "Accelerator", lambda **settings: asked.update(settings) or one)
    assert processes.new_accelerator() is one
    assert asked == {"mixed_precision": mixed, "cpu": False}


def test_an_evaluation_does_not_change_the_gradients(source):
    """On CPUs with AVX512-BF16 bitsandbytes repacks its layers in the first pass without gradients,
    and afterwards passes none on. (On other CPUs this cannot fail.)
    """
    profile = small(*source)
    model = models.add_lora(models.load_model(source[0], profile), profile)
    first = next(weight for name, weight in model.named_parameters() if "lora_B" in name)

    def gradient():
        model.train()
        model(IDS, labels=IDS).loss.backward()
        found, first.grad = first.grad.clone(), None
        return found

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(IDS)
    assert before.abs().max() > 0 and torch.equal(gradient(), before)


def test_an_interrupted_run_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    """Stopped after the checkpoint of step 5 of 8 and resumed, the run ends with the weights of the
    whole one.
    """
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    lab = Lab(small(*source))
    whole = train(lab, "sft", sweep="whole", keep_best=False)
    save = checkpoints.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(lab, "sft", sweep="cut", keep_best=False, session=Session(checkpoint_every=5))
    monkeypatch.undo()
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    resumed = train(lab, "sft", sweep="cut", keep_best=False, session=Session(checkpoint_every=5))
    assert resumed.metrics[1]["loss"] == whole.metrics[1]["loss"] and len(resumed.metrics) == len(
        whole.metrics
    )
    with torch.no_grad():
        assert torch.equal(resumed.model(IDS).logits, whole.model(IDS).logits)


def test_a_sweep_keeps_the_adapter_alone_and_loads_as_it_was_returned(trained):
    """Its parent's weights are not written again."""
    lab, _ = trained
    run = train(lab, "dpo", sweep="short", epochs=0.5)
    assert (run.folder / "adapter_model.safetensors").exists() and not (
        run.folder / "model.safetensors"
    ).exists()
    with torch.no_grad():
        logits = run.model(IDS).logits
        assert torch.equal(lab.load("dpo", "short")(IDS).logits, logits)
        assert not torch.equal(lab.load("sft")(IDS).logits, logits)
