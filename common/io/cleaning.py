"""Rows become clean texts: each that cannot be used is dropped, and counted in a report."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import pyarrow
from datasets import Dataset
from datasets.table import InMemoryTable

from common.io.fingerprints import digest
from common.io.formats import DataError, Unusable

HELD_OUT_SHARE = 10  # one prompt in ten is held out of data that have no test split


@dataclass
class CleaningReport:
    """What cleaning did: nothing is dropped or cut without being counted here."""

    source: str
    rows: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    cut: Counter = field(default_factory=Counter)  # what was shortened -> rows
    drawn: int = 0  # of the rows kept, how many were drawn; 0: all are there

    def __post_init__(self):
        self.dropped, self.cut = Counter(self.dropped), Counter(self.cut)

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows} rows read, {self.kept} kept"]
        lines += [f"  dropped {count:6d}  {why}" for why, count in sorted((+self.dropped).items())]
        lines += [f"  cut     {count:6d}  {what}" for what, count in sorted(self.cut.items())]
        drawn = f"  drawn   {self.drawn:6d}  of the rows kept, at random over the whole split"
        return "\n".join([*lines, drawn] if self.drawn else lines)


def _held_out(text: str) -> bool:
    """A fixed tenth of the prompts, by their text: no prompt is on both sides of the split."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def numbered(rows: Iterable) -> Iterator[tuple[str, object]]:
    """(place, row) of rows that come from no file."""
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def usable(rows: Iterable, read: Callable, split: str | None, report: CleaningReport) -> Iterator:
    """The texts of (place, row) pairs, counted in `report`. `split`: only its share of the prompts.

    Raises: DataError with the place, for a row that no format fits.
    """
    for place, row in rows:
        texts, reason = None, ""
        try:
            texts = read(row)
        except Unusable as error:
            reason = str(error)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        # The prompt decides on the side of the split; the whole row, where it has no prompt.
        if split and _held_out(texts["prompt"] if texts else str(row)) != (split == "test"):
            continue
        report.rows += 1
        if texts:
            yield texts
        else:
            report.dropped[reason] += 1


def clean(rows: Iterator[dict], limit: int | None, report: CleaningReport) -> Dataset:
    """At most `limit` rows as a dataset, without duplicates and without contradictions.

    Of two pairs with the same answers in opposite order, neither tells what is better.
    """
    seen: dict[str, tuple[int, str]] = {}  # the texts of a row -> its number and chosen answer
    contradicted = set()

    def first_ones() -> Iterator[dict]:
        for row in rows:
            key = digest(sorted(row.values()))
            number, chosen = seen.get(key, (None, ""))
            if number is None:
                seen[key] = len(seen), row["chosen"]
                yield row
            elif number not in contradicted and row["chosen"] == chosen:
                report.dropped["duplicate of an earlier row"] += 1
            else:
                again = number in contradicted
                report.dropped["the same answers in the opposite order"] += 1 if again else 2
                contradicted.add(number)
            if limit and len(seen) - len(contradicted) == limit:
                return

    # Arrow holds the texts, so that large data are never whole in Python's lists.
    texts, tables = first_ones(), []
    while chunk := list(islice(texts, 10_000)):
        schema = pyarrow.schema([(name, pyarrow.string()) for name in chunk[0]])
        tables.append(pyarrow.Table.from_pylist(chunk, schema))
    if len(seen) == len(contradicted):
        raise DataError(f"No row is left after cleaning.\n{report}")
    mask = pyarrow.array([number not in contradicted for number in range(len(seen))])
    return Dataset(InMemoryTable(pyarrow.concat_tables(tables).filter(mask)))
