"""Who says which answer is better, and why: a world's rule, or a reward model where there is none.

A language model and people judge behind the same interface: `common.judging`. How far two judges
agree, and what sways one, stands there, too.
"""

import math
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from common.data import collate, tokenize_response
from common.evaluation import Answer, WinRate, logps_of, win_rate
from common.io.formats import as_prompt
from common.losses import bradley_terry_loss, share_positive
from common.toyworld import World


class Vote(int):
    """1: the first answer is better, -1: the second is, 0: a tie. With the judge's `reason`.

    `clear`: False where nothing that can be read was said. It counts as a tie, and is counted.
    """

    def __new__(cls, value: int, reason: str = "", clear: bool = True):
        vote = super().__new__(cls, value)
        vote.reason, vote.clear = reason, clear
        return vote


class Judge(Protocol):
    """Prefers one of two answers. `name` is printed beside every number that it decides."""

    name: str

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[int]:
        """For each (prompt, first, second): 1 if `first` is better, -1 if `second`, 0 for a tie.

        Our judges return a `Vote` for each: the number, and why.
        """


class RuleJudge:
    """The rule of a world: the higher score wins, equal scores tie.

    In the toy world it knows the facts; in the world of instructions code verifies what was asked.
    """

    name = "the world's rule"

    def __init__(self, world: World):
        self.world = world

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[Vote]:
        votes = []
        for prompt, *answers in questions:
            found = [self.world.judge(prompt, answer) for answer in answers]
            broken = [[kind for kind, met in (one.met or {}).items() if not met] for one in found]
            flaws = [", ".join((*one.flaws, *bad)) for one, bad in zip(found, broken, strict=True)]
            first, second = (one.score for one in found)
            reason = f"{first:g} points ({flaws[0] or 'no flaw'}) against "
            reason += f"{second:g} ({flaws[1] or 'no flaw'})"
            votes.append(Vote(np.sign(first - second), reason))
        return votes


def rewards(model, batch: dict[str, Tensor], side: str) -> Tensor:
    """Rewards of one side of a batch under a `models.RewardModel`, (batch,), in float64."""
    # Put each prompt and its response together, without the padding between them.
    rows = []
    lengths = zip(batch["prompt_lengths"], batch[f"{side}_lengths"], strict=True)
    for row, (start, end) in enumerate(lengths):
        rows.append(torch.cat([batch["prompt_ids"][row, :start], batch[f"{side}_ids"][row, :end]]))
    # Pad on the right. The mask comes from the lengths: the pad id may be that of EOS.
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ends = batch["prompt_lengths"] + batch[f"{side}_lengths"]
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) < ends[:, None]
    return model(input_ids=input_ids, attention_mask=mask.long()).double()


def reward_objective(model, batch: dict, pairs: int) -> tuple[Tensor, dict]:
    """Loss and metrics of a reward model on a micro-batch, scaled as in `losses.objective`."""
    chosen, rejected = rewards(model, batch, "chosen"), rewards(model, batch, "rejected")
    margin = (chosen - rejected).detach()
    accuracy = share_positive(margin) * len(margin) / pairs
    metrics = {"margin": margin.sum() / pairs, "accuracy": accuracy}
    return bradley_terry_loss(chosen, rejected).sum() / pairs, metrics


