"""Opens a store file: to write, to read, or on a disk that can't be written.

Knows SQLite's modes and journals; must not know records or processes.
"""

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from tether.errors import StoreError
from tether.store import schema
from tether.store.location import is_on_network
from tether.store.replacing import SQLITE, replacing
from tether.store.sqlite_errors import as_store_error, is_busy

PATIENCE_SECONDS = 60.0  # how long to wait for another process that is writing
_CACHE_KIB = 32_000
# Compared with SQLite's defaults (4 KiB, 4 MB): three times the rows per second, a tenth less space at 300 tokens.
_PAGE_BYTES = 8192
_PAGES_BETWEEN_CHECKPOINTS = 5000


def open_to_write(path: Path) -> sqlite3.Connection:
    """A connection to the store at `path`, which is created if it doesn't exist; raises StoreError."""
    with as_store_error("open the log-prob store", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        db = _connect(path, "rwc")
        try:
            _patiently_prepare(db, path)
        except BaseException:
            db.close()
            raise
    return db


def open_to_read(path: Path) -> sqlite3.Connection:
    """A connection that can't change the store at `path`; raises StoreError."""
    if not path.is_dir() and (not path.is_file() or path.stat().st_size == 0):
        raise StoreError(
            problem=f"Cannot read the log-prob store {path}: there is no store at this path.",
            instead="Check the path. A store is created where it is opened to write, not to read.",
        )
    with as_store_error("open the log-prob store", path):
        db = _connect_to_read(path)
        try:
            schema.check(db, path)
            if schema.is_older(db):
                raise StoreError(
                    problem=f"Cannot open the log-prob store {path} with `read_only=True`: it has an older format, "
                    "which must be updated first.",
                    instead="Open it once without `read_only`, which updates it.",
                )
            db.execute("PRAGMA query_only = ON")
        except BaseException:
            db.close()
            raise
    return db


def open_damaged(path: Path) -> sqlite3.Connection:
    """A connection for reading what is readable of a damaged store; raises StoreError if it is not a store."""
    with as_store_error("open the log-prob store", path):
        db = _connect_to_read(path, is_damaged=True)
        db.execute("PRAGMA query_only = ON")
    return db


def copy_database(db: sqlite3.Connection, path: Path) -> None:
    """Copies what `db` sees at this moment to the file `path`, which appears only when complete."""
    in_use = [part for part in _journals(path) if part.exists()]
    if in_use or (path.exists() and os.path.samefile(path, db.execute("PRAGMA database_list").fetchone()[2])):
        raise StoreError(
            problem=f"Cannot write a copy of the log-prob store to {path}: a store in use is there"
            + (f" ({in_use[0].name} belongs to it)." if in_use else ", this one."),
            instead="Name a new file.",
        )
    with as_store_error("write a copy of the log-prob store to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, SQLITE) as unfinished, closing(sqlite3.connect(unfinished)) as copy:
            db.backup(copy)


def _connect(path: Path, mode: str, *, is_damaged: bool = False) -> sqlite3.Connection:
    """A connection that has read the file's header."""
    db = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=PATIENCE_SECONDS,
        isolation_level=None,  # we manage transactions
        check_same_thread=False,  # calls are made under a lock
    )
    db.text_factory = _decode
    try:
        if is_damaged:
            db.execute("PRAGMA writable_schema = ON")  # continues if the file is shorter than its header states
        db.execute("PRAGMA trusted_schema = OFF")  # what a file defines may call no function with effects
        db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        db.execute("PRAGMA schema_version").fetchone()
    except BaseException:
        db.close()
        raise
    return db


def _decode(text: bytes) -> str:
    return text.decode(errors="replace")  # a damaged value must not stop the rows beside it


def _patiently_prepare(db: sqlite3.Connection, path: Path) -> None:
    """Retries until patience ends: changing the journal fails at once if another process has the file open."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return _prepare(db, path)
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    if schema.is_empty(db):
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # so that `prune` can give space back
    else:
        schema.check(db, path)  # before any change: the file may be another program's
    _choose_journal(db, path)
    if schema.is_empty(db) or schema.is_older(db):
        db.execute("BEGIN IMMEDIATE")
        try:
            if schema.is_empty(db):  # checked again: another process may have been first
                schema.create(db)
            schema.check(db, path)
            schema.migrate(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _choose_journal(db: sqlite3.Connection, path: Path) -> None:
    """Chooses a write-ahead log where it works (readers never wait), otherwise a rollback journal."""
    wanted = "delete" if is_on_network(path) else "wal"
    (journal,) = db.execute("PRAGMA journal_mode").fetchone()
    if journal != wanted:
        try:
            (journal,) = db.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
        except sqlite3.OperationalError as error:
            if is_busy(error):
                raise
            (journal,) = db.execute("PRAGMA journal_mode = delete").fetchone()
    db.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_BETWEEN_CHECKPOINTS}")
    # A killed process loses nothing under either; NORMAL is also safe against power loss in WAL mode only.
    db.execute(f"PRAGMA synchronous = {'NORMAL' if journal == 'wal' else 'FULL'}")


def _connect_to_read(path: Path, *, is_damaged: bool = False) -> sqlite3.Connection:
    """Connects normally if the folder is writable, since SQLite keeps files beside a store in use."""
    writable = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    try:
        return _connect(path, "rw" if writable else "ro", is_damaged=is_damaged)
    except sqlite3.OperationalError as error:
        if writable or not ("unable to open" in str(error) or "readonly" in str(error)):
            raise
    _refuse_unfinished(path)
    return _connect(path, "ro&immutable=1", is_damaged=is_damaged)  # nothing writes here: the file is final


def _refuse_unfinished(path: Path) -> None:
    """Refuses a file with a journal beside it, since it isn't the whole store by itself."""
    for journal in _journals(path):
        if journal.exists() and journal.stat().st_size > 0:
            raise StoreError(
                problem=f"Cannot read the log-prob store {path}: its last writes are still in {journal.name}, and "
                "joining the two needs a folder that can be written.",
                instead="Open it once where its folder can be written, or copy both files to such a folder.",
            )


def _journals(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal")]
