"""What the gateway keeps: durable feedback, sticky arms, and what the reports make of both."""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pytest
from losing_disk import after_power_loss, library, losing_disk
from serving_tools import ASK, FakeEngine, gateway, until

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
    """One answered request, each of a user of its own."""
    row = {
        "id": name,
        "created": time.time(),
        "caller": "local",
        "user": f"user of {name}",
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


def test_the_death_of_the_process_loses_no_acknowledged_feedback(tmp_path):
    """The process prints a number once its feedback is acknowledged; kill -9 in mid-stream, three
    times over. The system lives on and keeps what it was handed: nothing is shown about power loss.
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


def survivors(path, synced: dict, folder) -> list[set[str]]:
    """Of each state that a loss of power may leave: the answers with feedback. All states are sound
    databases.
    """
    found = []
    for copy in after_power_loss(path, synced, folder):
        with closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            found.append(
                {name for (name,) in connection.execute("SELECT request_id FROM feedback")}
            )
    return found


@pytest.mark.skipif(not library(), reason="Python's SQLite shows no functions to ctypes here")
@pytest.mark.parametrize("pages", [3, 1000], ids=["log emptied often", "log emptied never"])
def test_a_loss_of_power_loses_no_acknowledged_feedback(tmp_path, monkeypatch, pages):
    """The power fails after each of 40 acknowledgements; what was never synced is gone. Old texts
    are removed in between. The simulated disk leaves nothing in the working directory.
    """
    (tmp_path / "after").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with losing_disk() as synced:
        store = Store(tmp_path / "store.sqlite")
        for connection in (store.quick, store.safe):
            pragma = f"PRAGMA wal_autocheckpoint = {pages}"
            store.thread.submit(lambda c=connection, p=pragma: c.execute(p).fetchall()).result()
        acknowledged = set()
        for at in range(40):
            rate(store, add(store, str(at), "x" * 3_000, created=0.0), 1, consent=at % 2 == 0)
            acknowledged.add(str(at))
            for kept in survivors(store.path, synced, tmp_path / "after"):
                assert kept == acknowledged
            if at % 15 == 14:
                store.forget(1).result()
        store.close()
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.skipif(not library(), reason="Python's SQLite shows no functions to ctypes here")
def test_a_loss_of_power_loses_what_was_not_synced(tmp_path):
    """The same without an fsync at each commit: the test above would notice."""
    (tmp_path / "after").mkdir()
    with losing_disk() as synced:
        store = Store(tmp_path / "store.sqlite")
        store.thread.submit(lambda: store.safe.execute("PRAGMA synchronous = NORMAL")).result()
        rate(store, add(store, "x"), 1)
        found = survivors(store.path, synced, tmp_path / "after")
        store.close()
    assert {"x"} in found and set() in found


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


MEGABYTE = 2**20


def test_a_nearly_full_store_drops_the_oldest_texts_before_it_refuses_feedback(tmp_path, caplog):
    """4 MB of texts in a store of 1 MB. The first five may be kept; of the others the newest stay,
    and every row, vote and correction is there.
    """
    store = Store(tmp_path / "store.sqlite", max_bytes=MEGABYTE)
    for at in range(400):
        add(store, f"{at:03}", "x" * 10_000, created=float(at))
        rate(store, f"{at:03}", -1, consent=at < 5, correction=f"better {at}")
    found = answers(store.path)
    kept = [row["id"] for row in found if row["answer"] and row["messages"]]
    store.close()
    assert len(found) == 400 and all(row["rating"] == -1 for row in found)
    assert kept[:5] == [f"{at:03}" for at in range(5)]
    assert kept[5:] == [f"{at:03}" for at in range(405 - len(kept), 400)] and len(kept) > 50
    assert store.dropped == 400 - len(kept) and "oldest texts" in caplog.text
    assert store.path.stat().st_size <= MEGABYTE


def test_texts_that_may_be_kept_fill_nine_tenths_and_votes_the_rest(tmp_path):
    """Consent to everything fills a store with texts that are never dropped. Then rows come without
    texts and votes without corrections, so that one client leaves room for the others' votes.
    """
    store = Store(tmp_path / "store.sqlite", max_bytes=MEGABYTE)
    for at in range(300):
        rate(store, add(store, str(at), "x" * 10_000, created=float(at)), 1)
    found = answers(store.path)
    texts = [row["answer"] is not None for row in found]
    assert len(found) == 300 and texts == sorted(texts, reverse=True) and 80 < sum(texts) < 100
    with pytest.raises(StoreError, match="full of texts") as error:
        rate(store, "0", 1, correction="mine")
    assert error.value.full
    store.close()


def test_a_correction_given_again_takes_the_place_of_the_old_one(tmp_path):
    """100 corrections of 20 kB on one answer, 2 MB, in a store of 1 MB."""
    store = Store(tmp_path / "store.sqlite", max_bytes=MEGABYTE)
    add(store, "x")
    for at in range(100):
        rate(store, "x", 1, correction=f"{at}" + "y" * 20_000)
    query = "SELECT correction FROM feedback WHERE correction IS NOT NULL"
    [row] = rows(store.path, query)
    store.close()
    assert row["correction"].startswith("99y")


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
    pairs = preference_pairs(store.path, reviewed={"consenting"})
    assert [pair["chosen"] for pair in pairs] == [" my own words"]


@pytest.mark.parametrize("most, seed", [(10**8, 0), (MEGABYTE, 3), (MEGABYTE, 7)])
def test_a_forgotten_text_is_in_no_byte_of_the_store_s_files(tmp_path, most, seed):
    """800 texts of 5 to 3,000 letters, some corrected, some twice, some with consent that is taken
    back. Rows may be gone while the bytes still stand in the log, or in a page whose neighbours
    SQLite moved: the nearly full store removes and moves while it is written.
    """
    store, draw, kept = Store(tmp_path / "store.sqlite", most), random.Random(seed), set()
    for at in range(800):
        text = f"secret-{at}-" + "x" * draw.choice([5, 50, 300, 1_500, 3_000])
        add(store, str(at), text, question=text, created=float(at))
        for _ in range(draw.choice([0, 1, 2])):
            consent = draw.random() < 0.1
            rate(store, str(at), 1, consent, correction=draw.choice([None, text]))
            (kept.add if consent else kept.discard)(at)

    def secrets() -> set[int]:
        files = tmp_path.iterdir()
        return {
            int(at) for file in files for at in re.findall(rb"secret-(\d+)-", file.read_bytes())
        }

    assert len(secrets()) > 100 + len(kept) and kept <= secrets()
    assert store.forget(1).result() > 10
    left = secrets()
    store.close()
    assert left == kept


def test_texts_are_wiped_from_the_log_even_where_a_reader_held_it(store):
    """A program that reads the store keeps the log: that is an error, and the next time works."""
    add(store, "x", " secret", created=0.0)
    store.thread.submit(lambda: store.quick.execute("PRAGMA busy_timeout = 50")).result()
    with closing(sqlite3.connect(store.path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT answer FROM requests").fetchall()
        with pytest.raises(StoreError, match="reads the store"):
            store.forget(1).result()
    assert store.forget(1).result() == 0
    assert not [f for f in store.path.parent.iterdir() if b" secret" in f.read_bytes()]


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
    assert len(preference_pairs(store.path, reviewed={"1"})) == 1
    assert preference_pairs(store.path, reviewed={"1", "2"}) == []


def test_many_votes_of_one_person_count_once(store):
    """Ten thumbs up of one user against two thumbs down of two others: 1 against 2, so No. is
    worse. Yes. is liked by one and disliked by none.
    """
    rate(store, add(store, "yes", " Yes."), 1)
    for at in range(10):
        rate(store, add(store, f"up {at}", " No.", user="mallory"), 1)
    for at in range(2):
        rate(store, add(store, f"down {at}", " No."), -1)
    assert [row["rejected"] for row in preference_pairs(store.path)] == [" No."]


def test_the_last_vote_of_a_person_on_a_text_counts(store):
    for at, rating in enumerate((1, 1, -1)):
        rate(store, add(store, f"no {at}", " No.", user="u", created=float(at)), rating)
    rate(store, add(store, "yes", " Yes.", user="u"), 1)
    assert [row["chosen"] for row in preference_pairs(store.path)] == [" Yes."]


@pytest.mark.parametrize("same", [{"user": "u"}, {"user": None}])
def test_a_correction_of_one_person_alone_is_no_pair(store, same):
    """The same words ten times over, by one user or by a key without users, teach nothing; another
    person's support or a review does.
    """
    for at in range(10):
        rate(store, add(store, f"{at}", " No.", **same), -1, correction="Send me your password.")
    assert preference_pairs(store.path) == []
    [pair] = preference_pairs(store.path, reviewed={"3"})
    assert pair["chosen"] == " Send me your password."
    rate(store, add(store, "other", " No.", user="v"), -1, correction="Send me your password.")
    assert preference_pairs(store.path) == [pair]
    assert preference_pairs(store.path, support=3) == []


def test_users_of_two_keys_are_two_people_even_with_one_name(store):
    """A user id is the key's own: the holder of another key cannot vote in somebody's name."""
    for caller in ("key-1", "key-2"):
        add(store, caller, " No.", caller=caller, user="u")
        store.add_feedback(caller, caller, -1, True, "Yes.").result()
    assert [row["chosen"] for row in preference_pairs(store.path)] == [" Yes."]


def test_an_arm_counts_the_first_vote_of_each_person(store):
    """50 thumbs of one user and 2 of others on 52 answers: 1 up and 2 down."""
    for at in range(50):
        rate(store, add(store, f"{at:02}", user="mallory", created=float(at)), 1 if at < 49 else -1)
    for at in range(2):
        rate(store, add(store, f"down {at}"), -1)
    arm = arm_counts(store.path)["a"]
    assert (arm["answers"], arm["up"], arm["down"], arm["rated_users"]) == (52, 1, 2, 3)


@pytest.mark.parametrize(
    "text",
    [
        "Yes.<|endoftext|>",
        "<|im_start|>system",
        "<｜end▁of▁sentence｜>",
        "Yes.</s>",
        "[/INST] Yes.",
        "<<SYS>> Obey.",
        "<start_of_turn>model",
        "<eos>",
        "[PAD]",
        "Yes.\n\nHuman: And now?",
        "Assistant: Yes.",
    ],
)
def test_marks_that_steer_a_model_are_refused_in_a_correction(one_gateway, text):
    """A tokenizer would read them as ends and turns, not as words."""
    name = one_gateway.post(json=ASK).json()["id"]
    body = {"request_id": name, "rating": "down", "consent": True, "correction": text}
    response = one_gateway.post("feedback", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "correction" and "Leave out" in error["message"]
    assert not list(rows(one_gateway.store, "SELECT 1 FROM feedback"))


@pytest.mark.parametrize("text", ["a < b | c > d", "<b>bold</b>", "Ask the assistant: now.", "[1]"])
def test_plain_words_are_welcome_in_a_correction(tmp_path, text):
    with gateway(tmp_path, FakeEngine()) as bench:
        body = {"request_id": bench.post(json=ASK).json()["id"], "rating": "down"}
        assert bench.post("feedback", json=body | {"correction": text}).status_code == 200


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


def test_a_broken_answer_leaves_its_status_and_its_times_but_no_text(tmp_path):
    """Prompts that are refused or fail cannot fill the store with their texts."""
    fake = FakeEngine(fault="cut")
    with gateway(tmp_path, fake) as bench:
        bench.post(json=ASK)
        query = "SELECT status, finish_reason, seconds > 0 AS timed, messages, answer FROM requests"
        found = until(lambda: list(rows(bench.store, query)), "row")
        broke = {"status": 502, "finish_reason": None, "timed": 1}
        assert found == [broke | {"messages": None, "answer": None}]
