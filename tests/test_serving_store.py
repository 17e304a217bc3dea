"""What the gateway keeps: durable feedback, sticky arms, and what the reports make of both."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pytest
from serving_tools import ASK, WORDS, FakeEngine, gateway, until

from common.data import load_pairs
from deploy.feedback import preference_pairs
from deploy.serving.store import (
    Store,
    StoreError,
    UnknownRequest,
    answers,
    arm_counts,
    choose_arm,
    pseudonym,
    rows,
)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store.sqlite")
    yield store
    store.close()


def add(store, name: str, text: str = " Yes.", question: str = "Is it?", **more) -> str:
    """One answered request."""
    row = {
        "id": name,
        "created": time.time(),
        "caller": "local",
        "user": "u",
        "experiment": "default",
        "model": "a",
        "assigned": 1,
        "status": 200,
        "messages": [{"role": "user", "content": question}],
        "answer": text,
        "finish_reason": "stop",
        "completion_tokens": 3,
        "seconds": 0.5,
    }
    store.add_request(**{**row, **more}).result()
    return name


def rate(
    store, name: str, rating: int, consent: bool = True, correction: str | None = None
) -> None:
    store.add_feedback(name, "local", rating, consent, correction).result()


WRITER = """
import sys
from deploy.serving.store import Store
store = Store(sys.argv[1])
for at in range(10**6):
    row = dict(id=str(at), caller="local", experiment="default", model="a", assigned=1, status=200)
    store.add_request(**row, created=0)
    store.add_feedback(str(at), "local", 1, True, "better").result()
    print(at, flush=True)
"""


def test_kill_9_during_feedback_loses_nothing_that_was_acknowledged(tmp_path):
    """The process prints a number once its feedback is acknowledged; it is killed in mid-stream,
    three times over.
    """
    for round_ in range(3):
        path = tmp_path / f"{round_}.sqlite"
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        acknowledged = [int(process.stdout.readline()) for _ in range(20 + 17 * round_)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().splitlines() if line.strip()]
        process.wait()
        kept = {int(row["request_id"]) for row in rows(path, "SELECT request_id FROM feedback")}
        assert set(acknowledged) <= kept and len(kept) - len(acknowledged) <= 1
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_feedback_waits_for_the_disk_and_requests_do_not(store):
    """SQLite's own settings: a write-ahead log, 2 = FULL (fsync at each commit), 1 = NORMAL."""

    def setting(connection, name):
        return store.thread.submit(
            lambda: connection.execute(f"PRAGMA {name}").fetchone()[0]
        ).result()

    assert setting(store.safe, "synchronous") == 2 and setting(store.quick, "synchronous") == 1
    assert {setting(connection, "journal_mode") for connection in (store.safe, store.quick)} == {
        "wal"
    }


def test_a_full_store_says_so_keeps_what_it_had_and_works_again(tmp_path):
    """SQLite's real error, from a limit of 12 pages. With a higher limit, writing works again."""
    store = Store(tmp_path / "store.sqlite", max_bytes=12 * 4096)
    add(store, "first")
    rate(store, "first", 1)
    with pytest.raises(StoreError, match="full") as error:
        add(store, "large", "x" * 100_000)
    assert error.value.full
    assert [row["id"] for row in answers(store.path)] == ["first"]
    store.thread.submit(lambda: store.quick.execute("PRAGMA max_page_count = 1000")).result()
    add(store, "large", "x" * 100_000)
    assert len(answers(store.path)) == 2
    store.close()


def test_a_place_that_cannot_be_written_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Name another with --store"):
        Store(tmp_path / "file" / "store.sqlite")
    (tmp_path / "text.sqlite").write_text(
        "this is no database, although it is long enough to be one" * 100
    )
    with pytest.raises(StoreError, match="Name another with --store"):
        Store(tmp_path / "text.sqlite")


def test_a_store_is_opened_again_with_all_that_was_in_it(tmp_path):
    for at in range(2):
        store = Store(tmp_path / "store.sqlite")
        rate(store, add(store, str(at)), 1)
        store.close()
    assert [row["rating"] for row in answers(tmp_path / "store.sqlite")] == [1, 1]


def test_feedback_is_for_one_s_own_answers(store):
    add(store, "mine", caller="key-1")
    for name, caller in (("mine", "key-2"), ("nobody's", "key-1")):
        with pytest.raises(UnknownRequest):
            store.add_feedback(name, caller, 1, True, None).result()
    assert store.add_feedback("mine", "key-1", 1, True, None).result() == "a"


