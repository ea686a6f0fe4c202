"""The statements that read and write rows of a store, a bounded number at a time.

Knows SQL; must not know files, arrays or what makes a record intact.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tether.store.record import Record

_KEYS_AT_ONCE = 500  # below the smallest limit on variables in one SQLite statement (999)
_COLUMNS = "key, num_tokens, checksum, log_probs"
_OF_IDENTITY = "identity = (SELECT id FROM identities WHERE digest = ?)"


@dataclass(frozen=True)
class StoredIdentity:
    """What a store holds of one reference.

    Args:
        digest: Digest of the reference.
        description: What the reference is, as given with its first records.
        num_records: Number of responses.
        num_tokens: Number of response tokens over all of them.
        size_bytes: Size of its keys, checksums and values, without SQLite's overhead.
        created: When the first record was put (UTC).
        last_used: When records were last put or read (UTC), exact to a day.
        num_put: Number of responses that were put and not removed; more than `num_records` if some were lost.
    """

    digest: str
    description: Mapping[str, Any] | None
    num_records: int
    num_tokens: int
    size_bytes: int
    created: datetime
    last_used: datetime
    num_put: int


@dataclass(frozen=True)
class StoredPass:
    """What a store noted of a pass over rows that filled it.

    Args:
        about: What was scored, and for which run, by name.
        began: When it began (UTC).
        ended: When all its rows were kept (UTC); None if it was stopped, or is under way.
    """

    about: Mapping[str, Any]
    began: datetime
    ended: datetime | None


def read_lengths(db: sqlite3.Connection, identity: str, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
    """Key and number of tokens of each of `keys` that has a record."""
    for some, marks in _in_chunks(keys):
        yield from db.execute(
            f"SELECT key, num_tokens FROM records WHERE {_OF_IDENTITY} AND key IN ({marks})",
            (identity, *some),
        )


def read_records(db: sqlite3.Connection, identity: str, keys: Sequence[bytes]) -> Iterator[Record]:
    """The records of `keys` that exist, unverified."""
    for some, marks in _in_chunks(keys):
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM records WHERE {_OF_IDENTITY} AND key IN ({marks})", (identity, *some)
        )
        yield from map(Record._make, rows)


def read_page(db: sqlite3.Connection, identity: str, after: bytes, limit: int) -> list[Record]:
    """Up to `limit` records with keys above `after`, in the order of their keys, unverified."""
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM records WHERE {_OF_IDENTITY} AND key > ? ORDER BY key LIMIT ?",
        (identity, after, limit),
    )
    return list(map(Record._make, rows))


def use_identity(db: sqlite3.Connection, identity: str, description: Mapping[str, Any] | None, now: float) -> int:
    """The row id of an identity, added if new, and marked as used at `now` (seconds since 1970)."""
    text = None if description is None else json.dumps(dict(description), sort_keys=True, default=str)
    db.execute(
        "INSERT INTO identities (digest, description, created, last_used) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET last_used = excluded.last_used,"
        " description = coalesce(description, excluded.description)",
        (identity, text, now, now),
    )
    (row_id,) = db.execute("SELECT id FROM identities WHERE digest = ?", (identity,)).fetchone()
    return int(row_id)


def touch_identity(db: sqlite3.Connection, identity: str, now: float) -> None:
    """Marks an identity, if it exists, as used at `now` (seconds since 1970)."""
    db.execute("UPDATE identities SET last_used = ? WHERE digest = ?", (now, identity))


def read_description(db: sqlite3.Connection, identity: str) -> dict[str, Any] | None:
    """The description of an identity; None if it has none, or does not exist."""
    row = db.execute("SELECT description FROM identities WHERE digest = ?", (identity,)).fetchone()
    return _parse(row[0]) if row else None


def read_digests(db: sqlite3.Connection) -> list[tuple[str, datetime]]:
    """Digest and time of last use of every identity."""
    rows = db.execute("SELECT digest, last_used FROM identities ORDER BY id")
    return [(digest, _moment(last_used)) for digest, last_used in rows]


def write_records(db: sqlite3.Connection, owner: int, records: Iterable[Record], num_new: int) -> None:
    """Writes records of the identity with row id `owner`, replacing those with the same key; `num_new` have none."""
    db.execute("UPDATE identities SET num_records = num_records + ? WHERE id = ?", (num_new, owner))
    db.executemany(
        f"INSERT INTO records (identity, {_COLUMNS}) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (identity, key) DO UPDATE SET num_tokens = excluded.num_tokens,"
        " checksum = excluded.checksum, log_probs = excluded.log_probs",
        ((owner, *record) for record in records),
    )


def read_probes(db: sqlite3.Connection, identity: str) -> list[tuple[str, bytes, bytes]]:
    """`about`, `checksum` and `log_probs` of an identity's probes, unverified."""
    return db.execute(f"SELECT about, checksum, log_probs FROM probes WHERE {_OF_IDENTITY}", (identity,)).fetchall()


def write_probe(db: sqlite3.Connection, owner: int, probe: tuple[str, bytes, bytes]) -> None:
    """Adds a probe of the identity with row id `owner`."""
    db.execute("INSERT INTO probes (identity, about, checksum, log_probs) VALUES (?, ?, ?, ?)", (owner, *probe))


