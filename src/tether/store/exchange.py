"""Moves log-probs in and out of a store: Parquet files, other stores, and what is left of a damaged one.

Everything streams, in batches of records. A store holds hashes, not tokens: files have `key`, `log_probs` and
`checksum`.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tether.errors import StoreError, said
from tether.store.key import KEY_BYTES
from tether.store.log_prob_store import LogProbStore
from tether.store.probe import KeptProbe
from tether.store.record import CHECKSUM_BYTES, LogProbs, RecordCodec
from tether.store.replacing import PARQUET, replacing

_log = logging.getLogger("tether.store")
_BATCH_SIZE = 1024
_METADATA = b"tether"
_FORMAT = 2
_COLUMNS = [
    ("key", pa.binary(KEY_BYTES)),
    ("log_probs", pa.list_(pa.field("element", pa.float32(), nullable=False))),
    ("checksum", pa.binary(CHECKSUM_BYTES)),
]
# What pyarrow raises on a damaged file.
_READING_ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError, MemoryError, OverflowError)


def export_parquet(store: LogProbStore, path: str | os.PathLike[str], identity: str) -> int:
    """Writes the records of one reference to a Parquet file, in the order of their keys.

    Args:
        store: The store that holds them.
        path: The file to write; an existing Parquet file is replaced in one step.
        identity: Digest of the reference; kept in the file's metadata with its description, probes and passes.

    Returns:
        The number of records written.

    Raises:
        StoreError: If the store holds nothing of that reference, a file can't be read or written, what is at
            `path` is no Parquet file, or its name does not end in .parquet.
    """
    if store.count(identity) == 0:
        known = ", ".join(i.digest for i in store.identities())
        raise StoreError(
            problem=f"Cannot export the reference {identity} from {store.path}: the store holds no record of it.",
            instead=f"Choose one of {known}." if known else "Fill the store first: it is empty.",
        )
    schema = pa.schema(_COLUMNS)
    target = Path(path).expanduser().absolute()
    num_records = 0
    try:
        with replacing(target, PARQUET) as file, pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
            for batch in store.batches(identity, batch_size=_BATCH_SIZE):
                writer.write_batch(_to_arrow(batch, schema, RecordCodec(identity)))
                num_records += len(batch)
            writer.add_key_value_metadata({_METADATA: _about(store, identity, num_records)})
    except (OSError, pa.ArrowException) as error:
        raise _cannot("write", target, error) from error
    return num_records


def import_parquet(store: LogProbStore, path: str | os.PathLike[str], identity: str | None = None) -> int:
    """Adds the records of a Parquet file to a store; of two records for a key, the longer is kept.

    Args:
        store: The store to add them to.
        path: A file with the columns `key` (16 bytes) and `log_probs` (list of float), and `checksum` (8 bytes) if
            `export_parquet` wrote it: then it is proven, as a whole and record by record.
        identity: Digest of the reference; needed if the file doesn't have it.

    Returns:
        The number of records that the store didn't have, or had shorter.

    Raises:
        StoreError: If the file has other columns, belongs to another reference than `identity`, is damaged, or holds a
            value that is no log-prob (the batches before it stay).
    """
    source = Path(path).expanduser().absolute()
    try:
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            about = _read_about(file, source, identity)
            if about["format"] != _FORMAT:
                _log.warning(_UNPROVEN, source, about["identity"])
            return _import(store, file, about, source)
    except StoreError:
        raise
    except _READING_ERRORS as error:
        raise _cannot("read", source, error) from error


def merge(into: LogProbStore, other_path: str | os.PathLike[str]) -> int:
    """Adds every record and probe of another store to this one; the other is not changed, and may be in use.

    Args:
        into: The store to add to.
        other_path: The file of the other store.

    Returns:
        The number of records that `into` didn't have, or had shorter.

    Raises:
        StoreError: If the other is this store, or either can't be read or written (what was merged stays).
    """
    source = Path(other_path).expanduser().absolute()
    if source.exists() and os.path.samefile(source, into.path):
        raise StoreError(
            problem=f"Cannot merge {source} into itself: both paths name the same file.",
            instead="Name the file of the other store.",
        )
    num_added = 0
    with LogProbStore(source, read_only=True) as other:
        for identity in other.digests():
            description = other.describe(identity)
            passes = [noted.about for noted in other.passes(identity)]
            add_notes(into, identity, other.probes(identity), passes, description)
            for batch in other.batches(identity, batch_size=_BATCH_SIZE):
                keys, values = [key for key, _ in batch], [value for _, value in batch]
                num_added += _add(into, identity, keys, values, description)
    return num_added


def prune(store: LogProbStore, *, identity: str | None = None, older_than: timedelta | None = None) -> int:
    """Removes records and frees their space.

    Args:
        store: The store to remove from.
        identity: Digest of the reference whose records to remove; `None` means any.
        older_than: Only references that were not used (put or read, exact to a day) for this long.

    Returns:
        The number of records removed.

    Raises:
        StoreError: If neither is given, `identity` is empty or `older_than` not positive, which would mean everything,
            or the store can't be written.
    """
    slips = {
        "neither `identity` nor `older_than` is given": identity is None and older_than is None,
        "`identity` is empty": identity == "",
        f"`older_than` is {older_than}": older_than is not None and older_than <= timedelta(0),
    }
    for slip in (why for why, is_so in slips.items() if is_so):
        raise StoreError(
            problem=f"Cannot prune {store.path} of everything: {slip}.",
            instead="Name an `identity` or an age (`older_than`). To remove the whole store, delete its file.",
        )
    latest = None if older_than is None else datetime.now(UTC) - older_than
    return sum(
        store.remove(known)
        for known, last_used in store.digests().items()
        if identity in (None, known) and (latest is None or last_used < latest)
    )


def add_notes(
    store: LogProbStore,
    identity: str,
    probes: Iterable[KeptProbe],
    passes: Iterable[Mapping[str, Any]],
    description: Mapping[str, Any] | None,
) -> None:
    """Adds what came with the records of a reference: its probes and the passes that filled the other store."""
    for probe in probes:
        store.put_probe(identity, probe, description=description)
    for about in passes:
        if about not in [noted.about for noted in store.passes(identity)]:
            with store.noting(identity, about, description=description):
                pass


def _add(
    store: LogProbStore,
    identity: str,
    keys: Sequence[bytes],
    values: Sequence[LogProbs],
    description: Mapping[str, Any] | None,
) -> int:
    """Puts the records that the store lacks; returns how many."""
    lacking = store.missing(identity, keys, [len(value) for value in values], verify=True)
    store.put(identity, [keys[i] for i in lacking], [values[i] for i in lacking], description=description)
    return len(lacking)


def _import(store: LogProbStore, file: pq.ParquetFile, about: Mapping[str, Any], source: Path) -> int:
    """Adds a file's records, in its order, and what it says of their reference."""
    owner, description, is_proven = about["identity"], about.get("description"), about["format"] == _FORMAT
    names = [name for name, _ in _COLUMNS if is_proven or name != "checksum"]
    num_added, num_read, last = 0, 0, b""
    for batch in file.iter_batches(batch_size=_BATCH_SIZE, columns=names):
        keys, values = _from_arrow(batch, source)
        if is_proven:
            _prove(keys, values, batch.column("checksum").to_pylist(), RecordCodec(owner), num_read, last, source)
            num_read, last = num_read + len(keys), keys[-1] if keys else last
        num_added += _add(store, owner, keys, values, description)
    if is_proven and num_read != about["num_records"]:
        why = f"it has {num_read:,} records, and was written with {about['num_records']:,}"
        raise _not_ours(source, why, _EXPORT_AGAIN)
    add_notes(store, owner, map(KeptProbe.of_fields, about.get("probes", ())), about.get("passes", ()), description)
    return num_added


