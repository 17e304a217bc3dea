"""Datasets of the hub: at a stated revision, streamed where a part is enough, and their cleaned
splits kept.

Whatever fails there ends in a DataError that says what happened and what to do.
"""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import datasets.config
import httpx2
import pyarrow
from datasets import Dataset, load_dataset
from datasets.exceptions import (
    ChecksumVerificationError,
    DataFilesNotFoundError,
    DatasetGenerationCastError,
    DatasetNotFoundError,
    SplitsVerificationError,
)
from datasets.table import CastError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from common.io.formats import DataError
from common.io.tables import FILE_ENDINGS


@dataclass(frozen=True)
class Known:
    """What the course knows of a dataset: a revision, its subsets, which are folders, and its test
    split.
    """

    revision: str
    subsets: tuple[str, ...] = ()
    folder: str | None = None  # the one folder that is read
    test: str = "test"


SUBREDDITS = (
    "askacademia askanthropology askbaking askcarguys askculinary askdocs askengineers askhistorians askhr "
    "askphilosophy askphysics askscience asksciencefiction asksocialscience askvet changemyview explainlikeimfive "
    "legaladvice"
)
# Revisions: the commit of `main` that public records name (August 2026). The parquet copy that the
# hub made of summarize-from-feedback, whose `main` needs a loading script, has no commit on record:
# see `at_commit`.
KNOWN = {
    "Anthropic/hh-rlhf": Known(
        "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
    ),
    "stanfordnlp/SHP": Known("e94b5f32602712d78ed494fe79105b1959396686", tuple(SUBREDDITS.split())),
    "openai/summarize_from_feedback": Known(
        "refs/convert/parquet", folder="comparisons", test="validation"
    ),
    "HuggingFaceH4/ultrafeedback_binarized": Known("3949bf5f8c17c394422ccfab0c31ea9c20bdeb85"),
    "trl-lib/ultrafeedback_binarized": Known("47124cb5778f5d50de1c7676a412828f3ea7c555"),
    "tatsu-lab/alpaca": Known("dce01c9b08f87459cf36a430d809084718273017"),
}


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub, as `owner/name`, `owner/name:subset` or `owner/name:subset@revision`."""

    name: str
    subset: str | None
    revision: str

    def __str__(self) -> str:
        return f"{self.name}:{self.subset}" if self.subset else self.name

    @property
    def known(self) -> Known:
        return KNOWN.get(self.name, Known(self.revision))

    @property
    def options(self) -> dict[str, str]:
        """For `load_dataset`: a subset is a folder in known datasets and parquet copies, else a
        configuration.
        """
        folder = self.known.folder or (
            self.subset if self.name in KNOWN or "convert/" in self.revision else None
        )
        return {"data_dir": folder} if folder else {"name": self.subset} if self.subset else {}


def hub_source(text: str) -> HubSource | None:
    """`text` as a dataset of the hub, or None if it cannot be one. Raises: DataError for an unknown
    subset.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?(?:@([\w./-]+))?", text)
    if not match or text.endswith(FILE_ENDINGS):
        return None
    name, subset, revision = match.groups()
    known = KNOWN.get(name)
    if known and subset and subset not in (*known.subsets, known.folder):
        has = (
            f"Its subsets: {', '.join(known.subsets)}"
            if known.subsets
            else "It has none: leave it out"
        )
        raise DataError(f"The dataset {name!r} has no subset {subset!r}. {has}.")
    return HubSource(name, subset, revision or (known.revision if known else "main"))


# --- failures


def _among(*kinds: type) -> Callable[[list, str], bool]:
    return lambda errors, text: any(isinstance(error, kinds) for error in errors)


def _says(pattern: str) -> Callable[[list, str], bool]:
    return lambda errors, text: re.search(pattern, text) is not None


def _status(low: int, high: int) -> Callable[[list, str], bool]:
    def is_it(errors: list, text: str) -> bool:
        codes = [getattr(getattr(error, "response", None), "status_code", 0) for error in errors]
        return any(low <= code <= high for code in codes)

    return is_it


def _disk_is_full(errors: list, text: str) -> bool:
    return any(
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for error in errors
    ) or bool(re.search("No space left|Not enough (free )?disk space", text))


