"""Moves log-probs in and out of a store: Parquet files, other stores, and what is left of a damaged one.

Everything streams, in batches of records. A store holds hashes, not tokens: files have `key` and `log_probs`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tether.errors import StoreError
from tether.store.key import KEY_BYTES
from tether.store.log_prob_store import LogProbStore
from tether.store.record import LogProbs

_BATCH_SIZE = 1024
_METADATA = b"tether"
_COLUMNS = [
    ("key", pa.binary(KEY_BYTES)),
    ("log_probs", pa.list_(pa.field("element", pa.float32(), nullable=False))),
]


def export_parquet(store: LogProbStore, path: str | os.PathLike[str], identity: str) -> int:
    """Writes the records of one reference to a Parquet file, in the order of their keys.

    Args:
        store: The store that holds them.
        path: The file to write; an existing one is replaced in one step.
        identity: Digest of the reference; kept in the file's metadata with the description.

    Returns:
        The number of records written.

    Raises:
        StoreError: If the store holds nothing of that reference, or a file can't be read or written.
    """
    if store.count(identity) == 0:
        known = ", ".join(i.digest for i in store.identities())
        raise StoreError(
            problem=f"Cannot export the reference {identity} from {store.path}: the store holds no record of it.",
            instead=f"Choose one of {known}." if known else "Fill the store first: it is empty.",
        )
    about = {"format": 1, "identity": identity, "description": store.describe(identity)}
    schema = pa.schema(_COLUMNS, metadata={_METADATA: json.dumps(about).encode()})
    target = Path(path).expanduser().absolute()
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    num_records = 0
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for batch in store.batches(identity, batch_size=_BATCH_SIZE):
                writer.write_batch(_to_arrow(batch, schema))
                num_records += len(batch)
        os.replace(unfinished, target)
    except (OSError, pa.ArrowException) as error:
        raise _cannot("write", target, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return num_records


def import_parquet(store: LogProbStore, path: str | os.PathLike[str], identity: str | None = None) -> int:
    """Adds the records of a Parquet file to a store; of two records for a key, the longer is kept.

    Args:
        store: The store to add them to.
        path: A file with the columns `key` (16 bytes) and `log_probs` (list of float).
        identity: Digest of the reference; needed if the file doesn't have it.

    Returns:
        The number of records that the store didn't have, or had shorter.

    Raises:
        StoreError: If the file has other columns, belongs to another reference than `identity`, or holds a value that
            is not finite (the batches before it stay).
    """
    source = Path(path).expanduser().absolute()
    try:
        with pq.ParquetFile(source) as file:
            owner, description = _read_owner(file.schema_arrow, source, identity)
            num_added = 0
            for batch in file.iter_batches(batch_size=_BATCH_SIZE, columns=["key", "log_probs"]):
                keys, values = _from_arrow(batch, source)
                num_added += _add(store, owner, keys, values, description)
            return num_added
    except (OSError, pa.ArrowException) as error:
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
            for probe in other.probes(identity):
                into.put_probe(identity, probe, description=description)
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
        StoreError: If neither is given, or the store can't be written.
    """
    if identity is None and older_than is None:
        raise StoreError(
            problem=f"Cannot prune {store.path} of everything: neither `identity` nor `older_than` is given.",
            instead="Name an `identity` or an age (`older_than`). To remove the whole store, delete its file.",
        )
    latest = None if older_than is None else datetime.now(UTC) - older_than
    return sum(
        store.remove(known)
        for known, last_used in store.digests().items()
        if identity in (None, known) and (latest is None or last_used < latest)
    )


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


def _to_arrow(batch: Sequence[tuple[bytes, LogProbs]], schema: pa.Schema) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(value) for _, value in batch)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, np.float32), *(value for _, value in batch)])
    keys = pa.array([key for key, _ in batch], pa.binary(KEY_BYTES))
    log_probs = pa.ListArray.from_arrays(offsets, flat, type=schema.field("log_probs").type)
    return pa.record_batch([keys, log_probs], schema=schema)


def _from_arrow(batch: pa.RecordBatch, source: Path) -> tuple[list[bytes], list[LogProbs]]:
    log_probs = batch.column("log_probs")
    if batch.column("key").null_count or log_probs.null_count or log_probs.flatten().null_count:
        raise _not_ours(source, "it has empty cells", "Leave out the rows without log-probs.")
    flat = log_probs.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    ends = np.cumsum(log_probs.value_lengths().to_numpy())[:-1]
    return batch.column("key").to_pylist(), np.split(flat, ends)


def _read_owner(schema: pa.Schema, source: Path, identity: str | None) -> tuple[str, Mapping[str, Any] | None]:
    """The digest and description of the reference whose log-probs the file holds."""
    if not {"key", "log_probs"} <= set(schema.names):
        if {"ref_chosen_logps", "ref_rejected_logps"} <= set(schema.names):
            why = "its rows hold sums over responses, and a store needs the log-prob of every token"
            raise _not_ours(source, why, "Name it as the training data: the trainer reads these columns itself.")
        why = f"its columns are {schema.names}, not `key` and `log_probs`"
        raise _not_ours(source, why, "Give it the columns `key` and `log_probs`.")
    about = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))
    owner = about.get("identity", identity)
    if owner is None:
        raise _not_ours(source, "it doesn't say which reference its log-probs belong to", "Pass `identity`.")
    if identity not in (None, owner):
        raise _not_ours(source, f"it holds log-probs of {owner}, not of {identity}", "Leave `identity` out.")
    return owner, about.get("description")


def _not_ours(source: Path, why: str, instead: str) -> StoreError:
    return StoreError(problem=f"Cannot import {source}: {why}.", instead=instead)


def _cannot(do: str, path: Path, error: Exception) -> StoreError:
    first, _, rest = " ".join(str(error).split()).rstrip(".").partition(". ")
    return StoreError(
        problem=f"Cannot {do} the Parquet file {path}: {first}.",
        details=rest and f"{rest}.",
        instead="Check the path, its permissions and the disk space.",
    )
