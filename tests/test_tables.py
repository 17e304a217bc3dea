"""Rows of files: every ending is read the same, and a fault is named by file and line."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet
from test_formats import comparison, shp, trl, ultra

from common.data import load_pairs
from common.io.formats import DataError

HH_ROWS = Path(__file__).parent / "data" / "hh_rows.jsonl"
GOOD = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
BOM = b"\xef\xbb\xbf"


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def asked(words: str) -> list[dict]:
    return [{**GOOD, "prompt": word} for word in words.split()]


def prompts(source, split: str | None = None) -> list[str]:
    found = load_pairs(source, split)[0]["prompt"]
    return [prompt.split("Human: ")[1].split("\n")[0] for prompt in found]


def table(rows: list[dict], separator: str = ",") -> bytes:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(separator.join(f'"{c}"' for c in row) + "\n" for row in cells).encode()


# --- every ending


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("ending", ["jsonl", "JSONL", "json", "csv", "tsv", "Csv"])
@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
def test_all_endings_hold_the_same_rows(tmp_path, ending, packed, mark):
    """In capitals too, gzipped, and with the byte-order mark that editors on Windows write."""
    rows = [GOOD, {**GOOD, "prompt": "Why?"}]
    data = {
        "jsonl": lines(rows),
        "json": json.dumps(rows, indent=1).encode(),
        "csv": table(rows),
        "tsv": table(rows, "\t"),
    }[ending.lower()]
    path = tmp_path / f"mine.{ending}{packed}"
    path.write_bytes(gzip.compress(mark + data) if packed else mark + data)
    assert prompts(path) == ["Hi", "Why?"]


def test_all_readers_agree(tmp_path):
    """The eleven rows of HH-RLHF, as a list, a JSON list and Parquet."""
    rows = [json.loads(line) for line in HH_ROWS.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    expected = load_pairs(HH_ROWS)[0].to_list()
    for source in (str(tmp_path / "rows.json"), tmp_path / "rows.parquet", rows):
        assert load_pairs(source)[0].to_list() == expected


def test_json_lines_are_read_where_the_ending_is_json(tmp_path):
    """As SHP's own files are written."""
    (tmp_path / "a.json").write_bytes(lines(asked("Hi Why?")))
    assert prompts(tmp_path / "a.json") == ["Hi", "Why?"]