class RewardJudge:
    """A reward model trained on the training pairs: the higher reward wins.

    It judges where there is no rule. `held_out_margin`: the reward of the chosen answer less that
    of the rejected one, of each held-out pair; `held_out_accuracy`: how often it is right there.
    """

    def __init__(self, model, tokenizer, held_out_pairs, batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.known = {}  # (prompt, answer) → reward
        pairs = list(held_out_pairs)
        self.held_out_margin = self._scores(pairs, "chosen") - self._scores(pairs, "rejected")
        self.held_out_accuracy = share_positive(self.held_out_margin)
        right = f"right on {self.held_out_accuracy:.0%} of {len(pairs)} held-out pairs"
        self.name = f"a reward model ({right})"

    @torch.no_grad()
    def _scores(self, rows: list[dict], side: str) -> Tensor:
        scores = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            batch = collate(part, device=self.model.device)
            scores.append(rewards(self.model, batch, side).cpu())
        return torch.cat(scores)

    def prefer(self, questions: list[tuple[str, str, str]]) -> list[Vote]:
        pairs = [((prompt, first), (prompt, second)) for prompt, first, second in questions]
        # Score each answer once, however often it is compared.
        new = list(dict.fromkeys(text for pair in pairs for text in pair if text not in self.known))
        if new:
            limit = getattr(self.model.config, "max_position_embeddings", None) or 10**9
            rows = []
            for text in new:
                prompt_ids, answer_ids, _ = tokenize_response(*text, self.tokenizer, limit)
                rows.append({"prompt_ids": prompt_ids, "chosen_ids": answer_ids})
            self.known |= zip(new, self._scores(rows, "chosen").tolist(), strict=True)
        votes = []
        for first, second in ((self.known[one], self.known[other]) for one, other in pairs):
            votes.append(Vote(np.sign(first - second), f"reward {first:.2f} against {second:.2f}"))
        return votes


def on_topic(model, tokenizer, answers: list[tuple[str, str]], batch_size=64) -> list[bool]:
    """Is each (prompt, answer) of the instruction world likelier under its own question?

    Compared is the same question about another topic, both without their constraints. The model is
    the one that training started from: an aligned one may have learned to like its own answers.
    """
    from common.instructions import ALL, instruction

    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    rows = []
    for prompt, answer in answers:
        found = instruction(prompt)
        pool = list(ALL["lookalikes" if found.kind == "lookalike" else "topics"][found.split])
        other = pool[(pool.index(found.about) + len(pool) // 2) % len(pool)]
        for asked in (found.asked, found.asked.replace(found.about, other)):
            asked, said = as_prompt(asked), f" {answer.strip()}"
            prompt_ids, answer_ids, _ = tokenize_response(asked, said, tokenizer, limit)
            rows.append({"prompt_ids": prompt_ids, "chosen_ids": answer_ids})
    own, elsewhere = logps_of(model, rows, batch_size).chosen.sums.reshape(-1, 2).T
    return (own > elsewhere).tolist()


def compare(judge: Judge, first: list[list[Answer]], second: list[list[Answer]]) -> list[list[int]]:
    """Verdicts on the answers of two models to the same prompts, (prompts, samples).

    Returns: 1 where `first` wins, -1 where `second` does, 0 for a tie.
    Raises: ValueError if the prompts differ.
    """
    pairs = []
    for group, other in zip(first, second, strict=True):
        pairs += zip(group, other, strict=True)
    if any(a.prompt != b.prompt for a, b in pairs):
        raise ValueError("The two models answered different prompts: they cannot be compared.")
    # Show each pair in both orders. A judge that changes its mind with the order calls a tie.
    shown = judge.prefer([(a.prompt, a.text, b.text) for a, b in pairs])
    swapped = judge.prefer([(a.prompt, b.text, a.text) for a, b in pairs])
    verdicts = [one if one == -other else 0 for one, other in zip(shown, swapped, strict=True)]
    samples = len(first[0])
    return [verdicts[start : start + samples] for start in range(0, len(verdicts), samples)]


def head_to_head(judge: Judge, first: list[list[Answer]], second: list[list[Answer]]) -> WinRate:
    """Win rate of `first` over `second` under this judge."""
    return win_rate(compare(judge, first, second))


def length_controlled(verdicts, lengths, other_lengths) -> float:
    """Win rate of A over B, were their answers equally long. Dubois et al. 2024 (arXiv 2404.04475).

    A logistic model of the verdicts: a constant, and a weight on the difference of lengths, in
    units of its standard deviation and through tanh. The rate is the model's at a difference of 0.
    Args: `verdicts`: 1, 0 or -1 as in `win_rate`; tokens of A's and of B's answers: one shape.
    Raises: ValueError for different shapes. The paper's terms for single prompts are left out.
    """
    tables = [np.asarray(table, dtype=float) for table in (verdicts, lengths, other_lengths)]
    if len({table.shape for table in tables}) > 1 or not tables[0].size:
        raise ValueError("Give one verdict and two lengths for each pair of answers.")
    # A tie is half a win. Where all differences are equal there is nothing to control for.
    points, gap = (tables[0].ravel() + 1) / 2, (tables[1] - tables[2]).ravel()
    longer = np.tanh(gap / gap.std()) if gap.std() > 0 else np.zeros(len(gap))

    def loss(weights):
        # Cross-entropy; the last term keeps the weights finite where one side wins everything.
        logits = weights[0] + weights[1] * longer
        error = expit(logits) - points
        value = (np.logaddexp(0, logits) - points * logits).mean() + 1e-4 * weights @ weights
        slope = np.array([error.mean(), (error * longer).mean()]) + 2e-4 * weights
        return value, slope

    return float(expit(minimize(loss, np.zeros(2), jac=True).x[0]))


def cohens_kappa(first, second) -> float:
    """Agreement of two annotators beyond chance, Cohen 1960 (doi 10.1177/001316446002000104).

    Args: their votes on the same pairs: 1, 0 or -1. nan where both always cast one and the same.
    """
    first, second = np.asarray(first), np.asarray(second)
    chance = sum(np.mean(first == vote) * np.mean(second == vote) for vote in (1, 0, -1))
    return float((np.mean(first == second) - chance) / (1 - chance)) if chance < 1 else math.nan
