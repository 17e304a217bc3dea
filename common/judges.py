"""Who says which answer is better: the world's rule, or a reward model where no rule exists."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.data import collate, tokenize_response
from common.evaluation import Answer, WinRate, win_rate
from common.losses import bradley_terry_loss, share_positive
from common.toyworld import World


class Judge(Protocol):
    """Anything that prefers one of two answers. `name` is printed beside every number it decides."""

    name: str

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[int]:
        """For each (prompt, first, second): 1 if `first` is better, -1 if `second` is, 0 for a tie."""


class RuleJudge:
    """The rule of the embedded world: the higher score wins, equal scores tie."""

    name = "the world's rule"

    def __init__(self, world: World):
        self.world = world

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[int]:
        judge = self.world.judge
        return [
            int(np.sign(judge(prompt, a).score - judge(prompt, b).score))
            for prompt, a, b in questions
        ]


def rewards(model, batch: dict[str, Tensor], side: str) -> Tensor:
    """Reward of one side of a batch under a `models.RewardModel`, (batch,), in float64."""
    rows = []
    for pair, (start, end) in enumerate(
        zip(batch["prompt_lengths"], batch[f"{side}_lengths"], strict=True)
    ):
        parts = batch["prompt_ids"][pair, :start], batch[f"{side}_ids"][pair, :end]
        rows.append(torch.cat(parts))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ends = batch["prompt_lengths"] + batch[f"{side}_lengths"]
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) < ends[:, None]
    return model(input_ids=input_ids, attention_mask=mask.long()).double()


def reward_objective(model, batch: dict, pairs: int) -> tuple[torch.Tensor, dict]:
    """Loss and metrics of a reward model on a micro-batch, scaled as in `losses.objective`."""
    chosen, rejected = rewards(model, batch, "chosen"), rewards(model, batch, "rejected")
    margin = (chosen - rejected).detach()
    metrics = {
        "margin": margin.sum() / pairs,
        "accuracy": share_positive(margin) * len(margin) / pairs,
    }
    return bradley_terry_loss(chosen, rejected).sum() / pairs, metrics


class RewardJudge:
    """A reward model trained on the training pairs: the higher reward wins. It judges where no rule
    exists.
    """

    def __init__(self, model, tokenizer, held_out_pairs, batch_size: int = 64):
        self.model, self.tokenizer, self.known = (
            model.eval(),
            tokenizer,
            {},
        )  # known: (prompt, answer) → reward
        self.batch_size = batch_size
        self.held_out_accuracy = self._accuracy(list(held_out_pairs))
        self.name = f"a reward model (right on {self.held_out_accuracy:.0%} of {len(held_out_pairs)} held-out pairs)"

    def _scores(self, rows: list[dict], side: str) -> Tensor:
        pad, size = self.tokenizer.pad_token_id, self.batch_size
        batches = (
            collate(rows[start : start + size], pad, self.model.device)
            for start in range(0, len(rows), size)
        )
        with torch.no_grad():
            return torch.cat([rewards(self.model, batch, side).cpu() for batch in batches])

    def _accuracy(self, pairs: list[dict]) -> float:
        return share_positive(self._scores(pairs, "chosen") - self._scores(pairs, "rejected"))

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[int]:
        pairs = [((prompt, first), (prompt, second)) for prompt, first, second in questions]
        new = list(dict.fromkeys(text for pair in pairs for text in pair if text not in self.known))
        if new:  # each answer is scored once, however often it is compared
            limit = getattr(self.model.config, "max_position_embeddings", None) or 10**9
            parts = [
                tokenize_response(prompt, answer, self.tokenizer, limit) for prompt, answer in new
            ]
            rows = [{"prompt_ids": prompt, "chosen_ids": answer} for prompt, answer, _ in parts]
            self.known.update(zip(new, self._scores(rows, "chosen").tolist(), strict=True))
        return [int(np.sign(self.known[first] - self.known[second])) for first, second in pairs]


def compare(judge: Judge, first: list[list[Answer]], second: list[list[Answer]]) -> list[list[int]]:
    """Verdicts on the answers of two models to the same prompts, (prompts, samples): 1 where
    `first` wins.

    Each pair is shown in both orders; where the judge changes its mind with the order, it is a tie.
    Raises: ValueError if the prompts differ.
    """
    pairs = [
        (a, b)
        for group, other in zip(first, second, strict=True)
        for a, b in zip(group, other, strict=True)
    ]
    if any(a.prompt != b.prompt for a, b in pairs):
        raise ValueError("The two models answered different prompts: they cannot be compared.")
    shown = judge.prefer([(a.prompt, a.text, b.text) for a, b in pairs])
    swapped = judge.prefer([(a.prompt, b.text, a.text) for a, b in pairs])
    verdicts = [one if one == -other else 0 for one, other in zip(shown, swapped, strict=True)]
    samples = len(first[0])
    return [verdicts[start : start + samples] for start in range(0, len(verdicts), samples)]


def head_to_head(judge: Judge, first: list[list[Answer]], second: list[list[Answer]]) -> WinRate:
    """Win rate of `first` over `second` under this judge."""
    return win_rate(compare(judge, first, second))
