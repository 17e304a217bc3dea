"""Rows of files: JSON lines (also gzipped), JSON lists, Parquet, CSV and TSV, or a folder of them."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
from pyarrow.parquet import ParquetFile

from common.io.formats import DataError

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".tsv")


def _json_lines(path: Path) -> Iterator[dict]:
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else open(path, encoding="utf-8") as lines
    ):
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path.name}, line {number}: not valid JSON ({error}). Mend it."
                    ) from None


def _json_list(path: Path) -> list:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}, line {error.lineno}: not valid JSON ({error.msg})."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: expected a JSON list of rows, found {type(rows).__name__}.")
    return rows


def _table(path: Path) -> Iterator[dict]:
    """Rows of a CSV or TSV file: the first line names the columns; quoted cells may hold line
    breaks.
    """
    csv.field_size_limit(2**27)  # whole dialogues are longer than the module's default of 128 kB
    with open(
        path, encoding="utf-8-sig", newline=""
    ) as file:  # -sig: spreadsheets write a byte-order mark
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        for row in rows:
            if None in row or None in row.values():
                found = (
                    sum(value is not None for value in row.values())
                    + len(row.get(None) or ())
                    - (None in row)
                )
                raise DataError(
                    f"{path.name}, line {rows.line_num}: {found} cells where the first line names "
                    f"{len(rows.fieldnames)} columns. Put cells that hold a separator or a line break in quotes."
                )
            yield row


def _by_ending(path: Path) -> Iterable[dict]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if path.suffix == ".parquet":
        return (row for batch in ParquetFile(path).iter_batches(1000) for row in batch.to_pylist())
    return _table(path) if path.suffix in (".csv", ".tsv") else _json_list(path)


def file_rows(path: Path) -> Iterator[dict]:
    """Rows of a file, or of all files of a folder in order of name.

    Raises: DataError for a file that is cut off, not text, or not what its ending says, and for a
        folder without any.
    """
    files = [path]
    if path.is_dir() and not (
        files := sorted(file for file in path.iterdir() if file.name.endswith(FILE_ENDINGS))
    ):
        raise DataError(f"{path}: no {', '.join(FILE_ENDINGS)} file in this folder.")
    for file in files:
        try:
            yield from _by_ending(file)
        except (
            EOFError,
            OSError,
            UnicodeDecodeError,
            zlib.error,
            csv.Error,
            pyarrow.ArrowException,
        ) as error:
            kind = type(error).__name__
            raise DataError(
                f"{file.name} cannot be read ({kind}: {error}). Fetch or write it again."
            ) from error
