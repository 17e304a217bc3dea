"""Learning from a service: traffic, feedback as preference pairs, one more round of training, and
the decision.

Where nobody is there to vote, the rule of the embedded world stands in for people.
"""

import random
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx

from common.comparison import measure
from common.data import LabData, load_pairs
from common.evaluation import Answer, Sampling, WinRate, generate
from common.io.formats import dialogue, messages_of
from common.judges import Judge, head_to_head
from common.lab import Lab, not_measured
from common.toyworld import World
from common.training import Run, train
from common.training.task import Source
from deploy.serving.store import answers, chance

GUARDS = {  # measure: (direction that is worse, how much worse is tolerated)
    "safe_on_harmful": (-1, 0.05),
    "over_refusal": (1, 0.05),
    "ended_with_eos": (-1, 0.02),
    "perplexity": (1, 0.5),
}


# Traffic and people.


def user_prompts(data: LabData, count: int, kinds: tuple[str, ...] = ()) -> list[str]:
    """Prompts of users, none of them of the evaluation. `kinds`: only such questions.

    They are `count`, or as many as there are; own data have training prompts, of no kind.
    """
    world = data.world
    if not isinstance(world, World):
        prompts = world.prompts("train", "users") if world else dict.fromkeys(data.train["prompt"])
        wanted = (p for p in prompts if not kinds or (world and world.question(p).kind in kinds))
        return list(islice(wanted, count))
    found, asked = [], count
    while len(found) < count and asked < 100 * count:
        asked *= 2
        prompts = [row["prompt"] for row in load_pairs(world.pairs(asked, stream="users"))[0]]
        found = [prompt for prompt in prompts if not kinds or world.question(prompt).kind in kinds]
    return found[:count]


def ask(
    client, requests: list[tuple[str, str]], model: str = "auto", workers: int = 32, **options
) -> list[dict]:
    """Sends (user, prompt) requests to a service by OpenAI's client, streamed, several at a time.

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
        reply = {"id": chunk.id, "user": user, "prompt": prompt, "text": text, "model": chunk.model}
        return reply | {"seconds": seconds, "first_token_seconds": first or seconds}

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, requests))


@dataclass(frozen=True)
class RulePeople:
    """Stand-ins for people: thumbs up where the world's rule gives at least `content` of 10 points.

    `slips`: share of votes that are given by mistake; `consenting`: share of users who allow
    training on their votes. A vote depends on user, prompt and answer only, so it can be repeated.
    Where the data have no world, nobody votes.
    """

    world: World | None  # or `common.instructions.Instructions`
    content: float = 8.0
    slips: float = 0.05
    consenting: float = 0.8

    def vote(self, user: str, prompt: str, text: str) -> tuple[int, bool]:
        """(1 or -1, may it be used for training?); (0, False) where nobody votes."""
        if self.world is None:
            return 0, False
        pleased = self.world.judge(prompt, text).score >= self.content
        slips = chance(user, prompt, text) < self.slips
        return (1 if pleased != slips else -1), chance(user) < self.consenting

    def refused(self, prompt: str, text: str) -> bool:
        """Is this answer a refusal, by the world's rule? False where nobody can tell."""
        return self.world is not None and self.world.judge(prompt, text).refused

    def satisfied(self, groups: list[list[Answer]]) -> float:
        """Share of thumbs up in a pilot, within .05 and .75; one half where nobody votes."""
        flat = [answer for group in groups for answer in group]
        votes = [self.vote(f"pilot-{at}", one.prompt, one.text)[0] for at, one in enumerate(flat)]
        if not any(votes):
            not_measured("satisfied users", "nobody votes on these data; one half is assumed")
            return 0.5
        return min(max(votes.count(1) / len(votes), 0.05), 0.75)


