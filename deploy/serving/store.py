"""Requests, answers and feedback in one SQLite file. What was acknowledged survives a crash."""

import hashlib
import json
import logging
import sqlite3
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from statistics import mean, quantiles

log = logging.getLogger("deploy.serving")
SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, created REAL NOT NULL, caller TEXT NOT NULL, user TEXT,
    experiment TEXT NOT NULL, model TEXT NOT NULL, assigned INTEGER NOT NULL,
    status INTEGER NOT NULL, messages TEXT, answer TEXT, finish_reason TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL, first_token_seconds REAL);
CREATE TABLE IF NOT EXISTS feedback (
    id INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL REFERENCES requests (id),
    created REAL NOT NULL, rating INTEGER NOT NULL CHECK (rating IN (-1, 1)),
    consent INTEGER NOT NULL CHECK (consent IN (0, 1)), correction TEXT);
CREATE INDEX IF NOT EXISTS feedback_by_request ON feedback (request_id, id);
CREATE INDEX IF NOT EXISTS requests_by_time ON requests (created);
CREATE INDEX IF NOT EXISTS texts_by_time ON requests (created) WHERE messages IS NOT NULL;
"""
# Requests whose latest feedback gives no consent: older than a time; the oldest few with texts.
UNKEPT = """SELECT id FROM requests WHERE NOT COALESCE((SELECT consent FROM feedback
    WHERE request_id = requests.id ORDER BY id DESC LIMIT 1), 0)"""
OLD = f"{UNKEPT} AND created < ?"
OLDEST = f"""{UNKEPT} AND messages IS NOT NULL ORDER BY created
    LIMIT (SELECT 1 + max_page_count / 1000 FROM pragma_max_page_count)"""
NO_TEXTS = "UPDATE requests SET messages = NULL, answer = NULL WHERE messages IS NOT NULL AND id"
NO_CORRECTION = "UPDATE feedback SET correction = NULL WHERE correction IS NOT NULL AND request_id"
# Closes the gaps that texts leave in the pages. SQLite may leave copies of neighbours it moves.
ANEW = "INSERT OR REPLACE INTO requests SELECT * FROM requests WHERE id"
CROWDED = """SELECT page_count - freelist_count >= 0.9 * max_page_count
    FROM pragma_page_count, pragma_freelist_count, pragma_max_page_count"""
VERSION = 1


class StoreError(RuntimeError):
    """The store could not keep something. `full`: because there is no space left."""

    def __init__(self, message: str, full: bool = False):
        super().__init__(message)
        self.full = full


class UnknownRequest(KeyError):
    """Feedback on a request that this caller did not make."""


def pseudonym(*parts: str) -> str:
    """What is kept of an experiment and a user id: a hash. Whoever knows the id finds it again."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def chance(*parts: str) -> float:
    """A number from 0 to 1 that looks random, and is the same for the same texts."""
    return int(pseudonym(*parts)[:13], 16) / 16**13


def choose_arm(user: str, weights: dict[str, float]) -> str:
    """The model that this user always gets, by the hash of a pseudonym: shares follow the weights.

    Raises: ValueError unless some weight is positive and none is negative.
    """
    ends = [*accumulate(weights.values())]
    if min(weights.values()) < 0 or not 0 < ends[-1] < float("inf"):
        raise ValueError(f"Weights must be 0 or larger, and at least one above 0, not {weights}.")
    return list(weights)[bisect(ends, chance("arm", user) * ends[-1])]


