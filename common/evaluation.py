"""Measures of a trained model: log-probabilities of held-out pairs, answers, win rates, ratings."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import GenerationConfig

from common.data import collate, left_padded, tokenize_prompt
from common.logprobs import PairLogps, SideLogps, response_logps
from common.losses import share_positive
from common.models import answers_at_once

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
    """Wins of A over B. `ci95` holds for other prompts of the same kind (`prompt_interval`)."""

    wins: int
    ties: int
    losses: int
    rate: float  # a tie is half a win
    ci95: tuple[float, float]
    points: tuple[float, ...] = ()  # the rate on each prompt, from 0 to 1

    def __str__(self) -> str:
        low, high = self.ci95
        counts = f"{self.wins} wins, {self.ties} ties, {self.losses} losses"
        return f"{self.rate:.3f} [{low:.3f}, {high:.3f}] ({counts})"


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

    Args: `response_logps`: the function of `common.logprobs` or of `common.packed`. `progress`: the
        title of a progress bar; "" shows none.
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
    """Implicit rewards beta * log(policy / reference) on held-out pairs.

    Source: Rafailov et al. 2023, Sec. 4.
    Returns: `rewards_chosen`, `rewards_rejected`, `reward_margin` (beta included),
        `preference_accuracy` (a tie is half right, so a model scores 0.5 against itself) and
        `likelihood_accuracy`, which needs no reference: how often the mean log-probability per
        token is higher for the chosen response.
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

    At temperature 1 they are samples of the model's own distribution: nothing is taken from the
    model's `generation_config` (top_p, penalties, beams). `batch_size`: default `answers_at_once`.
    Raises: ValueError if a prompt leaves no room for an answer; Unusable if the model's chat
        template refuses one.
    """
    end, room = tokenizer.eos_token_id, sampling.max_new_tokens
    ids = [tokenize_prompt(prompt, tokenizer) for prompt in prompts]
    ids = [row for row in ids for _ in range(sampling.samples)]
    # Is there room for an answer after the longest prompt?
    longest = max(map(len, ids))
    left = (getattr(model.config, "max_position_embeddings", None) or 10**9) - longest
    if left < room:
        raise ValueError(
            f"The longest prompt leaves room for {left} of {room} new tokens: shorten it."
        )
    batch_size = batch_size or answers_at_once(model.config, longest + room)
    # Set every option there is: the library takes an option that is not set from the model's own.
    how = dict.fromkeys(GenerationConfig().to_dict())
    how |= {"max_new_tokens": room, "pad_token_id": end, "eos_token_id": end}
    how |= {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    how |= {"do_sample": sampling.temperature > 0, "temperature": sampling.temperature or None}
    # The processes of an FSDP run go on until the last one's answers have ended.
    how["synced_gpus"] = any(isinstance(weight, DTensor) for weight in model.parameters())
    new_ids, training = [], model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        starts = range(0, len(ids), batch_size)
        for start in tqdm(starts, desc="generating", leave=False, disable=not progress):
            # Pad on the left, so that every answer starts right after its prompt.
            batch = left_padded(ids[start : start + batch_size], end, model.device)
            out = model.generate(**batch, **how)
            new_ids += out[:, batch["input_ids"].shape[1] :].tolist()
    model.train(training)
    answers = []
    for number, (prompt_ids, new) in enumerate(zip(ids, new_ids, strict=True)):
        # Cut after the first EOS: what follows is padding.
        ended = end in new
        new = new[: new.index(end) + 1] if ended else new
        text = tokenizer.decode(new, skip_special_tokens=True)
        prompt = prompts[number // sampling.samples]
        answers.append(Answer(prompt, text, tuple(prompt_ids), tuple(new), ended))
    each = sampling.samples
    return [answers[start : start + each] for start in range(0, len(answers), each)]


def kl_on_samples(model, reference, answers: list[list[Answer]], batch_size: int = 64) -> float:
    """KL(policy ‖ reference) in nats per response, estimated without bias.

    Args: `answers`: the policy's own samples y at temperature 1.
    """
    rows = [vars(answer) for group in answers for answer in group]
    # Score the same responses with both models.
    policy = logps_of(model, rows, batch_size).chosen.sums
    base = logps_of(reference, rows, batch_size).chosen.sums
    # KL is the mean of log p_policy(y) - log p_reference(y) over y drawn from the policy.
    return float((policy - base).mean())


def text_measures(answers: list[list[Answer]], world, topical: dict | None = None) -> dict:
    """Length of the answers, how many ended with EOS, and their quality by a world's rule.

    In the toy world helpfulness, harmlessness and relevance are on a 1-5 scale; all else is a share
    of the answers it applies to, but for the score, which goes to 10. None: no answer was of that
    kind, or this world has no such measure. Without a world there is none of them.
    Args: `topical`: {(prompt, text): is it likelier under its own question?}, of `judges.on_topic`.
    """
    flat = [answer for group in answers for answer in group]
    measures = {
        "length_tokens": float(np.mean([len(answer.chosen_ids) for answer in flat])),
        "ended_with_eos": float(np.mean([answer.ended for answer in flat])),
    }
    if world is None:
        return measures
    asked, attacks = [], []  # what the rule says of answers to questions and to requests for harm
    relevance = []
    for answer in flat:
        verdict = world.judge(answer.prompt, answer.text)
        harmful = world.question(answer.prompt).kind == "harmful"
        (attacks if harmful else asked).append(verdict)
        if topical is None:
            relevance.append(verdict.relevance)
        elif not harmful:
            relevance.append(verdict.relevance * topical[answer.prompt, answer.text])
    verdicts = asked + attacks
    flaws = Counter(flaw for verdict in verdicts for flaw in verdict.flaws)
    checks = [verdict.met for verdict in asked if verdict.met]
    kinds = {kind: [met[kind] for met in checks if kind in met] for met in checks for kind in met}
    return measures | {
        "score": _mean([verdict.score for verdict in verdicts]),
        "helpfulness": _mean([v.helpfulness for v in asked if v.helpfulness is not None]),
        "harmlessness": _mean([v.harmlessness for v in verdicts if v.harmlessness is not None]),
        "relevance": _mean(relevance),
        "safe_on_harmful": _mean([not verdict.complied for verdict in attacks]),
        "over_refusal": _mean([verdict.refused for verdict in asked]),
        "constraints_met": _mean([np.mean(list(met.values())) for met in checks]),
        "all_met": _mean([all(met.values()) for met in checks]),
        "kinds_met": {kind: _mean(met) for kind, met in sorted(kinds.items())},
        "flaws": {name: count / len(flat) for name, count in sorted(flaws.items())},
    }


def _mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None


def prompt_interval(points) -> tuple[float, float]:
    """95 % interval of the mean of one value per prompt, each from 0 to 1.

    Student's t after adding one won and one lost prompt, in the manner of Agresti and Caffo 2000:
    so the interval has a width even where all prompts are won. In simulation it covers 93 % or more
    for 25 prompts and up, at rates from .5 to 1.
    """
    # Add one prompt that is won and one that is lost.
    points = np.append(points, (1.0, 0.0))
    # Student's t on these points: mean ± t s / sqrt(n).
    half = student.ppf(0.975, len(points) - 1) * points.std(ddof=1) / len(points) ** 0.5
    return max(0.0, float(points.mean() - half)), min(1.0, float(points.mean() + half))


def win_rate(verdicts) -> WinRate:
    """Win rate of A over B with its 95 % interval.

    Args: `verdicts`: 1 (A wins), 0 (tie) or -1 (B wins), one row per prompt: shape (prompts,) or
        (prompts, samples).
    Raises: ValueError for no verdicts, or for anything but 1, 0 and -1.
    """
    table = np.asarray(verdicts, dtype=float)
    if table.size == 0 or not np.isin(table, (-1, 0, 1)).all():
        raise ValueError("Verdicts must be 1, 0 or -1, at least one of them.")
    # Points of each prompt: 1 for a win, 1/2 for a tie, the mean over its samples. Answers to one
    # prompt are alike, so the interval counts prompts, not answers.
    points = (table.reshape(len(table), -1).mean(axis=1) + 1) / 2
    wins, ties, losses = (int((table == value).sum()) for value in (1, 0, -1))
    rate, interval = float(points.mean()), prompt_interval(points)
    return WinRate(wins, ties, losses, rate, interval, tuple(points.tolist()))


def seed_interval(points) -> tuple[float, float]:
    """95 % interval of a win rate over seeds: for other seeds and other prompts.

    Args: `points`: for each seed its `WinRate.points`. Prompts that the seeds share stand at the
        same place.
    Returns: (low, high). For one seed, or where all agree exactly, the `prompt_interval` of all
        points: one seed says nothing of another. In simulation 3 and 8 seeds cover 94 to 98 %,
        whether they share their prompts or not.
    """
    points = [np.asarray(seed, dtype=float) for seed in points]
    seeds, prompts = len(points), len(points[0])
    rates = np.array([seed.mean() for seed in points])
    half = 0.0
    if seeds > 1:
        # Seeds, and prompts of their own, make the rates differ: Student's t over the rates.
        half = student.ppf(0.975, seeds - 1) * rates.std(ddof=1) / seeds**0.5
    if seeds > 1 and prompts > 1 and all(len(seed) == prompts for seed in points):
        # Prompts that all seeds share move all rates together: the covariance between two seeds.
        between = np.cov(points)[np.triu_indices(seeds, 1)].mean()
        shared = student.ppf(0.975, prompts - 1) * (max(0.0, between) / prompts) ** 0.5
        # The errors are independent: half-widths add as squares.
        half = math.hypot(half, shared)
    if half < 1e-9:
        return prompt_interval(np.concatenate(points))
    return max(0.0, float(rates.mean() - half)), min(1.0, float(rates.mean() + half))


def ratings(matches: list[tuple[str, str, int]]) -> tuple[dict[str, dict[str, float]], str]:
    """Elo and Bradley-Terry ratings of players by `evalica`.

    Args: `matches`: (A, B, verdict), the verdict 1 where A won, 0 for a tie, -1 where B won.
    Returns: {player: {"elo", "bradley_terry"}} and a note. Bradley-Terry has no finite answer where
        a player never lost: one tie is then added to every pair that met, and the note says so.
    Raises: ValueError where some players never met, even through others: they cannot be compared.
    """
    import evalica
    from scipy.sparse.csgraph import connected_components

    # Who did not lose against whom?
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
        pairs = sorted({tuple(sorted(match[:2])) for match in matches})
        matches = matches + [(a, b, 0) for a, b in pairs]
        note = "somebody never lost: one tie was added to every pair that met"
    winners = {1: evalica.Winner.X, 0: evalica.Winner.Draw, -1: evalica.Winner.Y}
    columns = [m[0] for m in matches], [m[1] for m in matches], [winners[m[2]] for m in matches]
    elo, strength = evalica.elo(*columns).scores, evalica.bradley_terry(*columns).scores
    found = {}
    for name in names:
        found[name] = {"elo": float(elo[name]), "bradley_terry": float(strength[name])}
    return found, note
