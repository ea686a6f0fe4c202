"""What a store promises its callers, on a healthy disk."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from support.store_cases import ME, OTHER, SOURCE, fill, found, in_fork, key_of, log_probs_of
from tether.errors import StoreError
from tether.store import LogProbStore, default_store_path


@pytest.fixture
def store(tmp_path: Path) -> LogProbStore:
    return LogProbStore(tmp_path / "store.sqlite")


def test_store_gives_back_what_was_put(store: LogProbStore) -> None:
    fill(store, range(5))
    answers = store.get(ME, [key_of(3), key_of(99), key_of(0)], [8, 8, 8])
    np.testing.assert_array_equal(answers[0], log_probs_of(3, 8))
    assert answers[1] is None
    np.testing.assert_array_equal(answers[2], log_probs_of(0, 8))


def test_store_gives_arrays_of_float32_that_may_be_changed(store: LogProbStore) -> None:
    fill(store, [0])
    first, second = store.get(ME, [key_of(0), key_of(0)], [8, 8])
    assert first is not None and first.dtype == np.float32 and first.shape == (8,)
    first += 1.0
    np.testing.assert_array_equal(second, log_probs_of(0, 8))


def test_store_serves_every_shorter_length_and_no_longer_one(store: LogProbStore) -> None:
    fill(store, [0], length=8)
    key = key_of(0)
    for length in range(9):
        (answer,) = store.get(ME, [key], [length])
        np.testing.assert_array_equal(answer, log_probs_of(0, length))
    assert store.get(ME, [key], [9]) == [None]
    assert store.missing(ME, [key, key, key_of(1)], [9, 8, 0]) == [0, 2]


def test_store_keeps_the_longer_of_two_records(store: LogProbStore) -> None:
    fill(store, [0], length=4)
    fill(store, [0], length=8)
    fill(store, [0], length=2)
    assert found(store, [0], length=8) == {0}
    assert store.count() == 1


def test_store_keeps_the_older_of_two_equally_long_records(store: LogProbStore) -> None:
    fill(store, [0])
    store.put(ME, [key_of(0)], [np.zeros(8, np.float32)])
    assert found(store, [0]) == {0}


def test_store_takes_the_longest_of_a_key_that_comes_twice_in_one_call(store: LogProbStore) -> None:
    keys = [key_of(0)] * 3
    store.put(ME, keys, [log_probs_of(0, n) for n in (3, 8, 5)])
    assert found(store, [0]) == {0}
    assert store.count() == 1


def test_store_keeps_references_apart(store: LogProbStore) -> None:
    fill(store, [0, 1], identity=ME)
    fill(store, [1, 2], identity=OTHER)
    assert found(store, range(3), identity=ME) == {0, 1}
    assert found(store, range(3), identity=OTHER) == {1, 2}
    assert (store.count(), store.count(ME), store.count("nobody")) == (4, 2, 0)
    assert store.missing("nobody", [key_of(0)], [1]) == [0]


def test_store_keeps_responses_of_no_tokens(store: LogProbStore) -> None:
    store.put(ME, [key_of(0)], [np.empty(0, np.float32)])
    (answer,) = store.get(ME, [key_of(0)], [0])
    assert answer is not None and answer.shape == (0,)
    assert store.missing(ME, [key_of(0)], [0]) == []


def test_store_rounds_other_floats_to_float32(store: LogProbStore) -> None:
    store.put(ME, [key_of(0)], [np.array([-0.1, -1e-3], np.float64)])
    (answer,) = store.get(ME, [key_of(0)], [2])
    np.testing.assert_array_equal(answer, np.array([-0.1, -1e-3], np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_store_refuses_what_is_not_finite_and_names_the_row(store: LogProbStore, bad: float) -> None:
    values = [log_probs_of(0, 8), np.array([-1.0, bad, -1.0])]
    with pytest.raises(StoreError, match=rf"{key_of(1).hex()} \(entry 1.*token 1 of 3"):
        store.put(ME, [key_of(0), key_of(1)], values)
    assert store.count() == 0


def test_store_refuses_calls_that_do_not_fit_together(store: LogProbStore) -> None:
    with pytest.raises(StoreError, match="2 keys with 1 values"):
        store.put(ME, [key_of(0), key_of(1)], [log_probs_of(0, 8)])
    with pytest.raises(StoreError, match="1 keys with 2 lengths"):
        store.get(ME, [key_of(0)], [1, 2])
    with pytest.raises(StoreError, match="16 bytes"):
        store.missing(ME, [b"short"], [1])
    with pytest.raises(StoreError, match="shape"):
        store.put(ME, [key_of(0)], [np.zeros((1, 4), np.float32)])


def test_store_answers_more_keys_than_one_statement_takes(store: LogProbStore) -> None:
    fill(store, range(0, 3000, 2), length=2)
    assert found(store, range(3000), length=2) == set(range(0, 3000, 2))
    keys = [key_of(i) for i in range(3000)]
    assert store.missing(ME, keys, [2] * 3000) == list(range(1, 3000, 2))
    assert store.missing(ME, keys, [2] * 3000, verify=True) == list(range(1, 3000, 2))


def test_store_of_nothing_asked_answers_nothing(store: LogProbStore) -> None:
    store.put(ME, [], [])
    assert store.get(ME, [], []) == [] and store.missing(ME, [], []) == [] and store.identities() == []


def test_store_tells_what_it_holds(store: LogProbStore) -> None:
    before = datetime.now(UTC)
    fill(store, [0, 1], length=4)
    store.put(ME, [key_of(2)], [log_probs_of(2, 3)], description={"kind": "explicit", "dtype": "bf16"})
    store.put(ME, [key_of(3)], [log_probs_of(3, 3)], description={"kind": "something else"})
    (held,) = store.identities()
    assert (held.digest, held.num_records, held.num_tokens) == (ME, 4, 14)
    assert held.description == {"kind": "explicit", "dtype": "bf16"} == store.describe(ME)
    assert held.size_bytes == 4 * (16 + 8) + 14 * 4
    assert before <= held.created <= held.last_used <= datetime.now(UTC)
    assert store.digests() == {ME: held.last_used}


def test_store_notes_once_a_day_that_it_was_read(store: LogProbStore) -> None:
    fill(store, [0])
    long_ago = (datetime.now(UTC) - timedelta(days=3)).timestamp()
    with store._file.write() as db:
        db.execute("UPDATE identities SET last_used = ?", (long_ago,))
    with LogProbStore(store.path, read_only=True) as reader:
        found(reader, [0])
    assert store.digests()[ME].timestamp() == long_ago
    found(store, [0])
    assert datetime.now(UTC) - store.digests()[ME] < timedelta(minutes=1)


def test_store_iterates_in_batches_while_it_is_written_to(store: LogProbStore) -> None:
    fill(store, range(100))
    seen: dict[bytes, np.ndarray] = {}
    for batch in store.batches(ME, batch_size=7):
        assert len(batch) <= 7
        seen.update(batch)
        fill(store, range(200, 210))
    for index in range(100):
        np.testing.assert_array_equal(seen[key_of(index)], log_probs_of(index, 8))


def test_store_is_there_again_after_close(store: LogProbStore) -> None:
    fill(store, range(5))
    with store:
        pass
    with pytest.raises(StoreError, match="closed"):
        store.count()
    with LogProbStore(store.path) as again:
        assert found(again, range(6)) == set(range(5))


def test_store_lies_under_tether_home_by_default(tether_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LogProbStore() as store:
        assert store.path == tether_home / "reference-log-probs.sqlite" == default_store_path()
        assert store.path.is_file()
    monkeypatch.delenv("TETHER_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    if sys.platform == "linux":
        assert default_store_path() == Path("/somewhere/cache/tether/reference-log-probs.sqlite")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TETHER_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(StoreError, match="no home folder") as caught:
        default_store_path()
    assert "TETHER_HOME" in caught.value.instead


def test_store_survives_pickling_into_another_program(store: LogProbStore) -> None:
    fill(store, range(3))
    script = (
        f"import sys, pickle; sys.path.insert(0, {str(SOURCE)!r});"
        f"store = pickle.loads({pickle.dumps(store)!r}); print(store.count())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "3"
    again = pickle.loads(pickle.dumps(LogProbStore(store.path, read_only=True)))
    assert again.read_only and found(again, range(3)) == {0, 1, 2}


def test_store_serves_parent_and_child_after_a_fork(store: LogProbStore) -> None:
    fill(store, range(10))

    def child() -> set[int]:
        fill(store, range(10, 20))
        return found(store, range(30))

    assert in_fork(child) == set(range(20))
    fill(store, range(20, 30))
    assert found(store, range(30)) == set(range(30))


def test_store_of_a_child_outlives_its_parents(store: LogProbStore) -> None:
    fill(store, range(10))

    def child() -> int:
        fill(store, range(10, 20))
        in_fork(lambda: fill(store, range(20, 30)))
        store.close()  # a child's close must not take the grandchild's, or the parent's, rows along
        return 0

    in_fork(child)
    fill(store, range(30, 40))
    store.close()
    with LogProbStore(store.path) as again:
        assert found(again, range(40)) == set(range(40))


def test_store_may_be_forked_while_other_threads_use_it(store: LogProbStore) -> None:
    fill(store, range(20))
    done = threading.Event()
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            step = 0
            while not done.is_set():
                fill(store, range(first + step, first + step + 4))
                assert found(store, range(20)) == set(range(20))
                step += 4
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (10_000, 20_000)]
    for thread in threads:
        thread.start()
    try:
        for round in range(15):
            in_fork(lambda start=100 + 4 * round: fill(store, range(start, start + 4)), patience_seconds=20)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert found(store, range(100, 160)) == set(range(100, 160))


def test_store_starts_afresh_where_its_file_was_removed(store: LogProbStore) -> None:
    fill(store, range(5))
    store.path.unlink()
    fill(store, range(5, 10))
    with LogProbStore(store.path) as again:
        assert found(again, range(10)) == set(range(5, 10))
