"""Judges beyond the rule: a language model behind an API, people; agreement, bias and ratings."""

import logging
import math
import random
import traceback
from itertools import combinations

import numpy as np
import pytest
from fake_api import between, servers

from common.evaluation import ratings
from common.io.endpoint import Endpoint, EndpointError, judge_endpoint
from common.judges import RuleJudge, Vote
from common.judging.agreement import agreement, calibration, kappa, table
from common.judging.language import LanguageJudge, marked
from common.judging.people import People
from common.judging.ratings import elo_orders, rating_intervals
from common.toyworld import World

PAIRS = [(f"\n\nHuman: {at}?\n\nAssistant:", f" good {at}", f" bad {at}") for at in range(12)]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    with servers(monkeypatch, 1) as (one,):
        monkeypatch.setenv("LAB_JUDGE_URL", one.url)
        monkeypatch.setenv("LAB_JUDGE_MODEL", "judge")
        monkeypatch.setenv("LAB_JUDGE_KEY", "secret-key")
        one.answer = by_word
        yield one


def shown(body: dict) -> tuple[str, str]:
    """The two answers of a request."""
    text = body["messages"][0]["content"]
    return (
        between(text, "=== Answer A ===", "=== Answer B ==="),
        between(text, "=== Answer B ===", "=== End"),
    )


def by_word(body: dict, number: int = 0) -> str:
    """A good judge: the answer that says "good" is better, with a reason."""
    first, second = shown(body)
    better = "A" if "good" in first and "good" not in second else "B"
    return f"{better} says what was asked.\n\n[[{better}]]"


def judge_of(folder, form="pairwise", **changes) -> LanguageJudge:
    endpoint = judge_endpoint(cache=folder, **{"retries": 1, "timeout": 0.3} | changes)
    return LanguageJudge(endpoint, form, workers=2, progress=False)


# --- a language model


def test_a_language_model_votes_with_its_reasons(fake, tmp_path):
    votes = judge_of(tmp_path).prefer([PAIRS[0], PAIRS[0][:1] + PAIRS[0][:0:-1]])
    assert votes == [1, -1] and all(vote.clear for vote in votes)
    assert [vote.reason for vote in votes] == ["A says what was asked.", "B says what was asked."]
    text = fake.requests[0]["messages"][0]["content"]
    assert "Human:" not in text and between(text, "person said ===", "=== Answer A") == "0?"


