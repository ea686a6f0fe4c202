"""Parquet files, other stores, copies, pruning: everything arrives, and only where it belongs."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.store_cases import ME, OTHER, fill, found, in_fork, key_of, log_probs_of, start_writer, wait_for
from tether.errors import StoreError
from tether.store import KeptProbe, LogProbStore, export_parquet, import_parquet, merge, prune
from tether.store.replacing import PARQUET, replacing


@pytest.fixture
def store(tmp_path: Path) -> LogProbStore:
    store = LogProbStore(tmp_path / "store.sqlite")
    fill(store, range(0, 1300), length=5)
    store.put(ME, [key_of(9999)], [np.empty(0, np.float32)], description={"kind": "explicit"})
    fill(store, range(10), identity=OTHER)
    return store


@pytest.fixture
def other(tmp_path: Path) -> LogProbStore:
    return LogProbStore(tmp_path / "other.sqlite")


def test_store_comes_back_from_parquet_as_it_was(store: LogProbStore, other: LogProbStore) -> None:
    file = store.path.with_suffix(".parquet")
    assert export_parquet(store, file, ME) == 1301
    assert import_parquet(other, file) == 1301
    assert found(other, range(1400), length=5) == set(range(1300))
    assert other.get(ME, [key_of(9999)], [0])[0] is not None
    assert other.describe(ME) == {"kind": "explicit"}
    assert other.count(OTHER) == 0
    assert import_parquet(other, file) == 0
    again = file.with_name("again.parquet")
    assert export_parquet(other, again, ME) == 1301
    assert again.read_bytes() == file.read_bytes()


def test_store_exports_columns_that_anyone_can_read(store: LogProbStore) -> None:
    file = store.path.with_suffix(".parquet")
    export_parquet(store, file, OTHER)
    table = pq.read_table(file)
    assert table.schema.names == ["key", "log_probs", "checksum"]
    values = dict(zip(table["key"].to_pylist(), table["log_probs"].to_pylist(), strict=True))
    np.testing.assert_array_equal(np.float32(values[key_of(3)]), log_probs_of(3, 8, OTHER))
    assert table["key"].to_pylist() == sorted(values)


def test_store_imports_files_of_others_under_the_identity_that_is_named(other: LogProbStore) -> None:
    file = other.path.with_suffix(".parquet")
    columns = {
        "key": [key_of(i) for i in range(3)],
        "log_probs": [list(log_probs_of(i, 5)) for i in range(3)],
    }
    pq.write_table(pa.table({**columns, "note": ["a", "b", "c"]}), file)
    with pytest.raises(StoreError, match="identity"):
        import_parquet(other, file)
    assert import_parquet(other, file, ME) == 3
    assert found(other, range(4), length=5) == {0, 1, 2}


def test_store_does_not_import_under_another_reference(store: LogProbStore, other: LogProbStore) -> None:
    file = store.path.with_suffix(".parquet")
    export_parquet(store, file, ME)
    with pytest.raises(StoreError, match=rf"{ME}, not of {OTHER}"):
        import_parquet(other, file, OTHER)
    assert other.count() == 0


@pytest.mark.parametrize("bad", [[[-1.0, float("nan")]], [None], [[-1.0, None]]])
def test_store_refuses_imports_with_holes(other: LogProbStore, bad: list[object]) -> None:
    file = other.path.with_suffix(".parquet")
    pq.write_table(pa.table({"key": [key_of(0)], "log_probs": pa.array(bad, pa.list_(pa.float64()))}), file)
    with pytest.raises(StoreError, match=r"nan|empty cells"):
        import_parquet(other, file, ME)
    assert other.count() == 0


def test_an_export_with_any_bit_flipped_brings_no_wrong_record(store: LogProbStore, tmp_path: Path) -> None:
    file, flipped = tmp_path / "scores.parquet", tmp_path / "flipped.parquet"
    store.put_probe(OTHER, KeptProbe((((1, 2), (3, 4)),), np.array([-1, -2], np.float32), {}))
    export_parquet(store, file, OTHER)
    content, draw, num_refused = file.read_bytes(), random.Random(0), 0
    for number in range(40):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        flipped.write_bytes(changed)
        with LogProbStore(tmp_path / f"{number}.sqlite") as other:
            try:
                import_parquet(other, flipped)
            except StoreError:
                num_refused += 1
            else:  # the bit means nothing
                assert found(other, range(10), identity=OTHER) == set(range(10)) and other.probes(OTHER)
            assert set(other.digests()) <= {OTHER}
            found(other, range(10), identity=OTHER)
    assert num_refused > 20


@pytest.mark.parametrize("change", ["a value", "a row less", "two rows change places", "no checksums", "no metadata"])
def test_an_export_that_was_rewritten_is_refused(store: LogProbStore, other: LogProbStore, change: str) -> None:
    file = store.path.with_suffix(".parquet")
    export_parquet(store, file, OTHER)
    table, about = pq.read_table(file), pq.ParquetFile(file).metadata.metadata[b"tether"]
    rows = table.to_pylist()
    if change == "a value":
        rows[3]["log_probs"][2] -= 1
    if change == "a row less":
        del rows[-1]
    if change == "two rows change places":
        rows[2], rows[3] = rows[3], rows[2]
    changed = pa.Table.from_pylist(rows, table.schema).replace_schema_metadata({"tether": about})
    if change == "no checksums":
        changed = changed.drop_columns(["checksum"])
    pq.write_table(changed.replace_schema_metadata({}) if change == "no metadata" else changed, file)
    with pytest.raises(StoreError, match=r"Cannot (import|read)"):
        import_parquet(other, file, OTHER)
    found(other, range(10), identity=OTHER)


def test_records_without_checksums_are_read_and_called_unproven(
    store: LogProbStore, other: LogProbStore, caplog: pytest.LogCaptureFixture
) -> None:
    file = store.path.with_suffix(".parquet")
    about = json.dumps({"format": 1, "identity": OTHER, "description": None})  # as Tether wrote it once
    columns = {"key": [key_of(0)], "log_probs": [list(log_probs_of(0, 8, OTHER))]}
    pq.write_table(pa.table(columns).replace_schema_metadata({"tether": about}), file)
    assert import_parquet(other, file) == 1 and found(other, [0], identity=OTHER) == {0}
    assert "has no checksums" in caplog.text
    pq.write_table(pa.table(columns | {"log_probs": [[-1.0, 5.0]]}), file)
    with pytest.raises(StoreError, match="no log-prob is above 0"):
        import_parquet(other, file, ME)


def test_what_is_written_replaces_only_files_of_its_kind(store: LogProbStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="what is there is an SQLite file"):
        export_parquet(store, store.path, OTHER)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    for write in (lambda: export_parquet(store, rows, OTHER), lambda: store.copy_to(rows)):
        with pytest.raises(StoreError, match="would be lost"):
            write()
    for place in (store.path, tmp_path / "busy.sqlite"):
        with LogProbStore(place), pytest.raises(StoreError, match="a store in use is there"):
            store.copy_to(place)
    assert rows.read_text() == "{}" and store.count() == 1311


def test_an_export_that_finds_no_room_leaves_the_older_one(store: LogProbStore, tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    export_parquet(store, path, OTHER)
    before = path.read_bytes()

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (33_000, 33_000))  # enough to open the store
        export_parquet(LogProbStore(store.path, read_only=True), path, ME)

    with pytest.raises(StoreError, match=r"Cannot write(.|\n)*disk space"):
        in_fork(child)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_unfinished_files_follow_no_link_and_are_removed_when_their_writer_is_dead(
    store: LogProbStore, tmp_path: Path
) -> None:
    file, victim = tmp_path / "scores.parquet", tmp_path / "victim"
    victim.write_text("mine")
    for process in range(os.getpid() - 2, os.getpid() + 3):
        (tmp_path / f"{file.name}.{process}.tmp").symlink_to(victim)

    def dies_while_writing() -> None:
        with replacing(file, PARQUET):
            os._exit(0)

    with pytest.raises(AssertionError, match="died"):
        in_fork(dies_while_writing)
    assert len(list(tmp_path.glob("*.tmp"))) == 6
    with replacing(tmp_path / "other.parquet", PARQUET) as other, replacing(file, PARQUET) as unfinished:
        assert len([path for path in tmp_path.glob("*.tmp") if not path.is_symlink()]) == 2
        for path in (other, unfinished):
            path.write_bytes(PARQUET)
        with replacing(file, PARQUET):
            assert unfinished.exists(), "its writer lives"
    export_parquet(store, file, OTHER)
    assert victim.read_text() == "mine" and not [path for path in tmp_path.glob("*.tmp") if not path.is_symlink()]


def test_store_says_what_is_wrong_with_a_file(store: LogProbStore) -> None:
    file = store.path.with_suffix(".parquet")
    pq.write_table(pa.table({"prompt": ["x"]}), file)
    with pytest.raises(StoreError, match="prompt"):
        import_parquet(store, file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(StoreError, match="Parquet"):
        import_parquet(store, file)
    with pytest.raises(StoreError, match="Parquet"):
        import_parquet(store, file.with_name("absent.parquet"))
    with pytest.raises(StoreError, match="Parquet"):
        export_parquet(store, file.parent / "no folder" / "x.parquet", ME)
    with pytest.raises(StoreError, match=rf"nobody(.|\n)*Choose one of {ME}, {OTHER}"):
        export_parquet(store, file, "nobody")


def test_store_merges_what_it_lacks(store: LogProbStore, other: LogProbStore) -> None:
    fill(other, range(1290, 1310), length=5)  # ten of them known
    fill(other, range(5), length=8)  # longer than what is known
    fill(other, range(20), identity=OTHER, length=3)  # ten known, and longer
    assert merge(store, other.path) == 10 + 5 + 10
    assert found(store, range(1400), length=5) == set(range(1310))
    assert found(store, range(10), length=8) == set(range(5))
    assert found(store, range(20), length=3, identity=OTHER) == set(range(20))
    assert found(store, range(20), length=8, identity=OTHER) == set(range(10))
    assert other.count() == 45
    assert merge(store, other.path) == 0


def test_store_merges_another_that_is_being_written(other: LogProbStore) -> None:
    busy = other.path.with_name("busy.sqlite")
    writer = start_writer(busy, 0, 2000, batch_size=8)
    wait_for(busy.exists)
    wait_for(lambda: LogProbStore(busy).count() > 0)
    while writer.poll() is None:
        merge(other, busy)
        found(other, range(2000))
    merge(other, busy)
    assert found(other, range(2000)) == set(range(2000))


def test_store_does_not_merge_itself_or_nothing(store: LogProbStore) -> None:
    with pytest.raises(StoreError, match="itself"):
        merge(store, store.path)
    with pytest.raises(StoreError, match="there is no store"):
        merge(store, store.path.with_name("absent.sqlite"))


def test_store_is_copied_whole_while_in_use(store: LogProbStore) -> None:
    copy = store.path.with_name("copy.sqlite")
    writer = start_writer(store.path, 2000, 4000, batch_size=8, length=5)
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    acknowledged = int(writer.stdout.readline())
    store.copy_to(copy)
    with LogProbStore(copy) as copied:
        assert found(copied, range(acknowledged), length=5) >= {*range(1300), *range(2000, acknowledged)}
    assert writer.communicate(timeout=60) and writer.returncode == 0
    assert not list(copy.parent.glob("*.tmp"))


def test_store_prunes_one_reference_and_gets_smaller(store: LogProbStore) -> None:
    fill(store, range(25_000), length=20)
    store.close()
    size = store.path.stat().st_size
    store = LogProbStore(store.path)
    num_records = store.count(ME)
    assert prune(store, identity=ME) == num_records
    assert list(store.digests()) == [OTHER]
    assert found(store, range(20), identity=OTHER) == set(range(10))
    store.close()
    assert store.path.stat().st_size < size / 10


def test_store_prunes_by_age(store: LogProbStore) -> None:
    month_ago = datetime.now(UTC) - timedelta(days=30)
    with store._file.write() as db:
        db.execute("UPDATE identities SET last_used = ? WHERE digest = ?", (month_ago.timestamp(), OTHER))
    assert prune(store, older_than=timedelta(days=31)) == 0
    assert prune(store, identity=ME, older_than=timedelta(days=29)) == 0
    assert prune(store, older_than=timedelta(days=29)) == 10
    assert list(store.digests()) == [ME]


def test_store_is_not_pruned_of_everything_by_a_slip(store: LogProbStore) -> None:
    slips: list[dict[str, Any]] = [{}, {"identity": ""}, {"older_than": timedelta(0)}, {"older_than": timedelta(-1)}]
    for slip in slips:
        with pytest.raises(StoreError, match="everything"):
            prune(store, **slip)
    assert store.count() == 1311


def test_merge_brings_the_probes_of_both_stores_and_prune_removes_them(tmp_path: Path) -> None:
    """Answers that differ are both kept: a run compares each with its reference."""
    texts = (((1, 2), (3, 4)), ((5,), (6,)))
    probes = [KeptProbe(texts, np.array([-1, -np.inf, number], np.float32), {"torch": "2"}) for number in range(2)]
    one, other = (LogProbStore(tmp_path / name) for name in "ab")
    one.put_probe(ME, probes[0])
    for probe in probes:
        other.put_probe(ME, probe)
    merge(one, other.path)
    assert [probe.log_probs.tolist() for probe in one.probes(ME)] == [probe.log_probs.tolist() for probe in probes]
    assert one.probes(ME)[0].texts == texts and one.probes(ME)[0].length == 4 and one.probes(OTHER) == []
    assert (
        KeptProbe.of_fields(json.loads(json.dumps(probes[0].as_fields()))).log_probs.tobytes()
        == probes[0].log_probs.tobytes()
    )
    prune(one, identity=ME)
    assert one.probes(ME) == [] and not one.digests()


def test_a_damaged_probe_counts_as_none(tmp_path: Path) -> None:
    with LogProbStore(tmp_path / "a") as store:
        for number in range(2):
            store.put_probe(ME, KeptProbe((((1,), (2,)),), np.array([-number], np.float32), {}))
    with closing(sqlite3.connect(tmp_path / "a")) as db, db:
        db.execute("UPDATE probes SET about = replace(about, '1', '7') WHERE id = 1")
    with LogProbStore(tmp_path / "a") as store:
        assert [probe.log_probs.tolist() for probe in store.probes(ME)] == [[-1]]
