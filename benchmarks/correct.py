"""Does a variant compute the loss? Against the naive computation, in float64 and in the precision
that is timed.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.materials import bench_model, lengths_of, longer_row
from benchmarks.variants import (
    BENCH_BETA,
    BENCH_LAMBDA,
    STEP_VARIANTS,
    Bench,
    StepVariant,
    loss_given,
)
from common import packed
from common.data import collate
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
        logps = F.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
        return logps.gather(1, ids[0, 1:, None])[:, 0]

    total, tokens = 0.0, sum(len(row["prompt_ids"] + row["chosen_ids"]) - 1 for row in rows)
    for row in rows:
        start = len(row["prompt_ids"]) - 1
        chosen, rejected = (token_logps(bench.policy, row, side) for side in ("chosen", "rejected"))
        if method == "dpo":
            with torch.no_grad():
                logps = [token_logps(bench.reference, row, s) for s in ("chosen", "rejected")]
                known = [each[start:].sum() for each in logps]
            margin = chosen[start:].sum() - known[0] - rejected[start:].sum() + known[1]
            loss = torch.log1p(torch.exp(-BENCH_BETA * margin)) / len(rows)
        else:
            p, q = (torch.exp(logps[start:].mean()) for logps in (chosen, rejected))
            odds_ratio = (p / (1 - p)) / (q / (1 - q))
            loss = torch.log1p(1 / odds_ratio) * BENCH_LAMBDA / len(rows) - chosen.sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def naive_result(bench: Bench, method: str, rows: list[dict]) -> tuple[float, dict]:
    """(loss, {weight: gradient}) of the naive computation."""
    bench.policy.zero_grad()
    loss = naive_backward(bench, method, rows)
    weights = bench.policy.named_parameters()
    return loss, {name: w.grad.clone() for name, w in weights if w.grad is not None}


def errors_of(
    bench: Bench, method: str, variant: StepVariant, rows: list[dict], naive: tuple[float, dict]
) -> dict:
    """Relative errors of a variant's loss and gradient, in the precision that the models have now.

    That of the gradient is the length of the difference, all weights as one vector.
    """
    bench.policy.zero_grad()
    loss = variant.loss(bench, method, rows)
    loss.backward()
    weights, expected = dict(bench.policy.named_parameters()), naive[1]
    off = sum((weights[name].grad - g).square().sum().item() for name, g in expected.items())
    length = sum(g.square().sum().item() for g in expected.values())
    return {"loss": abs(loss.item() / naive[0] - 1), "gradient": (off / length) ** 0.5}


def errors_of_all(
    bench: Bench, method: str, names: list[str], rows: list[dict], compared=STEP_VARIANTS
) -> dict:
    """{variant: {"float64": {"loss", "gradient"}, "float32": …}} on the two shortest pairs, as one
    batch.

    Raises: WrongVariant if a variant misses its tolerance in float64; NaN misses it. The models are
        in float32 before and after.
    """
    batch = sorted(rows, key=lambda row: longer_row(lengths_of(row)))[:2]
    found = {name: {} for name in names}
    for dtype in (torch.float64, torch.float32):
        bench.to(dtype)
        naive = naive_result(bench, method, batch)
        for name in names:
            errors = errors_of(bench, method, compared[name], batch, naive)
            found[name][str(dtype).removeprefix("torch.")] = errors
            for what, error in errors.items():
                bound = compared[name].tolerance
                if dtype == torch.float64 and not error <= bound:
                    raise WrongVariant(
                        f"{method} {name}: its {what} is off by {error:.2g}, more than {bound:g}: "
                        "not timed"
                    )
    return found


def lora_errors(size: dict, rows: list[dict]) -> dict:
    """Errors of the packed DPO step in float64 with LoRA, its reference being the model with the
    adapter off. The naive computation has the base model as a second model.
    """
    base = bench_model(size, 0)
    reference = frozen_copy(base).double()
    policy = add_lora(freeze(base), replace(PROFILES["cpu"], lora=16)).double()
    for name, weight in policy.named_parameters():
        if "lora_B" in name:  # a fresh adapter is zero: it would not differ from the reference
            torch.nn.init.normal_(weight, std=0.02)

    def loss(bench: Bench, method: str, rows: list[dict]) -> torch.Tensor:
        batch = collate(rows)
        with torch.no_grad(), policy.disable_adapter():
            known = packed.response_logps(policy, batch)
        return loss_given(bench, method, rows, batch, known, packed.response_logps)

    bench = Bench(policy, reference)
    return errors_of(
        bench, "dpo", StepVariant("LoRA", loss), rows, naive_result(bench, "dpo", rows)
    )
