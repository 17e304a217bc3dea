"""The voting page without a browser: what is kept, who sees what, who may ask, how votes stand."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from arena_page import NAMES, Longer, arena_of, made_up
from serving_tools import FOREIGN, addresses, running, status

from common import profiles
from common.judging.agreement import agreement
from common.judging.people import People
from common.lab import Lab
from common.training import train
from deploy.arena import ENOUGH, ArenaError, build_arena, lab_of, main, make_pairs_of
from deploy.votes import POINTS_LEFT, VoteStore, matches_of, stand_in_votes


@pytest.fixture
def arena(tmp_path):
    return arena_of(tmp_path / "votes.sqlite")


def cast(arena, voter: str, choose, count: int = 99) -> int:
    """One voter's votes, by what `choose(left, right)` says of the texts. Returns their number."""
    for done in range(count):
        pair = arena.next_pair(voter)[0]
        if pair is None:
            return done
        texts = (pair["text_a"], pair["text_b"])[:: 1 if pair["a_is_left"] else -1]
        arena.store.vote(pair["id"], voter, pair["a_is_left"], choose(*texts))
    return count


def longer(left: str, right: str) -> str:
    return "left" if len(left) > len(right) else "right"


# --- what is kept


def test_a_voter_has_one_vote_on_a_pair(arena):
    """A double click, and a change of mind: the first one counts, and is what is said back."""
    pair = arena.next_pair("me")[0]
    assert arena.store.vote(pair["id"], "me", True, "left") == ("left", True)
    assert arena.store.vote(pair["id"], "me", False, "right") == ("left", True)
    arena.store.vote(pair["id"], "you", True, "both bad")
    assert [(row["voter"], row["vote"]) for row in arena.store.votes()] == [("me", 1), ("you", 0)]


def test_a_vote_says_what_stood_where(arena):
    pair = arena.next_pair("me")[0]
    arena.store.vote(pair["id"], "me", False, "right")
    [row] = arena.store.votes("made up")
    assert (row["left"], row["right"]) == (pair["text_b"], pair["text_a"])
    assert (row["left_model"], row["right_model"]) == NAMES[::-1] and row["vote"] == -1
    assert matches_of([row]) == ([(NAMES[1], NAMES[0], -1)], [pair["prompt"]])
    assert arena.store.votes("another source") == []


def test_only_known_pairs_and_choices_are_kept(arena):
    for pair, choice in ((999, "left"), (1, "A")):
        with pytest.raises(sqlite3.IntegrityError):
            arena.store.vote(pair, "me", True, choice)
    assert arena.store.votes() == []


def test_pairs_are_made_once_however_many_pages_start(tmp_path):
    stores = [VoteStore(tmp_path / "votes.sqlite") for _ in range(4)]
    threads = [
        threading.Thread(target=store.add_pairs, args=("made up", made_up())) for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].pairs("made up")) == 40
    assert (tmp_path / "votes.sqlite").stat().st_mode & 0o077 == 0


def test_many_at_once_lose_no_vote(arena):
    """Four voters in threads of their own, each with a store of its own: 4 x 25."""
    failed = []

    def work(voter):
        try:
            own = replace(arena, store=VoteStore(arena.store.path))
            assert cast(own, voter, longer, 25) == 25
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(f"voter {at}",)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(arena.store.votes()) == 100


KILLED = """
import sys
from deploy.votes import VoteStore
store, columns = VoteStore(sys.argv[1]), ("prompt", "model_a", "model_b", "text_a", "text_b")
store.add_pairs("mine", [dict.fromkeys(columns, str(at)) for at in range(5000)])
for pair in store.pairs("mine"):
    store.vote(pair["id"], "me", True, "left")
    print(pair["id"], flush=True)
"""


def test_an_acknowledged_vote_survives_the_death_of_the_process(tmp_path):
    path, root = tmp_path / "votes.sqlite", Path(__file__).parents[1]
    command = [sys.executable, "-c", KILLED, str(path)]
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    told = [int(child.stdout.readline()) for _ in range(10)]
    child.send_signal(signal.SIGKILL)
    told += [int(line) for line in child.stdout.read().splitlines()]
    child.wait()
    kept = {row["pair"] for row in VoteStore(path).votes()}
    assert 10 <= len(told) < 5000 and set(told) <= kept


# --- who sees what


def test_each_voter_sees_every_pair_once_in_an_order_of_its_own(arena):
    first, second = (arena.next_pair(voter)[0] for voter in ("me", "you"))
    assert first == arena.next_pair("me")[0]  # a reload
    orders = {}
    for voter in ("me", "you"):
        seen = []
        while pair := arena.next_pair(voter)[0]:
            seen.append((pair["id"], pair["a_is_left"]))
            arena.store.vote(pair["id"], voter, pair["a_is_left"], "tie")
        orders[voter] = seen
        assert len({at for at, _ in seen}) == 40
        assert 8 < sum(left for _, left in seen) < 32  # sides look random
    assert orders["me"] != orders["you"]
    assert arena.next_pair("me") == (None, 40, 40)


# --- how the votes stand


def test_the_standing_has_intervals_from_the_first_vote_on(arena):
    assert arena.standing() == "No vote yet."
    cast(arena, "me", longer, 1)
    lines = arena.standing().splitlines()
    low, high = map(float, lines[1].split("[")[1].rstrip("]").split(","))
    assert high - low > 100 and lines[3] == f"κ with the longer one: after {ENOUGH} votes"