_is_offline = _among(httpx2.ConnectError, httpx2.ConnectTimeout, ConnectionError)
_is_cut = _among(
    httpx2.TransportError,
    XetDownloadError,
    ChecksumVerificationError,
    SplitsVerificationError,
    TimeoutError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
)
# Is it this? (asked with the error and its causes, and with their text) → what happened, and what
# to do.
FAILURES: tuple[tuple[Callable[[list, str], bool], str], ...] = (
    (
        _disk_is_full,
        "the disk is full. Free some space, or set HF_HOME to a folder on a larger disk, and run again.",
    ),
    (
        _status(429, 429),
        "the hub takes no more requests for now. Wait some minutes, or log in with `hf auth login`, and run again.",
    ),
    (_status(500, 599), "the hub answers with an error of its own. Try again later."),
    (
        lambda *e: _among(GatedRepoError)(*e) or _says("gated dataset")(*e),
        "it is gated. Accept its terms on its page on the hub, log in with `hf auth login`, and run again.",
    ),
    (
        lambda *e: _among(RevisionNotFoundError)(*e) or _says("Revision '.*' doesn't exist")(*e),
        "it has no such revision. Name another one: LAB_DATA=owner/name@main.",
    ),
    (
        _says("Dataset scripts are no longer supported"),
        "it needs a loading script, which is refused, since it would run foreign code. Read the parquet copy that the hub "
        "makes: LAB_DATA=owner/name:configuration@refs/convert/parquet, or download its rows as a file.",
    ),
    (
        _says("Config name is missing|BuilderConfig '.*' not found"),
        "it has several configurations. Name one of them: LAB_DATA=owner/name:configuration.",
    ),
    (
        _among(DatasetGenerationCastError, CastError),
        "its files have different columns. Name one configuration: LAB_DATA=owner/name:configuration.",
    ),
    (
        lambda *e: (
            _says("doesn't contain any data files")(*e)
            or _among(DataFilesNotFoundError, EntryNotFoundError)(*e)
            and not _is_offline(*e)
        ),
        "there is no data file at this place. Check the subset and the revision on its page on the hub.",
    ),
    (
        _among(RepositoryNotFoundError, DatasetNotFoundError),
        "there is none of this name, or it is private. Check the spelling, or log in with `hf auth login`.",
    ),
    (
        _among(HfHubHTTPError),
        "the hub refuses. Check that you may read it: log in with `hf auth login`.",
    ),
    (
        lambda *e: (
            _says("Server Disconnected|Consistency check failed|magic bytes|truncated")(*e)
            or _among(ConnectionResetError)(*e)
            or _is_cut(*e)
            and not _is_offline(*e)
        ),
        "the download was interrupted. Run again, and it goes on where it stopped.",
    ),
    (
        _among(pyarrow.ArrowInvalid, json.JSONDecodeError),
        "a file is cut off or damaged; the download may have been interrupted. Run again; if it fails in the same place, "
        "remove the copy with `hf cache rm`, or report it on its page on the hub.",
    ),
    (
        lambda *e: _is_offline(*e) and constants.HF_HUB_OFFLINE,
        "HF_HUB_OFFLINE is set, and there is no copy on this machine. Unset it and connect once.",
    ),
    (
        _is_offline,
        "the hub cannot be reached. Connect once: later runs read the copy that is kept.",
    ),
)


def hub_failure(source: HubSource, error: Exception) -> DataError:
    """Any failure of the hub or its libraries, in words that say what happened and what to do."""
    errors: list[BaseException] = [error]
    while (cause := errors[-1].__cause__ or errors[-1].__context__) and cause not in errors:
        errors.append(cause)
    text = "\n".join(str(one) for one in errors)
    advice = next(
        (advice for is_it, advice in FAILURES if is_it(errors, text)), "its rows cannot be read."
    )
    said = (
        errors[-1] if "Couldn't find any data file at" in str(error) else error
    )  # that one hides the others
    first = (str(said).strip().splitlines() or ["no message"])[0][:300]
    return DataError(
        f"Could not load the dataset {str(source)!r} from the hub: {advice} To go on offline, point LAB_DATA to a "
        "local file, or use LAB_PROFILE=cpu, which needs no download. "
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
    try:
        streams = load_dataset(
            source.name, streaming=True, **options
        )  # names the splits and downloads no rows
    except Exception as error:
        raise hub_failure(source, error) from error
    names = {
        name: (source.known.test if name == "test" else name) for name in ("train", "test", split)
    }
    own = {
        key: next((n for n in (name, f"{name}_prefs") if n in streams), None)
        for key, name in names.items()
    }
    hold_out = split in ("train", "test") and not own["test"]
    name = own["train" if hold_out or not split else split]
    if not name:
        raise DataError(
            f"The dataset {str(source)!r} has no split {split or 'train'!r}. Its splits: {', '.join(streams)}."
        )
    if streamed:
        return name, hold_out, _guarded(source, streams[name])

    def rows() -> Iterator[dict]:
        for table in (
            load_dataset(source.name, split=name, **options).with_format("arrow").iter(1000)
        ):
            yield from table.to_pylist()  # a thousand at once: one by one is much slower

    return name, hold_out, _guarded(source, rows())


# --- what is kept


def cache_folder() -> Path:
    """Where cleaned splits are kept: beside the libraries' own copies (HF_HOME moves both)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "alignment-labs"


def _key(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


def at_commit(source: HubSource) -> HubSource:
    """The source at the commit that its revision means now, or offline at the one it last meant;
    else as it is.
    """
    memory = cache_folder() / f"{_key(source.name, source.revision)}.commit"
    if re.fullmatch("[0-9a-f]{40}", source.revision):
        return source
    try:
        commit = HfApi().dataset_info(source.name, revision=source.revision, timeout=30).sha
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(commit, encoding="utf-8")
    except (
        httpx2.TransportError,
        OSError,
    ):  # what is wrong with the dataset itself shows when it is loaded
        commit = memory.read_text(encoding="utf-8") if memory.exists() else ""
    return replace(source, revision=commit) if commit else source


def _code() -> list[str]:
    """The code that decides what a cleaned row is."""
    return [
        Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        for name in ("readers", "hub", "data")
    ]


def kept(parts: tuple, build: Callable[[], tuple[Dataset, dict]]) -> tuple[Dataset, dict]:
    """A cleaned split with its report from an earlier run, if `parts` and our code are the same;
    else built and kept.

    A disk without room for it is a warning: the rows themselves are there.
    """
    folder = cache_folder() / _key(parts, _code())
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return Dataset.from_file(str(folder / "rows.arrow")), report
    except (OSError, ValueError, pyarrow.ArrowException):  # not there, or broken
        shutil.rmtree(folder, ignore_errors=True)
    rows, report = build()
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            whole = Path(scratch, "whole")
            whole.mkdir()
            with pyarrow.ipc.new_stream(str(whole / "rows.arrow"), rows.data.schema) as file:
                file.write_table(rows.data.table)
            (whole / "report.json").write_text(json.dumps(report), encoding="utf-8")
            os.replace(whole, folder)
    except OSError as error:  # full, read-only, or another process was first
        if not folder.exists():
            warnings.warn(
                f"The cleaned rows are not kept for the next time ({error}).", stacklevel=2
            )
    return rows, report
