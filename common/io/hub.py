"""Datasets of the hub: at a stated revision, streamed where a part is enough, cleaned splits kept.

Whatever fails there ends in a DataError that says what happened and what to do.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import datasets.config
import httpx2
import pyarrow
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, constants

from common.io.files import written_whole
from common.io.fingerprints import code_of, digest
from common.io.formats import DataError
from common.io.tables import FILE_ENDINGS


class Known(NamedTuple):
    """What the course knows of a dataset."""

    revision: str
    subsets: tuple[str, ...] = ()  # they are folders
    folder: str | None = None  # the one folder that is read
    test: str = "test"  # the name of its test split


HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SUBREDDITS = (
    "askacademia askanthropology askbaking askcarguys askculinary askdocs askengineers "
    "askhistorians askhr askphilosophy askphysics askscience asksciencefiction asksocialscience "
    "askvet changemyview explainlikeimfive legaladvice"
)
# Revisions: the commit of `main` that public records name (August 2026). `main` of
# summarize-from-feedback needs a loading script; the parquet copy that the hub made of it has no
# commit on record: see `at_commit`.
PARQUET = "refs/convert/parquet"
KNOWN_DATASETS = {
    "Anthropic/hh-rlhf": Known("09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", HH_SUBSETS),
    "stanfordnlp/SHP": Known("e94b5f32602712d78ed494fe79105b1959396686", tuple(SUBREDDITS.split())),
    "openai/summarize_from_feedback": Known(PARQUET, folder="comparisons", test="validation"),
    "HuggingFaceH4/ultrafeedback_binarized": Known("3949bf5f8c17c394422ccfab0c31ea9c20bdeb85"),
    "trl-lib/ultrafeedback_binarized": Known("47124cb5778f5d50de1c7676a412828f3ea7c555"),
    "tatsu-lab/alpaca": Known("dce01c9b08f87459cf36a430d809084718273017"),
}


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub: `owner/name`, `owner/name:subset` or `owner/name:subset@revision`."""

    name: str
    subset: str | None
    revision: str

    def __str__(self) -> str:
        return f"{self.name}:{self.subset}" if self.subset else self.name

    @property
    def known(self) -> Known:
        return KNOWN_DATASETS.get(self.name, Known(self.revision))

    @property
    def options(self) -> dict[str, str]:
        """For `load_dataset`. A subset is a folder in known datasets and parquet copies, else a
        configuration.
        """
        if self.known.folder:
            return {"data_dir": self.known.folder}
        folders = self.name in KNOWN_DATASETS or "convert/" in self.revision
        return {"data_dir" if folders else "name": self.subset} if self.subset else {}