class Store:
    """The file at `path`, written by one thread. After `add_feedback` it is on the disk (fsync).

    `max_bytes` bounds the file's size. When it is nine tenths full, the oldest texts without
    consent are dropped (`dropped` counts of how many requests); the last tenth holds no texts, so
    that nobody's leave the others' votes without room.
    Methods return futures; a future raises StoreError if the disk is full or broken.
    """

    def __init__(self, path: Path, max_bytes: int = 2_000_000_000):
        self.path, self.dropped, self.pause_until, self.moved = Path(path), 0, 0.0, False
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self.thread.submit(self._open, max_bytes).result()

    def _open(self, max_bytes: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Prompts are nobody else's to read; SQLite's log files get the same mode.
            self.path.touch(mode=0o600)
            # Two connections: a request need not wait for the disk, feedback must. (An fsync covers
            # both: one log.)
            self.quick = self._connect("NORMAL", max_bytes)
            self.safe = self._connect("FULL", max_bytes)
            version = self.safe.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                said = f"{self.path} has version {version}, not {VERSION}."
                raise StoreError(f"{said} Name another file with --store.")
            script = f"{SCHEMA} PRAGMA user_version = {VERSION};"
            self.safe.executescript(f"BEGIN IMMEDIATE; {script} COMMIT;")
        except (sqlite3.Error, OSError) as error:
            said = f"Cannot keep records in {self.path} ({error}). Name another with --store."
            raise StoreError(said) from error

    def _connect(self, synchronous: str, max_bytes: int) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=5)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # what is removed is overwritten
        page = connection.execute("PRAGMA page_size").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {max(1, max_bytes // page)}")
        return connection

    def _submit(self, work: Callable[[], object]) -> Future:
        def guarded():
            try:
                return work()
            except sqlite3.Error as error:
                for connection in (self.quick, self.safe):
                    if connection.in_transaction:
                        connection.rollback()
                full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"
                what = "The disk of the store is full" if full else f"The store failed ({error})"
                raise StoreError(f"{what}: nothing was kept.", full) from error

        return self.thread.submit(guarded)

    def _crowded(self) -> bool:
        """Is there no room for texts, even after the oldest ones without consent were dropped?"""
        while self.safe.execute(CROWDED).fetchone()[0]:
            if time.monotonic() < self.pause_until:
                return True
            ids = self.quick.execute(OLDEST).fetchall()
            for statement in (NO_CORRECTION, NO_TEXTS, ANEW):
                self.quick.executemany(f"{statement} = ?", ids)
            self.dropped, self.moved = self.dropped + len(ids), True
            log.warning("the store is nearly full: dropped its %d oldest texts", len(ids))
            # To find nothing takes a while: at most once a minute.
            self.pause_until = 0.0 if ids else time.monotonic() + 60
        return False

    def add_request(self, **row) -> Future:
        """Keeps one request and its answer. `messages` is a list; other columns may be left out."""
        row["messages"] = json.dumps(row["messages"]) if row.get("messages") else None
        columns, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        statement = f"INSERT INTO requests ({columns}) VALUES ({values})"

        def work() -> None:
            if self._crowded():
                row.update(messages=None, answer=None)
            self.quick.execute(statement, row)

        return self._submit(work)

    def add_feedback(
        self, request_id: str, caller: str, rating: int, consent: bool, correction: str | None
    ) -> Future:
        """Keeps feedback on an answer: rating 1 or -1. The latest counts. Gives its model.

        Raises (in the future): UnknownRequest if this caller made no such request.
        """
        query = "SELECT model FROM requests WHERE id = ? AND caller = ?"
        columns = "request_id, created, rating, consent, correction"
        insert = f"INSERT INTO feedback ({columns}) VALUES (?, ?, ?, ?, ?)"

        def work() -> str:
            found = self.safe.execute(query, (request_id, caller)).fetchone()
            if not found:
                raise UnknownRequest(request_id)
            if correction and self._crowded():
                raise StoreError("The store is full of texts: a vote fits, no correction.", True)
            row = (request_id, time.time(), rating, int(consent), correction)
            self.safe.execute("BEGIN IMMEDIATE")
            self.safe.execute(f"{NO_CORRECTION} = ?", row[:1])
            self.safe.execute(insert, row)
            self.safe.execute("COMMIT")
            return found[0]

        return self._submit(work)

    def forget(self, days: float) -> Future:
        """Removes texts older than `days`, corrections too, except where the latest feedback gives
        consent.

        No byte of them is left in the store's files. The future gives the number of requests.
        Raises (in the future): StoreError if a program that reads the store keeps its log.
        """

        def work() -> int:
            before = (time.time() - days * 86400,)
            self.quick.execute(f"{NO_CORRECTION} IN ({OLD})", before)
            count = self.quick.execute(f"{NO_TEXTS} IN ({OLD})", before).rowcount
            if self.moved:
                self.quick.execute("VACUUM")  # takes the copies with it
                self.moved = False
            if self.quick.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise StoreError("Another program reads the store: removed texts stay in its log.")
            return count

        return self._submit(work)

    def close(self) -> None:
        """Writes what waits, and closes the file."""
        for connection in (self.quick, self.safe):
            self.thread.submit(connection.close).result()
        self.thread.shutdown()


# --- reading it back, while the gateway runs

LATEST = "SELECT * FROM feedback WHERE id IN (SELECT MAX(id) FROM feedback GROUP BY request_id)"


def rows(path: Path, query: str, *values) -> Iterator[dict]:
    """Rows of a query on the store, which is opened for reading only. Raises: FileNotFoundError."""
    if not Path(path).exists():
        advice = f"Start the gateway with --store {path}, and ask it something."
        raise FileNotFoundError(f"No store at {path}. {advice}")
    address = f"{Path(path).resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=5)) as connection:
        connection.row_factory = sqlite3.Row
        yield from (dict(row) for row in connection.execute(query, values))


def answers(path: Path, experiment: str = "default") -> list[dict]:
    """Every answer that was given, oldest first, with the latest feedback on it.

    Returns: columns of `requests` (`messages` as a list; it and `answer` are None once forgotten),
    and `rating` (1, -1 or None), `consent` (0, 1 or None), `correction`.
    """
    query = (
        "SELECT requests.*, rating, consent, correction FROM requests LEFT JOIN "
        f"({LATEST}) latest ON latest.request_id = requests.id "
        "WHERE status = 200 AND experiment = ? ORDER BY requests.created, requests.id"
    )
    found = list(rows(path, query, experiment))
    for row in found:
        row["messages"] = json.loads(row["messages"]) if row["messages"] else None
    return found


def arm_counts(path: Path, experiment: str = "default") -> dict[str, dict]:
    """What each arm of the A/B test has seen so far; answers that named their model are left out.

    One user of one caller has one vote: the first.
    Returns: model → `answers`, `users`, `up`, `down`, `rated_users`, `ended_with_eos` (share),
    `length_tokens` (mean), `seconds_p50`, `seconds_p95`.
    """
    arms = defaultdict(list)
    for row in answers(path, experiment):
        if row["assigned"]:
            arms[row["model"]].append(row)
    report = {}
    for model, found in sorted(arms.items()):
        votes = {(r["caller"], r["user"]): r["rating"] for r in reversed(found) if r["rating"]}
        seconds = [row["seconds"] for row in found]
        cuts = quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else seconds * 19
        report[model] = {
            "answers": len(found),
            "users": len({row["user"] for row in found} - {None}),
            "up": sum(rating == 1 for rating in votes.values()),
            "down": sum(rating == -1 for rating in votes.values()),
            "rated_users": len({user for _, user in votes} - {None}),
            "ended_with_eos": mean(row["finish_reason"] == "stop" for row in found),
            "length_tokens": mean(row["completion_tokens"] or 0 for row in found),
            "seconds_p50": cuts[9],
            "seconds_p95": cuts[18],
        }
    return report
