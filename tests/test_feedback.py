"""From feedback to the next model: traffic, votes, drift and the decision."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from openai import OpenAI
from scipy.stats import binomtest
from serving_tools import WORDS, FakeEngine, gateway
from tiny import micro_profile

from common.evaluation import Answer, WinRate
from common.instructions import Instructions
from common.io.formats import messages_of
from common.judges import RuleJudge
from common.lab import Lab
from common.models import new_tiny_model
from common.training import train
from deploy.abtest import alarms, drift_limits, signals
from deploy.feedback import (
    RulePeople,
    ask,
    balanced,
    decide,
    next_round,
    next_rounds,
    pairs_in_process,
    preference_pairs,
    round_in_process,
    send_votes,
    user_prompts,
)
from deploy.serving.store import Store, answers


@pytest.fixture(scope="module")
def lab():
    return Lab(micro_profile(), seed=44)


def test_no_evaluation_prompt_is_among_the_users(lab):
    prompts = user_prompts(lab.data, 300)
    assert len(set(prompts)) == 300 and not set(prompts) & set(lab.data.prompts)


def test_users_of_one_kind(lab):
    world = lab.data.world
    assert {world.question(p).kind for p in user_prompts(lab.data, 20, ("harmful",))} == {"harmful"}


@pytest.fixture(scope="module")
def instructions():
    """Data of the instruction world."""
    return SimpleNamespace(world=Instructions(3))


def test_users_of_the_instruction_world_ask_nothing_that_is_held_out(instructions):
    world, prompts = instructions.world, user_prompts(instructions, 200)
    assert len(set(prompts)) == 200
    assert not set(prompts) & {question.prompt for question in world.questions(200)}
    assert {world.question(prompt).split for prompt in prompts} == {"train"}


def test_users_of_one_kind_in_the_instruction_world(instructions):
    harmful = user_prompts(instructions, 60, ("harmful",))
    assert len(set(harmful)) == 60
    assert {instructions.world.question(prompt).kind for prompt in harmful} == {"harmful"}


def test_votes_in_the_instruction_world_become_pairs(instructions):
    """Of a request for harm a refusal scores 10, and help 0: one thumb up, one down."""
    people = RulePeople(instructions.world, slips=0, consenting=1)
    refusal, help_ = " I'm sorry, but I cannot help with that.", " Sure, here is how to do it."
    harmful = user_prompts(instructions, 5, ("harmful",))
    groups = [[answer(prompt, refusal), answer(prompt, help_)] for prompt in harmful]
    assert [people.refused(harmful[0], text) for text in (refusal, help_)] == [True, False]
    pairs = pairs_in_process(people, groups)
    assert {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs} == {
        (prompt, refusal, help_) for prompt in harmful
    }


def test_users_of_own_data_ask_what_is_trained_on_each_once():
    rows = {"prompt": ["a", "b", "a", "c"]}
    own = SimpleNamespace(world=None, train=rows)
    assert user_prompts(own, 2) == ["a", "b"] and user_prompts(own, 9) == ["a", "b", "c"]
    assert user_prompts(own, 9, ("harmful",)) == []


def test_where_nobody_votes_there_is_no_share_no_pair_and_no_round(lab, capsys):
    people = RulePeople(None)
    groups = [[answer("a", " Yes."), answer("a", " No.")]]
    assert people.satisfied(groups) == 0.5 and pairs_in_process(people, groups) == []
    assert (
        send_votes("http://nowhere.invalid", "", [{"user": "u", "prompt": "a", "text": ""}], people)
        == 0
    )
    assert next_rounds(lab, "orpo", [], {"round 2": {}}) == {}
    assert capsys.readouterr().out.count("not measured") == 2


def test_the_share_of_a_pilot_is_counted(lab):
    """3 flawless answers of 4: three thumbs up, none by mistake."""
    world = lab.data.world
    questions = [world.question(prompt) for prompt in user_prompts(lab.data, 4)]
    texts = [world.flawless(q) for q in questions[:3]] + [" No no no"]
    groups = [[answer(q.prompt, text)] for q, text in zip(questions, texts, strict=True)]
    assert RulePeople(world, slips=0).satisfied(groups) == 0.75


def test_people_follow_the_rule_but_for_slips(lab):
    """A flawless answer scores 10, a bare one that is also vague below 8; 5 % of 400 votes are
    slips.
    """
    world = lab.data.world
    people, questions = RulePeople(world), [world.question(p) for p in user_prompts(lab.data, 200)]
    good = [people.vote("u", q.prompt, world.flawless(q))[0] for q in questions]
    bad = [
        people.vote("u", q.prompt, world.render(q, {"bare", "vague"}, random.Random(0)))[0]
        for q in questions
        if q.kind == "benign"
    ]
    assert 0.9 < good.count(1) / len(good) < 1 and 0.9 < bad.count(-1) / len(bad) < 1


def answer(prompt: str, text: str) -> Answer:
    return Answer(prompt, text, (), (), True)


def test_only_consented_votes_become_pairs(lab):
    """A good and a bad answer to each prompt: a pair where both users consent, nothing where nobody
    does.
    """
    world = lab.data.world
    questions = [world.question(prompt) for prompt in user_prompts(lab.data, 10)]
    answers = [[answer(q.prompt, world.flawless(q)), answer(q.prompt, " No.")] for q in questions]
    pairs = pairs_in_process(RulePeople(world, slips=0, consenting=1), answers)
    assert {row["prompt"] for row in pairs} == {q.prompt for q in questions}
    assert all(row["rejected"] == " No." for row in pairs)
    assert pairs_in_process(RulePeople(world, slips=0, consenting=0), answers) == []


def test_users_ask_and_vote_through_a_gateway(lab, tmp_path):
    """Two questions with one answer: every vote is kept, and those with consent can be pairs."""
    questions = user_prompts(lab.data, 2)
    people = RulePeople(lab.data.world, slips=0, consenting=1)
    with gateway(tmp_path, FakeEngine()) as bench:
        url = f"{bench.root}/v1"
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        replies = ask(client, [("ada", prompt) for prompt in questions], max_tokens=9)
        up = send_votes(url, "none", replies, people)
        kept = answers(bench.store)
    assert [reply["prompt"] for reply in replies] == questions
    assert {reply["text"] for reply in replies} == {"".join(WORDS)}
    assert all(reply["seconds"] >= reply["first_token_seconds"] > 0 for reply in replies)
    assert up == sum(row["rating"] == 1 for row in kept) and len(kept) == 2
    assert all(row["consent"] == 1 and row["rating"] for row in kept)


def rows_of(**changes) -> list[dict]:
    return [
        {
            "length_tokens": 20.0 + i % 5,
            "refused": float(i % 4 == 0),
            "ended_with_eos": 1.0,
            "surprise": 1.0 + i % 3 / 10,
        }
        | changes
        for i in range(60)
    ]


@pytest.mark.parametrize("changes", [{}, {"surprise": 0.1}])
def test_the_same_traffic_raises_no_alarm(changes):
    """Not where a signal never varies, either: 0.1 is no sum of powers of two, and still its mean
    is 0.1 in a baseline of 60 and in a window of 30.
    """
    assert alarms(rows_of(**changes)[:30], drift_limits(rows_of(**changes), 30)) == {}


@pytest.mark.parametrize(
    "signal, value",
    [("length_tokens", 40.0), ("refused", 1.0), ("ended_with_eos", 0.5), ("surprise", 2.0)],
)
def test_each_signal_raises_its_alarm(signal, value):
    changed = [
        row | {signal: value if i % 2 else 1.0 * value} for i, row in enumerate(rows_of()[:30])
    ]
    assert alarms(changed, drift_limits(rows_of(), 30)) == {signal: value}


@pytest.mark.parametrize("size, window", [(1, 30), (60, 0)])
def test_a_band_needs_a_baseline_and_a_window(size, window):
    with pytest.raises(ValueError, match="at least 2 answers"):
        drift_limits(rows_of()[:size], window)


def test_one_odd_answer_is_no_drift():
    """All 60 of the baseline ended by themselves; one of 30 that does not stays in the
    band.
    """
    window = rows_of()[:30]
    window[0]["ended_with_eos"] = 0.0
    assert alarms(window, drift_limits(rows_of(), 30)) == {}


def quiet_rows(rng: np.random.Generator, size: int) -> list[dict]:
    """Traffic that never changes: rare cut and refused answers, a surprise with a long tail."""
    columns = {
        "length_tokens": rng.geometric(1 / 27, size).astype(float),
        "ended_with_eos": (rng.random(size) < 0.98).astype(float),
        "surprise": np.exp(0.8 * rng.standard_normal(size) - 1),
        "refused": (rng.random(size) < 0.05).astype(float),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_one_level_holds_for_all_signals_together():
    """Of 400 quiet windows of 60 answers, each with a baseline of 150, one in a hundred may raise
    any alarm: the 95 % interval of the share that does holds 1 %, and ends below 4 %.
    """
    rng, windows = np.random.default_rng(0), 400
    raised = sum(
        bool(alarms(quiet_rows(rng, 60), drift_limits(quiet_rows(rng, 150), 60)))
        for _ in range(windows)
    )
    low, high = binomtest(raised, windows).proportion_ci(method="wilson")
    assert low <= 0.01 and high < 0.04, f"{raised} of {windows} quiet windows raise an alarm"


def test_signals_of_an_answer(lab):
    """Tokens of the answer with EOS; surprise is the mean NLL of these tokens, here under random
    weights.
    """
    model = new_tiny_model(lab.profile, lab.tokenizer).eval()
    row = {
        "messages": messages_of(lab.prompts[0]),
        "answer": "No, I will not.",
        "finish_reason": "length",
    }
    found = signals([row], lambda prompt, text: "will not" in text, model, lab.tokenizer)[0]
    assert found["length_tokens"] == len(lab.tokenizer(" No, I will not.")["input_ids"]) + 1
    assert found["refused"] == 1 and found["ended_with_eos"] == 0 and 4 < found["surprise"] < 9


def test_the_next_round_starts_from_the_deployed_model(lab):
    train(lab, "base")
    train(lab, "orpo")
    rows = [
        {"prompt": p, "chosen": " Yes, do.", "rejected": " No."} for p in user_prompts(lab.data, 12)
    ]
    run = next_round(lab, "orpo", rows)
    assert run.record["parent"] == run.record["reference"] == "orpo" and run.record["n_pairs"] == 12
    assert lab.lineage("dpo", "round-2")[-2] == lab.fingerprint_of("orpo")


def test_a_round_in_process_votes_trains_and_measures(lab):
    """What notebook 1.8-04 does for further seeds, in small."""
    for stage in ("base", "sft", "orpo"):
        train(lab, stage)
    found = round_in_process(lab, "orpo", 40, 4, RuleJudge(lab.data.world))
    rate = found["rate"]
    assert found["pairs"] > 0 and rate.wins + rate.ties + rate.losses == len(lab.prompts)
    assert found["before"]["reward_margin"] != found["after"]["reward_margin"]


FINE = {"safe_on_harmful": 0.9, "over_refusal": 0.1, "ended_with_eos": 1.0, "perplexity": 3.0}


@pytest.mark.parametrize(
    "interval, action",
    [((0.51, 0.6), "promote"), ((0.45, 0.55), "keep the old one"), ((0.4, 0.49), "roll back")],
)
def test_the_interval_decides(interval, action):
    assert decide(WinRate(0, 0, 0, sum(interval) / 2, interval), FINE, FINE).action == action


@pytest.mark.parametrize(
    "guard, value",
    [("safe_on_harmful", 0.8), ("over_refusal", 0.2), ("ended_with_eos", 0.9), ("perplexity", 4.0)],
)
def test_a_broken_guard_rolls_back_even_a_winner(guard, value):
    decision = decide(WinRate(9, 0, 1, 0.9, (0.7, 1.0)), FINE, FINE | {guard: value})
    assert decision.action == "roll back" and guard in decision.reasons[1]


def test_what_was_not_measured_is_said():
    reasons = decide(
        WinRate(9, 0, 1, 0.9, (0.7, 1.0)), {"perplexity": 3.0}, {"perplexity": 3.0}
    ).reasons
    assert "not measured: safe_on_harmful, over_refusal, ended_with_eos" in reasons[-1]


def test_pairs_of_one_model_only(lab, tmp_path):
    """Two answers to one question from two models, one liked and one not: a pair, but none of
    either model's own.
    """
    store = Store(tmp_path / "votes.sqlite")
    for model, rating in (("old", -1), ("new", 1)):
        row = {
            "id": model,
            "created": 0.0,
            "caller": "c",
            "experiment": "default",
            "assigned": 1,
            "status": 200,
        }
        store.add_request(
            **row, model=model, messages=messages_of(lab.prompts[0]), answer=f"Says {model}."
        )
        store.add_feedback(model, "c", rating, True, None).result()
    store.close()
    assert [row["chosen"] for row in preference_pairs(store.path)] == [" Says new."]
    assert preference_pairs(store.path, model="new") == []


def test_no_question_has_more_than_its_share():
    """5 pairs on a and 1 on b: 2 and 1 are left, all of them from before, and the same ones next
    time.
    """
    pairs = [{"prompt": "a", "chosen": str(n), "rejected": "x"} for n in range(5)]
    pairs.append({"prompt": "b", "chosen": "y", "rejected": "x"})
    left = balanced(pairs, per_question=2)
    assert [row["prompt"] for row in left] == ["a", "a", "b"] and all(row in pairs for row in left)
    assert left[0] != left[1] and left == balanced(pairs, per_question=2)
