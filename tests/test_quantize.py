"""Quantised variants: the sizes they should have, the same interface, and rounding that happens
only once.
"""

import pytest
import torch
from tiny import micro_profile

from common.data import left_padded
from common.lab import Lab
from common.training import train
from deploy.export import export, load_exported
from deploy.quantize import (
    QuantizeError,
    build,
    measure_variants,
    merge_routes,
    rounded,
    weight_bytes,
)


@pytest.fixture(scope="module")
def lab():
    lab = Lab(micro_profile(width=64, heads=2, layers=1), seed=43)
    train(lab, "base")
    return lab


@pytest.fixture(scope="module")
def source(lab, tmp_path_factory):
    return export(lab, "base", tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("variants")


def linear_weights(model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".h." in name and p.ndim == 2)


def padded(lab, prompts: list[str]) -> dict[str, torch.Tensor]:
    return left_padded(lab.tokenizer(prompts)["input_ids"], lab.tokenizer.eos_token_id)


def logits(model, lab):
    inputs = padded(lab, lab.prompts[:3])
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    extra = {} if "onnx" in type(model).__name__.lower() else {"position_ids": places}
    with torch.no_grad():
        return model(**inputs, **extra).logits.float()[:, -1]


@pytest.mark.parametrize(
    "name, largest",
    [
        ("bfloat16", 0.3),
        ("bnb-int8", 0.3),
        ("bnb-nf4", 2.0),
        ("onnx-float32", 1e-4),
        ("onnx-int8", 1.0),
    ],
)
def test_a_variant_computes_nearly_the_same(name, largest, lab, source, folder):
    exact = logits(load_exported(source)[0], lab)
    difference = (logits(build(name, source, folder).model, lab) - exact).abs().max()
    assert difference <= largest and (name == "onnx-float32" or difference > 0)


def test_bytes_of_weights_by_hand(lab, source, folder):
    """bfloat16 halves every weight. int8 takes one byte of each linear weight for four, and adds a
    float per row.
    """
    plain = load_exported(source)[0]
    assert weight_bytes(plain) == 4 * plain.num_parameters()
    assert build("bfloat16", source, folder).weight_bytes == 2 * plain.num_parameters()
    rows = 64 + 3 * 64 + 4 * 64 + 64  # outputs of the four linear layers
    assert build("bnb-int8", source, folder).weight_bytes == (
        4 * plain.num_parameters() - 3 * linear_weights(plain) + 4 * rows
    )


def test_embeddings_keep_their_bits_in_bitsandbytes(lab, source, folder):
    plain = load_exported(source)[0]
    variant = build("bnb-nf4", source, folder)
    assert variant.rounded_share == linear_weights(plain) / plain.num_parameters()
    torch.testing.assert_close(
        variant.model.transformer.wte.weight, plain.transformer.wte.weight, rtol=0, atol=0
    )


def test_nf4_read_again_after_a_forward_pass_is_the_same(lab, source, folder):
    """The first forward pass may repack the weights in memory; what is on the disk was written
    before.
    """
    first = build("bnb-nf4", source, folder)
    before = logits(first.model, lab)
    assert torch.equal(before, logits(build("bnb-nf4", source, folder).model, lab))
    assert torch.equal(before, logits(first.model, lab))


def test_onnx_ignores_padding(lab, source, folder):
    """A prompt alone and the same one padded on the left give the same next-token logits."""
    model = build("onnx-float32", source, folder).model
    together = logits(model, lab)
    for row, prompt in zip(together, lab.prompts[:3], strict=True):
        alone = model(**padded(lab, [prompt])).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_a_failure_is_named(source, folder, monkeypatch):
    monkeypatch.setattr(
        "deploy.quantize._bitsandbytes", lambda *_: (_ for _ in ()).throw(ImportError("no kernel"))
    )
    with pytest.raises(QuantizeError, match="bnb-int8 cannot be made here: ImportError: no kernel"):
        build("bnb-int8", source, folder)


def test_full_precision_against_itself_is_a_draw(lab, source, folder):
    """Equal logits and equal seeds give equal samples, so every comparison ties."""

    class Length:
        name = "the longer one"

        def prefer(self, questions):
            return [(len(a) > len(b)) - (len(a) < len(b)) for _, a, b in questions]

    variants = [build(name, source, folder) for name in ("float32", "onnx-float32")]
    report = measure_variants(lab, variants, Length(), batch=2, new_tokens=3)
    plain, onnx = report["float32"], report["onnx-float32"]
    assert (
        plain["win_rate"].rate == 0.5
        and plain["win_rate"].ties == len(lab.prompts)
        and plain["same_greedy"] == 1
    )
    assert onnx["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)


def test_rounding_in_blocks_by_hand():
    """3 bits: levels -3 … 3. Steps 2/3, 4/3 and 100/3, so 1 / (2/3) = 1.5 → 2 (to the even one),
    and 0.5 / (4/3) = 0.375 → 0. The block of zeros has no step.
    """
    weights = torch.tensor([[1.0, -2.0, 0.5, 4.0], [100.0, 30.0, 0.0, 0.0]])
    expected = torch.tensor([[4 / 3, -2.0, 0.0, 4.0], [100.0, 100 / 3, 0.0, 0.0]])
    torch.testing.assert_close(rounded(weights, 3, 2), expected)


def test_merge_routes_by_hand():
    """3 bits, one block: W₀ = (3, 1.4, -0.6, 0.4) has step 1, so Q(W₀) = (3, 1, -1, 0). With
    Δ = (0, 0.3, 0, 0.2): Q(W₀) + Δ = (3, 1.3, -1, 0.2) rounds back to Q(W₀), so nothing of Δ is
    kept. W₀ + Δ = (3, 1.7, -0.6, 0.6) went (0.7, 0.6) where Δ went (0.3, 0.2):
    (0.21 + 0.12) / 0.13 of it. Rounded it is (3, 2, -1, 1): (1, 1), (0.3 + 0.2) / 0.13.
    """
    start = torch.tensor([[3.0, 1.4, -0.6, 0.4]])
    change = torch.tensor([[0.0, 0.3, 0.0, 0.2]])
    found = merge_routes(start, change, bits=3, block=4)
    size = (9 + 1.69 + 1 + 0.04) ** 0.5
    expected = {
        "W₀ + Δ": ((0.16 + 0.16 + 0.16) ** 0.5 / size, 0.33 / 0.13),
        "Q(W₀ + Δ)": ((0.49 + 0.64) ** 0.5 / size, 0.5 / 0.13),
        "Q(Q(W₀) + Δ)": (0.13**0.5 / size, 0.0),
    }
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, rel=1e-5, abs=1e-6), name
    assert found["bfloat16 of Q(W₀) + Δ"][0] < 0.004


def test_a_small_change_is_lost_by_rounding_twice_and_kept_on_average_by_rounding_once():
    """A change of 1 % of the weights: the nearest route to what was trained keeps none of it."""
    draw = torch.Generator().manual_seed(0)
    start, change = (torch.randn(512, 256, generator=draw) for _ in range(2))
    found = merge_routes(start, change / 100)
    assert found["Q(Q(W₀) + Δ)"][0] < 0.02 < found["Q(W₀ + Δ)"][0] < found["W₀ + Δ"][0]
    assert found["Q(Q(W₀) + Δ)"][1] < 0.1
    assert 0.9 < found["Q(W₀ + Δ)"][1] < 1.1 and 0.9 < found["W₀ + Δ"][1] < 1.1
