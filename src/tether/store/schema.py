"""The tables of a store file, their version, and the migration of older versions (see FORMAT.md).

Knows SQL; must not know arrays, files or processes.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from tether.errors import StoreError
from tether.store.sqlite_errors import how_to_salvage

APPLICATION_ID = 0x54455448  # "TETH", in the file's header: distinguishes a store from other SQLite files
SCHEMA_VERSION = 4  # version 1 is Tether 0.1.0's, which had other names for references

_PROBES = """CREATE TABLE probes (
        id INTEGER PRIMARY KEY,
        identity INTEGER NOT NULL,
        about TEXT NOT NULL,
        checksum BLOB NOT NULL,
        log_probs BLOB NOT NULL)"""

_PASSES = """CREATE TABLE passes (
        id INTEGER PRIMARY KEY,
        identity INTEGER NOT NULL,
        about TEXT NOT NULL,
        began REAL NOT NULL,
        ended REAL)"""

# Identity ids are never reused (AUTOINCREMENT), so that a record can't end up with another reference.
_IDENTITIES = """CREATE TABLE identities (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        digest TEXT NOT NULL UNIQUE,
        description TEXT,
        created REAL NOT NULL,
        last_used REAL NOT NULL"""
_COUNTED = "num_records INTEGER NOT NULL DEFAULT 0"
_RECORDS = (
    """CREATE TABLE records (
        id INTEGER PRIMARY KEY,
        identity INTEGER NOT NULL,
        key BLOB NOT NULL,
        num_tokens INTEGER NOT NULL,
        checksum BLOB NOT NULL,
        log_probs BLOB NOT NULL)""",
    "CREATE UNIQUE INDEX records_by_key ON records (identity, key)",
)
_TABLES = {
    2: (f"{_IDENTITIES})", *_RECORDS),
    3: (f"{_IDENTITIES})", *_RECORDS, _PROBES),
    4: (f"{_IDENTITIES}, {_COUNTED})", *_RECORDS, _PROBES, _PASSES),  # as ALTER TABLE writes it
}
# _MIGRATIONS[n] turns version n into n + 1, within the caller's transaction.
_MIGRATIONS = {
    2: (_PROBES,),
    3: (
        f"ALTER TABLE identities ADD COLUMN {_COUNTED}",
        "UPDATE identities SET num_records = (SELECT count(*) FROM records WHERE identity = identities.id)",
        _PASSES,
    ),
}
# What SQLite adds by itself.
_SQLITES_OWN = {"sqlite_sequence", "sqlite_stat1", "sqlite_stat4", "sqlite_autoindex_identities_1"}


def is_empty(db: sqlite3.Connection) -> bool:
    """Whether the file has no tables: neither a store nor another program's database."""
    (num_tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(num_tables == 0 and _read(db, "application_id") == 0 and _read(db, "user_version") == 0)


def check(db: sqlite3.Connection, path: Path) -> None:
    """Raises StoreError if the file is another program's database, a store newer than this program, or has other
    tables than a store: a trigger or a view would act whenever a table is written or read.
    """
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
    if (differing := _differing(db, _TABLES[version])) is not None:
        raise StoreError(
            problem=f"Cannot use the log-prob store {path}: {differing}.",
            details="The file was not changed. Triggers, views and other tables can change what is written and read.",
            instead=f"Save the intact records into a new file: {how_to_salvage(path)}.",
        )


def create(db: sqlite3.Connection) -> None:
    """Creates the tables of an empty file, within the caller's transaction."""
    for statement in _TABLES[SCHEMA_VERSION]:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def is_older(db: sqlite3.Connection) -> bool:
    """Whether `migrate` has something to do."""
    return _read(db, "user_version") < SCHEMA_VERSION


def migrate(db: sqlite3.Connection) -> None:
    """Migrates a checked store to this version, within the caller's transaction."""
    for version in range(_read(db, "user_version"), SCHEMA_VERSION):
        for statement in _MIGRATIONS[version]:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {version + 1}")


def _differing(db: sqlite3.Connection, statements: Sequence[str]) -> str | None:
    """What of the file's schema a store does not have, or lacks; None if it is as these statements make it."""
    ours = {_plain(statement) for statement in statements}
    rows = db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    found = {_plain(str(sql)): f"{kind} `{name}`" for kind, name, sql in rows if name not in _SQLITES_OWN}
    others = [what for statement, what in found.items() if statement not in ours]
    others += [f"{kind} `{name}`" for kind, name, _ in rows if name in _SQLITES_OWN and kind not in ("table", "index")]
    if others:
        return f"it has a {others[0]} that is not a store's"
    lacking = [statement.split("(")[0].strip() for statement in ours if statement not in found]
    return f"what `{lacking[0]}` made is not there" if lacking else None


def _plain(statement: str) -> str:
    return " ".join(statement.split())


def _read(db: sqlite3.Connection, pragma: str) -> int:
    (value,) = db.execute(f"PRAGMA {pragma}").fetchone()
    return int(value)
