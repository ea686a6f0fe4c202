"""What the tests of the store share: log-probs that follow from their name, and other processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tether.store import LogProbStore, content_key

SOURCE = Path(__file__).resolve().parents[2] / "src"
ME = "digest-of-one-reference"
OTHER = "digest-of-another-reference"


def key_of(index: int) -> bytes:
    return content_key([index], [index + 1])


def log_probs_of(index: int, length: int, identity: str = ME) -> np.ndarray:
    """The one true answer for a response: a longer one begins with every shorter one."""
    seed = [index, *identity.encode()]
    return -np.random.default_rng(seed).random(length, dtype=np.float32)


def fill(store: LogProbStore, indices: Iterable[int], length: int = 8, identity: str = ME) -> None:
    indices = list(indices)
    values = [log_probs_of(i, length, identity) for i in indices]
    store.put(identity, [key_of(i) for i in indices], values)


def found(store: LogProbStore, indices: Iterable[int], length: int = 8, identity: str = ME) -> set[int]:
    """Which of the indices the store serves; fails if any number is not the true one."""
    indices = list(indices)
    answers = store.get(identity, [key_of(i) for i in indices], [length] * len(indices))
    for index, answer in zip(indices, answers, strict=True):
        if answer is not None:
            np.testing.assert_array_equal(answer, log_probs_of(index, length, identity))
    return {index for index, answer in zip(indices, answers, strict=True) if answer is not None}


def in_fork(body: Callable[[], Any], *, patience_seconds: float = 60.0) -> Any:
    """What `body` returns (or raises) in a forked child that leaves without cleaning up."""
    from_child, to_parent = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(patience_seconds))  # a child that hangs is a failure, not a hanging test
        try:
            answer = (True, body())
        except BaseException as error:
            answer = (False, error)
        os.write(to_parent, pickle.dumps(answer))
        os._exit(0)
    os.close(to_parent)
    with os.fdopen(from_child, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said, "the child died"
    is_well, answer = pickle.loads(said)
    if not is_well:
        raise answer
    return answer


# Fills a store batch by batch with the true log-probs and says each number of finished batches.
WRITER = """
import sys
sys.path[:0] = [{source!r}, {tests!r}]
from support.store_cases import fill
from tether.store import LogProbStore
path, first, last, batch_size, length = sys.argv[1], *map(int, sys.argv[2:])
with LogProbStore(path) as store:
    print("ready", flush=True)
    for start in range(first, last, batch_size):
        fill(store, range(start, min(start + batch_size, last)), length)
        print(min(start + batch_size, last), flush=True)
"""


def start_writer(path: Path, first: int, last: int, *, batch_size: int = 16, length: int = 8) -> subprocess.Popen[str]:
    """A separate program that fills [first, last) and prints how far it got after each batch."""
    script = WRITER.format(source=str(SOURCE), tests=str(Path(__file__).parents[1]))
    arguments = [str(n) for n in (first, last, batch_size, length)]
    return subprocess.Popen([sys.executable, "-c", script, str(path), *arguments], stdout=subprocess.PIPE, text=True)


def kill(writer: subprocess.Popen[str]) -> list[int]:
    """`kill -9`; returns what the writer had said before."""
    writer.kill()
    assert writer.stdout is not None
    said = writer.stdout.read().split("\n")[:-1]  # the last line may be cut
    writer.wait()
    return [int(line) for line in said if line != "ready"]


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("identity", [ME, OTHER])
def store_cases_longer_answers_begin_with_shorter_ones(identity: str) -> None:
    np.testing.assert_array_equal(log_probs_of(3, 9, identity)[:4], log_probs_of(3, 4, identity))
    assert not np.array_equal(log_probs_of(3, 4, identity), log_probs_of(4, 4, identity))