def test_a_talk_is_shown_with_its_speakers(fake, tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    judge_of(tmp_path).prefer([(prompt, " good", " bad")])
    text = fake.requests[0]["messages"][0]["content"]
    assert (
        between(text, "person said ===", "=== A") == "user: Hi\n\nassistant: Hello!\n\nuser: Why?"
    )


def test_grades_of_single_answers_make_a_vote_and_each_is_asked_once(fake, tmp_path):
    """Three answers to one prompt in two pairs: three requests. 9 against 2; 2 against 2: a tie."""
    fake.answer = lambda body, number: (
        f"Fine.\nRating: [[{9 if 'good' in body['messages'][0]['content'].split('===')[4] else 2}]]"
    )
    prompt, good, bad = PAIRS[0]
    votes = judge_of(tmp_path, "single").prefer([(prompt, good, bad), (prompt, bad, " worse")])
    assert votes == [1, 0] and all(vote.clear for vote in votes) and len(fake.requests) == 3
    assert votes[0].reason == "9 of 10 (Fine.) against 2 (Fine.)"


def test_a_forced_choice_follows_an_example_for_each_place_and_knows_no_tie(fake, tmp_path):
    """A model that always says [[B]] is read throughout, and found to prefer the second place."""
    fake.answer = lambda body, number: "[[B]]"
    judge = judge_of(tmp_path, "forced")
    [row] = agreement([judge], PAIRS)
    assert (row["unreadable"], row["changed"], row["first"][0]) == (0, 12, 0)
    turns = fake.requests[0]["messages"]
    assert [turn["content"] for turn in turns[1:4:2]] == ["[[A]]", "[[B]]"] and len(turns) == 5
    fake.answer = lambda body, number: "[[C]]"
    assert not judge_of(tmp_path / "other", "forced").prefer(PAIRS[:1])[0].clear
    with pytest.raises(ValueError, match="pairwise, forced, single"):
        judge_of(tmp_path, "word")


def test_a_second_run_costs_nothing(fake, tmp_path):
    first, second = judge_of(tmp_path), judge_of(tmp_path)
    assert first.prefer(PAIRS) == second.prefer(PAIRS) == [1] * 12 and len(fake.requests) == 12
    assert first.spent.startswith("12 questions: 12 asked now, 0 failed, 0 from the cache; 120 tok")
    assert second.spent == (
        "12 questions: 0 asked now, 0 failed, 12 from the cache; "
        "0 tokens of prompts and 0 of replies"
    )


def test_the_sum_is_named_at_the_prices_that_are_given(fake, tmp_path, monkeypatch):
    """12 x 10 tokens at 100 a million and 12 x 2 at 1000: 0.012 + 0.024."""
    monkeypatch.setenv("LAB_JUDGE_PRICE", "100 1000")
    judge = judge_of(tmp_path)
    judge.prefer(PAIRS)
    assert judge.spent.endswith("24 of replies, 0.0360 at these prices")
    monkeypatch.setenv("LAB_JUDGE_PRICE", "cheap")
    with pytest.raises(EndpointError, match="two numbers"):
        _ = judge.spent


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("A is right.\n[[A]]", "A"),
        ("A is right.\n\n**[[C]]**\n", "C"),
        ("Why.\nVerdict: [[B]].", "B"),
        ("[[B]]", "B"),
        ("[[A]] because it is right.", None),
        ("I would say [[A]].", None),
        ("[[A]]\nThat is my verdict.", None),
        ("[[A]] or [[B]]", None),
        ("First [[A]], but then\n[[B]]", None),
        ("A", None),
        ("[[D]]", None),
        ("[A]", None),
        ("[[a]]", None),
        ("", None),
        ("I cannot help with that.", None),
    ],
)
def test_a_verdict_is_read_only_alone_on_the_last_line(text, mark):
    assert marked(text, "([ABC])")[0] == mark


def hostile(body: dict, number: int):
    """Twelve pairs, each another trouble; by the number in the prompt."""
    at = int(between(body["messages"][0]["content"], "person said ===", "?"))
    troubles = {
        1: b"<html>",
        2: b'{"choices": [{"message": {"content": "A is b',
        3: (500, {"retry-after-ms": 1}),
        4: "I cannot judge answers of other models.",
        5: "[[A]] is my verdict, since it is good.",
        6: b'{"choices": [{"message": {"content": null, "refusal": "No."}}]}',
        7: "",
        8: "[[A]]\n[[B]]",
        9: b"[" * 100_000,
    }
    if at == 10 and not hostile.limited:  # once: the second try is answered
        hostile.limited = True
        return 429, {"retry-after-ms": 1}
    if at == 11:
        hostile.release.wait(5)  # longer than the time-out
        return None
    return troubles[at] if at in troubles else by_word(body)


@pytest.fixture
def trouble():
    import threading

    hostile.limited, hostile.release = False, threading.Event()
    yield hostile
    hostile.release.set()


