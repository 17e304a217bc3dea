"""Measures of a trained model: log-probabilities on held-out pairs, generated answers, win rates,
ratings.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import mean, stdev

import numpy as np
import torch
from tqdm import tqdm

from common.data import collate
from common.lab import Lab
from common.logprobs import PairLogps, SideLogps, response_logps
from common.losses import share_positive
from common.toyworld import World

BETA = 0.1  # scale of `reward_margin` in reports, whatever beta a model was trained with
# Costs of a run, in reports. `simple_flops`: without packing, by which methods are compared.
COSTS = (
    "wall_seconds",
    "cpu_seconds",
    "peak_memory_bytes",
    "train_flops",
    "simple_flops",
    "train_tokens",
)


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


@torch.no_grad()
def logps_of(
    model, rows, pad_id: int = 0, batch_size: int = 64, path: str = "simple", progress: str = ""
) -> PairLogps:
    """Log-probabilities of all rows, in order and without gradients, each (rows,), on the CPU.

    Args: `path`: as in `response_logps`. `progress`: the title of a progress bar; "": none.
    """
    rows = list(rows)
    parts = []
    training = model.training
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc=progress, disable=not progress):
        batch = collate(rows[start : start + batch_size], pad_id, model.device)
        parts.append(response_logps(model, batch, path))
    model.train(training)

    def join(side: str) -> SideLogps | None:
        if getattr(parts[0], side) is None:
            return None
        sides = [getattr(part, side) for part in parts]
        return SideLogps(
            torch.cat([s.sums for s in sides]).cpu(), torch.cat([s.lengths for s in sides]).cpu()
        )

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


def cache_bytes(config) -> int:
    """Bytes of a token's keys and values in all layers, in float32."""
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (
        2
        * config.num_hidden_layers
        * (getattr(config, "num_key_value_heads", None) or heads)
        * per_head
        * 4
    )


