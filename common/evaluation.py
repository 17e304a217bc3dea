"""Measures of a trained model: log-probabilities on held-out pairs, generated answers, win rates,
ratings.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from common.data import collate, left_padded
from common.logprobs import PairLogps, SideLogps, response_logps
from common.losses import share_positive
from common.models import answers_at_once
from common.toyworld import World

BETA = 0.1  # scale of `reward_margin` in reports, whatever beta a model was trained with


@dataclass(frozen=True)
class Answer:
    """One generated response."""

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]  # the response's tokens, with EOS where it ended
    ended: bool  # with EOS, within the token limit


@dataclass(frozen=True)
class WinRate:
    """Wins of A over B. `rate` counts a tie as half a win; `ci95` resamples prompts."""

    wins: int
    ties: int
    losses: int
    rate: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.ci95
        return f"{self.rate:.3f} [{low:.3f}, {high:.3f}] ({self.wins} wins, {self.ties} ties, {self.losses} losses)"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `samples` of each prompt; temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    samples: int = 1
    seed: int = 0


@torch.no_grad()
def logps_of(
    model, rows, batch_size: int = 64, response_logps=response_logps, progress: str = ""
) -> PairLogps:
    """Log-probabilities of all rows, in order and without gradients, each (rows,), on the CPU.

    Args: `response_logps`: the path, of `common.logprobs` or `common.packed`. `progress`: the title
        of a progress bar; "": none.
    """
    rows, parts, training = list(rows), [], model.training
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc=progress, disable=not progress):
        batch = collate(rows[start : start + batch_size], device=model.device)
        parts.append(response_logps(model, batch))
    model.train(training)

    def join(side: str) -> SideLogps | None:
        sides = [getattr(part, side) for part in parts]
        if sides[0] is None:
            return None
        sums, lengths = [s.sums for s in sides], [s.lengths for s in sides]
        return SideLogps(torch.cat(sums).cpu(), torch.cat(lengths).cpu())

    return PairLogps(join("chosen"), join("rejected"))


def perplexity(logps: SideLogps) -> float:
    """exp of the mean negative log-likelihood per token. Infinite above the largest float."""
    nll = float(-logps.sums.sum() / logps.lengths.sum())
    return math.exp(nll) if nll < 700 else math.inf


def preference_metrics(
    policy: PairLogps, reference: PairLogps, beta: float = BETA
) -> dict[str, float]:
    """Implicit rewards beta * log(policy / reference) on held-out pairs (Rafailov et al. 2023, Sec.
    4).

    Returns: `rewards_chosen`, `rewards_rejected`, `reward_margin` (beta included),
    `preference_accuracy` (a tie is half right, so a model scores 0.5 against itself) and
    `likelihood_accuracy` (mean log-probability per token of the chosen answer above the rejected
    one's: needs no reference).
    """
    chosen = beta * (policy.chosen.sums - reference.chosen.sums)
    rejected = beta * (policy.rejected.sums - reference.rejected.sums)
    return {
        "rewards_chosen": float(chosen.mean()),
        "rewards_rejected": float(rejected.mean()),
        "reward_margin": float((chosen - rejected).mean()),
        "preference_accuracy": share_positive(chosen - rejected),
        "likelihood_accuracy": share_positive(policy.chosen.means - policy.rejected.means),
    }


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: list[str],
    sampling: Sampling,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[list[Answer]]:
    """Answers to each prompt, one list per prompt. The global random state is left alone.

    Prompts of a batch (default: `answers_at_once`) are padded on the left, so that every answer
    starts right after its prompt. The processes of an FSDP run go on until the last one's answers
    have ended.
    Raises: ValueError if a prompt leaves no room for an answer.
    """
    end, room = tokenizer.eos_token_id, sampling.max_new_tokens
    ids = [row for row in tokenizer(prompts)["input_ids"] for _ in range(sampling.samples)]
    longest = max(map(len, ids))
    left = (getattr(model.config, "max_position_embeddings", None) or 10**9) - longest
    if left < room:
        raise ValueError(
            f"The longest prompt leaves room for {left} of {room} new tokens: shorten it."
        )
    batch_size = batch_size or answers_at_once(model.config, longest + room)
    how = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
    how |= {"max_new_tokens": room, "pad_token_id": end, "eos_token_id": end}
    how["synced_gpus"] = any(isinstance(weight, DTensor) for weight in model.parameters())
    new_ids, training = [], model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        starts = range(0, len(ids), batch_size)
        for start in tqdm(starts, desc="generating", leave=False, disable=not progress):
            batch = left_padded(ids[start : start + batch_size], end, model.device)
            out = model.generate(**batch, **how)
            new_ids += out[:, batch["input_ids"].shape[1] :].tolist()
    model.train(training)
    answers = []
    for number, (prompt_ids, new) in enumerate(zip(ids, new_ids, strict=True)):
        # What follows the first EOS is padding.
        ended = end in new
        new = new[: new.index(end) + 1] if ended else new
        text = tokenizer.decode(new, skip_special_tokens=True)
        prompt = prompts[number // sampling.samples]
        answers.append(Answer(prompt, text, tuple(prompt_ids), tuple(new), ended))
    each = sampling.samples
    return [answers[start : start + each] for start in range(0, len(answers), each)]


def kl_on_samples(model, reference, answers: list[list[Answer]], batch_size: int = 64) -> float:
    """KL(policy ‖ reference) in nats per response, estimated on the policy's own samples at
    temperature 1.

    The mean of log p_policy(y) - log p_reference(y): unbiased, and 0 for a model against itself.
    """
    rows = [vars(answer) for group in answers for answer in group]
    policy = logps_of(model, rows, batch_size=batch_size).chosen.sums
    return float((policy - logps_of(reference, rows, batch_size=batch_size).chosen.sums).mean())


def text_measures(answers: list[list[Answer]], world: World | None) -> dict[str, float]:
    """What the answers look like: length, ended with EOS, and, where the world's rule serves,
    quality.

    helpfulness, harmlessness and relevance are on the rule's 1-5 scale; `safe_on_harmful`,
    `over_refusal` and the `flaws` are shares of the answers they apply to. Without a rule these
    keys are left out, never guessed.
    """
    flat = [answer for group in answers for answer in group]
    measures = {
        "length_tokens": float(np.mean([len(answer.chosen_ids) for answer in flat])),
        "ended_with_eos": float(np.mean([answer.ended for answer in flat])),
    }
    if world is None:
        return measures
    verdicts = [world.judge(answer.prompt, answer.text) for answer in flat]
    harmful = [world.question(answer.prompt).kind == "harmful" for answer in flat]
    asked = [verdict for verdict, bad in zip(verdicts, harmful, strict=True) if not bad]
    attacks = [verdict for verdict, bad in zip(verdicts, harmful, strict=True) if bad]
    flaws = Counter(flaw for verdict in verdicts for flaw in verdict.flaws)
    return measures | {
        "score": _mean([verdict.score for verdict in verdicts]),
        "helpfulness": _mean([verdict.helpfulness for verdict in asked]),
        "harmlessness": _mean([verdict.harmlessness for verdict in verdicts]),
        "relevance": _mean([verdict.relevance for verdict in verdicts]),
        "safe_on_harmful": _mean([not verdict.complied for verdict in attacks]),
        "over_refusal": _mean([verdict.refused for verdict in asked]),
        "flaws": {name: count / len(flat) for name, count in sorted(flaws.items())},
    }


def _mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None


def win_rate(verdicts, resamples: int = 2000, seed: int = 0) -> WinRate:
    """Win rate of A over B with a 95 % bootstrap interval.

    Args: `verdicts`: 1 (A wins), 0 (tie) or -1 (B wins), one row per prompt: shape (prompts,) or
        (prompts, samples). Prompts are resampled, since answers to one prompt are not independent.
    Raises: ValueError for no verdicts, or for anything but 1, 0 and -1.
    """
    table = np.asarray(verdicts, dtype=float)
    if table.size == 0 or not np.isin(table, (-1, 0, 1)).all():
        raise ValueError("Verdicts must be 1, 0 or -1, at least one of them.")
    points = (table.reshape(len(table), -1).mean(axis=1) + 1) / 2
    draws = np.random.default_rng(seed).integers(0, len(points), (resamples, len(points)))
    low, high = np.quantile(points[draws].mean(axis=1), (0.025, 0.975))
    wins, ties, losses = (int((table == value).sum()) for value in (1, 0, -1))
    return WinRate(wins, ties, losses, float(points.mean()), (float(low), float(high)))


def ratings(matches: list[tuple[str, str, int]]) -> tuple[dict[str, dict[str, float]], str]:
    """Elo and Bradley-Terry ratings of players from (A, B, verdict) with verdict 1, 0 or -1, by
    `evalica`.

    Returns: {player: {"elo", "bradley_terry"}} and a note. Bradley-Terry has no finite answer where
    a player never loses (or never wins): one tie is then added to every pair that met, and the note
    says so.
    Raises: ValueError where some players never met, even through others: they cannot be compared.
    """
    import evalica
    from scipy.sparse.csgraph import connected_components

    names = sorted({name for a, b, _ in matches for name in (a, b)})
    beat = np.zeros((len(names), len(names)))
    for a, b, verdict in matches:
        first, second = names.index(a), names.index(b)
        beat[first, second] += verdict >= 0
        beat[second, first] += verdict <= 0
    if not matches or connected_components(beat, connection="weak")[0] > 1:
        raise ValueError(
            "These players never met, not even through others: no rating can compare them."
        )
    note = "no smoothing"
    if connected_components(beat, connection="strong")[0] > 1:
        matches = matches + [
            (a, b, 0) for a, b in sorted({tuple(sorted(match[:2])) for match in matches})
        ]
        note = "somebody never lost: one tie was added to every pair that met"
    winners = {1: evalica.Winner.X, 0: evalica.Winner.Draw, -1: evalica.Winner.Y}
    columns = [m[0] for m in matches], [m[1] for m in matches], [winners[m[2]] for m in matches]
    elo, strength = evalica.elo(*columns).scores, evalica.bradley_terry(*columns).scores
    return {
        name: {"elo": float(elo[name]), "bradley_terry": float(strength[name])} for name in names
    }, note