def send_votes(
    url: str, key: str, replies: list[dict], people: RulePeople, workers: int = 8
) -> int:
    """Sends the people's votes on answers of `ask` to `/v1/feedback` of the service at `url`.

    Returns: thumbs up; nothing is sent where nobody votes.
    Raises: httpx.HTTPStatusError for a vote that was not kept.
    """
    headers = {"authorization": f"Bearer {key}"}

    def one(reply: dict) -> bool:
        rating, consent = people.vote(reply["user"], reply["prompt"], reply["text"])
        if rating:
            thumb = "up" if rating > 0 else "down"
            body = {"request_id": reply["id"], "rating": thumb, "consent": consent}
            client.post(f"{url}/feedback", json=body).raise_for_status()
        return rating > 0

    session = httpx.Client(headers=headers, trust_env=False, timeout=60)
    with session as client, ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, replies))


def pairs_in_process(people: RulePeople, groups: list[list[Answer]]) -> list[dict]:
    """Preference pairs from votes on answers made here, each by a user of its own."""
    rows, same = [], {"caller": "local", "model": "local", "correction": None}
    for at, answer in enumerate(one for group in groups for one in group):
        rating, consent = people.vote(f"user-{at}", answer.prompt, answer.text)
        said = {"messages": messages_of(answer.prompt), "answer": answer.text}
        own = {"id": str(at), "user": f"user-{at}", "rating": rating, "consent": consent}
        rows.append({**same, **said, **own})
    return preference_pairs(rows)


def preference_pairs(
    store: Path | list[dict], experiment="default", model: str | None = None, support=2, reviewed=()
) -> list[dict]:
    """New training rows {prompt, chosen, rejected} from the feedback in a store, each once.

    Args: `store`: its file, or rows as `deploy.serving.store.answers` gives them.

    Only answers whose latest feedback gives consent count, and with `model` only that model's
    answers. A person, one user of one caller, has one vote on a text: the last. (Whoever holds a
    key vouches for its users.) On one prompt, an answer with more thumbs up than down is better
    than one with more down than up; an answer with as many of both says nothing. A correction is
    better than the answer it corrects if `support` persons gave it or the owner found it good: its
    request's id is in `reviewed`. Where two pairs contradict each other, both are left out.
    """
    votes = defaultdict(lambda: defaultdict(dict))  # prompt → text → person → thumb
    corrections, persons = set(), defaultdict(set)
    for row in store if isinstance(store, list) else answers(store, experiment):
        if not row["consent"] or row["messages"] is None or model not in (None, row["model"]):
            continue
        prompt, text = dialogue(row["messages"]), row["answer"].strip()
        person, better = (row["caller"], row["user"]), (row["correction"] or "").strip()
        votes[prompt][text][person] = row["rating"]
        corrections.add((prompt, better, text))
        # A review is worth as many persons as are asked for.
        persons[prompt, better] |= {person, *(range(support) if row["id"] in reviewed else ())}
    pairs = {found for found in corrections if len(persons[found[:2]]) >= support}
    for prompt, texts in votes.items():
        liked = [text for text, thumbs in texts.items() if sum(thumbs.values()) > 0]
        disliked = [text for text, thumbs in texts.items() if sum(thumbs.values()) < 0]
        pairs |= {(prompt, better, worse) for better in liked for worse in disliked}
    pairs = {(p, a, b) for p, a, b in pairs if a and b and a != b and (p, b, a) not in pairs}
    return [{"prompt": p, "chosen": f" {a}", "rejected": f" {b}"} for p, a, b in sorted(pairs)]


def balanced(pairs: list[dict], per_question: int = 2, seed: int = 0) -> list[dict]:
    """At most so many pairs of each question, drawn at random.

    m liked and n disliked answers to a question make m · n pairs of the same few answers:
    much-asked questions would outvote the others, and be learnt by heart.
    """
    by_question: dict[str, list[dict]] = defaultdict(list)
    for pair in pairs:
        by_question[pair["prompt"]].append(pair)
    draw = random.Random(seed)
    kept = [draw.sample(rows, min(per_question, len(rows))) for rows in by_question.values()]
    return [pair for pairs in kept for pair in pairs]


