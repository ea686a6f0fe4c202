"""`kill -9` and several writers at once: nothing acknowledged is lost, no batch is halved, no number is wrong."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from support.store_cases import OTHER, fill, found, kill, start_writer, wait_for
from tether.errors import StoreError
from tether.store import LogProbStore

BATCH_SIZE, NUM_ROWS = 16, 20_000


def kill_once_and_go_on(path: Path, start: int, draw: random.Random, pace_seconds: float) -> int:
    """Starts a writer at `start`, kills it at a random moment, and returns where the next one must start."""
    writer = start_writer(path, start, start + NUM_ROWS, batch_size=BATCH_SIZE, length=50)
    if draw.random() < 0.8:  # else: kill it perhaps before it has a store at all
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(draw.random() * pace_seconds)
    else:
        time.sleep(draw.random() * 0.4)
    said = kill(writer)
    acknowledged = said[-1] if said else start
    with LogProbStore(path) as store:
        num_stored = store.count()
        # The pipe may have lost the last line to the kill; beyond it at most whole batches in flight.
        assert num_stored >= acknowledged and (num_stored - start) % BATCH_SIZE == 0
        assert num_stored <= acknowledged + 2 * BATCH_SIZE
        recent = range(max(0, start - 100), num_stored)
        assert found(store, [*recent, num_stored], length=50) == set(recent)
    return num_stored


@pytest.mark.parametrize("seed", range(4))
def test_store_loses_nothing_when_its_writer_is_killed(tmp_path: Path, seed: int) -> None:
    kill_once_and_go_on(tmp_path / "store.sqlite", 0, random.Random(seed), pace_seconds=0.3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_store_loses_nothing_in_a_hundred_kills_of_one_store(tmp_path: Path) -> None:
    draw, num_stored = random.Random(0), 0
    for _ in range(100):
        num_stored = kill_once_and_go_on(tmp_path / "store.sqlite", num_stored, draw, pace_seconds=0.3)
    assert num_stored > 100 * BATCH_SIZE
    with LogProbStore(tmp_path / "store.sqlite") as store:
        assert store.count() == num_stored
        for start in range(0, num_stored, 1000):
            rows = range(start, min(start + 1000, num_stored))
            assert found(store, rows, length=50) == set(rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_store_loses_nothing_when_one_of_two_writers_is_killed_again_and_again(tmp_path: Path) -> None:
    path, draw = tmp_path / "store.sqlite", random.Random(1)
    survivor = start_writer(path, 1_000_000, 1_003_000, batch_size=4)
    for _ in range(25):
        victim = start_writer(path, 0, NUM_ROWS, batch_size=BATCH_SIZE)
        assert victim.stdout is not None and victim.stdout.readline() == "ready\n"
        time.sleep(draw.random() * 0.1)
        said = kill(victim)
        with LogProbStore(path) as store:
            expected = set(range(said[-1] if said else 0))
            assert found(store, expected) == expected
    assert survivor.wait(120) == 0
    with LogProbStore(path) as store:
        assert len(found(store, range(1_000_000, 1_003_000))) == 3_000


def test_store_takes_rows_from_several_programs_at_once(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"  # overlapping ranges, and all of them create the file
    writers = [start_writer(path, first, first + 1200, batch_size=8) for first in (0, 600, 1200)]
    for writer in writers:
        assert writer.stdout is not None
        said, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0 and said.endswith(f"{said.split()[-1]}\n")
    with LogProbStore(path) as store:
        assert found(store, range(3000)) == set(range(2400))
        assert store.count() == 2400


def test_store_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    writer = start_writer(path, 0, 2000, batch_size=8)
    wait_for(path.exists)
    with LogProbStore(path) as store:
        seen: set[int] = set()
        while writer.poll() is None:
            now = found(store, range(2000))
            assert seen <= now
            seen = now
            fill(store, range(3), identity=OTHER)
        assert found(store, range(2000)) == set(range(2000))


def test_store_says_who_is_in_the_way_when_a_writer_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.store.opening.PATIENCE_SECONDS", 0.2)
    path = tmp_path / "store.sqlite"
    with LogProbStore(path) as store, LogProbStore(path) as other:
        fill(store, range(3))
        with other._file.write():
            # In one process the stores share a lock that the same thread may take twice: SQLite's remains.
            with pytest.raises(StoreError, match="another process"):
                fill(store, range(3, 6))
            assert found(store, range(6)) == {0, 1, 2}
        fill(store, range(3, 6))
        assert found(store, range(6)) == set(range(6))


def test_store_is_whole_after_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    writer = start_writer(path, 0, NUM_ROWS, batch_size=BATCH_SIZE)
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    time.sleep(0.1)
    writer.send_signal(2)
    said = [int(line) for line in writer.stdout.read().split() if line.isdigit()]
    writer.wait(20)
    with LogProbStore(path) as store:
        assert found(store, range(NUM_ROWS)) >= set(range(said[-1] if said else 0))
        assert store.count() % BATCH_SIZE == 0
    assert isinstance(writer, subprocess.Popen)
