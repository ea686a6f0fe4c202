"""SQLite's errors, said in three parts.

Knows SQLite's messages; must not know tables or records.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tether.errors import StoreError

# A piece of SQLite's message -> why it cannot be, what to do instead.
_SAID = {
    "is full": (
        "the disk is full; nothing of this call was written, everything written before is intact",
        "free space on that disk, or keep the store elsewhere (`TETHER_HOME`, or another path), and go on",
    ),
    "readonly": (
        "the file or its folder may not be written here",
        "pass `read_only=True`, or keep the store in a folder of yours (`TETHER_HOME`, or another path)",
    ),
    "unable to open": (
        "the file can't be opened, or its folder can't take the files that SQLite keeps beside it",
        "check path and permissions; to read a store in a folder that can't be written pass `read_only=True`",
    ),
    "locked": (
        "another process has been writing to it for a minute without a pause",
        "look for a process that hangs while it has the store open, and try again",
    ),
    "malformed": (
        "the file is damaged (cut short, or overwritten); no number was taken from the damaged part",
        "save every intact record with `tether.store.salvage(damaged, fresh)`, then use the fresh store",
    ),
    "not a database": (
        "the file isn't an SQLite database, or its first bytes were overwritten; it was not changed",
        "choose another path for the store, or move that file away",
    ),
    "disk I/O": (
        "the operating system failed to read or write the file; nothing of this call was written",
        "check the disk (space, quota, network); everything written before is kept",
    ),
}
for piece, like in (
    ("locking protocol", "locked"),
    ("codec can't decode", "malformed"),  # SQLite quotes a damaged statement, and Python can't read the quote
    ("No space left", "is full"),
    ("Permission denied", "readonly"),
    ("Read-only file system", "readonly"),
):
    _SAID[piece] = _SAID[like]
_ELSE = ("SQLite refused", "check the disk and the file, or choose another path for the store")


@contextmanager
def in_three_parts(doing: str, path: Path) -> Iterator[None]:
    """Turns an SQLite error in its body into a StoreError about `path`."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        why, instead = next((parts for piece, parts in _SAID.items() if piece in str(error)), _ELSE)
        raise StoreError(
            problem=f"{doing} the log-prob store {path}", details=f"{why} ({error})", instead=instead
        ) from error


def is_busy(error: sqlite3.Error) -> bool:
    """Whether the error goes away by waiting for another process."""
    return "locked" in str(error) or "locking protocol" in str(error)


def is_damage(error: BaseException | None) -> bool:
    """Whether the error says that the file's pages are damaged."""
    return isinstance(error, sqlite3.DatabaseError) and "malformed" in str(error)