def test_nothing_is_dropped_silently_whatever_the_server_does(fake, tmp_path, trouble):
    """Of twelve pairs two are read (the first, and the one after 429), five not readable (4 to 8),
    five fail (garbage, truncated, 500, nested, hung): 2 + 5 + 5 = 12, and each says why.
    """
    fake.answer = trouble
    judge = judge_of(tmp_path)
    votes = judge.prefer(PAIRS)
    assert judge.counts == {"read": 2, "not readable": 5, "failed": 5}
    assert [at for at, vote in enumerate(votes) if vote.clear] == [0, 10]
    assert all(vote.reason for vote in votes) and sum(votes) == 2
    for at, said in {
        1: "no chat completion",
        2: "no chat completion",
        3: "fails (status 500",
        4: "no verdict: 'I cannot judge",
        5: "wrong place",
        6: "no verdict: 'No.'",
        8: "several verdicts",
        9: "no chat completion",
        11: "does not answer within 0.3 s",
    }.items():
        assert said in votes[at].reason, at
    [row] = agreement([judge], PAIRS)
    assert row["unreadable"] == 10 and row["won"] == 2 and row["questions"] == 12


def test_what_failed_is_asked_again_and_what_was_read_is_not(fake, tmp_path, trouble):
    fake.answer = trouble
    judge_of(tmp_path).prefer(PAIRS)
    fake.answer, before = by_word, len(fake.requests)
    judge = judge_of(tmp_path)
    judge.prefer(PAIRS)
    assert len(fake.requests) - before == 5 and judge.counts == {"read": 7, "not readable": 5}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((401, {}), "refuses the key. Set LAB_JUDGE_KEY. What was"),
        ((404, {}), "does not know the model 'judge'.* Check the model and LAB_JUDGE_URL"),
        ((307, {"Location": "http://127.0.0.1:9/"}), "elsewhere .status 307.. Check LAB_JUDGE_URL"),
        ((429, {"retry-after-ms": 1}), "takes no more requests .*Wait"),
    ],
)
def test_a_server_that_can_never_answer_stops_the_run(fake, tmp_path, found, said):
    """Not 12 times the same failure; what was answered is kept."""
    fake.answer = lambda body, number: found
    with pytest.raises(EndpointError, match=said):
        judge_of(tmp_path).prefer(PAIRS)
    assert len(fake.requests) <= 2 * 2 * 2  # two at a time, a retry each, and one more each


def test_a_server_that_fails_from_the_start_is_given_up(fake, tmp_path):
    fake.answer = lambda body, number: b"garbage"
    with pytest.raises(EndpointError, match="no chat completion"):
        judge_of(tmp_path).prefer(PAIRS)
    assert len(fake.requests) <= 5 + 2