@pytest.mark.parametrize(
    "row", [shp(), comparison(), ultra(), trl()], ids=["shp", "comparison", "ultra", "trl"]
)
def test_formats_survive_json_lines_and_parquet(tmp_path, row):
    """Parquet gives lists of structs back, with the fields in the order of the schema."""
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    Dataset.from_list([row]).to_parquet(str(tmp_path / "a.parquet"))
    expected = load_pairs([row])[0].to_list()
    for name in ("a.jsonl", "a.parquet"):
        assert load_pairs(tmp_path / name)[0].to_list() == expected


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_cells_in_quotes_may_hold_quotes_and_line_breaks(tmp_path, ending, separator):
    """SHP's numbers come as text."""
    rows = [shp(0, human_ref_A='Say "eat", slowly.\nThen eat.'), shp(1, history="Why?")]
    with open(tmp_path / f"a.{ending}", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    assert load_pairs(tmp_path / f"a.{ending}")[0].to_list() == load_pairs(rows)[0].to_list()


def test_cells_of_a_table_are_text(tmp_path):
    """Words that pandas would take for no value or for numbers; an empty cell is an empty text."""
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nnull,NA,1.0\n\nHi,Hello,\n")
    pairs, report = load_pairs(tmp_path / "a.csv")
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == (" NA", " 1.0")
    assert report.dropped == {"empty side": 1}


def test_a_long_cell_of_a_table_is_read(tmp_path):
    """The csv module refuses more than 131,072 characters unless told otherwise."""
    (tmp_path / "a.csv").write_text(f"prompt,chosen,rejected\na,{'so ' * 60_000},c\n")
    assert len(load_pairs(tmp_path / "a.csv")[0][0]["chosen"]) > 150_000


# --- faults, by file and line

CUT = b'{"prompt": "Why?", "cho\n'
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
TWICE = b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n'
LATIN = '{"prompt": "caf\u00e9", "chosen": "b", "rejected": "c"}\n'.encode("latin-1")
FAULTS = {
    "half a line": (CUT, "not valid JSON"),
    "two values": (lines([GOOD]).strip() + b"{}\n", "not valid JSON"),
    "a name twice": (TWICE, "the name 'chosen' comes twice. Rename or remove one"),
    "nested too deep": (DEEP, "lists or objects are nested too deep"),
    "5,000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "Exceeds the limit"),
    "another encoding": (LATIN, "not UTF-8 .*Save it as UTF-8"),
    "a wrong type": (lines([{**GOOD, "chosen": 5}]), "column chosen must hold text, not int"),
    "a list as role": (
        lines([{**ultra(), "chosen": [{"role": ["user"], "content": "a"}]}]),
        "column role of a message in chosen must hold text, not list",
    ),
    "no format": (lines([{"a": 1}]), "the columns a are of no known format"),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_file_and_line(tmp_path, fault, packed):
    """Line 4: line 2 is empty and counts."""
    broken, problem = FAULTS[fault]
    data = lines([GOOD]) + b"\n" + lines([GOOD]) + broken + lines([GOOD])
    path = tmp_path / f"mine.jsonl{packed}"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataError, match=rf"mine\.jsonl{packed}, line 4: .*{problem}"):
        load_pairs(path)


@pytest.mark.parametrize("fault", ["a name twice", "nested too deep", "5,000 digits", "no format"])
def test_a_fault_in_a_list_is_named_by_file_and_line(tmp_path, fault):
    broken, problem = FAULTS[fault]
    rows = [json.dumps(GOOD).encode(), broken.strip(), json.dumps(GOOD).encode()]
    (tmp_path / "mine.json").write_bytes(b"[\n" + b",\n".join(rows) + b"\n]\n")
    with pytest.raises(DataError, match=rf"mine\.json, line 3: .*{problem}"):
        load_pairs(tmp_path / "mine.json")


@pytest.mark.parametrize("end", [" oops]", "{}", ",]", "] and more", ""])
def test_a_list_that_is_no_json_is_named_with_its_line(tmp_path, end):
    (tmp_path / "mine.json").write_text(f"[\n{json.dumps(GOOD)}\n{end}")
    with pytest.raises(DataError, match=r"mine\.json, line [23]: not valid JSON"):
        load_pairs(tmp_path / "mine.json")


def test_in_a_folder_the_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([GOOD]))
    (tmp_path / "b.jsonl").write_bytes(lines([{**GOOD, "rejected": {}}]))
    with pytest.raises(DataError, match=r"^b\.jsonl, line 1: column rejected must hold text"):
        load_pairs(tmp_path)


def test_a_row_of_a_list_is_named_by_its_number():
    with pytest.raises(DataError, match="^row 2: column chosen must hold text"):
        load_pairs([GOOD, {**GOOD, "chosen": 1}])


HEAD = "prompt,chosen,rejected\n"
TABLES = {
    "too many cells": (HEAD + 'a,"b\nb",c\na,b,c,d\n', 4, "not the 3 cells"),
    "far too many": (HEAD + 'a,"b\nb",c\na,b,c,d,e,f\n', 4, "not the 3 cells"),
    "too few cells": (HEAD + 'a,"b\nb",c\na,b\n', 4, "not the 3 cells"),
    "a header twice": ("prompt,chosen,chosen\na,b,c\n", 1, "the name 'chosen' comes twice"),
    "words after a quote": (HEAD + 'a,b,c\na,"b" b,c\n', 3, "close them"),
    "an open quote": (HEAD + 'a,b,c\n\na,"b,c\na,b,c\n', 4, "close them"),
    "semicolons": ("prompt;chosen;rejected\na;b;c\n", 2, "the columns prompt;chosen;rejected are"),
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_fault_in_a_table_is_named_by_line(tmp_path, fault):
    text, line, problem = TABLES[fault]
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=rf"a\.csv, line {line}: .*{problem}"):
        load_pairs(tmp_path / "a.csv")


