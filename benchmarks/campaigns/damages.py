"""Trials that damage what is kept: a checkpoint, a store, an export. What is read then must be right or be refused.

"Named" is an error of Tether's that names the file or, of a store, also the report of `tether store verify`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
from runs import KINDS, STEPS, Place, Values, make, train, until_killed, whole_run

from support.runs import curve, make_trainer
from support.tiny import tiny_model, tiny_pairs
from tether import last_checkpoint
from tether.cli.pairs import load_pairs
from tether.data.datasets import REFERENCE_COLUMNS, TOKEN_COLUMNS
from tether.errors import StoreError, TetherError
from tether.store import KeptProbe, LogProbStore, content_key, export_parquet, import_parquet, salvage
from tether.trainer.reference_columns import with_reference_columns

EQUAL, NAMED, HARMLESS = "resumed equal", "refused, named", "harmless"
Trial = tuple[str, str, int]


def flip(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def blot(draw: random.Random, content: bytes, fill: bytes | None = None, size: int = 64) -> bytes:
    """A stretch is other bytes than it was: random ones, or `fill`."""
    at, size = draw.randrange(len(content)), min(size, len(content))
    return (content[:at] + (fill * size if fill else draw.randbytes(size)) + content[at + size :])[: len(content)]


def zero(draw: random.Random, content: bytes) -> bytes:
    return blot(draw, content, b"\0", draw.choice([64, 4096]))


def cut(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


BYTES = [flip, blot, zero, cut]


# --- checkpoints ---------------------------------------------------------------------------------------------------


def damage_checkpoint(draw: random.Random, folder: Path) -> Trial:
    """One file of a checkpoint in the middle of a run; resumed by its name, or as the last one."""
    kind, out = draw.choice(list(KINDS)), folder / "run"
    whole = whole_run(kind)
    shutil.copytree(whole.folder, out)
    for step in range(4, STEPS + 1):
        shutil.rmtree(out / f"checkpoint-{step}")
    checkpoint = out / "checkpoint-3"
    name, harm = _harm_file(draw, checkpoint, Path(whole_run(kind, seed=5).folder) / "checkpoint-3")
    resumed = last_checkpoint(out) if draw.random() < 0.25 else str(checkpoint)
    what = f"{kind}: {name}, {harm}, resumed from {resumed}"
    try:
        found, _, _ = train(out, kind, resumed, Place())
    except TetherError as error:
        # The manifest of another checkpoint names the files that are not its own.
        is_named = name in str(error) or (name == "manifest.json" and str(checkpoint) in str(error))
        return (NAMED if is_named and harm not in ("added", "none") else "RAW"), f"{what}: {error}", 1
    outcome = HARMLESS if harm in ("added", "none") else EQUAL
    return (outcome if found == whole.digest else "SILENT"), what, 1


def _harm_file(draw: random.Random, checkpoint: Path, of_other_run: Path) -> tuple[str, str]:
    """Which file of a checkpoint was harmed, and how; "none" if the bytes are the same as before."""
    harm = draw.choice(["bytes", "bytes", "gone", "step", "run", "added"])
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    name = draw.choice([each for each in ADDED if each not in names] if harm == "added" else names)
    path = checkpoint / name
    before = path.read_bytes() if path.is_file() else None
    sources = {"step": checkpoint.with_name("checkpoint-2") / name, "run": of_other_run / name}
    if harm == "added":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b'{"a": 1}')
    elif harm == "gone" or (harm in sources and not sources[harm].is_file()):
        path.unlink()
    elif harm in sources:
        shutil.copy(sources[harm], path)
    elif before:
        path.write_bytes(draw.choice(BYTES)(draw, before))
    return name, "none" if path.is_file() and path.read_bytes() == before else harm


ADDED = [
    "scaler.pt",
    "pytorch_model.bin",
    "optimizer.bin",
    "reference/start.json",
    "notes.txt",
    "sub/adapter_model.bin",
]


# --- stores --------------------------------------------------------------------------------------------------------

IDENTITY, LENGTH = "a" * 32, 60
_draw = np.random.default_rng(0)
STORED: Values = {content_key([1], [i + 2]): -_draw.exponential(2, LENGTH).astype(np.float32) for i in range(400)}
STATEMENTS = [
    "DELETE FROM records WHERE id % 3 = 0",
    "UPDATE records SET identity = 7 WHERE id % 5 = 0",
    "DROP INDEX records_by_key",
    "CREATE TRIGGER t AFTER INSERT ON identities BEGIN DELETE FROM records; END",
    "CREATE TRIGGER t AFTER UPDATE ON identities BEGIN UPDATE records SET log_probs = zeroblob(240); END",
    "CREATE VIEW v AS SELECT 1",
    "ALTER TABLE records RENAME TO r2; CREATE VIEW records AS SELECT * FROM r2",
    "DELETE FROM identities",
    "UPDATE identities SET digest = 'b' || substr(digest, 2)",
    "DROP TABLE probes",
    "UPDATE records SET key = randomblob(16) WHERE id < 5",
    "UPDATE records SET checksum = zeroblob(8) WHERE id < 9",
    "CREATE TABLE extra (x)",
    "PRAGMA user_version = 3",
    "PRAGMA user_version = 9",
    "PRAGMA application_id = 1",
]


def damage_store(draw: random.Random, folder: Path) -> Trial:
    """A store's pages, tables, index, schema or log: nothing wrong is read, what is lost is reported and put anew."""
    path = folder / "store.sqlite"
    harm = draw.choice(["page", "page", "index", "log", "statement"])
    _fill_and_kill(path, in_pass=harm == "log")
    log = path.with_name("store.sqlite-wal")
    if harm == "log" and draw.random() < 0.25:
        log.unlink()
    elif harm in ("page", "log"):
        target = path if harm == "page" else log
        target.write_bytes(draw.choice(BYTES)(draw, target.read_bytes()))
    elif harm == "index":
        content = path.read_bytes()
        page = draw.choice([i for i in range(1, len(content) // 8192) if content[i * 8192] in (2, 10)]) * 8192
        path.write_bytes(content[:page] + blot(draw, content[page : page + 8192]) + content[page + 8192 :])
    else:
        harm = draw.choice(STATEMENTS)
        with closing(sqlite3.connect(path)) as db:
            db.executescript(harm)
    with suppress(StoreError), LogProbStore(folder / "salvaged.sqlite") as fresh:
        copy = shutil.copytree(folder, folder / "copy", ignore=shutil.ignore_patterns("salvaged*"))
        salvage(copy / path.name, fresh)
        if _wrong(fresh):
            return "SILENT", f"{harm}: salvaged wrong records", 1
    try:
        return *_read_store(path, harm), 1
    except StoreError as error:
        return NAMED, f"{harm}: {error}", 1


def _read_store(path: Path, harm: str) -> tuple[str, str]:
    with LogProbStore(path) as store:
        num_put = sum(entry.num_put for entry in store.identities() if entry.digest == IDENTITY)
        damage = store.find_damage()
        num_intact = sum(len(batch) for batch in store.batches(IDENTITY))
        is_reported = bool(damage) or num_put != num_intact or IDENTITY not in store.digests()
        is_reported = is_reported or any(each.ended is None for each in store.passes(IDENTITY))
        if _wrong(store):
            return "SILENT", f"{harm}: wrong records"
        lost = sum(value is None for value in _get(store))
        if lost and not is_reported:
            return "LOST", f"{harm}: {lost} records, and nothing is reported"
        store.put(IDENTITY, list(STORED), list(STORED.values()))
        if _wrong(store) or any(value is None for value in _get(store)):
            return "LOST", f"{harm}: records that were put again are not there"
        return (NAMED if is_reported else HARMLESS), f"{harm}: {lost} lost, {damage}"


def _get(store: LogProbStore) -> list[np.ndarray | None]:
    return store.get(IDENTITY, list(STORED), [LENGTH] * len(STORED))


def _wrong(store: LogProbStore) -> bool:
    pairs = zip(_get(store), STORED.values(), strict=True)
    return any(found is not None and (found != value).any() for found, value in pairs)


def _fill_and_kill(path: Path, *, in_pass: bool) -> None:
    """A store whose writer was killed: in its pass, a part of which is in the write-ahead log then, or after it."""

    def child() -> None:
        keys, values = list(STORED), list(STORED.values())
        store = LogProbStore(path)
        with store.noting(IDENTITY, {"set": "train"}):
            for start in range(0, 400, 20):
                if start == 200:
                    store._file.settle()
                store.put(IDENTITY, keys[start : start + 20], values[start : start + 20])
            if in_pass:
                os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    until_killed(child)


def train_on_damage(draw: random.Random, folder: Path) -> Trial:
    """A run on a store whose file or values are damaged: it trains as on a whole one, or is refused."""
    out, whole = folder / "run", whole_run("precomputed")
    store, content = out.with_suffix(".sqlite"), Path(whole.folder).with_suffix(".sqlite").read_bytes()
    harm = draw.choice([*BYTES, None, None])
    store.write_bytes(content if harm is None else harm(draw, content))
    if harm is None:
        with closing(sqlite3.connect(store)) as db, db:
            db.execute(
                "UPDATE records SET log_probs = randomblob(length(log_probs)) WHERE id % ? = 0", (draw.choice([1, 3]),)
            )
    what = "values" if harm is None else harm.__name__
    try:
        trainer = make(out, "precomputed", save_strategy="no")
        trainer.train()
    except TetherError as error:
        return (NAMED if error.instead and str(store) in str(error) else "RAW"), f"{what}: {error}", 1
    plain = make(folder / "plain", "full", save_strategy="no")
    plain.train()
    is_right = np.allclose(curve(trainer), curve(plain), atol=1e-4)
    return (HARMLESS if is_right else "SILENT"), what, 1


# --- exports -------------------------------------------------------------------------------------------------------


def damage_export(draw: random.Random, folder: Path) -> Trial:
    """One bit of an export of a store, a third of them in the file's footer."""
    source, exported = folder / "source.sqlite", folder / "x.parquet"
    with LogProbStore(source) as store:
        store.put(IDENTITY, list(STORED), list(STORED.values()), description={"kind": "explicit"})
        store.put_probe(IDENTITY, KeptProbe((((1, 2), (3, 4)),), np.array([-1, -2], np.float32), {"torch": "2"}))
        with store.noting(IDENTITY, {"model": "m", "max_length": 64}):
            pass
        export_parquet(store, exported, IDENTITY)
    content = exported.read_bytes()
    start = len(content) - 3000 if draw.random() < 1 / 3 else 0
    exported.write_bytes(content[:start] + flip(draw, content[start:]))
    refused = ""
    with LogProbStore(folder / "into.sqlite") as store:
        try:
            import_parquet(store, exported)
        except StoreError as error:
            refused = str(error)
        if _wrong(store) or store.digests().keys() - {IDENTITY}:
            return "SILENT", "wrong records", 1
        if refused:
            return (NAMED if str(exported) in refused else "RAW"), refused, 1
        is_all = (
            all(v is not None for v in _get(store)) and len(store.probes(IDENTITY)) == len(store.passes(IDENTITY)) == 1
        )
    return (HARMLESS if is_all else "LOST"), "imported", 1


def damage_rows(draw: random.Random, folder: Path) -> Trial:
    """One bit of rows that were exported with their reference sums."""
    trainer = make_trainer(folder / "out", tiny_model(), tiny_pairs(24))
    rows = with_reference_columns(trainer.train_dataset, trainer.reference, trainer.data_collator)
    path, names = folder / "rows.parquet", (*TOKEN_COLUMNS, *REFERENCE_COLUMNS)
    rows.to_parquet(path)
    path.write_bytes(flip(draw, path.read_bytes()))
    expected = [tuple(str(row[name]) for name in names) for row in rows]
    try:
        given = load_pairs(str(path), "train_data")
        found = make_trainer(folder / "out", tiny_model(), given, ref_columns="other").train_dataset
        same = [tuple(str(row[name]) for name in names) for row in found]
    except TetherError as error:
        return NAMED, str(error), 1
    return (HARMLESS if same == expected else "LOST" if set(same) < set(expected) else "SILENT"), "read", 1
