"""The verbs of `tether store` that read and write records. They need no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from tether.cli import EXIT_DONE
from tether.errors import StoreError
from tether.store import (
    LogProbStore,
    StoredIdentity,
    StoredPass,
    export_parquet,
    import_parquet,
    merge,
    prune,
    salvage,
)
from tether.store.location import store_path

_MOST_DAYS = 36_500
_LATEST_PASSES = 4
# A full model and an adapter on it can have one reference: what is kept names the kind that scored first.
_ABOUT = {"kind": "first scored as", "compute_dtype": "compute dtype", "scoring_version": "scoring version"}


def info(name: str | None) -> int:
    with open_store(name, read_only=True) as store:
        identities = store.identities()
        print(f"store      {store.path} ({size_of(store.path) / 1e6:,.1f} MB)")
        for identity in identities:
            print(_describe(identity))
            passes = store.passes(identity.digest)
            for noted in passes[:1] + passes[1:][-_LATEST_PASSES:]:
                print(_describe_pass(noted))
            if len(passes) > 1 + _LATEST_PASSES:
                print(f"           These are the first and the latest of {len(passes)} passes.")
        if not identities:
            print("           It is empty.")
    return EXIT_DONE


def export(name: str | None, file: str, start: str | None) -> int:
    with open_store(name) as store:
        identity = choose_identity(store, start)
        print(f"{export_parquet(store, file, identity):,} responses of {identity} are in {file}.")
    return EXIT_DONE


def import_file(name: str | None, file: str, identity: str | None) -> int:
    with open_store(name, must_exist=False) as store:
        named = None if identity is None else _digest(store, identity)
        added = import_parquet(store, file, named)
        print(f"{added:,} responses were new; {store.path} now has {store.count():,}.")
    return EXIT_DONE


def merge_into(name: str | None, others: Sequence[str]) -> int:
    with open_store(name, must_exist=False) as store:
        for other in others:
            print(f"{merge(store, other):,} responses were new in {other}")
        print(f"{store.path} now has {store.count():,}.")
    return EXIT_DONE


def salvage_into(name: str | None, damaged: str) -> int:
    with open_store(name, must_exist=False) as store:
        print(f"{salvage(damaged, store):,} intact responses are in {damaged}; {store.path} now has {store.count():,}.")
    return EXIT_DONE


def prune_store(name: str | None, start: str | None, older_than: float | None) -> int:
    if older_than is not None and not 0 < older_than <= _MOST_DAYS:
        raise StoreError(
            problem=f"Cannot prune by `--older_than {older_than:g}`: it is a number of days, above 0 and up to "
            f"{_MOST_DAYS:,}.",
            instead="Write `--older_than 90` for the references that no run has used for 90 days.",
        )
    age = None if older_than is None else timedelta(days=older_than)
    with open_store(name) as store:
        identity = None if start is None else choose_identity(store, start)
        removed = prune(store, identity=identity, older_than=age)
        print(f"{removed:,} responses were removed; {store.path} now has {store.count():,}.")
    return EXIT_DONE


def open_store(name: str | None, *, read_only: bool = False, must_exist: bool = True) -> LogProbStore:
    """The store named by `--store`, or the shared one.

    Raises:
        StoreError: If it does not exist and `must_exist`.
    """
    path = store_path(name)
    if must_exist and not (path.is_file() or path.is_dir()):  # opening a folder says that it is one
        raise StoreError(
            problem=f"Cannot open the store {path}: there is no such file.",
            instead="Name another with `--store FILE`, or fill this one with `tether precompute RECIPE.yaml`.",
        )
    return LogProbStore(path, read_only=read_only)


def choose_identity(store: LogProbStore, start: str | None) -> str:
    """The digest of a reference by its first letters, or that of the only one in the store.

    Raises:
        StoreError: If there is none, or more than one; lists them.
    """
    if start == "":
        raise StoreError(
            problem="Cannot choose a reference by `--identity ''`: every digest begins with it.",
            instead="Write the first letters of its digest; `tether store info` lists them.",
        )
    known = list(store.digests())
    found = [digest for digest in known if digest.startswith(start or "")]
    if len(found) == 1:
        return found[0]
    number = len(found) or "no"
    why = f"{number} digests start with `{start}`" if start else f"it holds {number} references"
    raise StoreError(
        problem=f"Cannot choose a reference of the store {store.path}: {why}.",
        details=f"It holds {', '.join(known)}." if known else "",
        instead="Name one with `--identity` and its first letters; `tether store info` says what each is.",
    )


def _digest(store: LogProbStore, start: str) -> str:
    """A digest for records to import: a whole one, or the first letters of one that the store has.

    Raises:
        StoreError: If it is neither.
    """
    return start if re.fullmatch("[0-9a-f]{32}", start) else choose_identity(store, start)


def size_of(path: Path) -> int:
    """Size of a store with its write-ahead log, in bytes."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*") if part.is_file())


def _describe(identity: StoredIdentity) -> str:
    about = identity.description or {}
    what = ", ".join(f"{title} {about[name]}" for name, title in _ABOUT.items() if name in about)
    return (
        f"reference  {identity.digest}: {what or '(not described)'}\n"
        f"           {identity.num_records:,} responses, {identity.num_tokens:,} tokens, "
        f"{identity.size_bytes / 1e6:,.1f} MB; since {identity.created:%Y-%m-%d}, "
        f"last used {identity.last_used:%Y-%m-%d}" + _lost(identity)
    )


def _lost(identity: StoredIdentity) -> str:
    num_lost = identity.num_put - identity.num_records
    return (
        f"\n           {num_lost:,} more were put and are not there: scored again when needed" if num_lost > 0 else ""
    )


def _describe_pass(noted: StoredPass) -> str:
    about = "; ".join(f"{name} {value}" for name, value in noted.about.items() if value != "")
    state = "" if noted.ended else "; did not end: stopped, under way, or its end is lost"
    return f"  filled   {noted.began:%Y-%m-%d %H:%M} UTC: {about}{state}"
