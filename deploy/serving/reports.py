"""Reads the store back while the gateway runs: answers with their feedback, and counts per arm of
an A/B test.
"""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import mean, quantiles

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
