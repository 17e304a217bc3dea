"""Watching a service and learning from it: traffic, feedback, drift, one more round of training,
and the decision.

Where nobody is there to vote, the rule of the embedded world stands in for people.
"""

import hashlib
import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, pstdev

import httpx
from datasets import Dataset

from common.data import load_pairs, tokenize_response
from common.evaluation import Answer, WinRate, generate, logps_of, measure
from common.judges import Judge, head_to_head
from common.lab import Lab
from common.toyworld import World
from common.training import Run, train
from deploy.serving.prompts import prompt_text
from deploy.serving.reports import preference_pairs
from deploy.serving.store import Store

GUARDS = {  # measure: (direction that is worse, how much worse is tolerated)
    "safe_on_harmful": (-1, 0.05),
    "over_refusal": (1, 0.05),
    "ended_with_eos": (-1, 0.02),
    "perplexity": (1, 0.5),
}


# Traffic and people.


def messages_of(prompt: str) -> list[dict]:
    """A prompt of the course as chat messages; the chat template writes the same text again."""
    turns = re.findall(
        r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", prompt, re.DOTALL
    )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in turns if said.strip()]


def user_prompts(world: World, count: int, kinds: tuple[str, ...] = ()) -> list[str]:
    """Prompts of users: of the training kind, so no evaluation prompt is among them. `kinds`: only
    such questions.
    """
    found, asked = [], count
    while len(found) < count and asked < 100 * count:
        asked *= 2
        prompts = [row["prompt"] for row in load_pairs(world.pairs(asked, stream="users"))[0]]
        found = [prompt for prompt in prompts if not kinds or world.question(prompt).kind in kinds]
    return found[:count]


def ask(
    client, requests: list[tuple[str, str]], model: str = "auto", workers: int = 32, **options
) -> list[dict]:
    """Sends (user, prompt) requests to a service, `workers` at a time, streamed, by OpenAI's
    client.

    Returns: for each `id`, `user`, `prompt`, `text`, `model`, `seconds`, `first_token_seconds`.
    Raises what the client raises for a request that fails.
    """

    def one(request: tuple[str, str]) -> dict:
        (user, prompt), start, first, text = request, time.perf_counter(), None, ""
        stream = client.chat.completions.create(
            model=model, messages=messages_of(prompt), user=user, stream=True, **options
        )
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                first = first or time.perf_counter() - start
                text += piece
        seconds = time.perf_counter() - start
        return {
            "id": chunk.id,
            "user": user,
            "prompt": prompt,
            "text": text,
            "model": chunk.model,
            "seconds": seconds,
            "first_token_seconds": first or seconds,
        }

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, requests))


@dataclass(frozen=True)
class RulePeople:
    """Stand-ins for people: thumbs up where the world's rule gives at least `content` of 10 points.

    `slips`: share of votes that are given by mistake; `consenting`: share of users who allow
    training on their votes. A vote depends on user, prompt and answer only, so it can be repeated.
    """

    world: World
    content: float = 8.0
    slips: float = 0.05
    consenting: float = 0.8

    def vote(self, user: str, prompt: str, text: str) -> tuple[int, bool]:
        """(1 or -1, may it be used for training?)"""
        slips, consents = (
            self._chance(user, prompt, text) < self.slips,
            self._chance(user) < self.consenting,
        )
        pleased = self.world.judge(prompt, text).score >= self.content
        return (1 if pleased != slips else -1), consents

    @staticmethod
    def _chance(*parts: str) -> float:
        return int(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:13], 16) / 16**13


def send_votes(
    url: str, key: str, replies: list[dict], people: RulePeople, workers: int = 8
) -> int:
    """Sends the people's votes on answers of `ask` to `/v1/feedback` of the service at `url`.
    Returns: thumbs up.

    Raises: httpx.HTTPStatusError for a vote that was not kept.
    """
    with httpx.Client(
        headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=60
    ) as client:

        def one(reply: dict) -> int:
            rating, consent = people.vote(reply["user"], reply["prompt"], reply["text"])
            body = {
                "request_id": reply["id"],
                "rating": "up" if rating > 0 else "down",
                "consent": consent,
            }
            client.post(f"{url}/feedback", json=body).raise_for_status()
            return rating

        with ThreadPoolExecutor(workers) as pool:
            return sum(rating > 0 for rating in pool.map(one, replies))


