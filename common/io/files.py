"""Files and folders that are written whole or not at all, and JSON lines."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parents[2]


def runs_folder() -> Path:
    """Where runs and fetched models are kept: `$LAB_RUNS`, relative to the root of the course."""
    return ROOT / (os.environ.get("LAB_RUNS") or "runs")


def local_path(source: str | None) -> str | None:
    """A local path made absolute, from here or from the repository's root; a hub id as it is."""
    found = [path for path in (Path(source), ROOT / source) if path.exists()] if source else []
    return str(found[0].resolve()) if found else source


def folder_name(source: str) -> str:
    """A folder name: the last part of a path or of a hub id (`owner/name:subset@revision`)."""
    marked = re.fullmatch(r"[\w.-]+/([\w.-]+[:@].+)", source)
    last = marked[1] if marked else Path(source.rstrip("/")).name
    bare = re.sub(r"(\.(jsonl|json|parquet|csv|tsv|gz))+$", "", last)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", bare) or "custom"


def sync(target: Path) -> None:
    """Brings a file, or all files of a folder, to the disk."""
    for path in (target, *target.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its place in one rename, or never.

    So no file or folder is ever half written.
    Raises: OSError with what to do when the disk is full or the folder cannot be written; `target`
        is then untouched. If it cannot even be put back, the message names where it lies.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write in {target.parent} ({error.strerror}). "
            "Set LAB_RUNS to a folder of your own.",
        ) from error
    try:
        yield scratch / target.name
        sync(scratch / target.name)
        _swap(scratch / target.name, target, scratch / "old")
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(
                errno.ENOSPC,
                f"The disk is full: {target} was not written, and what was there before is intact. "
                "Free some space (old runs are in the runs folder) and run again.",
            ) from error
        raise
    finally:
        if target.exists() or not (scratch / "old").exists():
            shutil.rmtree(scratch, ignore_errors=True)


def _swap(new: Path, target: Path, old: Path) -> None:
    """Puts `new` in the place of `target`; a folder that was there goes to `old`, and back if that
    fails.
    """
    try:
        if target.is_dir():
            os.replace(target, old)
        os.replace(new, target)
    except BaseException as error:  # Ctrl-C too
        try:
            if old.exists():
                os.replace(old, target)
        except OSError as again:
            where = f"What was in {target} lies whole in {old}. Move it back ({error})."
            raise OSError(again.errno, where) from error
        raise


def write_json(path: Path, value) -> None:
    """Writes JSON whole or not at all. NaN is refused (ValueError): no report holds one."""
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_lines(path: Path, rows: list[dict]) -> None:
    """Writes JSON lines whole or not at all."""
    with written_whole(path) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_metrics(folder: Path) -> list[dict]:
    """`metrics.jsonl` in `folder`, one dict per step, without a line that a kill cut off."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