def _prove(
    keys: Sequence[bytes],
    values: Sequence[LogProbs],
    checksums: Sequence[bytes],
    codec: RecordCodec,
    first: int,
    last: bytes,
    source: Path,
) -> None:
    """Refuses a record that is not as it was written, or not in its place."""
    for row, (key, value, checksum) in enumerate(zip(keys, values, checksums, strict=True), first):
        if key <= last or codec.pack(key, value).checksum != checksum:
            why = f"its row {row} is not as it was written (key {key.hex()})"
            raise _not_ours(source, why, _EXPORT_AGAIN)
        last = key


def _to_arrow(batch: Sequence[tuple[bytes, LogProbs]], schema: pa.Schema, codec: RecordCodec) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(value) for _, value in batch)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, np.float32), *(value for _, value in batch)])
    keys = pa.array([key for key, _ in batch], pa.binary(KEY_BYTES))
    log_probs = pa.ListArray.from_arrays(offsets, flat, type=schema.field("log_probs").type)
    checksums = pa.array([codec.pack(*one).checksum for one in batch], pa.binary(CHECKSUM_BYTES))
    return pa.record_batch([keys, log_probs, checksums], schema=schema)


def _from_arrow(batch: pa.RecordBatch, source: Path) -> tuple[list[bytes], list[LogProbs]]:
    log_probs = batch.column("log_probs")
    if batch.column("key").null_count or log_probs.null_count or log_probs.flatten().null_count:
        raise _not_ours(source, "it has empty cells", "Leave out the rows without log-probs.")
    flat = log_probs.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    ends = np.cumsum(log_probs.value_lengths().to_numpy())[:-1]
    return batch.column("key").to_pylist(), np.split(flat, ends) if len(batch) else []


