"""A disk that forgets what was not synced, under SQLite of this process: for tests of power loss.

SQLite reaches files through a table of functions (sqlite3_vfs, sqlite3_io_methods in its
documentation). A copy of the system's own table goes in its place, in which opening and xSync note
what they did. Folders are not watched: SQLite syncs a new log's folder by itself.
"""

import _sqlite3
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_void_p
from itertools import product
from pathlib import Path

OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
SYNC = CFUNCTYPE(c_int, c_void_p, c_int)


class Methods(Structure):
    """sqlite3_io_methods: what a file can do. xSync is the fifth."""

    _fields_ = [("version", c_int), ("functions", c_void_p * 18)]


class Vfs(Structure):
    """The beginning of sqlite3_vfs, and its other functions."""

    _fields_ = [
        ("version", c_int),
        ("file_size", c_int),
        ("path_length", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", c_void_p),
        ("others", c_void_p * 15),
    ]


def library():
    """SQLite as Python itself uses it; None where its functions cannot be reached."""
    with suppress(AttributeError, OSError):
        found = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
        found.sqlite3_vfs_find.restype = POINTER(Vfs)
        return found
    return None


@contextmanager
def losing_disk() -> Iterator[dict[str, bytes]]:
    """Gives path → bytes at the last sync of that file, for files that SQLite opens meanwhile."""
    sqlite, synced, names, descriptors = library(), {}, {}, {}
    real = sqlite.sqlite3_vfs_find(None).contents
    real_open, kept = OPEN(real.open), []

    @SYNC
    def sync(file, flags):
        real_sync, path = names[file]
        status = real_sync(file, flags)
        size = os.fstat(descriptors[path]).st_size
        synced[path] = os.pread(descriptors[path], size, 0)
        return status

    @OPEN
    def open_(vfs, name, file, flags, out):
        status = real_open(vfs, name, file, flags, out)
        if status == 0 and name:
            path = os.fsdecode(ctypes.string_at(name))
            place = c_void_p.from_address(file)  # a file begins with the place of its methods
            methods = Methods.from_buffer_copy(Methods.from_address(place.value))
            kept.append(methods)  # SQLite holds no reference
            names[file] = SYNC(methods.functions[4]), path
            methods.functions[4] = ctypes.cast(sync, c_void_p).value
            place.value = ctypes.addressof(methods)
            if path not in descriptors:  # never closed meanwhile: that would drop SQLite's locks
                descriptors[path] = os.open(path, os.O_RDONLY)
        return status

    mine = Vfs.from_buffer_copy(real)
    mine.name, mine.open = b"losing", ctypes.cast(open_, c_void_p).value
    sqlite.sqlite3_vfs_register(ctypes.byref(mine), 1)
    try:
        yield synced
    finally:
        sqlite.sqlite3_vfs_unregister(ctypes.byref(mine))
        for descriptor in descriptors.values():
            os.close(descriptor)


def after_power_loss(path: Path, synced: dict[str, bytes], folder: Path) -> Iterator[Path]:
    """The database and its log as a loss of power may leave them: of each of the two, only what was
    synced, or all that was written. (A disk may keep any part of the rest; these are the ends.)
    """
    files = [str(path), f"{path}-wal"]
    for at, keeps in enumerate(product((True, False), repeat=2)):
        copy = folder / f"{at}.sqlite"
        for file, suffix, unsynced in zip(files, ("", "-wal"), keeps, strict=True):
            target = Path(f"{copy}{suffix}")
            target.unlink(missing_ok=True)
            if unsynced or file in synced:
                target.write_bytes(Path(file).read_bytes() if unsynced else synced[file])
        Path(f"{copy}-shm").unlink(missing_ok=True)
        yield copy