def test_a_table_in_another_encoding_is_named_by_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(f"{HEAD}a,b,c\na,caf\u00e9,c\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 3: not UTF-8"):
        load_pairs(tmp_path / "a.csv")


def test_a_column_of_parquet_that_comes_twice_is_refused(tmp_path):
    texts = [pyarrow.array([text]) for text in ("Hi", "Yes.", "No.", "Maybe.")]
    names = ["prompt", "chosen", "rejected", "rejected"]
    parquet.write_table(pyarrow.table(texts, names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, columns: the name 'rejected' comes twice"):
        load_pairs(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(lines([GOOD]) * 50, mtime=0)[:-20]),
        ("not.csv.gz", b"prompt,chosen,rejected\n"),
        ("not.parquet", b"PAR1 this is no table"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(tmp_path, name, content):
    """A download that was cut off, a file that is not packed, a table that is none."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be read .*Fetch or write it again"):
        load_pairs(tmp_path / name)


@pytest.mark.parametrize("name", ["mine.txt", "mine", "mine.xlsx"])
def test_an_ending_that_says_nothing_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(lines([GOOD]))
    with pytest.raises(DataError, match=rf"{name}: its name must end in \.jsonl or .*\.parquet"):
        load_pairs(tmp_path / name)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="(?s)No row is left.*0 rows read"):
        load_pairs(tmp_path / "mine.jsonl")


# --- folders


def test_a_folder_is_read_file_by_file_in_order_of_name(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(lines(asked("three four")))
    (tmp_path / "a.csv").write_bytes(table(asked("one two")))
    assert prompts(tmp_path) == ["one", "two", "three", "four"]


def test_what_is_no_data_does_not_stop_a_folder(tmp_path):
    """Hidden files as macOS leaves them, what `datasets` writes beside its files, a README."""
    (tmp_path / "a.jsonl").write_bytes(lines(asked("Hi")))
    for name in ("._a.jsonl", ".a.csv", "dataset_info.json", "state.json", "README.md"):
        (tmp_path / name).write_bytes(b'{"features": {}, "bytes": "\xff"}')
    assert prompts(tmp_path) == ["Hi"]


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(DataError, match=r"no \.jsonl, .*\.parquet file in this folder"):
        load_pairs(tmp_path)


@pytest.mark.parametrize("held_out", ["test", "validation", "dev"])
def test_the_split_of_a_folder_is_its_own(tmp_path, held_out):
    """Sixty prompts of train and four of test: split anew by prompt, they would be mixed."""
    train, test = [f"train{n}" for n in range(60)], [f"test{n}" for n in range(4)]
    (tmp_path / "train-0.jsonl").write_bytes(lines(asked(" ".join(train[:30]))))
    (tmp_path / "train-1.json").write_bytes(lines(asked(" ".join(train[30:]))))
    (tmp_path / f"my_{held_out}.csv.gz").write_bytes(gzip.compress(table(asked(" ".join(test)))))
    assert prompts(tmp_path, "train") == train
    assert prompts(tmp_path, "test") == test
    assert sorted(prompts(tmp_path)) == sorted(train + test)


def test_a_third_split_of_a_folder_is_read_by_its_name(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(asked(name)))
    for name in ("train", "validation", "test"):
        assert prompts(tmp_path, name) == [name]


def test_a_file_of_no_split_beside_a_split_is_an_error(tmp_path):
    for name in ("train", "test", "more"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(asked(name)))
    with pytest.raises(DataError, match=r"is more\.jsonl for train or test\? Say so in its name"):
        load_pairs(tmp_path, "train")


@pytest.mark.parametrize("names", [("train.jsonl",), ("test.jsonl",), ("trainer.jsonl",)])
def test_without_both_parts_a_folder_is_split_by_prompt(tmp_path, names):
    rows = asked(" ".join(f"q{n}" for n in range(60)))
    for name in names:
        (tmp_path / name).write_bytes(lines(rows))
    for split in ("train", "test"):
        assert prompts(tmp_path, split) == prompts(rows, split)


def test_an_unknown_split_of_local_data_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([GOOD]))
    for source in ([GOOD], tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(DataError, match="there is no 'validation'"):
            load_pairs(source, "validation")
