"""Recovers what is left of a damaged store file.

Knows that any page may be unreadable; must not know why.
"""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tether.errors import StoreError
from tether.store.log_prob_store import LogProbStore
from tether.store.opening import open_damaged
from tether.store.record import Record, RecordCodec, unpack
from tether.store.sqlite_errors import as_store_error, how_to_salvage, is_damage

_BATCH_SIZE = 1024
_SMALLEST_ROW_BYTES = 32  # no record is smaller, which bounds the number of rows in a file


def salvage(damaged_path: str | os.PathLike[str], into: LogProbStore) -> int:
    """Copies every intact record of a damaged store to another one; the damaged file is not changed.

    Each record is verified by its checksum, so nothing wrong is copied.

    Args:
        damaged_path: The damaged file; no process should be writing to it.
        into: A new or existing store.

    Returns:
        The number of intact records that were found.

    Raises:
        StoreError: If the file is not an SQLite file at all or its tables cannot be found, is `into` itself, or `into`
            can't be written.
    """
    path = Path(damaged_path).expanduser().absolute()
    if path.exists() and os.path.samefile(path, into.path):
        raise StoreError(
            problem=f"Cannot salvage {path} into itself: both paths name the same file.",
            instead=f"Name a new file: {how_to_salvage(path)}.",
        )
    db = open_damaged(path)
    try:
        with as_store_error("read the log-prob store", path):
            return _move_records(db, into)
    except StoreError as error:
        if not (is_damage(error.__cause__) or "no such table" in str(error.__cause__)):
            raise
        raise StoreError(
            problem=f"Cannot salvage {path}: what names its tables is damaged ({error.__cause__}), so no record can "
            "be found.",
            details="The file was not changed.",
            instead="Score the responses again: `tether precompute` with the recipe, into a new file.",
        ) from error
    finally:
        db.close()


def _move_records(db: sqlite3.Connection, into: LogProbStore) -> int:
    codecs = {
        row_id: (digest, RecordCodec(digest))
        for row_id, digest in _rows(db, "identities", "id, digest")
        if isinstance(digest, str)
    }
    waiting: dict[str, list[Record]] = {digest: [] for digest, _ in codecs.values()}
    num_found = 0
    for _, owner, *columns in _rows(db, "records", "id, identity, key, num_tokens, checksum, log_probs"):
        digest, codec = codecs.get(owner, ("", None))
        record = Record(*columns)
        if codec is not None and codec.is_intact(record):
            num_found += 1
            waiting[digest].append(record)
            if len(waiting[digest]) == _BATCH_SIZE:
                _put(into, digest, waiting[digest])
    for digest, records in waiting.items():
        _put(into, digest, records)
    return num_found


def _put(into: LogProbStore, digest: str, records: list[Record]) -> None:
    into.put(digest, [record.key for record in records], [unpack(record) for record in records])
    records.clear()


def _rows(db: sqlite3.Connection, table: str, columns: str) -> Iterator[tuple[Any, ...]]:
    """The readable rows of a table; skips unreadable ones in slowly growing steps."""
    (num_pages,) = db.execute("PRAGMA page_count").fetchone()
    (page_bytes,) = db.execute("PRAGMA page_size").fetchone()
    highest = num_pages * page_bytes // _SMALLEST_ROW_BYTES
    last = num_read = num_failures = 0
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = ? AND type <> 'table'", (table,)).fetchone():
        raise sqlite3.DatabaseError(f"`{table}` is no table, so the file is malformed")  # a view might never end
    while max(last, num_read) < highest:  # damaged pages may form a cycle
        try:
            for row in db.execute(f"SELECT {columns} FROM {table} NOT INDEXED WHERE id > ? ORDER BY id", (last,)):
                num_read, num_failures = num_read + 1, 0
                last = row[0] if last < row[0] < highest else last
                yield row
            return
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            num_failures += 1
            last += 1 + num_failures // 1000