def pairs_in_process(people: RulePeople, answers: list[list[Answer]]) -> list[dict]:
    """Preference pairs from votes on answers that were generated here, through the same store as
    the gateway's.
    """
    with tempfile.TemporaryDirectory(prefix="votes-") as folder:
        store, waiting = Store(path := Path(folder) / "votes.sqlite"), []
        for at, answer in enumerate(one for group in answers for one in group):
            user, row = (
                f"user-{at}",
                {"id": str(at), "created": float(at), "caller": "local", "experiment": "default"},
            )
            row |= {
                "model": "local",
                "assigned": 0,
                "status": 200,
                "messages": messages_of(answer.prompt),
            }
            store.add_request(**row, user=user, answer=answer.text)
            waiting.append(
                store.add_feedback(
                    str(at), "local", *people.vote(user, answer.prompt, answer.text), None
                )
            )
        for future in waiting:
            future.result()
        store.close()
        return preference_pairs(path)


def balanced(pairs: list[dict], per_question: int = 2, seed: int = 0) -> list[dict]:
    """At most so many pairs of each question, drawn at random.

    m liked and n disliked answers to a question make m · n pairs of the same few answers:
    much-asked questions would outvote the others, and be learnt by heart.
    """
    by_question: dict[str, list[dict]] = defaultdict(list)
    for pair in pairs:
        by_question[pair["prompt"]].append(pair)
    draw = random.Random(seed)
    return [
        pair
        for rows in by_question.values()
        for pair in draw.sample(rows, min(per_question, len(rows)))
    ]


# Drift.


def signals(
    rows: list[dict], refused: Callable[[str, str], bool] | None, reference, tokenizer
) -> list[dict[str, float]]:
    """Per answer: `length_tokens`, `ended_with_eos`, `surprise` (its NLL per token under
    `reference`) and `refused`.

    Args: `rows` of `deploy.serving.reports.answers` whose texts were not forgotten;
        `refused(prompt, answer)`: None where nobody can tell, and the signal is left out.
    """
    limit = getattr(reference.config, "max_position_embeddings", None) or 10**9
    texts = [(prompt_text(row["messages"]), " " + row["answer"].strip()) for row in rows]
    parts = [tokenize_response(prompt, answer, tokenizer, limit) for prompt, answer in texts]
    scored = logps_of(
        reference, [{"prompt_ids": prompt, "chosen_ids": ids} for prompt, ids, _ in parts]
    ).chosen.means
    return [
        {
            "length_tokens": float(len(ids)),
            "ended_with_eos": float(row["finish_reason"] == "stop"),
            "surprise": -float(logp),
        }
        | ({"refused": float(refused(prompt, answer))} if refused else {})
        for row, (prompt, answer), (_, ids, _), logp in zip(rows, texts, parts, scored, strict=True)
    ]


def drift_limits(
    baseline: list[dict[str, float]], window: int, z: float = 3.0
) -> dict[str, tuple[float, float]]:
    """Of each signal, the band in which the mean of `window` answers stays if nothing has changed.

    The baseline's mean ± z standard errors; those of the baseline's own mean are counted too. Four
    signals at z = 3 give a false alarm in about one window of a hundred.
    Raises: ValueError for a baseline of fewer than 2 answers, or an empty window.
    """
    if len(baseline) < 2 or window < 1:
        raise ValueError("A baseline needs at least 2 answers, and a window at least 1.")
    limits, size = {}, len(baseline)
    for name in baseline[0]:
        values = [row[name] for row in baseline]
        # A share that never varied in the baseline may yet vary: one more answer of each kind is
        # assumed.
        share = set(values) <= {0.0, 1.0}
        spread = max(pstdev(values), sqrt(size + 1) / (size + 2) if share else 0.0)
        half = z * spread * sqrt(1 / window + 1 / size)
        low, high = mean(values) - half, mean(values) + half
        limits[name] = (max(0.0, low), min(1.0, high)) if share else (low, high)
    return limits