def test_kappa_with_the_rule_is_shown_after_thirty_votes(arena):
    """People who vote as the rule does: κ 1; the models win alike, so their points are the same."""
    cast(arena, "me", longer, ENOUGH)
    said = arena.standing()
    assert "κ with the longer one: 1.00 [0." in said and "people (30 votes of 1)" in said


def test_a_data_set_without_a_rule_says_that_it_has_none(arena):
    cast(arena, "me", longer, ENOUGH)
    assert "not measured (this data set has none)" in replace(arena, rule=None).standing()


def test_stand_ins_are_called_so_and_err_as_often_as_told():
    """The same seed gives the same votes; with slips they agree with their judge, but not always.
    Sides differ between stand-ins.
    """
    votes = stand_in_votes(made_up(), Longer(), voters=3, slips=0.3)
    assert votes == stand_in_votes(made_up(), Longer(), voters=3, slips=0.3) and len(votes) == 120
    assert {row["voter"] for row in votes} == {"stand-in 1", "stand-in 2", "stand-in 3"}
    assert {row["choice"] for row in votes} == set(POINTS_LEFT)
    right = [row["vote"] == Longer().prefer([(0, row["left"], row["right"])])[0] for row in votes]
    assert 0.6 < sum(right) / 120 < 0.95  # .7 + .3 / 4
    people = People(stand_in_votes(made_up(), Longer(), voters=1, slips=0.3), "stand-ins")
    assert people.name == "stand-ins (40 votes of 1)"
    value, (low, high) = agreement([Longer(), people], people.questions)[1]["kappa"]
    assert 0.2 < value < 1 and low < value < high


# --- who may ask


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    arena = arena_of(tmp_path_factory.mktemp("page") / "votes.sqlite")
    cast(arena, "me", longer, 2)
    app = build_arena(arena)
    with running(app, timeout_graceful_shutdown=1) as address:
        yield address, app


def test_the_votes_are_exported_as_lines(page):
    found = httpx.get(f"{page[0]}/votes.jsonl", trust_env=False)
    rows = [json.loads(line) for line in found.text.splitlines()]
    assert len(rows) == 2 and found.headers["content-type"].startswith("text/plain")
    assert {row["left_model"] for row in rows} | {row["right_model"] for row in rows} == set(NAMES)


def test_no_other_site_votes_or_reads_and_no_file_is_given(page):
    """As of the chat page: every address, under another Host and for a page of another site."""
    address, app = page
    every = addresses(app)
    assert len(every) > 50 and ("GET", "/votes.jsonl") in every
    for method, path in every:
        for headers in ({"host": "evil.example:7861"}, *FOREIGN.values()):
            assert status(address, method, path, headers) == 403, (method, path, headers)
    for path in ("/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/deep_link"):
        assert status(address, "GET", path, {}) == 404
    large = httpx.post(f"{address}/gradio_api/queue/join", content=b"x" * 2_000_000)
    assert large.status_code == 413


def test_the_config_names_no_model_and_reports_to_nobody(page):
    """What the browser is sent before a vote."""
    config = httpx.get(f"{page[0]}/config", trust_env=False)
    assert not config.json().get("analytics_enabled")
    assert not any(name in config.text for name in NAMES)


# --- the command


@pytest.fixture
def runs(trained_lab, monkeypatch):
    """Folders of two finished runs of a very small profile, which calls itself smoke."""
    monkeypatch.setitem(profiles.PROFILES, "smoke", trained_lab.profile)
    monkeypatch.setattr(Lab, "folder", trained_lab.folder)
    train(trained_lab, "sft")
    return trained_lab.folder / "base", trained_lab.folder / "sft"


def test_two_runs_make_pairs_once(runs, tmp_path, capsys):
    store = VoteStore(tmp_path / "votes.sqlite")
    lab = lab_of(*runs)
    source = make_pairs_of(*runs, lab, store, 6)
    pairs = store.pairs(source)
    assert 0 < len(pairs) <= 6 and {row["model_a"] for row in pairs} == {"base"}
    assert all(row["text_a"] != row["text_b"] for row in pairs)
    assert "base answers 6 prompts" in capsys.readouterr().out
    assert make_pairs_of(*runs, lab, store, 6) == source and store.pairs(source) == pairs
    assert capsys.readouterr().out == ""  # no model was loaded


def test_the_command_serves_this_machine_alone(runs, tmp_path, monkeypatch, capsys):
    seen = {}

    def run(server, sockets):
        seen.update(vars(server.config), host=sockets[0].getsockname()[0])
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run)
    store = ["--store", str(tmp_path / "v.sqlite"), "--port", "0", "--prompts", "3"]
    assert main(["--a", str(runs[0]), "--b", str(runs[1]), *store]) == 0
    assert seen["host"] == "127.0.0.1" and seen["ws"] == "none"
    assert "vote on http://127.0.0.1:" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    base, sft = runs
    assert main(["--a", str(tmp_path), "--b", str(sft)]) == 1
    assert "holds no finished run" in capsys.readouterr().err
    assert main(["--a", str(sft), "--b", str(sft)]) == 1
    assert "Two runs of one profile, seed and data set" in capsys.readouterr().err
    other = tmp_path / "sft"
    other.mkdir()
    record = json.loads((base / "run.json").read_text()) | {"seed": 7}
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(ArenaError, match="smoke/7/toyworld"):
        lab_of(sft, other)