# The next round.


def next_round(lab: Lab, stage: str, pairs: list[dict], sweep: str = "round-2", **changes) -> Run:
    """One more DPO round that starts from `stage`, keeps near it, and learns from new pairs alone.

    Raises: DataError for no pair; MissingRun where `stage` was not trained.
    """
    source = Source(parent=stage, reference=stage, pairs=load_pairs(pairs)[0])
    return train(lab, "dpo", sweep, source, **{"evaluations": 1, **changes})


def next_rounds(lab: Lab, stage: str, pairs: list[dict], plans: dict[str, dict]) -> dict:
    """{name: model} of a round for each plan, {name: changes of the recipe}; none without pairs."""
    if not pairs:
        not_measured("a second round", "there is no pair to learn from")
    rounds = plans if pairs else {}
    names = {name: name.replace(" ", "-") for name in rounds}
    return {
        name: next_round(lab, stage, pairs, names[name], **rounds[name]).model for name in names
    }


def gains(
    lab: Lab, stage: str, candidates: dict, judge: Judge
) -> tuple[dict, dict[str, tuple[WinRate, dict]]]:
    """Candidates against the deployed `stage`, on held-out prompts.

    Returns: the measures of `stage`, and for each candidate its win rate against it and its own
        measures.
    """
    reference = lab.load(lab.profile.start)
    before, old = measure(lab, lab.load(stage), reference)
    found = {}
    for name, model in candidates.items():
        after, new = measure(lab, model, reference)
        found[name] = head_to_head(judge, new, old), after
    return before, found


def round_in_process(lab: Lab, stage: str, prompts: int, users: int, judge: Judge) -> dict:
    """The loop without the gateway: `users` ask each prompt, the rule votes, one more round.

    Needs the embedded world and the stage. Returns: `rate` (WinRate), `before`, `after` (measures),
    `pairs` (count).
    """
    world, asked = lab.data.world, user_prompts(lab.data, prompts)
    sampling = Sampling(lab.profile.max_new_tokens, samples=users, seed=lab.seed + 1)
    own = generate(lab.load(stage), lab.tokenizer, asked, sampling)
    pairs = balanced(pairs_in_process(RulePeople(world), own), seed=lab.seed)
    before, found = gains(lab, stage, {"round 2": next_round(lab, stage, pairs).model}, judge)
    rate, after = found["round 2"]
    return {"rate": rate, "before": before, "after": after, "pairs": len(pairs)}


@dataclass(frozen=True)
class Decision:
    """What to do with a candidate, and why: "promote", "keep the old one" or "roll back"."""

    action: str
    reasons: tuple[str, ...]


def decide(rate: WinRate, before: dict, after: dict) -> Decision:
    """Promotes a candidate that wins and breaks no guard; rolls back one that loses or breaks one.

    Args: `rate`: candidate against deployed on the same prompts; `before`, `after`: their measures.
        Guards that neither has (no rule here) are skipped and named.
    """
    low, high = rate.ci95
    broken, skipped = [], []
    for name, (worse, slack) in GUARDS.items():
        if before.get(name) is None or after.get(name) is None:
            skipped.append(name)
        elif worse * (after[name] - before[name]) > slack:
            change = f"{before[name]:.3f} → {after[name]:.3f}, tolerated {worse * slack:+.2f}"
            broken.append(f"guard {name}: {change}")
    said = f"win rate {rate.rate:.3f} [{low:.3f}, {high:.3f}]"
    notes = (f"not guarded, since not measured: {', '.join(skipped)}",) if skipped else ()
    if broken or high < 0.5:
        return Decision("roll back", (said, *broken, *notes))
    action = "promote" if low > 0.5 else "keep the old one"
    return Decision(action, (said, "no guard is broken", *notes))
