"""Broken disks, foreign files, damaged bytes: a clear error or a repair, never a wrong number, never a lost row."""

from __future__ import annotations

import logging
import os
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from support.store_cases import ME, fill, found, in_fork, key_of, log_probs_of
from tether.errors import StoreError
from tether.store import KeptProbe, LogProbStore, opening, salvage, schema

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def filled(path: Path, num_records: int = 50, length: int = 8) -> Path:
    with LogProbStore(path) as store:
        for start in range(0, num_records, 100):
            fill(store, range(start, min(start + 100, num_records)), length)
    return path


def damage(path: Path, index: int, assignment: str) -> None:
    """Changes one record behind the store's back."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE records SET {assignment} WHERE key = ?", (key_of(index),))


DAMAGES = {
    "one byte": "log_probs = CAST(substr(log_probs, 1, 31) || x'00' AS BLOB)",
    "text that is none": "log_probs = x'FF' || substr(log_probs, 2)",
    "cut short": "log_probs = substr(log_probs, 1, 16)",
    "cut short with its count": "log_probs = substr(log_probs, 1, 16), num_tokens = 4",
    "count": "num_tokens = 7",
    "larger count": "num_tokens = 1000",
    "checksum": "checksum = x'0000000000000000'",
    "text": "log_probs = 'hello', num_tokens = 'x'",
    "another's values": "(num_tokens, checksum, log_probs) = "
    "(SELECT num_tokens, checksum, log_probs FROM records WHERE id = 1)",
}


@pytest.mark.parametrize("assignment", DAMAGES.values(), ids=DAMAGES.keys())
def test_store_counts_a_damaged_record_as_missing(
    path: Path, assignment: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(filled(path), 3, assignment)
    damage(path, 5, assignment)
    keys, lengths = [key_of(i) for i in range(10)], [8] * 10
    with LogProbStore(path) as store:
        with caplog.at_level(logging.WARNING, logger="tether.store"):
            assert found(store, range(10)) == set(range(10)) - {3, 5}
            assert found(store, range(10)) == set(range(10)) - {3, 5}
        assert len(caplog.records) == 1 and str(path) in caplog.text
        assert store.missing(ME, keys, lengths) == [3, 5]
        fill(store, range(10))
        assert found(store, range(10)) == set(range(10))


def test_store_notices_damage_without_serving_it_when_asked_to_verify(path: Path) -> None:
    damage(filled(path), 3, DAMAGES["one byte"])
    with LogProbStore(path) as store:
        assert store.missing(ME, [key_of(3)], [8]) == []
        assert store.missing(ME, [key_of(3)], [8], verify=True) == [0]
        assert store.missing(ME, [key_of(3)], [8]) == [0]


def test_store_replaces_a_damaged_record_even_by_a_shorter_one(path: Path) -> None:
    damage(filled(path), 3, DAMAGES["one byte"])
    with LogProbStore(path) as store:
        fill(store, [3], length=2)
        assert found(store, [3], length=2) == {3}


def test_store_that_may_only_read_counts_damage_as_missing_too(path: Path) -> None:
    damage(filled(path), 3, DAMAGES["one byte"])
    with LogProbStore(path, read_only=True) as store:
        assert found(store, range(5)) == {0, 1, 2, 4}
        assert sum(len(batch) for batch in store.batches(ME)) == 49


def test_store_does_not_serve_records_moved_to_another_reference(path: Path) -> None:
    with closing(sqlite3.connect(filled(path))) as db, db:
        db.execute("UPDATE identities SET digest = 'another reference'")
    with LogProbStore(path) as store:
        assert store.get("another reference", [key_of(0)], [8]) == [None]


def test_store_on_a_full_disk_keeps_what_it_has_and_goes_on_later(path: Path) -> None:
    with LogProbStore(path) as store:
        fill(store, range(50))
        with store._file.read() as db:
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match=r"disk is full(.|\n)*Free space"):
            fill(store, range(100, 1100))
        assert found(store, range(1100)) == set(range(50))
        with store._file.read() as db:
            db.execute("PRAGMA max_page_count = 1000000")
        fill(store, range(100, 1100))
        assert store.count() == 1050


def test_store_survives_a_file_that_may_not_grow(path: Path) -> None:
    filled(path)

    def child() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = path.stat().st_size + 20_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        store = LogProbStore(path)
        with pytest.raises(StoreError) as refused:
            for start in range(100, 100_000, 100):
                fill(store, range(start, start + 100))
        assert found(store, range(50)) == set(range(50))
        return refused.value.instead

    assert in_fork(child)
    with LogProbStore(path) as store:
        num_written = store.count() - 50
        assert num_written % 100 == 0, "half a batch was written"
        assert found(store, range(100 + num_written)) == {*range(50), *range(100, 100 + num_written)}


@pytest.fixture
def shut_folder() -> Iterator[Path]:
    """A folder with a store in it, that a process without privileges may read and not write."""
    folder = Path(tempfile.mkdtemp())
    filled(folder / "store.sqlite")
    folder.chmod(0o555)
    (folder / "store.sqlite").chmod(0o444)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def as_stranger(body: object) -> object:
    def child() -> object:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        return body()  # type: ignore[operator]

    return in_fork(child)


def test_store_in_a_read_only_folder_is_read(shut_folder: Path) -> None:
    def body() -> bool:
        with LogProbStore(shut_folder / "store.sqlite", read_only=True) as store:
            with pytest.raises(StoreError, match="read_only"):
                fill(store, [99])
            return found(store, range(60)) == set(range(50))

    assert as_stranger(body)


def test_store_in_a_read_only_folder_is_not_opened_for_writing(shut_folder: Path) -> None:
    def body() -> str:
        with pytest.raises(StoreError) as refused:
            LogProbStore(shut_folder / "store.sqlite")
        with pytest.raises(StoreError) as refused_new:
            LogProbStore(shut_folder / "folder" / "new.sqlite")
        return f"{refused.value}{refused_new.value}"

    said = as_stranger(body)
    assert isinstance(said, str) and said.count("is not writable") == 2 and "TETHER_HOME" in said


def test_store_in_a_read_only_folder_is_not_read_without_its_last_writes(shut_folder: Path) -> None:
    shut_folder.chmod(0o755)
    (shut_folder / "store.sqlite").chmod(0o644)
    path = shut_folder / "store.sqlite"

    def leave_a_journal() -> None:
        fill(LogProbStore(path), range(50, 60))  # the child ends without closing

    in_fork(leave_a_journal)
    (shut_folder / "store.sqlite-shm").unlink()
    shut_folder.chmod(0o555)

    def body() -> object:
        try:
            with LogProbStore(path, read_only=True) as store:
                return found(store, range(60))
        except StoreError as error:
            return str(error)

    answer = as_stranger(body)
    assert answer == set(range(60)) or "last writes" in str(answer)


def test_store_that_is_only_read_must_exist(path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        LogProbStore(path, read_only=True)
    path.touch()
    with pytest.raises(StoreError, match="there is no store"):
        LogProbStore(path, read_only=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_store_refuses_files_of_others_and_leaves_them_as_they_are(path: Path, read_only: bool) -> None:
    path.write_bytes(b"these are not the bytes of a database " * 100)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="isn't an SQLite database"):
        LogProbStore(path, read_only=read_only)
    assert path.read_bytes() == before
    path.write_bytes(bytes(4096) + before)
    with pytest.raises(StoreError, match="the start of the file is zeros"):
        LogProbStore(path, read_only=read_only)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE customers (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        LogProbStore(path, read_only=read_only)
    assert path.read_bytes() == before
    with pytest.raises(StoreError):
        LogProbStore(path.parent, read_only=read_only)  # a folder


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("version", [0, 1, 99])
def test_store_refuses_another_format_version(path: Path, version: int, read_only: bool) -> None:
    with closing(sqlite3.connect(filled(path))) as db:
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=rf"format version {version}(.|\n)*reads format version {schema.SCHEMA_VERSION}"
    ):
        LogProbStore(path, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [2, 3])
def test_store_of_an_older_format_is_brought_up_to_date(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as db:  # written by a Tether of that version
        db.executescript(Path(__file__).with_name(f"version_{version}.sql").read_text())
    with pytest.raises(StoreError, match="older format"):
        LogProbStore(path, read_only=True)
    probe = KeptProbe((((1, 2), (3, 4)),), np.array([-1, -2], np.float32), {})
    with LogProbStore(path) as store:
        assert found(store, range(50)) == set(range(50)) and len(store.probes(ME)) == version - 2
        assert [(of.num_put, of.num_records) for of in store.identities()] == [(50, 50)] and not store.passes(ME)
        store.put_probe(ME, probe)
    with LogProbStore(path, read_only=True) as store:
        assert found(store, range(50)) == set(range(50)) and len(store.probes(ME)) == 1


FOREIGN = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON identities BEGIN DELETE FROM records; END",
    "a view": "CREATE VIEW v AS SELECT 1",
    "a view for a table": "ALTER TABLE records RENAME TO r; CREATE VIEW records AS SELECT * FROM r",
    "a table": "CREATE TABLE extra (x)",
    "no index": "DROP INDEX records_by_key",
}


@pytest.mark.parametrize("statement", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_with_another_schema_is_no_store(path: Path, statement: str, read_only: bool) -> None:
    with closing(sqlite3.connect(filled(path))) as db:
        db.executescript(statement)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"Cannot use the log-prob store(.|\n)*tether store salvage"):
        LogProbStore(path, read_only=read_only)
    assert path.read_bytes() == before


def test_a_trigger_that_comes_while_a_store_is_open_does_nothing(path: Path) -> None:
    with LogProbStore(filled(path)) as store:
        with closing(sqlite3.connect(path)) as db:
            db.executescript(FOREIGN["a trigger"])
        with pytest.raises(StoreError, match="a trigger `t`"):
            fill(store, range(5), identity="new")
        assert store.count() == 50


def test_a_store_knows_how_many_records_it_was_given(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def put_and_there(store: LogProbStore) -> tuple[int, int]:
        (of,) = store.identities()
        return of.num_put, of.num_records

    with LogProbStore(filled(path)) as store:
        fill(store, range(40, 60), length=9)  # ten known, and longer
        damage(path, 3, DAMAGES["one byte"])
        found(store, range(10))
        assert put_and_there(store) == (59, 59), "a damaged record is removed, and counted as that"
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("DELETE FROM records WHERE id > 40")
        assert put_and_there(store) == (59, 39) and not store.find_damage()
        with caplog.at_level(logging.WARNING), store.noting(ME, {"set": "train"}):
            assert "20 records of the reference" in caplog.text
            fill(store, range(60))
        assert put_and_there(store) == (60, 60)
        assert [dict(done.about) for done in store.passes(ME) if done.ended] == [{"set": "train"}]
        store.remove(ME)
        assert store.identities() == [] and store.passes(ME) == []


def test_a_pass_whose_end_is_lost_with_the_write_ahead_log_is_seen(path: Path) -> None:
    def killed_in_a_pass() -> None:
        store = LogProbStore(path)
        with store.noting(ME, {"set": "train"}):
            fill(store, range(50))
            os._exit(0)

    with pytest.raises(AssertionError, match="died"):
        in_fork(killed_in_a_pass)
    path.with_name(path.name + "-wal").unlink()
    with LogProbStore(path) as store:
        assert store.count() == 0 and [done.ended for done in store.passes(ME)] == [None]


def test_a_write_ahead_log_that_is_cut_after_a_pass_takes_nothing_back(path: Path) -> None:
    def killed_after_a_pass() -> None:
        store = LogProbStore(path)
        with store.noting(ME, {"set": "train"}):
            for start in range(0, 100, 10):
                fill(store, range(start, start + 10))
        os._exit(0)

    with pytest.raises(AssertionError, match="died"):
        in_fork(killed_after_a_pass)
    log = path.with_name(path.name + "-wal")
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    with LogProbStore(path) as store:
        assert found(store, range(100)) == set(range(100))


def test_a_pass_ends_at_once_while_another_process_writes(path: Path) -> None:
    with LogProbStore(path) as store, LogProbStore(path) as other:
        fill(store, range(3))
        with other._file.write():
            start = time.perf_counter()
            store._file.settle()
            assert time.perf_counter() - start < 5
        with other._file.read() as db:
            (patience,) = db.execute("PRAGMA busy_timeout").fetchone()
        assert patience > 1000
        assert found(store, range(3)) == {0, 1, 2}


def test_store_works_where_a_write_ahead_log_cannot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "is_on_network", lambda path: True)
    with LogProbStore(path) as store, LogProbStore(path) as other:
        with store._file.read() as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        fill(store, range(10))
        fill(other, range(10, 20))
        assert found(store, range(30)) == set(range(20))
        assert found(other, range(30)) == set(range(20))


def serves_only_truth(path: Path, num_records: int) -> int:
    """How many records come back from a damaged file; every one of them is right. -1: it said a StoreError."""
    try:
        with LogProbStore(path) as store:
            for batch in store.batches(ME, batch_size=64):
                assert {key for key, _ in batch} <= {key_of(i) for i in range(num_records)}
            return len(found(store, range(num_records), length=100))
    except StoreError as error:
        assert error.instead
        return -1


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return filled(tmp_path_factory.mktemp("original") / "store.sqlite", 600, length=100).read_bytes()


@pytest.mark.parametrize("percent", [12, 37, 50, 73, 95, 99])
def test_store_cut_short_says_so_and_can_be_salvaged(path: Path, original: bytes, percent: int) -> None:
    path.write_bytes(original[: len(original) * percent // 100])
    with LogProbStore(path.with_name("fresh.sqlite")) as fresh:
        num_saved = salvage(path, fresh)
        assert len(found(fresh, range(600), length=100)) == num_saved == fresh.count()
        assert num_saved > 600 * (percent - 15) / 100
    assert serves_only_truth(path, 600) == -1


@pytest.mark.parametrize("seed", range(40))
def test_store_with_bytes_overwritten_anywhere_serves_only_truth(path: Path, original: bytes, seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(original)
    for _ in range(draw.choice([1, 5, 50])):
        start, length = draw.randrange(len(content)), draw.choice([1, 4, 100, 4096])
        stop = min(start + length, len(content))
        content[start:stop] = draw.randbytes(stop - start)
    path.write_bytes(content)
    with LogProbStore(path.with_name("fresh.sqlite")) as fresh:
        try:
            num_saved = salvage(path, fresh)
        except StoreError as error:
            assert error.instead
        else:
            assert len(found(fresh, range(600), length=100)) == num_saved == fresh.count()
    serves_only_truth(path, 600)


def test_store_salvages_all_but_the_damaged_pages(path: Path, original: bytes) -> None:
    content = bytearray(original)
    size = int.from_bytes(content[16:18], "big")  # of a page, from the file's header
    page = len(content) // 2 // size
    content[page * size : (page + 3) * size] = bytes(3 * size)
    path.write_bytes(content)
    with LogProbStore(path.with_name("fresh.sqlite")) as fresh:
        assert salvage(path, fresh) > 600 - 3 * 20
        assert path.read_bytes() == bytes(content)


@pytest.mark.parametrize("lost", [slice(100, 2000), slice(2000, 8192)])
def test_store_that_lost_the_names_of_its_tables_says_that_nothing_can_be_saved(
    path: Path, original: bytes, lost: slice
) -> None:
    content = bytearray(original)
    content[lost] = b"x" * (lost.stop - lost.start)
    path.write_bytes(content)
    with LogProbStore(path.with_name("fresh.sqlite")) as fresh:
        with pytest.raises(StoreError, match="no record can be found") as error:
            salvage(path, fresh)
        assert "tether store salvage" not in str(error.value) and fresh.count() == 0


def test_store_copied_by_hand_while_in_use_serves_only_truth(path: Path) -> None:
    with LogProbStore(path) as store:
        for start in range(0, 2000, 50):
            fill(store, range(start, start + 50), length=100)
            if start % 400 == 0:  # only the main file, as `cp` would: the write-ahead log stays behind
                copied = in_fork(path.read_bytes)
                copy = path.with_name(f"copy-{start}.sqlite")
                copy.write_bytes(copied)
                serves_only_truth(copy, 2000)
        assert found(store, range(2000), length=100) == set(range(2000))


def test_store_keeps_numbers_exactly(path: Path) -> None:
    extremes = np.array([-0.0, 0.0, -1e-45, -3.4e38, -1.0000001], np.float32)
    with LogProbStore(path) as store:
        store.put(ME, [key_of(0)], [extremes])
    with LogProbStore(path) as store:
        (answer,) = store.get(ME, [key_of(0)], [5])
        assert answer is not None and answer.tobytes() == extremes.tobytes()
        assert store.get(ME, [key_of(1)], [1]) == [None]
    assert log_probs_of(0, 3).dtype == np.float32