def answers_at_once(config, tokens: int) -> int:
    """How many answers to write at once: 256, or as many as have their keys and values in 2 GB."""
    return max(1, min(256, int(2e9 / (tokens * cache_bytes(config)))))


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    sharded: bool = False,
) -> list[list[Answer]]:
    """`samples` answers to each prompt; temperature 0 is greedy. The global random state is left
    alone.

    Prompts of a batch (default: `answers_at_once`) are padded on the left, so that every answer
    starts right after its prompt. `sharded`: the processes of an FSDP run go on until the last
    one's answers have ended.
    Returns: one list of answers per prompt. Raises: ValueError if a prompt leaves no room for an
        answer.
    """
    end = tokenizer.eos_token_id
    ids = [row for row in tokenizer(prompts)["input_ids"] for _ in range(samples)]
    room = (getattr(model.config, "max_position_embeddings", None) or 10**9) - max(map(len, ids))
    if room < max_new_tokens:
        raise ValueError(
            f"The longest prompt leaves room for {room} of {max_new_tokens} new tokens: shorten it."
        )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    batch_size = batch_size or answers_at_once(model.config, max(map(len, ids)) + max_new_tokens)
    flat, training = [], model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(
            range(0, len(ids), batch_size), desc="generating", leave=False, disable=not progress
        ):
            batch = ids[start : start + batch_size]
            longest = max(map(len, batch))
            inputs = torch.tensor(
                [[end] * (longest - len(row)) + row for row in batch], device=model.device
            )
            mask = torch.tensor(
                [[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=model.device
            )
            out = model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=end,
                eos_token_id=end,
                synced_gpus=sharded,
                **sampling,
            )
            flat += [
                _cut(row, new.tolist(), end)
                for row, new in zip(batch, out[:, longest:], strict=True)
            ]
    model.train(training)
    answers = [
        Answer(
            prompts[i // samples],
            tokenizer.decode(new, skip_special_tokens=True),
            tuple(row),
            tuple(new),
            ended,
        )
        for i, (row, new, ended) in enumerate(flat)
    ]
    return [answers[start : start + samples] for start in range(0, len(answers), samples)]


def _cut(prompt_ids: list[int], new_ids: list[int], end: int) -> tuple[list[int], list[int], bool]:
    """New tokens up to and including the first EOS; what follows is padding."""
    ended = end in new_ids
    return prompt_ids, new_ids[: new_ids.index(end) + 1] if ended else new_ids, ended


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


def measure(
    lab: Lab, model, reference, temperature: float = 1.0
) -> tuple[dict, list[list[Answer]]]:
    """Every shared measure of a model against the reference `sft`, and the answers they were taken
    on.

    Returns: the values of `models.<stage>` in `evaluation.json` (units: see the functions above),
        and the answers.
    """
    profile = lab.profile
    answers = generate(
        model,
        lab.tokenizer,
        lab.prompts,
        profile.max_new_tokens,
        temperature,
        profile.samples,
        seed=lab.seed,
        batch_size=4 * profile.eval_batch,
        progress=True,
    )
    policy = logps_of(model, lab.test_pairs, batch_size=profile.eval_batch)
    shared = preference_metrics(
        policy, logps_of(reference, lab.test_pairs, batch_size=profile.eval_batch)
    )
    kl = kl_on_samples(model, reference, answers, profile.eval_batch)
    seen = text_measures(answers, lab.data.world)
    return {"perplexity": perplexity(policy.chosen), "kl": kl, **shared, **seen}, answers


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


def evaluation_report(
    models: dict[str, dict], rates: dict[str, WinRate], records: dict[str, dict]
) -> dict:
    """The report of one seed, as `evaluation.json` and `comparison.json` hold it.

    Args: `models`: {stage: what `measure` returned}; `rates`: {"dpo_vs_sft": …}; `records`: {stage:
        its `run.json`}.
    Returns: {"models", "win_rate", "cost", "seeds": 1}. Every `std` is null: one seed has no
        spread.
    """
    report = {
        "models": {stage: dict(measures) for stage, measures in models.items()},
        "win_rate": {name: asdict(rate) for name, rate in rates.items()},
        "cost": {
            stage: {name: record[name] for name in COSTS} for stage, record in records.items()
        },
        "seeds": 1,
    }
    return summarise_seeds([report])


def summarise_seeds(reports: list[dict]) -> dict:
    """One report from those of several seeds: means, and beside them `std`, the sample standard
    deviation (n - 1).

    Of a win rate, `rate` is the mean of the seeds' rates, wins, ties and losses are their sums, and
    `ci95` combines the seeds' own intervals: it says how sure we are given these trained models;
    `std` says how much training varies.
    Raises: ValueError for no report, reports of several seeds, or reports that do not hold the same
        entries.
    """
    parts = ("models", "win_rate", "cost")
    if not reports or any(report["seeds"] != 1 for report in reports):
        raise ValueError("Give one report per seed, at least one.")
    if any(report[part].keys() != reports[0][part].keys() for report in reports for part in parts):
        raise ValueError(
            "These reports do not hold the same models, pairs and costs: they cannot be averaged."
        )
    rows = {
        part: {name: [report[part][name] for report in reports] for name in reports[0][part]}
        for part in parts
    }
    models = {}
    for stage, seeds in rows["models"].items():
        if any(row.keys() != seeds[0].keys() for row in seeds):
            raise ValueError(
                f"The reports of {stage!r} hold different measures: they cannot be averaged."
            )
        means, spreads = _over_seeds(
            [{name: row[name] for name in row if name != "std"} for row in seeds]
        )
        models[stage] = means | {"std": spreads}
    return {
        "models": models,
        "win_rate": {name: _mean_rate(seeds) for name, seeds in rows["win_rate"].items()},
        "cost": {stage: _over_seeds(seeds)[0] for stage, seeds in rows["cost"].items()},
        "seeds": len(reports),
    }


def _over_seeds(values: list) -> tuple:
    """(mean, standard deviation) of numbers; of dicts key by key, where a flaw that was never seen
    has share 0.
    """
    if isinstance(values[0], dict):
        names = dict.fromkeys(name for value in values for name in value)
        pairs = {name: _over_seeds([value.get(name, 0.0) for value in values]) for name in names}
        return {name: pair[0] for name, pair in pairs.items()}, {
            name: pair[1] for name, pair in pairs.items()
        }
    if None in values:
        return None, None
    return (mean(values), stdev(values)) if len(values) > 1 else (values[0], None)


def _mean_rate(seeds: list[dict]) -> dict:
    """A win rate over seeds. The seeds' errors are independent, so their half-widths add as
    squares.
    """
    rate, std = _over_seeds([seed["rate"] for seed in seeds])
    down, up = (
        math.hypot(*(seed["ci95"][i] - seed["rate"] for seed in seeds)) / len(seeds) for i in (0, 1)
    )
    counts = {name: sum(seed[name] for seed in seeds) for name in ("wins", "ties", "losses")}
    return counts | {"rate": rate, "ci95": [rate - down, rate + up], "std": std}
