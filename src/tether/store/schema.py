"""The tables of a store file, their version, and the migration of older versions (see FORMAT.md).

Knows SQL; must not know arrays, files or processes.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from tether.errors import StoreError

APPLICATION_ID = 0x54455448  # "TETH", in the file's header: distinguishes a store from other SQLite files
SCHEMA_VERSION = 3  # version 1 is Tether 0.1.0's, which had other names for references

_PROBES = """CREATE TABLE probes (
        id INTEGER PRIMARY KEY,
        identity INTEGER NOT NULL,
        about TEXT NOT NULL,
        checksum BLOB NOT NULL,
        log_probs BLOB NOT NULL)"""

# Identity ids are never reused (AUTOINCREMENT), so that a record can't end up with another reference.
_TABLES = (
    """CREATE TABLE identities (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        digest TEXT NOT NULL UNIQUE,
        description TEXT,
        created REAL NOT NULL,
        last_used REAL NOT NULL)""",
    """CREATE TABLE records (
        id INTEGER PRIMARY KEY,
        identity INTEGER NOT NULL,
        key BLOB NOT NULL,
        num_tokens INTEGER NOT NULL,
        checksum BLOB NOT NULL,
        log_probs BLOB NOT NULL)""",
    "CREATE UNIQUE INDEX records_by_key ON records (identity, key)",
    _PROBES,
)
# _MIGRATIONS[n] turns version n into n + 1, within the caller's transaction.
_MIGRATIONS: dict[int, Callable[[sqlite3.Connection], object]] = {2: lambda db: db.execute(_PROBES)}


def is_empty(db: sqlite3.Connection) -> bool:
    """Whether the file has no tables: neither a store nor another program's database."""
    (num_tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(num_tables == 0 and _read(db, "application_id") == 0 and _read(db, "user_version") == 0)


def check(db: sqlite3.Connection, path: Path) -> None:
    """Raises StoreError if the file is another program's database, or a store newer than this program."""
    if _read(db, "application_id") != APPLICATION_ID:
        raise StoreError(
            problem=f"Cannot use {path} as a log-prob store: this SQLite file belongs to another program.",
            details="The file was not changed.",
            instead="Choose another path for the store.",
        )
    version = _read(db, "user_version")
    if version > SCHEMA_VERSION or (version < SCHEMA_VERSION and version not in _MIGRATIONS):
        raise StoreError(
            problem=f"Cannot open the log-prob store {path}: it has format version {version}, and this version of "
            f"Tether reads format version {SCHEMA_VERSION}.",
            details="The file was not changed.",
            instead="Use the version of Tether that wrote it (or a newer one), or another path for the store.",
        )


def create(db: sqlite3.Connection) -> None:
    """Creates the tables of an empty file, within the caller's transaction."""
    for statement in _TABLES:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def is_older(db: sqlite3.Connection) -> bool:
    """Whether `migrate` has something to do."""
    return _read(db, "user_version") < SCHEMA_VERSION


def migrate(db: sqlite3.Connection) -> None:
    """Migrates a checked store to this version, within the caller's transaction."""
    for version in range(_read(db, "user_version"), SCHEMA_VERSION):
        _MIGRATIONS[version](db)
        db.execute(f"PRAGMA user_version = {version + 1}")


def _read(db: sqlite3.Connection, pragma: str) -> int:
    (value,) = db.execute(f"PRAGMA {pragma}").fetchone()
    return int(value)
