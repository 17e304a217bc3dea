"""Held-out measures while a stage trains, and the signs of over-optimisation in them.

Every process takes them all, on the same weights and with the same seeds, and uses those of the
first one (`Trainer.held_out_measures`). Held-out sets are small, and no process has anything else
to do meanwhile.
"""

import math
from dataclasses import dataclass, replace

import torch

from common import losses
from common.data import collate
from common.evaluation import Answer, Sampling, generate, logps_of
from common.judges import RuleJudge, head_to_head, reward_objective
from common.logprobs import PairLogps
from common.toyworld import World

KL_LIMIT, ACCURACY_LIMIT = 20.0, 0.95  # the course pages' limits (claims D6 and D7)


@dataclass
class HeldOut:
    """What a stage is measured on, and what is kept of its reference between evaluations."""

    rows: list[dict]  # tokenised rows of the stage's own kind
    pairs: list[dict]  # tokenised held-out pairs
    prompts: list[str]  # answered at every evaluation, once each
    tokenizer: object
    sampling: Sampling
    world: World | None = None  # its rule judges the answers
    reference_logps: PairLogps | None = None  # of `pairs`
    reference_answers: list[list[Answer]] | None = None

    @torch.no_grad()
    def measures(self, trainer) -> dict[str, float]:
        """Held-out loss, both log-probabilities and, for preference stages, KL and win rate."""
        found = self._rewards(trainer) if trainer.task.method == "reward" else self._logps(trainer)
        return {f"held_out_{name}": float(value) for name, value in found.items()}

    @torch.no_grad()
    def remember_reference(self, trainer) -> None:
        """Keeps what is needed of a reference that will go: its log-probabilities and answers.

        Its log-probabilities of answers yet to come cannot be kept, so no KL is measured then.
        (With LoRA it is: the adapter is switched off.)
        """
        with trainer.as_reference() as reference:
            self.reference_logps = self.logps(trainer, reference, self.pairs)
            if self.world:
                self.reference_answers = self.answers(reference, self.sampling.seed + 1)

    def logps(self, trainer, model, rows: list[dict]) -> PairLogps:
        """Log-probabilities of all rows, without gradients."""
        return logps_of(model, rows, trainer.task.eval_batch, trainer.response_logps)

    def answers(self, model, seed: int) -> list[list[Answer]]:
        """One sampled answer to each prompt."""
        return generate(model, self.tokenizer, self.prompts, replace(self.sampling, seed=seed))

    def _logps(self, trainer) -> dict:
        method, recipe = trainer.task.method, replace(trainer.recipe, nll_on_prompt=False)
        pairs = self.logps(trainer, trainer.model, self.pairs)
        own = pairs
        if "rejected_ids" not in self.rows[0]:
            own = self.logps(trainer, trainer.model, self.rows)
        if method == "dpo" and self.reference_logps is None:
            with trainer.as_reference() as reference:
                self.reference_logps = self.logps(trainer, reference, self.pairs)
        count, tokens = len(self.rows), losses.scored_tokens(self.rows, recipe)
        loss, found = losses.objective(method, recipe, own, self.reference_logps, count, tokens)
        nll = losses.sft_loss(own.chosen.sums, own.chosen.lengths)
        found |= {"loss": loss, "nll": nll, "logps_chosen": pairs.chosen.sums.mean()}
        found["logps_rejected"] = pairs.rejected.sums.mean()
        if method == "dpo" or trainer.reference is not None:
            found |= self._on_samples(trainer)
        return found

    def _on_samples(self, trainer) -> dict:
        """KL to the reference and win rate against it, on one answer to each prompt."""
        found, own = {}, self.answers(trainer.model, self.sampling.seed)
        if trainer.reference is not None or trainer.has_adapter:  # it is still there
            rows = [vars(answer) for group in own for answer in group]
            policy = self.logps(trainer, trainer.model, rows).chosen.sums
            with trainer.as_reference() as reference:
                found["kl"] = (policy - self.logps(trainer, reference, rows).chosen.sums).mean()
                if self.world and self.reference_answers is None:
                    self.reference_answers = self.answers(reference, self.sampling.seed + 1)
        if self.world:
            judge = RuleJudge(self.world)
            found["win_rate"] = head_to_head(judge, own, self.reference_answers).rate
        return found

    def _rewards(self, trainer) -> dict[str, float]:
        """Loss, margin and accuracy of a reward model."""
        trainer.policy.eval()
        total, size = {}, trainer.task.eval_batch
        for start in range(0, len(self.rows), size):
            batch = collate(self.rows[start : start + size], device=trainer.model.device)
            loss, found = reward_objective(trainer.model, batch, len(self.rows))
            for name, value in {"loss": loss, **found}.items():
                total[name] = total.get(name, 0.0) + float(value)
        return total


def signs_of_over_optimisation(metrics: list[dict]) -> list[str]:
    """What the course pages warn of, each with its remedies, from the rows since the last two
    evaluations.
    """
    signs = []
    evaluated = [index for index, row in enumerate(metrics) if "held_out_loss" in row]
    now, rows = metrics[evaluated[-1]], metrics[evaluated[-2] + 1 :] if len(evaluated) > 1 else []
    knob = "lower lambda" if "held_out_odds_ratio_loss" in now else "raise beta"  # ORPO has no beta
    remedy = f"stop earlier, {knob}, or lower the learning rate"
    if now.get("held_out_kl", 0.0) > KL_LIMIT:
        signs.append(
            f"KL to the reference is {now['held_out_kl']:.1f} nats (> {KL_LIMIT:.0f}): {remedy}."
        )
    right = [row["accuracy"] for row in rows if "accuracy" in row]
    if right and sum(right) / len(right) > ACCURACY_LIMIT:
        signs.append(
            f"Training accuracy is {sum(right) / len(right):.3f} (> {ACCURACY_LIMIT}): {remedy}."
        )
    if len(evaluated) > 2:
        before = metrics[evaluated[-2]]
        earlier = metrics[evaluated[-3] + 1 : evaluated[-2] + 1]
        falling = _mean(rows, "loss") < _mean(earlier, "loss")
        if falling and now.get("held_out_nll", 0.0) > 1.02 * before.get("held_out_nll", math.inf):
            signs.append(
                f"The loss falls but the held-out NLL rises to {now['held_out_nll']:.3f}: {remedy}."
            )
        rate, rate_before = (row.get("held_out_win_rate") for row in (now, before))
        if falling and None not in (rate, rate_before) and rate < rate_before - 0.05:
            signs.append(f"The loss falls but the win rate falls to {rate:.2f}: {remedy}.")
    return signs


def _mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