def test_the_latest_feedback_counts(store):
    rate(store, add(store, "x"), 1, consent=True)
    rate(store, "x", -1, consent=False)
    [row] = answers(store.path)
    assert (row["rating"], row["consent"]) == (-1, 0)


def test_old_texts_are_forgotten_unless_there_is_consent(store):
    """Three answers of ten days ago and one of now; one of the old ones may be kept, one withdrew
    its consent.
    """
    old = time.time() - 10 * 86400
    for name in ("plain", "consenting", "withdrawn"):
        add(store, name, created=old)
    add(store, "new")
    rate(store, "consenting", 1)
    rate(store, "withdrawn", 1)
    rate(store, "withdrawn", 1, consent=False)
    with closing(sqlite3.connect(store.path)) as file, file:
        file.execute("UPDATE feedback SET correction = 'my own words'")
    assert store.forget(7).result() == 2 and store.forget(7).result() == 0
    with closing(sqlite3.connect(store.path)) as file:
        left = file.execute(
            "SELECT request_id FROM feedback WHERE correction IS NOT NULL"
        ).fetchall()
    assert left == [("consenting",)] and store.path.stat().st_mode & 0o077 == 0
    kept = {row["id"]: row["answer"] for row in answers(store.path)}
    assert kept == {"plain": None, "consenting": " Yes.", "withdrawn": None, "new": " Yes."}
    assert [pair["chosen"] for pair in preference_pairs(store.path)] == [
        " my own words"
    ]  # of the consenting user


def test_an_arm_is_sticky_and_shares_follow_the_weights():
    """10,000 users at 0.9 : 0.1. The share of the second is 0.1 with a deviation of 0.003: five of
    them at most.
    """
    weights = {"a": 0.9, "b": 0.1}
    users = [pseudonym("default", f"user {at}") for at in range(10_000)]
    arms = [choose_arm(user, weights) for user in users]
    assert arms == [choose_arm(user, weights) for user in users]
    assert abs(Counter(arms)["b"] / 10_000 - 0.1) < 0.015
    other = [choose_arm(pseudonym("second", f"user {at}"), weights) for at in range(10_000)]
    assert (
        50 < sum(a == b == "b" for a, b in zip(other, arms, strict=True)) < 150
    )  # 100, deviation 10: independent
    assert {choose_arm(user, {"a": 0, "b": 2}) for user in users} == {"b"}


@pytest.mark.parametrize(
    "weights", [{"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("inf")}, {"a": float("nan")}]
)
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="Weights must be"):
        choose_arm("user", weights)


def test_two_arms_are_recorded_with_every_answer(tmp_path):
    """Each user meets one model, in the header as in the store; naming a model is no part of the
    test.
    """
    with gateway(tmp_path, FakeEngine(), FakeEngine(), weights={"a": 1.0, "b": 1.0}) as bench:
        seen = {}
        for user in [f"user {at}" for at in range(12)] * 2:
            response = bench.post(json=ASK | {"user": user})
            seen.setdefault(user, set()).add(response.headers["x-lab-model"])
            assert (
                response.headers["x-lab-assigned"] == "true"
                and response.json()["model"] in seen[user]
            )
        assert all(len(models) == 1 for models in seen.values()) and set.union(*seen.values()) == {
            "a",
            "b",
        }
        named = bench.post(json=ASK | {"model": "b", "user": "user 0"})
        assert named.headers["x-lab-assigned"] == "false"
        found = answers(bench.store)
        assert len(found) == 25 and {row["user"] for row in found}.isdisjoint(seen)
        counts = arm_counts(bench.store)
        assert {name: arm["users"] for name, arm in counts.items()} == Counter(
            m for [m] in seen.values()
        )
        assert sum(arm["answers"] for arm in counts.values()) == 24
        assert counts["a"]["ended_with_eos"] == 1 and counts["a"]["length_tokens"] == 5


def test_feedback_through_the_gateway_is_there_when_it_is_acknowledged(tmp_path):
    with gateway(tmp_path, FakeEngine()) as bench:
        for at in range(20):
            answer = bench.post(json=ASK | {"stream": True}).text
            name = json.loads(answer.splitlines()[0].removeprefix("data: "))["id"]
            assert (
                bench.post("feedback", json={"request_id": name, "rating": "down"}).status_code
                == 200
            )
            assert (
                len(list(rows(bench.store, "SELECT id FROM feedback WHERE rating = -1"))) == at + 1
            )
        assert preference_pairs(bench.store) == []  # nobody gave consent


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "request_id: Field required"),
        ({"request_id": "x"}, "rating: Field required"),
        ({"request_id": "x", "rating": 1}, "rating: Input should be 'up' or 'down', not 1"),
        ({"request_id": "x", "rating": ["up"]}, "rating: Input should be 'up' or 'down'"),
        ({"request_id": "x", "rating": "up", "consent": "yes"}, "consent: Input should be a valid"),
        ({"request_id": "x", "rating": "up", "correction": 7}, "correction: Input should be"),
        ({"request_id": "x", "rating": "up", "stars": 5}, "stars: The gateway does not know it"),
        ({"request_id": "x", "rating": "up"}, "No such answer"),
    ],
)
def test_wrong_feedback_is_told_what_to_change(one_gateway, body, said):
    response = one_gateway.post("feedback", json=body)
    assert response.status_code in (400, 404) and said in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def one_gateway(tmp_path_factory):
    with gateway(tmp_path_factory.mktemp("one"), FakeEngine()) as bench:
        yield bench


