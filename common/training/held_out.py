"""Held-out measures while a stage trains: loss, log-probabilities and, for preference stages, KL
and win rate.

Every process takes them all, on the same weights and with the same seeds: held-out sets are small,
and no process has anything else to do meanwhile. What counts is what the first one found
(`Trainer.run`).
"""

from dataclasses import replace

import torch

from common import losses
from common.data import collate
from common.evaluation import Answer, generate, logps_of
from common.judges import RuleJudge, head_to_head, reward_objective
from common.logprobs import PairLogps


@torch.no_grad()
def measures(trainer) -> dict[str, float]:
    """Held-out loss, both log-probabilities and, for preference stages, KL and win rate on samples."""
    return {f"held_out_{name}": float(value) for name, value in _measures(trainer).items()}


def _measures(trainer) -> dict:
    if trainer.method == "reward":
        return _of_rewards(trainer)
    test, recipe = trainer.lab.test_pairs, replace(trainer.recipe, nll_on_prompt=False)
    pairs = logps(trainer, trainer.model, test)
    own = (
        pairs
        if "rejected_ids" in trainer.held_out[0]
        else logps(trainer, trainer.model, trainer.held_out)
    )
    if trainer.method == "dpo" and trainer.held_out_reference is None:
        with trainer.as_reference() as reference:
            trainer.held_out_reference = logps(trainer, reference, test)
    count, tokens = len(trainer.held_out), losses.scored_tokens(trainer.held_out, recipe)
    loss, found = losses.objective(
        trainer.method, recipe, own, trainer.held_out_reference, count, tokens
    )
    found |= {"loss": loss, "nll": losses.sft_loss(own.chosen.sums, own.chosen.lengths)}
    found |= {
        "logps_chosen": pairs.chosen.sums.mean(),
        "logps_rejected": pairs.rejected.sums.mean(),
    }
    if trainer.method == "dpo" or trainer.reference is not None:
        found |= _on_samples(trainer)
    return found


def _of_rewards(trainer) -> dict[str, float]:
    """Loss, margin and accuracy of a reward model."""
    trainer.policy.eval()
    total, count = {}, len(trainer.held_out)
    for start in range(0, count, trainer.eval_batch):
        rows = trainer.held_out[start : start + trainer.eval_batch]
        loss, found = reward_objective(
            trainer.model, collate(rows, trainer.pad, trainer.model.device), count
        )
        for name, value in {"loss": loss, **found}.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def _on_samples(trainer) -> dict[str, float]:
    """KL to the reference and win rate against it, on one answer to each of a few held-out prompts."""
    lab, found = trainer.lab, {}
    world, own = lab.data.world, answers(trainer, trainer.model, lab.seed)
    if trainer.reference is not None or trainer.lora:  # not after its log-probabilities were cached
        rows = [vars(answer) for group in own for answer in group]
        policy = logps(trainer, trainer.model, rows)
        with trainer.as_reference() as reference:
            found["kl"] = (policy.chosen.sums - logps(trainer, reference, rows).chosen.sums).mean()
            if world and trainer.reference_answers is None:
                trainer.reference_answers = answers(trainer, reference, lab.seed + 1)
    if world:
        found["win_rate"] = head_to_head(RuleJudge(world), own, trainer.reference_answers).rate
    return found


def logps(trainer, model, rows: list[dict]) -> PairLogps:
    """Log-probabilities of all rows, without gradients."""
    return logps_of(model, rows, trainer.pad, trainer.eval_batch, trainer.path)


def answers(trainer, model, seed: int) -> list[list[Answer]]:
    """One sampled answer to each of a few held-out prompts."""
    prompts, length = trainer.lab.prompts[:SAMPLED_PROMPTS], trainer.lab.profile.max_new_tokens
    return generate(
        model, trainer.lab.tokenizer, prompts, length, seed=seed, sharded=trainer.sharded
    )
