"""The store against a dict, through reopening, second writers, other processes, damage and `kill -9`."""

from __future__ import annotations

import os
import signal
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from support.store_cases import ME, OTHER, in_fork, key_of, log_probs_of
from tether.errors import StoreError
from tether.store import LogProbStore, salvage

NUM_KEYS, MAX_LENGTH = 12, 6
identities = st.sampled_from([ME, OTHER])
rows = st.lists(st.tuples(st.integers(0, NUM_KEYS - 1), st.integers(0, MAX_LENGTH)), min_size=1, max_size=6)
Rows = list[tuple[int, int]]


def put(store: LogProbStore, identity: str, batch: Rows) -> None:
    values = [log_probs_of(i, length, identity) for i, length in batch]
    store.put(identity, [key_of(i) for i, _ in batch], values)


class StoreMachine(RuleBasedStateMachine):
    """`model[(identity, index)]` is the length of the longest record that was put."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "store.sqlite"
        self.store = LogProbStore(self.path)
        self.second = LogProbStore(self.path)
        self.model: dict[tuple[str, int], int] = {}

    def teardown(self) -> None:
        self.store.close()
        self.second.close()
        self.folder.cleanup()

    def note(self, identity: str, batch: Rows) -> None:
        for index, length in batch:
            self.model[identity, index] = max(self.model.get((identity, index), -1), length)

    @rule(identity=identities, batch=rows)
    def put(self, identity: str, batch: Rows) -> None:
        put(self.store, identity, batch)
        self.note(identity, batch)

    @rule(identity=identities, batch=rows)
    def put_by_second_connection(self, identity: str, batch: Rows) -> None:
        put(self.second, identity, batch)
        self.note(identity, batch)

    @rule(identity=identities, batch=rows)
    def put_by_other_process(self, identity: str, batch: Rows) -> None:
        in_fork(lambda: put(self.store, identity, batch))
        self.note(identity, batch)

    @rule(identity=identities, batch=rows, bad=st.sampled_from([np.nan, np.inf, -np.inf]))
    def put_something_not_finite(self, identity: str, batch: Rows, bad: float) -> None:
        values = [log_probs_of(i, length, identity) for i, length in batch]
        values[-1] = np.append(values[-1], np.float32(bad))
        with pytest.raises(StoreError, match="would spoil"):
            self.store.put(identity, [key_of(i) for i, _ in batch], values)

    @rule(identity=identities, batches=st.lists(rows, min_size=1, max_size=4), microseconds=st.integers(0, 4000))
    def kill_other_process(self, identity: str, batches: list[Rows], microseconds: int) -> None:
        """Batches before the kill are there; the one in flight is there or not, but not by half."""
        from_child, to_parent = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for batch in batches:
                    put(self.store, identity, batch)
                    os.write(to_parent, b".")
            finally:
                os._exit(0)
        os.close(to_parent)
        time.sleep(microseconds / 1e6)
        os.kill(child, signal.SIGKILL)
        with os.fdopen(from_child, "rb") as pipe:
            num_finished = len(pipe.read())
        os.waitpid(child, 0)
        for batch in batches[:num_finished]:
            self.note(identity, batch)
        if num_finished < len(batches):
            in_flight = batches[num_finished]
            needs = {i: max(length for j, length in in_flight if j == i) for i, _ in in_flight}
            news = [i for i, length in needs.items() if self.model.get((identity, i), -1) < length]
            lacking = self.store.missing(identity, [key_of(i) for i in news], [needs[i] for i in news])
            assert len(lacking) in (0, len(news)), "a batch was written by half"
            if not lacking:
                self.note(identity, in_flight)

    @rule(choice=st.integers(0, 1000), offset=st.integers(0, 40), flip=st.integers(1, 255))
    def damage_a_record(self, choice: int, offset: int, flip: int) -> None:
        if not self.model:  # no precondition: what is there depends on the moment of a kill, draws must not
            return
        identity, index = sorted(self.model)[choice % len(self.model)]
        where = "WHERE key = ? AND identity = (SELECT id FROM identities WHERE digest = ?)"
        with closing(sqlite3.connect(self.path)) as db, db:
            row = db.execute(f"SELECT checksum, log_probs FROM records {where}", (key_of(index), identity)).fetchone()
            checksum, blob = bytearray(row[0]), bytearray(row[1])
            target = blob if offset < len(blob) else checksum
            target[offset % len(target)] ^= flip
            db.execute(
                f"UPDATE records SET checksum = ?, log_probs = ? {where}",
                (bytes(checksum), bytes(blob), key_of(index), identity),
            )
        assert self.store.get(identity, [key_of(index)], [0]) == [None]
        del self.model[identity, index]

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = LogProbStore(self.path)

    @rule()
    def reopen_after_everyone_left(self) -> None:
        self.second.close()
        self.reopen()
        self.second = LogProbStore(self.path)

    @rule()
    def salvage_into_a_fresh_file(self) -> None:
        with LogProbStore(self.path.with_name("fresh.sqlite")) as fresh:
            assert salvage(self.path, fresh) == len(self.model)
            self.check(fresh)
        for leftover in self.path.parent.glob("fresh.sqlite*"):
            leftover.unlink()

    @invariant()
    def equals_the_model(self) -> None:
        self.check(self.store)
        with LogProbStore(self.path, read_only=True) as reader:
            assert reader.count() == len(self.model)

    def check(self, store: LogProbStore) -> None:
        for identity in (ME, OTHER):
            keys = [key_of(i) for i in range(NUM_KEYS)]
            lengths = [self.model.get((identity, i), -1) for i in range(NUM_KEYS)]
            asked = [max(length, 0) for length in lengths]
            expected = [i for i, length in enumerate(lengths) if length < 0]
            assert store.missing(identity, keys, asked) == expected
            assert store.missing(identity, keys, [n + 1 for n in asked]) == list(range(NUM_KEYS))
            for index, answer in enumerate(store.get(identity, keys, asked)):
                if lengths[index] < 0:
                    assert answer is None
                else:
                    np.testing.assert_array_equal(answer, log_probs_of(index, lengths[index], identity))
            assert store.count(identity) == sum(length >= 0 for length in lengths)


quick = settings(max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = quick


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_store_equals_a_dict_through_many_more_moves() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(StoreMachine, settings=settings(quick, max_examples=150, stateful_step_count=40))