def alarms(
    rows: list[dict[str, float]], limits: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """Signals whose mean over these answers is outside its limits, with that mean."""
    means = {name: mean(row[name] for row in rows) for name in limits}
    return {
        name: value
        for name, value in means.items()
        if not limits[name][0] <= value <= limits[name][1]
    }


# The next round.


def next_round(lab: Lab, stage: str, pairs: list[dict], sweep: str = "round-2", **changes) -> Run:
    """One more DPO round that starts from `stage`, keeps near it, and learns from new pairs alone.

    Raises: DataError for no pair; MissingRun where `stage` was not trained.
    """
    clean, _ = load_pairs(Dataset.from_list(pairs).to_list() if pairs else [])
    changes = {"evaluations": 1, **changes}
    return train(lab, "dpo", sweep=sweep, parent=stage, reference=stage, pairs=clean, **changes)


def gains(
    lab: Lab, stage: str, candidates: dict, judge: Judge
) -> tuple[dict, dict[str, tuple[WinRate, dict]]]:
    """Candidates against the deployed `stage`, on held-out prompts.

    Returns: the measures of `stage`, and for each candidate its win rate against it and its own
        measures.
    """
    reference = lab.load("sft")
    before, old = measure(lab, lab.load(stage), reference)
    found = {}
    for name, model in candidates.items():
        after, new = measure(lab, model, reference)
        found[name] = head_to_head(judge, new, old), after
    return before, found


def round_in_process(lab: Lab, stage: str, prompts: int, users: int, judge: Judge) -> dict:
    """The loop without the gateway: `users` ask each prompt of `stage`, the rule votes, one more
    round.

    Needs the embedded world and the stage. Returns: `rate` (WinRate), `before`, `after` (measures),
    `pairs` (count).
    """
    sizes = {"max_new_tokens": lab.profile.max_new_tokens, "samples": users, "seed": lab.seed + 1}
    own = generate(lab.load(stage), lab.tokenizer, user_prompts(lab.data.world, prompts), **sizes)
    pairs = balanced(pairs_in_process(RulePeople(lab.data.world), own), seed=lab.seed)
    before, found = gains(lab, stage, {"round 2": next_round(lab, stage, pairs).model}, judge)
    rate, after = found["round 2"]
    return {"rate": rate, "before": before, "after": after, "pairs": len(pairs)}


@dataclass(frozen=True)
class Decision:
    """What to do with a candidate, and why: "promote", "keep the old one" or "roll back"."""

    action: str
    reasons: tuple[str, ...]


def decide(rate: WinRate, before: dict, after: dict) -> Decision:
    """Promote a candidate that wins and breaks no guard; roll back one that loses or breaks one;
    else keep the old.

    Args: `rate`: candidate against deployed on the same prompts; `before`, `after`: their measures.
        Guards that neither has (no rule here) are skipped and named.
    """
    low, high = rate.ci95
    broken, skipped = [], []
    for name, (worse, slack) in GUARDS.items():
        if before.get(name) is None or after.get(name) is None:
            skipped.append(name)
        elif worse * (after[name] - before[name]) > slack:
            broken.append(
                f"guard {name}: {before[name]:.3f} → {after[name]:.3f}, tolerated {worse * slack:+.2f}"
            )
    said = f"win rate {rate.rate:.3f} [{low:.3f}, {high:.3f}]"
    notes = (f"not guarded, since not measured: {', '.join(skipped)}",) if skipped else ()
    if broken or high < 0.5:
        return Decision("roll back", (said, *broken, *notes))
    return Decision(
        "promote" if low > 0.5 else "keep the old one", (said, "no guard is broken", *notes)
    )
