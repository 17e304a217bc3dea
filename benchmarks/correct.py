"""Does a variant compute the loss? Against the naive computation, in float64 and in the precision
that is timed.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.variants import (
    BETA,
    LAMBDA,
    PARTS,
    VARIANTS,
    Bench,
    Variant,
    new_model,
    ours_given,
    row_length,
)
from common.data import collate
from common.logprobs import response_logps
from common.models import add_lora, freeze, frozen_copy
from common.profiles import PROFILES


class WrongVariant(RuntimeError):
    """A variant that does not compute the loss. It is not timed."""


def naive_backward(bench: Bench, method: str, rows: list[dict]) -> float:
    """The loss, its gradients left on the policy: each response alone, without padding, log_softmax
    everywhere.
    """

    def token_logps(model, row: dict, side: str) -> torch.Tensor:
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]], device=bench.device)
        return F.log_softmax(model(ids).logits[0, :-1].double(), dim=-1).gather(
            1, ids[0, 1:, None]
        )[:, 0]

    total, tokens = 0.0, sum(len(row["prompt_ids"] + row["chosen_ids"]) - 1 for row in rows)
    for row in rows:
        start = len(row["prompt_ids"]) - 1
        chosen, rejected = (token_logps(bench.policy, row, side) for side in ("chosen", "rejected"))
        if method == "dpo":
            with torch.no_grad():
                known = [
                    token_logps(bench.reference, row, side)[start:].sum()
                    for side in ("chosen", "rejected")
                ]
            margin = chosen[start:].sum() - known[0] - rejected[start:].sum() + known[1]
            loss = torch.log1p(torch.exp(-BETA * margin)) / len(rows)
        else:
            p, q = (torch.exp(logps[start:].mean()) for logps in (chosen, rejected))
            odds_ratio = (p / (1 - p)) / (q / (1 - q))
            loss = torch.log1p(1 / odds_ratio) * LAMBDA / len(rows) - chosen.sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def distance(model, naive: dict[str, torch.Tensor]) -> float:
    """Length of the difference from the naive gradient over that gradient's own, all weights as one
    vector.
    """
    weights = dict(model.named_parameters())
    off = sum(
        (weights[name].grad - gradient).square().sum().item() for name, gradient in naive.items()
    )
    return (off / sum(gradient.square().sum().item() for gradient in naive.values())) ** 0.5


def errors_of(
    bench: Bench, method: str, variant: Variant, batch: list[dict], naive: tuple[float, dict]
) -> dict:
    """Relative errors of a variant's loss and gradient, in the precision that the models have now."""
    bench.policy.zero_grad()
    loss = variant.loss(bench, method, batch)
    loss.backward()
    return {"loss": abs(loss.item() / naive[0] - 1), "gradient": distance(bench.policy, naive[1])}


def naive_on(bench: Bench, method: str, batch: list[dict]) -> tuple[float, dict]:
    bench.policy.zero_grad()
    return naive_backward(bench, method, batch), gradients(bench.policy)


def refuse_wrong(name: str, variant: Variant, errors: dict) -> None:
    """Raises: WrongVariant if a variant misses its tolerance in float64. NaN misses it."""
    for what, bound in (("loss", variant.loss_tolerance), ("gradient", variant.gradient_tolerance)):
        if not errors[what] <= bound:
            raise WrongVariant(
                f"{name}: its {what} is off by {errors[what]:.2g}, more than {bound:g}: not timed"
            )


def errors_of_all(
    bench: Bench, method: str, names: list[str], rows: list[dict], compared=VARIANTS
) -> dict:
    """{variant: {"float64": {"loss", "gradient"}, "float32": …}} on the two shortest pairs, as one
    batch.

    Raises: WrongVariant. The models are in float32 before and after.
    """
    batch = sorted(rows, key=lambda row: row_length([len(row[f"{part}_ids"]) for part in PARTS]))[
        :2
    ]
    found = {name: {} for name in names}
    for dtype in (torch.float64, torch.float32):
        bench.to(dtype)
        naive = naive_on(bench, method, batch)
        for name in names:
            errors = errors_of(bench, method, compared[name], batch, naive)
            found[name][str(dtype).removeprefix("torch.")] = errors
            if dtype == torch.float64:
                refuse_wrong(f"{method} {name}", compared[name], errors)
    return found


def lora_errors(size: dict, rows: list[dict]) -> dict:
    """Errors of the packed DPO step in float64 with LoRA, its reference being the model with the
    adapter off.

    The naive computation has the base model as a second model.
    """
    base = new_model(size, 0)
    reference = frozen_copy(base).double()
    policy = add_lora(freeze(base), replace(PROFILES["cpu"], lora=16)).double()
    for name, weight in policy.named_parameters():
        if "lora_B" in name:  # a fresh adapter is zero: it would not differ from the reference
            torch.nn.init.normal_(weight, std=0.02)

    def packed(bench: Bench, method: str, batch: list[dict]) -> torch.Tensor:
        with torch.no_grad(), policy.disable_adapter():
            tensors = collate(batch)
            known = response_logps(policy, tensors, "packed")
        return ours_given(bench, method, batch, "packed", known, tensors)

    bench = Bench(policy, reference, "cpu", {})
    return errors_of(bench, "dpo", Variant("LoRA", packed), rows, naive_on(bench, "dpo", rows))