def test_pairs_come_from_votes_on_one_prompt(store):
    """Yes: 2 up. No: 1 down. Maybe: one of each, which says nothing. A lone thumb on another prompt
    has no partner.
    """
    for name, text, rating in (
        ("1", " Yes.", 1),
        ("2", "Yes. ", 1),
        ("3", " No.", -1),
        ("4", " Maybe.", 1),
        ("5", " Maybe.", -1),
    ):
        rate(store, add(store, name, text), rating)
    rate(store, add(store, "6", " Of course.", "Is it, now?"), 1)
    prompt = "\n\nHuman: Is it?\n\nAssistant:"
    assert preference_pairs(store.path) == [
        {"prompt": prompt, "chosen": " Yes.", "rejected": " No."}
    ]


def test_without_consent_nothing_becomes_a_pair(store):
    rate(store, add(store, "1", " Yes."), 1, consent=True)
    rate(store, add(store, "2", " No."), -1, consent=False)
    assert preference_pairs(store.path) == []
    rate(store, "2", -1, consent=True)
    assert len(preference_pairs(store.path)) == 1
    rate(store, "1", 1, consent=False)  # taken back
    assert preference_pairs(store.path) == []


def test_a_correction_is_better_than_what_it_corrects(store):
    rate(store, add(store, "1", " No."), -1, correction="  Yes, it is. ")
    rate(store, add(store, "2", " No."), -1, correction="Yes, it is.")  # the same again
    rate(store, add(store, "3", " Hm."), -1, correction=" ")
    rate(store, add(store, "4", " Hm."), -1, correction="Hm.")
    prompt = "\n\nHuman: Is it?\n\nAssistant:"
    assert preference_pairs(store.path) == [
        {"prompt": prompt, "chosen": " Yes, it is.", "rejected": " No."}
    ]


def test_pairs_that_contradict_each_other_are_left_out(store):
    rate(store, add(store, "1", " No."), -1, correction="Yes.")
    rate(store, add(store, "2", " Yes."), -1, correction="No.")
    assert preference_pairs(store.path) == []


def test_pairs_are_rows_that_the_course_reads(store, tmp_path):
    """The next round's training data: `load_pairs` keeps every row as it is."""
    for at in range(3):
        rate(store, add(store, f"{at} up", f" Yes {at}.", f"Question {at}?"), 1)
        rate(store, add(store, f"{at} down", f" No {at}.", f"Question {at}?"), -1)
    pairs, path = preference_pairs(store.path), tmp_path / "feedback.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found, report = load_pairs(str(path))
    assert len(pairs) == 3 and found.to_list() == pairs and not sum(report.dropped.values())


def test_a_missing_store_is_an_error_that_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="Start the gateway with --store"):
        arm_counts(tmp_path / "none.sqlite")


def test_answers_are_recorded_as_broken_where_they_broke(tmp_path):
    fake = FakeEngine(fault="cut")
    with gateway(tmp_path, fake) as bench:
        bench.post(json=ASK)
        found = until(
            lambda: list(rows(bench.store, "SELECT status, answer, finish_reason FROM requests")),
            "row",
        )
        assert found == [{"status": 502, "answer": "".join(WORDS[:2]), "finish_reason": None}]