def hub_source(text: str) -> HubSource | None:
    """`text` as a dataset of the hub, or None if it cannot be one. Raises: DataError for an unknown
    subset.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?(?:@([\w./-]+))?", text)
    if not match or text.lower().endswith(FILE_ENDINGS):
        return None
    name, subset, revision = match.groups()
    known = KNOWN_DATASETS.get(name)
    if known and subset and subset not in (*known.subsets, known.folder):
        none = "It has none: leave it out"
        has = f"Its subsets: {', '.join(known.subsets)}" if known.subsets else none
        raise DataError(f"The dataset {name!r} has no subset {subset!r}. {has}.")
    return HubSource(name, subset, revision or (known.revision if known else "main"))


# --- failures

OFFLINE = r"\b(ConnectError|ConnectTimeout|ConnectionError)\b"
INTERRUPTED = "the download was interrupted. Run again, and it goes on where it stopped."
# What is looked for in the kinds and texts of an error and its causes -> what happened, what to do.
# The first one that is found counts.
FAILURES = {
    "No space left|Not enough (free )?disk space|quota exceeded": (
        "the disk is full. Free some space, or set HF_HOME to a folder on a larger disk, "
        "and run again."
    ),
    "status 429": (
        "the hub takes no more requests for now. Wait some minutes, or log in with "
        "`hf auth login`, and run again."
    ),
    "status 5..": "the hub answers with an error of its own. Try again later.",
    "GatedRepoError|gated dataset": (
        "it is gated. Accept its terms on its page on the hub, log in with `hf auth login`, "
        "and run again."
    ),
    "RevisionNotFoundError|Revision '.*' doesn't exist": (
        "it has no such revision. Name another one: LAB_DATA=owner/name@main."
    ),
    "Dataset scripts are no longer supported": (
        "it needs a loading script, which is refused, since it would run foreign code. Read the "
        "parquet copy that the hub makes: LAB_DATA=owner/name:configuration@refs/convert/parquet, "
        "or download its rows as a file."
    ),
    "Config name is missing|BuilderConfig '.*' not found": (
        "it has several configurations. Name one of them: LAB_DATA=owner/name:configuration."
    ),
    r"DatasetGenerationCastError|\bCastError": (
        "its files have different columns. Name one configuration: "
        "LAB_DATA=owner/name:configuration."
    ),
    "ConnectionResetError|Server Disconnected|Consistency check|magic bytes|truncated": INTERRUPTED,
    f"(?s)HF_HUB_OFFLINE is on.*{OFFLINE}": (
        "HF_HUB_OFFLINE is set, and there is no copy on this machine. Unset it and connect once."
    ),
    OFFLINE: "the hub cannot be reached. Connect once: later runs read the copy that is kept.",
    "doesn't contain any data files|DataFilesNotFoundError|EntryNotFoundError": (
        "there is no data file at this place. Check the subset and the revision on its page on "
        "the hub."
    ),
    "RepositoryNotFoundError|DatasetNotFoundError": (
        "there is none of this name, or it is private. Check the spelling, or log in with "
        "`hf auth login`."
    ),
    "HfHubHTTPError": "the hub refuses. Check that you may read it: log in with `hf auth login`.",
    r"TransportError|XetDownloadError|ChecksumVerificationError|SplitsVerificationError|"
    r"\bTimeoutError|\bEOFError|BadGzipFile|zlib\.error": INTERRUPTED,
    "ArrowInvalid|JSONDecodeError": (
        "a file is cut off or damaged; the download may have been interrupted. Run again; if it "
        "fails in the same place, remove the copy with `hf cache rm`, or report it on its page on "
        "the hub."
    ),
    "": "its rows cannot be read.",
}


def _described(error: BaseException) -> str:
    """The names of an error's classes, its text, and the status of its response."""
    kinds = " ".join(f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"{kinds}: {error} (status {status})"


def hub_failure(source: HubSource, error: Exception) -> DataError:
    """Any failure of the hub or its libraries, in words that say what happened and what to do."""
    errors: list[BaseException] = [error]
    while (cause := errors[-1].__cause__ or errors[-1].__context__) and cause not in errors:
        errors.append(cause)
    trace = "\n".join(map(_described, errors))
    if constants.HF_HUB_OFFLINE:
        trace = f"HF_HUB_OFFLINE is on\n{trace}"
    advice = next(advice for pattern, advice in FAILURES.items() if re.search(pattern, trace))
    # This message hides the others.
    said = errors[-1] if "Couldn't find any data file at" in str(error) else error
    first = (str(said).strip().splitlines() or ["no message"])[0][:300]
    return DataError(
        f"Could not load the dataset {str(source)!r} from the hub: {advice} To go on offline, "
        "point LAB_DATA to a local file, or use LAB_PROFILE=cpu, which needs no download. "
        f"(Revision {source.revision}. {type(said).__name__}: {first})"
    )


def _guarded(source: HubSource, rows: Iterable[dict]) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:  # the libraries raise many kinds, at the first row or at a later one
        raise hub_failure(source, error) from error


# --- loading


def hub_split(
    source: HubSource, split: str | None, streamed: bool
) -> tuple[str, bool, Iterator[dict]]:
    """A split of a hub dataset: (its name there, must a tenth of its prompts be held out?, its
    rows).

    "train" and "test" are the dataset's own; where it has no test split, both are taken from its
    training split, by prompt. None is the training split, whole. `streamed`: no more is downloaded
    than is read.
    Raises: DataError, also while the rows are read.
    """
    options = {**source.options, "revision": source.revision}
    try:  # streams name the splits and download no rows
        streams = load_dataset(source.name, streaming=True, **options)
    except Exception as error:
        raise hub_failure(source, error) from error
    names = {name: name for name in ("train", "test", split)} | {"test": source.known.test}
    own = {
        key: next((n for n in (name, f"{name}_prefs") if n in streams), None)
        for key, name in names.items()
    }
    hold_out = split in ("train", "test") and not own["test"]
    name = own["train" if hold_out or not split else split]
    if not name:
        has = f"has no split {split or 'train'!r}. Its splits: {', '.join(streams)}."
        raise DataError(f"The dataset {str(source)!r} {has}")
    if streamed:
        return name, hold_out, _guarded(source, streams[name])

    def rows() -> Iterator[dict]:
        whole = load_dataset(source.name, split=name, **options).with_format("arrow")
        for table in whole.iter(1000):
            yield from table.to_pylist()  # a thousand at once: one by one is much slower

    return name, hold_out, _guarded(source, rows())


# --- what is kept


def cache_folder() -> Path:
    """Where cleaned splits are kept: beside the libraries' own copies (HF_HOME moves both)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "alignment-labs"


def at_commit(source: HubSource) -> HubSource:
    """The source at the commit that its revision means now, or offline at the one it last meant."""
    if re.fullmatch("[0-9a-f]{40}", source.revision):
        return source
    memory = cache_folder() / f"{digest([source.name, source.revision])}.commit"
    try:
        commit = HfApi().dataset_info(source.name, revision=source.revision, timeout=30).sha
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(commit, encoding="utf-8")
    except (httpx2.TransportError, OSError):
        # What is wrong with the dataset itself shows when it is loaded.
        commit = memory.read_text(encoding="utf-8") if memory.exists() else ""
    return replace(source, revision=commit or source.revision)


def _code() -> list[str]:
    """The code that decides what a cleaned row is."""
    return [code_of(f"common.{name}") for name in ("io.cleaning", "io.formats", "io.hub")]


def kept(parts: tuple, build: Callable[[], tuple[Dataset, dict]]) -> tuple[Dataset, dict]:
    """A cleaned split and its report from an earlier run with the same `parts` and code, or built.

    A disk without room for it is a warning: the rows themselves are there.
    """
    folder = cache_folder() / digest([parts, _code()])
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return Dataset.from_file(str(folder / "rows.arrow")), report
    except (OSError, ValueError, pyarrow.ArrowException):  # not there, or broken
        shutil.rmtree(folder, ignore_errors=True)
    rows, report = build()
    try:
        with written_whole(folder) as scratch:
            scratch.mkdir()
            with pyarrow.ipc.new_stream(str(scratch / "rows.arrow"), rows.data.schema) as file:
                file.write_table(rows.data.table)
            (scratch / "report.json").write_text(json.dumps(report), encoding="utf-8")
    except OSError as error:  # full, or read-only
        warnings.warn(f"The cleaned rows are not kept for the next time ({error}).", stacklevel=2)
    return rows, report