def test_no_server_is_an_error_that_says_so(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_JUDGE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(EndpointError, match="Is the server running. Check LAB_JUDGE_URL"):
        judge_of(tmp_path).prefer(PAIRS)


def test_a_judge_that_is_not_named_is_an_error_that_says_what_to_set(fake, monkeypatch):
    monkeypatch.delenv("LAB_JUDGE_MODEL")
    with pytest.raises(EndpointError, match="LAB_JUDGE_MODEL not set.*deploy.serving"):
        judge_endpoint()


def test_the_key_stands_in_no_log_cache_or_exception(fake, tmp_path, caplog, capfd):
    """A server that repeats the key, in a reply and in an error, to a client that logs all it can.

    The fake server writes the header that it got into its errors.
    """
    caplog.set_level(logging.DEBUG)
    told = {1: "The key is secret-key.\n[[A]]", 2: (400, {})}
    fake.answer = lambda body, number: told.get(number, (401, {}))
    endpoint = judge_endpoint(cache=tmp_path, retries=0)
    first, second = ([{"role": "user", "content": text}] for text in "xy")
    replies = endpoint.ask_all([first, second], workers=1)
    assert replies[0]["text"].startswith("The key is [key]") and "[key]" in replies[1]["failure"]
    judge = LanguageJudge(endpoint, workers=1)
    with pytest.raises(EndpointError) as raised:
        judge.prefer(PAIRS)
    assert len(fake.requests) >= 3
    assert {request["headers"]["authorization"] for request in fake.requests} == {
        "Bearer secret-key"
    }
    said = "".join(traceback.format_exception(raised.value)) + repr(vars(raised.value))
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    kept += str(replies)
    assert "[key]" in kept
    shown = capfd.readouterr()
    logged = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    for place in (said, kept, logged, shown.out, shown.err, repr(endpoint), repr(vars(judge))):
        assert "secret-key" not in place


def test_the_judge_s_key_goes_to_the_judge_and_openai_s_to_openai(fake, monkeypatch):
    assert judge_endpoint().variable == "LAB_JUDGE_KEY"
    monkeypatch.setenv("LAB_JUDGE_URL", "https://api.openai.com/v1")
    assert judge_endpoint().variable == "OPENAI_API_KEY"
    monkeypatch.setenv("LAB_JUDGE_URL", "http://model.example/v1")
    with pytest.raises(EndpointError, match="LAB_JUDGE_KEY would .* clear text. Use https.$"):
        judge_endpoint().client()
    assert Endpoint("m", "http://127.0.0.1:1/v1").variable == "LAB_SAMPLER_KEY"


# --- people


def votes(*cast: tuple[str, int, int]) -> list[dict]:
    """(voter, pair, vote) as rows; the good answer on the left."""
    rows = []
    for voter, at, vote in cast:
        prompt, left, right = PAIRS[at]
        rows.append({"prompt": prompt, "left": left, "right": right, "vote": vote, "voter": voter})
    return rows


def test_people_decide_by_majority_and_each_has_one_vote():
    """Pair 0: two of three for the left; pair 1: one each, a tie; pair 2: nobody. The second vote
    of one voter on a pair does not count.
    """
    rows = votes(("a", 0, 1), ("b", 0, 1), ("c", 0, -1), ("a", 1, 1), ("b", 1, -1), ("c", 0, -1))
    people = People(rows)
    found = people.prefer(PAIRS[:3])
    assert found == [1, 0, 0] and [vote.clear for vote in found] == [True, True, False]
    assert found[0].reason == "2 for the first, 1 for the second, 3 in all"
    assert people.name == "people (5 votes of 3)" and len(people.questions) == 2
    assert people.prefer([(p, b, a) for p, a, b in PAIRS[:2]]) == [-1, 0]


def test_people_who_always_press_the_left_button_are_found_out():
    """Asked in one order each, their verdicts tell nothing: it is the buttons that do."""
    rows = votes(*(("a", at, 1) for at in range(12)))
    rows = [
        row | {"left": row["right"], "right": row["left"]} if at % 2 else row
        for at, row in enumerate(rows)
    ]
    people = People(rows)
    share, (low, high) = agreement([people], people.questions)[0]["first"]
    assert share == 1 and low > 0.5


# --- agreement


class Planted:
    """A judge that votes as told, given (prompt, first, second)."""

    def __init__(self, name, vote):
        self.name, self.vote = name, vote

    def prefer(self, questions):
        return [self.vote(*question) for question in questions]


GOOD = Planted("good", lambda prompt, one, other: Vote(("good" in one) - ("good" in other)))
FIRST = Planted("first", lambda *case: Vote(1))
TIES = Planted("ties", lambda *case: Vote(0))
MUTE = Planted("mute", lambda *case: Vote(0, "?", clear=False))
MANY = [(f"{at}", f"good {at}" + " x" * (at % 3), f"bad {at}" + " x" * 1) for at in range(60)]
MANY = [(p, a, b) if at % 2 else (p, b, a) for at, (p, a, b) in enumerate(MANY)]


def coin(prompt, one, other):
    """Half of the pairs for one, half for the other, whatever the order."""
    draw = random.Random(f"coin {prompt} {sorted((one, other))}").random() < 0.5
    return Vote(1 if draw == (one < other) else -1)


def test_planted_judges_are_found_out():
    """Always first: the first wins all verdicts, none holds in both orders, κ 0 or below. A coin:
    κ around 0, no bias of order. All ties and no verdict at all: counted as what they are.
    """
    good, first, ties, mute, fair = agreement(
        [GOOD, FIRST, TIES, MUTE, Planted("coin", coin)], MANY
    )
    assert good["kappa"] is None and good["won"] == 60 and good["first"][0] == 0.5
    assert first["first"][0] == 1 and first["first"][1][0] > 0.9
    assert (first["won"], first["changed"], first["longer"]) == (0, 60, None)
    assert first["kappa"][0] == 0 and ties["kappa"][0] == 0
    assert (ties["ties"], ties["changed"], ties["first"]) == (60, 0, None)
    assert (mute["unreadable"], mute["ties"], mute["won"]) == (60, 0, 0)
    low, high = fair["kappa"][1]
    assert low < 0 < high and fair["won"] == 60 and fair["first"][0] == 0.5
    for row in (good, first, ties, mute, fair):
        assert row["won"] + row["ties"] + row["changed"] + row["unreadable"] == row["questions"]


def test_a_judge_that_loves_length_is_found_out():
    """It prefers the longer answer wherever lengths differ; the yardstick does in half of these."""
    longer = Planted("long", lambda p, one, other: Vote(np.sign(len(one) - len(other))))
    pairs = [(str(at), "good" + " x" * (2 * (at % 2)), "bad x") for at in range(40)]
    yardstick, found = agreement([GOOD, longer], pairs)
    assert yardstick["longer"][0] == 0.5 and found["longer"][0] == 1
    assert found["longer"][1][0] > 0.5 and found["kappa"][1][0] < 0.3


def test_a_judge_agrees_with_itself_but_not_in_what_cannot_be_read():
    """Twelve pairs, four of them unreadable by both: κ of "good" with itself is 1 only where both
    speak.
    """
    part = Planted("part", lambda p, a, b: MUTE.vote() if p < "2" else GOOD.vote(p, a, b))
    assert agreement([GOOD, GOOD], MANY)[1]["kappa"][0] == 1
    assert agreement([part, part], MANY)[1]["kappa"][0] < 1


def test_kappa_is_that_of_a_table_done_by_hand():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: agreement .7; chance .5·.6 + .5·.4 = .5; κ .4.

    The interval is that of the share of agreement, over chance: (low - .5) / .5.
    """
    from common.evaluation import prompt_interval

    one = [1] * 25 + [0] * 25
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    value, (low, high) = kappa(one, other)
    assert math.isclose(value, 0.4)
    share = prompt_interval([1] * 20 + [0] * 5 + [0] * 10 + [1] * 15)
    assert np.allclose((low, high), [(end - 0.5) / 0.5 for end in share])
    assert kappa(other, one)[0] == value and kappa(["x", "x"], ["x", "x"]) is None
    with pytest.raises(ValueError, match="same questions"):
        kappa([1], [1, 0])


def test_answers_to_one_prompt_are_no_new_evidence_for_kappa():
    """The same ten prompts, each four times: the interval is as wide as with ten."""
    one, other = [1, 0] * 5, [1, 0] * 3 + [0, 1] * 2
    value, (low, high) = kappa(one, other)
    again, interval = kappa(one * 4, other * 4, prompts=[*range(10)] * 4)
    assert again == value and np.allclose(interval, (low, high))


def test_the_interval_of_kappa_holds_what_it_promises():
    """Two judges who agree beyond chance on half of 100 prompts, 400 times: 95 % or a bit less."""
    rng, base, labels, hits = np.random.default_rng(0), [0.45, 0.1, 0.45], [1, 0, -1], 0
    truth = 0.5  # J = q diag(base) + (1 - q) base baseᵀ has κ = q
    for _ in range(400):
        one = rng.choice(labels, 100, p=base)
        other = np.where(rng.random(100) < truth, one, rng.choice(labels, 100, p=base))
        _, (low, high) = kappa(one, other)
        hits += low <= truth <= high
    assert 0.92 < hits / 400 < 0.99


def test_the_table_has_a_line_for_each_judge():
    lines = table(agreement([GOOD, FIRST, MUTE], MANY)).splitlines()
    assert len(lines) == 4 and "1.00 [" in lines[2] and lines[3].split()[-1] == "-"


def test_the_figures_show_every_judge_and_every_bin():
    """A dot for what was measured, none where nothing was to be measured."""
    from common.plots.judging import calibration_curve, judges_side_by_side

    rows = agreement([GOOD, FIRST, MUTE], MANY)
    kappas, first, longer = judges_side_by_side(rows, "Judges").axes
    assert [label.get_text() for label in kappas.get_yticklabels()] == ["mute", "first", "good"]
    dots = [sum(line.get_marker() == "o" for line in ax.lines) for ax in (kappas, first, longer)]
    assert dots == [2, 2, 1]
    curve = calibration_curve(calibration([0.1, -0.1, 2.0, 3.0], bins=2)).axes[0]
    assert len(curve.containers[0][0].get_xdata()) == 2


def test_where_there_is_no_language_model_one_line_says_so(tmp_path, monkeypatch, capsys):
    from deploy.local_judge import by_language_model

    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    monkeypatch.delenv("LAB_JUDGE_URL", raising=False)
    assert by_language_model(GOOD, MANY) == ([], []) and table([]) == ""
    said = capsys.readouterr().out
    assert said.startswith("not measured: a language model as judge (LAB_JUDGE_URL is not set")


def test_the_service_that_is_set_judges_beside_the_yardstick(fake, tmp_path, monkeypatch):
    """A good judge with reasons, who cannot choose without any: κ is 1, and 0."""
    from deploy.local_judge import by_language_model

    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    fake.answer = lambda body, number: by_word(body) if len(body["messages"]) == 1 else "Both."
    (_, pairs, forced), judges = by_language_model(GOOD, MANY[:12])
    assert pairs["kappa"][0] == 1 and pairs["won"] == 12
    assert (forced["unreadable"], forced["kappa"][0]) == (12, 0)
    assert [dict(one.counts) for one in judges] == [{"read": 24}, {"not readable": 24}]


def test_a_server_whose_port_changes_is_known_by_its_name(fake, tmp_path):
    """The second one has another address, and the kept replies of the first."""
    fake.answer, asked = (lambda body, number: "Yes."), [[{"role": "user", "content": "Is it?"}]]
    [reply] = judge_endpoint(cache=tmp_path, known_as="mine").ask_all(asked)
    moved = judge_endpoint("http://127.0.0.1:9/v1", "judge", cache=tmp_path, known_as="mine")
    [again] = moved.ask_all(asked)
    assert again == reply | {"cached": True} and not reply["cached"] and reply["text"] == "Yes."


def test_the_rule_says_why():
    """From the world's own pairs: points and flaws of both answers."""
    world = World(4)
    [row] = world.pairs(1, label_noise=0)
    prompt = row["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:"
    answers = [row[side].removeprefix(prompt) for side in ("chosen", "rejected")]
    [vote] = RuleJudge(world).prefer([(prompt, *answers)])
    assert vote == 1 and vote.reason.count("points") == 1 and " against " in vote.reason
    assert "flaw" in vote.reason or "," in vote.reason


def test_calibration_tells_a_sure_model_from_a_right_one():
    """Margins of ±2: σ(2) = .88. Right in 9 of 10, the bin is calibrated; of ±0: a coin."""
    [row] = calibration([2.0] * 9 + [-2.0], bins=1)
    assert math.isclose(row["said"], 1 / (1 + math.exp(-2))) and row["right"] == 0.9
    low, high = calibration([0.1, -0.1] * 20 + [3.0, -3.0] * 20, bins=2)
    assert low["right"] == high["right"] == 0.5 and high["said"] > 0.95 > high["ci95"][1]


# --- ratings


def played(rng, points: dict[str, float], count: int, ties: float = 0.3) -> list:
    """Matches of players with known points: A's expected share is Elo's curve, ties included.

    A tie takes 2 · ties · min(p, 1 - p), half of it from A's wins and half from B's.
    """
    couples, found = list(combinations(points, 2)), []
    for _ in range(count):
        one, other = couples[rng.integers(len(couples))]
        p = 1 / (1 + 10 ** ((points[other] - points[one]) / 400))
        tie, draw = 2 * ties * min(p, 1 - p), rng.random()
        found.append((one, other, 1 if draw < p - tie / 2 else 0 if draw < p + tie / 2 else -1))
    return found


def hits_of(points: dict[str, float], simulations: int, resamples: int) -> int:
    """In how many simulations of 1,000 votes do the intervals hold all the true points?"""
    hits = 0
    for seed in range(simulations):
        matches = played(np.random.default_rng(seed), points, 1000)
        found = rating_intervals(matches, resamples=resamples, seed=seed)
        bounds = {name: row["ci95"] for name, row in found.items()}
        hits += all(bounds[name][0] <= true <= bounds[name][1] for name, true in points.items())
    return hits


@pytest.mark.more
@pytest.mark.parametrize(
    "points", [{"a": 1060, "b": 940}, {"a": 1150, "b": 1050, "c": 980, "d": 820}], ids=len
)
def test_known_strengths_lie_within_their_intervals(points):
    """1,000 votes with ties, 100 times: all players at once in 90 or more."""
    assert hits_of(points, 100, 200) >= 90


def test_known_strengths_of_two_lie_within_their_intervals_quickly():
    """Twenty simulations, of which 17 or more hold (15 or fewer have a chance of 1 in 300)."""
    assert hits_of({"a": 1060, "b": 940}, 20, 60) >= 16


def test_points_are_the_strengths_of_bradley_terry_and_sum_to_the_middle():
    matches = [("a", "b", 1)] * 7 + [("b", "a", 1)] * 3
    found = rating_intervals(matches, resamples=50)
    assert list(found) == ["a", "b"] and found["a"]["matches"] == 10
    gap = found["a"]["points"] - found["b"]["points"]
    assert abs(gap - 400 * math.log10(7 / 3)) < 0.1
    strengths = ratings(matches)[0]
    odds = strengths["a"]["bradley_terry"] / strengths["b"]["bradley_terry"]
    assert abs(gap - 400 * math.log10(odds)) < 0.1
    assert abs(found["a"]["points"] + found["b"]["points"] - 2000) < 1e-6


def test_votes_on_one_prompt_are_no_new_evidence_for_ratings():
    """Ten prompts, four equal votes each: the interval is as wide as with one vote each."""
    one = [("a", "b", 1)] * 7 + [("a", "b", -1)] * 3
    ten = rating_intervals(one, resamples=300)["a"]["ci95"]
    forty = rating_intervals(one * 4, prompts=[*range(10)] * 4, resamples=300)["a"]["ci95"]
    naive = rating_intervals(one * 4, resamples=300)["a"]["ci95"]
    assert abs((forty[1] - forty[0]) / (ten[1] - ten[0]) - 1) < 0.35
    assert (naive[1] - naive[0]) < 0.65 * (forty[1] - forty[0])


def test_somebody_who_never_lost_has_a_rating_and_strangers_have_none():
    found = rating_intervals([("a", "b", 1)] * 10, resamples=50)
    assert math.isfinite(found["a"]["ci95"][1]) and found["a"]["points"] > found["b"]["points"]
    with pytest.raises(ValueError, match="never met"):
        rating_intervals([("a", "b", 1), ("b", "a", 1), ("c", "d", 0)])


def test_elo_depends_on_the_order_of_play():
    """a wins five times, then loses five times: the last matches weigh most, so b is ahead."""
    matches = [("a", "b", 1)] * 5 + [("a", "b", -1)] * 5
    found = elo_orders(matches, orders=100)
    assert found["a"]["given"] < 1000 < found["b"]["given"]
    assert found["a"]["low"] < 1000 < found["a"]["high"]
    strengths = ratings(matches)[0]
    assert abs(strengths["a"]["bradley_terry"] - strengths["b"]["bradley_terry"]) < 1e-6
