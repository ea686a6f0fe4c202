"""Turns SQLite's errors into errors of the store: why it failed, and what to do.

Knows SQLite's messages; must not know tables or records.
"""

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tether.errors import StoreError, said

# Part of SQLite's message -> why it failed, what happened to the data, and what to do instead.
_CAUSES = {
    "is full": (
        "the disk is full",
        "Nothing of this call was written; everything written before is intact.",
        "Free space on that disk and try again, or keep the store elsewhere (`TETHER_HOME`, or another path).",
    ),
    "readonly": (
        "the file or its folder is not writable",
        "",
        "Keep the store in a folder of your own (`TETHER_HOME`, or another path). In Python, `read_only=True` reads it "
        "where it is.",
    ),
    "unable to open": (
        "the file cannot be opened, or SQLite cannot keep its own files beside it",
        "",
        "Check the path and its permissions. In Python, `read_only=True` reads a store in a folder that you cannot "
        "write.",
    ),
    "locked": (
        "another process has been writing to it for a minute without a break",
        "",
        "Look for a process that hangs while it has the store open, and try again.",
    ),
    "malformed": (
        "the file is damaged",
        "It was truncated or overwritten. No number was read from the damaged part.",
        "Save every intact record into a new file, and use that one: {salvage}.",
    ),
    "not a database": (
        "the file isn't an SQLite database, or its first bytes were overwritten",
        "The file was not changed.",
        "Choose another path for the store, or move that file away.",
    ),
    "disk I/O": (
        "the operating system failed to read or write the file",
        "Nothing of this call was written; everything written before is kept.",
        "Check the disk (space, quota, network).",
    ),
}
for piece, like in (
    ("locking protocol", "locked"),
    ("codec can't decode", "malformed"),  # SQLite quotes a damaged statement, which Python can't decode
    ("No space left", "is full"),
    ("Permission denied", "readonly"),
    ("Read-only file system", "readonly"),
):
    _CAUSES[piece] = _CAUSES[like]
_FOLDER = ("it is a folder", "", "Name a file, existing or new.")
_ZEROED = (
    "the start of the file is zeros, as after a power cut or an interrupted copy",
    "Without it, no record can be found in the rest. The file was not changed.",
    "Copy the file again from where it is whole, or move it away: a run then computes its log-probs anew.",
)
_ELSE = ("SQLite or the system failed", "", "Check the disk and the file, or choose another path for the store.")


def how_to_salvage(path: Path) -> str:
    """The command that saves what is left of a damaged store."""
    return f"`tether store salvage {shlex.quote(str(path))} --store NEW.sqlite`"


@contextmanager
def as_store_error(action: str, path: Path) -> Iterator[None]:
    """Turns an SQLite error in its block into a StoreError: `Cannot {action} {path}: ...`."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        found = next((parts for piece, parts in _CAUSES.items() if piece in str(error)), _ELSE)
        why, details, instead = _FOLDER if path.is_dir() else _ZEROED if _begins_with_zeros(path) else found
        raise StoreError(
            problem=f"Cannot {action} {path}: {why} ({said(error)}).",
            details=details,
            instead=instead.replace("{salvage}", how_to_salvage(path)),
        ) from error


def _begins_with_zeros(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(16) == bytes(16)
    except OSError:
        return False


def is_busy(error: sqlite3.Error) -> bool:
    """Whether waiting for another process resolves the error."""
    return "locked" in str(error) or "locking protocol" in str(error)


def is_damage(error: BaseException | None) -> bool:
    """Whether the error says that the file's pages are damaged."""
    return isinstance(error, sqlite3.DatabaseError) and "malformed" in str(error)
