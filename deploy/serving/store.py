"""Requests, answers, A/B assignment and feedback in one SQLite file. What was acknowledged survives
a crash.
"""

import hashlib
import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import mean, quantiles

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
"""
# Requests older than a time, unless the latest feedback on them gives consent.
OLD = """created < ? AND NOT COALESCE((SELECT consent FROM feedback
    WHERE request_id = requests.id ORDER BY id DESC LIMIT 1), 0)"""
VERSION = 1


class StoreError(RuntimeError):
    """The store could not keep something. `full`: because there is no space left."""

    def __init__(self, message: str, full: bool = False):
        super().__init__(message)
        self.full = full


class UnknownRequest(KeyError):
    """Feedback on a request that this caller did not make."""


def pseudonym(experiment: str, user: str) -> str:
    """What is kept in place of a user id: 128 bits of a hash. Whoever knows the id can still find
    it again.
    """
    return hashlib.sha256(f"{experiment}\0{user}".encode()).hexdigest()[:32]


def choose_arm(user: str, weights: dict[str, float]) -> str:
    """The model that this user always gets, by the hash of a pseudonym: shares follow the weights.

    Raises: ValueError unless some weight is positive and none is negative.
    """
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"Weights must be 0 or larger, and at least one above 0, not {weights}.")
    point = int(hashlib.sha256(f"arm\0{user}".encode()).hexdigest()[:13], 16) / 16**13 * total
    for name, weight in weights.items():
        point -= weight
        if point < 0:
            return name
    return [name for name, weight in weights.items() if weight][-1]


class Store:
    """The file at `path`, written by one thread. Feedback is on the disk (fsync) when
    `add_feedback` is done.

    `max_bytes` bounds the file's size: beyond, it is full, as a disk would be.
    Methods return futures; a future raises StoreError if the disk is full or broken.
    """

    def __init__(self, path: Path, max_bytes: int = 2_000_000_000):
        self.path = Path(path)
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
            raise StoreError(
                f"Cannot keep records in {self.path} ({error}). Name another with --store."
            ) from error

    def _connect(self, synchronous: str, max_bytes: int) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=5)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA foreign_keys = ON")
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

    def add_request(self, **row) -> Future:
        """Keeps one request and its answer. `messages` is a list; columns that are not given stay
        empty.
        """
        row["messages"] = json.dumps(row.get("messages"))
        columns, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        statement = f"INSERT INTO requests ({columns}) VALUES ({values})"
        return self._submit(lambda: self.quick.execute(statement, row) and None)

    def add_feedback(
        self, request_id: str, caller: str, rating: int, consent: bool, correction: str | None
    ) -> Future:
        """Keeps feedback on an answer: rating 1 or -1. The latest on an answer counts. The future
        gives its model.

        Raises (in the future): UnknownRequest if this caller made no such request.
        """

        query = "SELECT model FROM requests WHERE id = ? AND caller = ?"
        columns = "request_id, created, rating, consent, correction"
        insert = f"INSERT INTO feedback ({columns}) VALUES (?, ?, ?, ?, ?)"

        def work() -> str:
            found = self.safe.execute(query, (request_id, caller)).fetchone()
            if not found:
                raise UnknownRequest(request_id)
            row = (request_id, time.time(), rating, int(consent), correction)
            self.safe.execute(insert, row)
            return found[0]

        return self._submit(work)

    def forget(self, days: float) -> Future:
        """Removes texts older than `days`, corrections too, except where the user's latest feedback
        gives consent.

        The future gives of how many requests. Counts and times stay.
        """
        corrections = f"""UPDATE feedback SET correction = NULL
            WHERE request_id IN (SELECT id FROM requests WHERE {OLD})"""
        texts = f"""UPDATE requests SET messages = NULL, answer = NULL
            WHERE messages IS NOT NULL AND {OLD}"""

        def work() -> int:
            before = (time.time() - days * 86400,)
            self.quick.execute(corrections, before)
            return self.quick.execute(texts, before).rowcount

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

    Returns: model → `answers`, `users`, `up`, `down`, `rated_users`, `ended_with_eos` (share),
    `length_tokens` (mean), `seconds_p50`, `seconds_p95`.
    """
    arms = defaultdict(list)
    for row in answers(path, experiment):
        if row["assigned"]:
            arms[row["model"]].append(row)
    report = {}
    for model, found in sorted(arms.items()):
        seconds = [row["seconds"] for row in found]
        cuts = quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else seconds * 19
        report[model] = {
            "answers": len(found),
            "users": len({row["user"] for row in found} - {None}),
            "up": sum(row["rating"] == 1 for row in found),
            "down": sum(row["rating"] == -1 for row in found),
            "rated_users": len({row["user"] for row in found if row["rating"]} - {None}),
            "ended_with_eos": mean(row["finish_reason"] == "stop" for row in found),
            "length_tokens": mean(row["completion_tokens"] or 0 for row in found),
            "seconds_p50": cuts[9],
            "seconds_p95": cuts[18],
        }
    return report
