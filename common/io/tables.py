"""Rows of files, each with its place: JSON lines, JSON lists, CSV, TSV, Parquet, and folders."""

import csv
import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from io import StringIO
from pathlib import Path

import pandas
import pyarrow
from pyarrow.parquet import ParquetFile

from common.io.formats import DataError

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
FILE_ENDINGS = (*TEXTS, *(f"{ending}.gz" for ending in TEXTS), ".parquet")
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLIT_IN_NAME = re.compile(r"(?<![a-z])(?:(train|test)|validation|valid|val|dev)(?![a-z])")


def _unique(names: list, where: str = "") -> None:
    """Raises: ValueError for a name that comes twice, of which the library would take the last."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}the name {twice!r} comes twice. Rename or remove one.")


def _object(pairs: list[tuple]) -> dict:
    _unique([name for name, _ in pairs])
    return dict(pairs)


def _json(text: str, listed: bool) -> Iterator[tuple[str, object]]:
    """A list of rows, or rows on lines of their own."""
    first, between, end = r"\s*\[\s*", r"\s*,\s*", r"\s*\]\s*\Z"
    if not listed:
        first, between, end = r"\s*", r"[ \t\r]*\n\s*", r"\s*\Z"
    decoder, gap, at, line = json.JSONDecoder(object_pairs_hook=_object), first, 0, 1
    while not re.compile(end if at else first + end).match(text, at):
        found = re.compile(gap).match(text, at)
        line += text.count("\n", at, found.end() if found else at)
        try:
            if not found:
                raise json.JSONDecodeError("Expecting the next row", text, at)
            row, at = decoder.raw_decode(text, found.end())
        except json.JSONDecodeError as error:
            where = f"line {error.lineno if listed else line}: not valid JSON"
            raise ValueError(f"{where} ({error.msg}, column {error.colno}). Mend it.") from None
        except RecursionError:
            raise ValueError(f"line {line}: lists or objects are nested too deep.") from None
        except ValueError as error:  # a name that comes twice, or a number of thousands of digits
            raise ValueError(f"line {line}: {error}") from None
        yield f"line {line}", row
        gap, line = between, line + text.count("\n", found.end(), at)


def _table(text: str, separator: str) -> Iterator[tuple[str, dict]]:
    """CSV or TSV: the first line names the columns; cells in quotes may hold line breaks."""
    csv.field_size_limit(2**27)  # whole dialogues are longer than the default of 128 kB
    shape = {"sep": separator, "header": None, "index_col": False, "skip_blank_lines": False}
    read = partial(pandas.read_csv, engine="python", dtype=str, keep_default_na=False, **shape)
    names = read(StringIO(text), nrows=1).iloc[0].tolist()
    _unique(names, "line 1: ")
    wrong = f"not the {len(names)} cells of the first line. Put cells that hold a separator, a "
    wrong += "quote or a line break in quotes, and close them."
    try:  # one column more than there are names: a row that fills it has too many cells
        table = read(StringIO(text), names=range(len(names) + 1))
    except pandas.errors.ParserError:  # says no line of the file
        reader, line = csv.reader(StringIO(text), delimiter=separator, strict=True), 1
        with suppress(csv.Error):
            while len(next(reader)) <= len(names):
                line = reader.line_num + 1
        raise ValueError(f"line {line}: {wrong}") from None
    line = 1
    for row in table.itertuples(index=False, name=None):
        cells = [cell for cell in row if isinstance(cell, str)]
        if line > 1 and cells:  # not the names, not an empty line
            if len(cells) != len(names):
                raise ValueError(f"line {line}: {wrong}")
            yield f"line {line}", dict(zip(names, cells, strict=True))
        line += 1 + sum(cell.count("\n") for cell in cells)


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        file = ParquetFile(path)
        _unique(file.schema_arrow.names, "columns: ")
        rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(f"line {line}: not UTF-8 ({error.reason}). Save it as UTF-8.") from None
    if ".json" in name:
        yield from _json(text, ".jsonl" not in name and text.lstrip().startswith("["))
    else:
        yield from _table(text, "\t" if ".tsv" in name else ",")


def file_rows(files: Iterable[Path]) -> Iterator[tuple[str, object]]:
    """(place, row) of all rows of files; a place is the name of the file and the line.

    Raises: DataError for a file that is cut off, not text, or not what its ending says.
    """
    for file in files:
        if not file.name.lower().endswith(FILE_ENDINGS):
            raise DataError(f"{file.name}: its name must end in {' or '.join(FILE_ENDINGS)}.")
        try:
            for place, row in _rows(file):
                yield f"{file.name}, {place}", row
        except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
            what = f"{file.name} cannot be read ({type(error).__name__}: {error})"
            raise DataError(f"{what}. Fetch or write it again.") from error
        except ValueError as error:
            raise DataError(f"{file.name}, {error}") from None


def local_files(path: Path, split: str | None) -> tuple[list[Path], bool]:
    """The files of a split, and whether the split must be made by prompt.

    None is every file, in order of name. A folder whose files are named after train and test (or
    validation) has its own split.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
        files = [
            f for f in files if f.name.lower().endswith(FILE_ENDINGS) and f.name not in NO_ROWS
        ]
    if not files:
        raise DataError(f"{path}: no {', '.join(FILE_ENDINGS)} file in this folder.")
    own = defaultdict(list)
    for file in files:
        word = SPLIT_IN_NAME.search(file.name.lower())
        own[word and (word[1] or "validation")].append(file)
    has_own = "train" in own and len(own.keys() & {"test", "validation"}) > 0
    own.setdefault("test", own["validation"])
    if split is None:
        return files, False
    if has_own and own[None]:
        raise DataError(f"{path}: is {own[None][0].name} for train or test? Say so in its name.")
    if split not in ("train", "test") and not (has_own and own[split]):
        raise DataError(f"{path} has train and test, its own or by prompt: there is no {split!r}.")
    return (own[split], False) if has_own else (files, True)
