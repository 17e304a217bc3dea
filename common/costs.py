"""What a training step costs: FLOPs by formula, to set beside the counted ones."""

from torch import nn
from transformers.pytorch_utils import Conv1D

# Passes through the model per pair and epoch, one per answer: (forward, backward).
PASSES = {"sft": (1, 1), "dpo": (4, 2), "dpo_cached": (2, 2), "orpo": (2, 2)}
FIRST = {"dpo_cached": 2}  # forward passes per pair before training, once: the cached reference


def pass_units(method: str, lora: bool = False) -> float:
    """Cost of a method per pair and epoch, in forward passes over one answer.

    A backward pass costs two forward passes: one for the gradients of the weights, one for those of
    the inputs. Under LoRA the frozen weights need no gradients, and almost only the second is left.
    """
    forward, backward = PASSES[method]
    return forward + backward * (1 if lora else 2)


def pass_cost(epochs: dict[str, float], lora: bool = False) -> float:
    """Forward passes per pair of some stages together, {method: epochs}, what is done once
    included.

    The usual claim, ORPO over SFT and DPO at equal epochs: `pass_cost({"orpo": 1}) /
    pass_cost({"sft": 1, "dpo": 1})`, which is 6 / (3 + 8).
    """
    return sum(
        pass_units(method, lora) * times + FIRST.get(method, 0) for method, times in epochs.items()
    )


def formula_flops(model, method: str, padded_tokens: float, scored_tokens: float) -> float:
    """Floating-point operations of training by formula: 2 per weight and token forward, 4 backward.

    Args: `padded_tokens`: as the model sees them, both answers, over all steps (`run.json`);
        `scored_tokens`: those whose prediction the output head computes. `method`: as in PASSES.
        Attention's own products are left out.
    Source: Kaplan et al. 2020 (arXiv 2001.08361), Sec. 2.1; the head counted apart, since it sees
        fewer tokens.
    """
    head = model.get_output_embeddings()
    inner = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    per_pass = (
        sum(m.weight.numel() for m in inner) * padded_tokens + head.weight.numel() * scored_tokens
    )
    answers = PASSES[method][1]  # answers per pair that the policy learns from
    return 2 * per_pass * pass_units(method) / answers
