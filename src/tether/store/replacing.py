"""A new file written beside the one that it will replace, so that a reader sees the old one or the new one, whole.

Knows files; must not know what is in them.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tether.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows, where a file that is in use cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

SQLITE, PARQUET = b"SQLite format 3\0", b"PAR1"
_KINDS = {SQLITE: "an SQLite file", PARQUET: "a Parquet file"}


@contextmanager
def replacing(path: Path, begins: bytes) -> Iterator[Path]:
    """A new, empty file for the block to write, which takes the place of `path` when the block ends without an error.

    Nothing can wait under its name, as a link to another file could, since nobody can guess it. Such files of
    processes that died are removed.

    Args:
        path: The file to write.
        begins: How files of its kind begin.

    Raises:
        StoreError: If `path` is a file of another kind, or has the name of one.
        OSError: If the file can't be written.
    """
    check_kind(path, begins)
    _remove_left_behind(path)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with unfinished.open("xb") as file:
            _lock(file)
            yield unfinished
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_kind(path: Path, begins: bytes) -> None:
    """Raises StoreError if there is a file of another kind at `path`, which a slip would replace, or if its name is one
    of another kind.
    """
    found = b""
    if path.exists():
        with path.open("rb") as file:
            found = file.read(len(SQLITE))
    if found and not found.startswith(begins):
        kind = next((name for start, name in _KINDS.items() if found.startswith(start)), "no such file")
        raise StoreError(
            problem=f"Cannot write {_KINDS[begins]} to {path}: what is there is {kind}, and would be lost.",
            details="The file was not changed.",
            instead="Name a new file, or remove that one first.",
        )
    if begins == PARQUET and path.suffix.lower() != ".parquet":  # other programs go by the name
        raise StoreError(
            problem=f"Cannot write {_KINDS[begins]} to {path}: its name does not end in .parquet.",
            instead="Name a file that ends in .parquet.",
        )


def _lock(file: IO[bytes]) -> bool:
    """Holds a file until it is closed; returns False if another process does."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _remove_left_behind(path: Path) -> None:
    """Removes unfinished files of `path` whose writers are dead."""
    ours = re.compile(re.escape(path.name) + r"\.(\d+|[0-9a-f]{16})\.tmp")
    for other in path.parent.glob("*.tmp"):
        if ours.fullmatch(other.name) and not other.is_symlink():
            with suppress(OSError), other.open("rb") as file:
                if _lock(file):
                    for part in (other, other.with_name(f"{other.name}-journal")):
                        part.unlink(missing_ok=True)
