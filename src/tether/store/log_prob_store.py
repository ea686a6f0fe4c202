"""The store of reference log-probs: scored once, kept on disk, found again by what was computed.

Knows identities, keys and arrays; must not know models, tokenizers or options of training.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from tether.errors import StoreError
from tether.store import tables
from tether.store.location import default_store_path, store_path
from tether.store.opening import copy_database
from tether.store.probe import KeptProbe
from tether.store.record import LogProbs, Record, RecordCodec, check_keys, check_values, unpack
from tether.store.store_file import StoreFile
from tether.store.tables import StoredIdentity, StoredPass

__all__ = ["LogProbStore", "StoredIdentity", "StoredPass", "default_store_path"]

_log = logging.getLogger("tether.store")
_DAY = timedelta(days=1)
_ROWS_AT_ONCE = 10_000
_KEYS_AT_ONCE = 500


class LogProbStore:
    """Per-token log-probs on disk, by identity of the reference and key of the response.

    Equivalent to a `dict[(identity, key)] -> array` that survives the process, can be shared by several processes,
    keeps the longest array it was given, and never returns anything but what was put. It can be pickled and
    forked: each process opens the file anew.

    Args:
        path: The file. `None` means `default_store_path()`.
        read_only: Never write; the store must exist.

    Raises:
        StoreError: If the file can't be opened, isn't a store, or has another format version.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, read_only: bool = False) -> None:
        self._attach(store_path(path), read_only)
        with self._file.read():
            pass  # raises errors here, not at the first batch

    def get(self, identity: str, keys: Sequence[bytes], lengths: Sequence[int]) -> list[LogProbs | None]:
        """The log-probs of responses.

        Args:
            identity: Digest of the reference.
            keys: Content keys, 16 bytes each; the same key may come twice.
            lengths: How many response tokens of each are needed.

        Returns:
            For each key the first `lengths[i]` per-token log-probs, float32 in nats, shape (lengths[i],);
            `None` if there is no record, if it is shorter, or if it is damaged (logged once).

        Raises:
            StoreError: If the file can't be read.
        """
        check_keys(keys, lengths, "lengths")
        found = {record.key: record for record in self._read_intact(identity, keys)}
        return [
            unpack(found[key], length) if key in found and found[key].num_tokens >= length else None
            for key, length in zip(keys, lengths, strict=True)
        ]

    def missing(
        self, identity: str, keys: Sequence[bytes], lengths: Sequence[int], *, verify: bool = False
    ) -> list[int]:
        """Which responses have not been scored yet.

        Args:
            identity: Digest of the reference.
            keys: Content keys, 16 bytes each.
            lengths: How many response tokens of each are needed.
            verify: Also read and check the values, so that `get` is sure to find them. Otherwise a damaged record is
                only noticed by `get`.

        Returns:
            The indices i, ascending, for which there is no record of at least `lengths[i]` tokens.

        Raises:
            StoreError: If the file can't be read.
        """
        check_keys(keys, lengths, "lengths")
        if verify:
            stored = {record.key: record.num_tokens for record in self._read_intact(identity, keys)}
        else:
            with self._file.read() as db:
                stored = dict(tables.read_lengths(db, identity, keys))
        needs = zip(keys, lengths, strict=True)
        return [i for i, (key, length) in enumerate(needs) if stored.get(key, -1) < length]

    def put(
        self,
        identity: str,
        keys: Sequence[bytes],
        values: Sequence[npt.NDArray[Any]],
        *,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes records in one transaction; of two for a key the longer is kept, of equally long ones the older.

        Args:
            identity: Digest of the reference.
            keys: Content keys, 16 bytes each.
            values: Per-token log-probs of each response in nats, shape (num_response_tokens,).
            description: What the reference is, as JSON; kept from the first call that has one.

        Raises:
            StoreError: If a value is not finite (named by key and place), or the file can't be written. Then nothing
                of the call is written.
        """
        check_keys(keys, values, "values")
        codec = RecordCodec(identity)
        longest: dict[bytes, Record] = {}
        for position, (key, value) in enumerate(zip(keys, values, strict=True)):
            record = codec.pack(key, check_values(value, key, position))
            if key not in longest or longest[key].num_tokens < record.num_tokens:
                longest[key] = record
        if longest:
            with self._file.write() as db:
                owner = tables.use_identity(db, identity, description, time.time())
                num_new = len(longest)
                for old in tables.read_records(db, identity, list(longest)):
                    num_new -= 1
                    if codec.is_intact(old) and old.num_tokens >= longest[old.key].num_tokens:
                        del longest[old.key]
                tables.write_records(db, owner, longest.values(), num_new)

    def probes(self, identity: str) -> list[KeptProbe]:
        """The intact probes of a reference, the shortest first; raises StoreError if the file can't be read."""
        codec = RecordCodec(identity)
        with self._file.read() as db:
            probes = [KeptProbe.unpack(codec, *row) for row in tables.read_probes(db, identity)]
        return sorted((probe for probe in probes if probe is not None), key=lambda probe: probe.length)

    def put_probe(self, identity: str, probe: KeptProbe, *, description: Mapping[str, Any] | None = None) -> None:
        """Keeps what a reference answered to texts that are no rows; the same answers are kept once.

        Args:
            identity: Digest of the reference.
            probe: The texts and the answers.
            description: As `put`.

        Raises:
            StoreError: If the file can't be written.
        """
        known = {(other.texts, other.log_probs.tobytes()) for other in self.probes(identity)}
        if (probe.texts, probe.log_probs.tobytes()) not in known:
            with self._file.write() as db:
                owner = tables.use_identity(db, identity, description, time.time())
                tables.write_probe(db, owner, probe.pack(RecordCodec(identity)))

    @contextmanager
    def noting(
        self, identity: str, about: Mapping[str, Any], *, description: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """Notes a pass over rows in the store, as begun, and as ended when the block ends without an error.

        Records that vanished from the file since they were put are logged.

        Args:
            identity: Digest of the reference.
            about: What is scored, and for which run, by name, as JSON.
            description: As `put`.

        Raises:
            StoreError: If the file can't be written.
        """
        with self._file.write() as db:
            owner = tables.use_identity(db, identity, description, time.time())
            num_lost = tables.recount(db, owner)
            row_id = tables.begin_pass(db, owner, about, time.time())
        self._file.settle()  # so that a write-ahead log that is lost leaves a pass that never ended
        if num_lost > 0:
            _log.warning(
                "%d records of the reference %s have vanished from the log-prob store %s since they were put. Those "
                "that are needed are scored again.",
                *(num_lost, identity, self.path),
            )
        yield
        with self._file.write() as db:
            tables.end_pass(db, row_id, time.time())
        self._file.settle()

    def passes(self, identity: str) -> list[StoredPass]:
        """The passes noted for a reference, the first one first; raises StoreError if the file can't be read."""
        with self._file.read() as db:
            return tables.read_passes(db, identity)

    def find_damage(self) -> list[str]:
        """What SQLite's own check finds wrong with the file; reads all of it. Raises StoreError if it can't be read."""
        with self._file.read() as db:
            return tables.find_damage(db)

    def count(self, identity: str | None = None) -> int:
        """Number of records, of one identity or (`None`) of all; raises StoreError if it can't be read."""
        with self._file.read() as db:
            return tables.count_records(db, identity)

    def identities(self) -> list[StoredIdentity]:
        """What the store holds, one entry for each reference; raises StoreError if it can't be read."""
        with self._file.read() as db:
            return tables.read_identities(db)

    def digests(self) -> dict[str, datetime]:
        """The identities and when each was last used (cheap); raises StoreError if it can't be read."""
        with self._file.read() as db:
            return dict(tables.read_digests(db))

    def describe(self, identity: str) -> Mapping[str, Any] | None:
        """The description that was put with a reference; raises StoreError if the file can't be read."""
        with self._file.read() as db:
            return tables.read_description(db, identity)

    def batches(self, identity: str, *, batch_size: int = 1024) -> Iterator[list[tuple[bytes, LogProbs]]]:
        """All intact records of an identity, in the order of their keys, `batch_size` at a time.

        Memory doesn't grow with the store, and the store may be used and written to between batches.

        Args:
            identity: Digest of the reference.
            batch_size: Number of records read at once.

        Yields:
            Pairs of key (16 bytes) and per-token log-probs (float32 in nats, shape (num_response_tokens,)).

        Raises:
            StoreError: If the file can't be read.
        """
        self._touch(identity)
        last = b""
        while True:
            with self._file.read() as db:
                page = tables.read_page(db, identity, last, batch_size)
                if page and not (isinstance(page[-1].key, bytes) and page[-1].key > last):
                    raise sqlite3.DatabaseError("the index is malformed")  # the query could loop forever
            if not page:
                return
            yield [(record.key, unpack(record)) for record in self._prove(identity, page)]
            last = page[-1].key

    def remove(self, identity: str) -> int:
        """Removes every record of a reference and frees its space; the store may be used meanwhile.

        Args:
            identity: Digest of the reference.

        Returns:
            How many records were removed.

        Raises:
            StoreError: If the file can't be written.
        """
        total, removed = 0, _ROWS_AT_ONCE
        while removed == _ROWS_AT_ONCE:
            with self._file.write() as db:
                removed = tables.delete_some(db, identity, _ROWS_AT_ONCE)
                tables.free_space(db)
            total += removed
        return total

    def copy_to(self, path: str | os.PathLike[str]) -> None:
        """Writes a copy of the whole store as of one moment, even while other processes use it.

        Args:
            path: The file to write; an existing one is replaced in one step.

        Raises:
            StoreError: If this store can't be read, the copy can't be written, or a file there is in use or no store.
        """
        with self._file.read() as db:
            copy_database(db, Path(path).expanduser().absolute())

    def close(self) -> None:
        """Releases the file; the store can't be used afterwards."""
        self._file.close()

    def __enter__(self) -> "LogProbStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "read_only": self.read_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._attach(**state)

    def _attach(self, path: Path, read_only: bool) -> None:
        """Sets everything up but opening the file, which happens at the first use."""
        self.path = path
        self.read_only = read_only
        self._file = StoreFile(path, read_only)
        self._has_warned = False
        self._touched: set[str] = set()

    def _read_intact(self, identity: str, keys: Sequence[bytes]) -> Iterator[Record]:
        """The records of `keys` that exist and are intact, with a bounded number in memory."""
        self._touch(identity)
        distinct = list(set(keys))
        for start in range(0, len(distinct), _KEYS_AT_ONCE):
            with self._file.read() as db:
                records = list(tables.read_records(db, identity, distinct[start : start + _KEYS_AT_ONCE]))
            yield from self._prove(identity, records)

    def _prove(self, identity: str, records: Sequence[Record]) -> list[Record]:
        """Those records that are intact; the others are logged once and removed, to be scored again."""
        codec = RecordCodec(identity)
        intact: list[Record] = []
        damaged: list[Record] = []
        for record in records:
            (intact if codec.is_intact(record) else damaged).append(record)
        if damaged:
            self._warn_once(f"has damaged records ({len(damaged)} in this read), which count as missing")
            self._give_up(identity, codec, [record.key for record in damaged])
        return intact

    def _give_up(self, identity: str, codec: RecordCodec, keys: Sequence[bytes]) -> None:
        """Removes damaged records, so that `missing` reports them too; checks them again before."""
        if self.read_only:
            return
        with suppress(StoreError), self._file.write() as db:  # even if it fails, they are never served
            records = list(tables.read_records(db, identity, keys))
            damaged = [record.key for record in records if not codec.is_intact(record)]
            tables.delete_records(db, identity, damaged)

    def _touch(self, identity: str) -> None:
        """Records, at most once per store and day, that the identity is in use (for `prune`)."""
        if self.read_only or identity in self._touched:
            return
        self._touched.add(identity)
        with self._file.read() as db:
            last_used = dict(tables.read_digests(db)).get(identity)
        if last_used is not None and datetime.now(UTC) - last_used > _DAY:
            with suppress(StoreError), self._file.write() as db:  # reading must work even if this does not
                tables.touch_identity(db, identity, time.time())

    def _warn_once(self, what: str) -> None:
        if not self._has_warned:
            _log.warning("The log-prob store %s %s. This is logged once.", self.path, what)
        self._has_warned = True