def _about(store: LogProbStore, identity: str, num_records: int) -> bytes:
    """What a file's metadata say of its records."""
    about = {
        "format": _FORMAT,
        "identity": identity,
        "description": store.describe(identity),
        "num_records": num_records,
        "probes": [probe.as_fields() for probe in store.probes(identity)],
        "passes": [dict(noted.about) for noted in store.passes(identity)],
    }
    return json.dumps(about | {"checksum": _checksum(about)}).encode()


def _checksum(about: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in about.items() if name != "checksum"}
    return blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=KEY_BYTES).hexdigest()


def _read_about(file: pq.ParquetFile, source: Path, identity: str | None) -> dict[str, Any]:
    """What a file says of its records; at least `format` (0 if another program wrote it) and `identity`."""
    names = file.schema_arrow.names
    if not {"key", "log_probs"} <= set(names):
        if {"ref_chosen_logps", "ref_rejected_logps"} <= set(names):
            why = "its rows hold sums over responses, and a store needs the log-prob of every token"
            raise _not_ours(source, why, "Name it as the training data: the trainer reads these columns itself.")
        why = f"its columns are {names}, not `key` and `log_probs`"
        raise _not_ours(source, why, "Give it the columns `key` and `log_probs`.")
    about = json.loads((file.metadata.metadata or {}).get(_METADATA, b'{"format": 0}'))
    if about.get("format") not in (0, 1, _FORMAT):
        why = f"it has format {about.get('format')!r}, and this version of Tether reads {_FORMAT}"
        raise _not_ours(source, why, "Use the version of Tether that wrote it, or export it again.")
    if about["format"] == _FORMAT and about.get("checksum") != _checksum(about):
        raise _not_ours(source, "its metadata are not as they were written", _EXPORT_AGAIN)
    if about["format"] != _FORMAT and "checksum" in names:
        why = "its records have checksums, and the metadata that belong to them are not there"
        raise _not_ours(source, why, _EXPORT_AGAIN)
    owner = about.setdefault("identity", identity)
    if owner is None:
        raise _not_ours(source, "it doesn't say which reference its log-probs belong to", "Pass `identity`.")
    if identity not in (None, owner):
        raise _not_ours(source, f"it holds log-probs of {owner}, not of {identity}", "Leave `identity` out.")
    return dict(about)


_EXPORT_AGAIN = "Export it again, or copy it again from where it was written."
_UNPROVEN = (
    "%s has no checksums, so its log-probs cannot be proven. A run compares some with the reference %s where that is "
    "at hand (`ref_store_verify`, `tether store verify`)."
)


def _not_ours(source: Path, why: str, instead: str) -> StoreError:
    return StoreError(problem=f"Cannot import {source}: {why}.", instead=instead)


def _cannot(do: str, path: Path, error: Exception) -> StoreError:
    first, _, rest = said(error).partition(". ")
    return StoreError(
        problem=f"Cannot {do} the Parquet file {path}: {first}.",
        details=rest and f"{rest}.",
        instead="Check the path, its permissions and the disk space."
        if do == "write"
        else f"Check the path and its permissions. If it is damaged: {_EXPORT_AGAIN[0].lower()}{_EXPORT_AGAIN[1:]}",
    )
