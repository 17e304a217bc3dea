"""Votes of people on pairs of answers, in one SQLite file. A crash loses none of them."""

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.serving.store import chance

VOTES_SCHEMA = """
CREATE TABLE IF NOT EXISTS pairs (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL, prompt TEXT NOT NULL,
    model_a TEXT NOT NULL, model_b TEXT NOT NULL, text_a TEXT NOT NULL, text_b TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS pairs_by_source ON pairs (source);
CREATE TABLE IF NOT EXISTS votes (
    pair INTEGER NOT NULL REFERENCES pairs (id), voter TEXT NOT NULL, created REAL NOT NULL,
    a_is_left INTEGER NOT NULL CHECK (a_is_left IN (0, 1)),
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'both bad')),
    PRIMARY KEY (pair, voter));
"""
POINTS_LEFT = {"left": 1, "right": -1, "tie": 0, "both bad": 0}  # 1: the left one is better


class VoteStore:
    """The file at `path`: pairs of answers, and the votes on them, one a voter and pair.

    Every call opens a connection of its own, so several pages may use one file. After `vote` the
    vote is on the disk (fsync). Raises: sqlite3.Error, where the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o600)  # what people prefer is nobody else's to read
        with self._open() as file:
            file.execute("PRAGMA journal_mode = WAL")
            for statement in filter(str.strip, VOTES_SCHEMA.split(";")):
                file.execute(statement)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is kept, or nothing."""
        file = sqlite3.connect(self.path, timeout=20, isolation_level=None)
        file.row_factory = sqlite3.Row
        try:
            file.execute("PRAGMA synchronous = FULL")
            file.execute("PRAGMA foreign_keys = ON")
            with file:
                yield file
        finally:
            file.close()

    def add_pairs(self, source: str, rows: list[dict]) -> None:
        """Adds the pairs of one `source`, unless they are there: what a restart makes again.

        Args: `rows`: with `prompt`, `model_a`, `model_b`, `text_a`, `text_b`.
        """
        columns = "(:source, :prompt, :model_a, :model_b, :text_a, :text_b)"
        insert = f"INSERT INTO pairs {columns.replace(':', '')} VALUES {columns}"
        with self._open() as file:
            file.execute("BEGIN IMMEDIATE")  # two pages that start at once make them once
            if not file.execute("SELECT 1 FROM pairs WHERE source = ?", (source,)).fetchone():
                file.executemany(insert, [{**row, "source": source} for row in rows])
            file.execute("COMMIT")

    def pairs(self, source: str) -> list[dict]:
        """The pairs of one source, with their `id`."""
        with self._open() as file:
            found = file.execute("SELECT * FROM pairs WHERE source = ? ORDER BY id", (source,))
            return [dict(row) for row in found]

    def vote(self, pair: int, voter: str, a_is_left: bool, choice: str) -> tuple[str, bool]:
        """Keeps a voter's first vote on a pair. Returns: (the choice that counts, is a on the left
        there).

        A second vote on the same pair changes nothing: a double click counts once.
        Raises: sqlite3.IntegrityError for an unknown pair or choice.
        """
        insert = "INSERT INTO votes VALUES (?, ?, ?, ?, ?) ON CONFLICT (pair, voter) DO NOTHING"
        query = "SELECT choice, a_is_left FROM votes WHERE pair = ? AND voter = ?"
        with self._open() as file:
            file.execute(insert, (pair, voter, time.time(), a_is_left, choice))
            kept = file.execute(query, (pair, voter)).fetchone()
        return kept["choice"], bool(kept["a_is_left"])

    def votes(self, source: str | None = None) -> list[dict]:
        """Votes in the order in which they came; `source`: only those on its pairs.

        Returns: rows with `prompt`, `left`, `right` (texts), `left_model`, `right_model`, `choice`,
        `vote` (1: the left one is better, -1: the right one, 0), `voter`, `pair`, `created`.
        """
        where = "WHERE source = ?" if source else ""
        query = f"SELECT * FROM votes JOIN pairs ON pairs.id = votes.pair {where} ORDER BY created"
        with self._open() as file:
            found = file.execute(query, (source,) if source else ()).fetchall()
        return [_as_shown(dict(row)) for row in found]


def _as_shown(row: dict) -> dict:
    """A vote with its answers in the places where they stood."""
    left, right = ("a", "b") if row["a_is_left"] else ("b", "a")
    shown = {"left": row[f"text_{left}"], "right": row[f"text_{right}"]}
    shown |= {"left_model": row[f"model_{left}"], "right_model": row[f"model_{right}"]}
    kept = {name: row[name] for name in ("prompt", "voter", "pair", "created", "choice")}
    return kept | shown | {"vote": POINTS_LEFT[row["choice"]]}


def stand_in_votes(
    pairs: list[dict], judge, voters: int = 3, slips: float = 0.15, seed: int = 0
) -> list[dict]:
    """Votes where nobody voted yet: they are no people's, but of a judge that errs.

    Args: `judge`: a `common.judges.Judge`. Each stand-in sees every pair, and with probability
    `slips` presses any button.
    Returns: rows as `VoteStore.votes` gives them, whose voters are "stand-in 1", ….
    """
    questions = [(row["prompt"], row["text_a"], row["text_b"]) for row in pairs]
    known, votes = judge.prefer(questions), []
    for at in range(voters):
        draw, voter = random.Random(f"{seed}/{at}"), f"stand-in {at + 1}"
        for number, (row, verdict) in enumerate(zip(pairs, known, strict=True)):
            a_is_left = chance(voter, str(number)) < 0.5
            choice = {1: "left", -1: "right", 0: "tie"}[int(verdict) * (1 if a_is_left else -1)]
            if draw.random() < slips:
                choice = draw.choice(list(POINTS_LEFT))
            told = {"pair": number, "voter": voter, "created": float(number)}
            votes.append(_as_shown({**row, **told, "choice": choice, "a_is_left": a_is_left}))
    return votes


def matches_of(votes: list[dict]) -> tuple[list[tuple[str, str, int]], list[str]]:
    """Votes as (matches, prompts) for `common.judging.ratings`."""
    matches = [(row["left_model"], row["right_model"], row["vote"]) for row in votes]
    return matches, [row["prompt"] for row in votes]