def read_passes(db: sqlite3.Connection, identity: str) -> list[StoredPass]:
    """The passes that were noted for an identity, the first one first."""
    rows = db.execute(f"SELECT about, began, ended FROM passes WHERE {_OF_IDENTITY} ORDER BY id", (identity,))
    return [
        StoredPass(_parse(about) or {}, _moment(began), None if ended is None else _moment(ended))
        for about, began, ended in rows
    ]


def begin_pass(db: sqlite3.Connection, owner: int, about: Mapping[str, Any], now: float) -> int:
    """Notes that a pass for the identity with row id `owner` begins; returns its row id."""
    text = json.dumps(dict(about), default=str)
    row_id = db.execute("INSERT INTO passes (identity, about, began) VALUES (?, ?, ?)", (owner, text, now)).lastrowid
    assert row_id is not None
    return row_id


def end_pass(db: sqlite3.Connection, row_id: int, now: float) -> None:
    """Notes that all rows of a pass are kept."""
    db.execute("UPDATE passes SET ended = ? WHERE id = ?", (now, row_id))


def delete_records(db: sqlite3.Connection, identity: str, keys: Iterable[bytes]) -> None:
    """Removes the records of `keys`."""
    found = db.executemany(f"DELETE FROM records WHERE {_OF_IDENTITY} AND key = ?", ((identity, key) for key in keys))
    _count_removed(db, identity, found.rowcount)


def delete_some(db: sqlite3.Connection, identity: str, limit: int) -> int:
    """Removes up to `limit` records of an identity, and the identity and its probes with the last; returns how many."""
    removed = db.execute(
        f"DELETE FROM records WHERE id IN (SELECT id FROM records WHERE {_OF_IDENTITY} LIMIT ?)",
        (identity, limit),
    ).rowcount
    _count_removed(db, identity, removed)
    if removed < limit:
        for table in ("probes", "passes"):
            db.execute(f"DELETE FROM {table} WHERE {_OF_IDENTITY}", (identity,))
        db.execute("DELETE FROM identities WHERE digest = ?", (identity,))
    return removed


def _count_removed(db: sqlite3.Connection, identity: str, num_removed: int) -> None:
    db.execute("UPDATE identities SET num_records = num_records - ? WHERE digest = ?", (num_removed, identity))


def recount(db: sqlite3.Connection, owner: int) -> int:
    """Lets the number put be that of the records which are there; returns how many more it was."""
    (num_put,) = db.execute("SELECT CAST(num_records AS INTEGER) FROM identities WHERE id = ?", (owner,)).fetchone()
    (num_records,) = db.execute("SELECT count(*) FROM records WHERE identity = ?", (owner,)).fetchone()
    db.execute("UPDATE identities SET num_records = ? WHERE id = ?", (num_records, owner))
    return int(num_put - num_records)


def find_damage(db: sqlite3.Connection) -> list[str]:
    """What SQLite's own check finds wrong with the file's pages, tables and index; nothing if they are sound."""
    found = [text for (text,) in db.execute("PRAGMA integrity_check(20)")]
    return [] if found == ["ok"] else found


def free_space(db: sqlite3.Connection) -> None:
    """Truncates the file by its empty pages."""
    (num_empty_pages,) = db.execute("PRAGMA freelist_count").fetchone()
    for _ in range(num_empty_pages):  # one by one, since Python's sqlite3 runs one step per statement
        db.execute("PRAGMA incremental_vacuum(1)")


def count_records(db: sqlite3.Connection, identity: str | None) -> int:
    """Number of records, of one identity or of all."""
    if identity is None:
        row = db.execute("SELECT count(*) FROM records").fetchone()
    else:
        row = db.execute(f"SELECT count(*) FROM records WHERE {_OF_IDENTITY}", (identity,)).fetchone()
    return int(row[0])


def read_identities(db: sqlite3.Connection) -> list[StoredIdentity]:
    """Every identity, in the order of creation."""
    rows = db.execute(
        "SELECT digest, description, count(key), coalesce(sum(num_tokens), 0),"
        " coalesce(sum(length(key) + length(checksum) + length(log_probs)), 0), created, last_used,"
        " CAST(identities.num_records AS INTEGER)"
        " FROM identities LEFT JOIN records ON records.identity = identities.id"
        " GROUP BY identities.id ORDER BY identities.id"
    )
    return [
        StoredIdentity(digest, _parse(text), num, tokens, size_bytes, _moment(created), _moment(last_used), num_put)
        for digest, text, num, tokens, size_bytes, created, last_used, num_put in rows
    ]


def _parse(description: str | None) -> dict[str, Any] | None:
    """The parsed description; None if there is none, or if it is damaged (no number depends on it)."""
    try:
        parsed = json.loads(description or "null")
    except (TypeError, ValueError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _moment(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise sqlite3.DatabaseError(f"a time is malformed: {seconds!r}") from error


def _in_chunks(keys: Sequence[bytes]) -> Iterator[tuple[Sequence[bytes], str]]:
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        some = keys[start : start + _KEYS_AT_ONCE]
        yield some, ",".join("?" * len(some))
