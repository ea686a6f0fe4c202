"""Sums and verdicts over the processes of a run.

A *collective* call must be made by every process, in the same order. Everything also works in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from tether.errors import ReferenceModelError, TetherError

T = TypeVar("T")


def num_processes() -> int:
    """How many processes take part in this run."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this is the main process (rank 0)."""
    return not is_distributed() or dist.get_rank() == 0


def reduced(tensor: Tensor, how: str) -> Tensor:
    """The tensor reduced over all processes by `"sum"` or `"max"`, on each of them. Collective."""
    operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how]
    tensor = tensor.clone()
    if is_distributed():
        dist.all_reduce(tensor, operation)
    return tensor


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process. Collective."""
    return any(_gathered(flag))


def names_of_all(names: Iterable[str]) -> list[str]:
    """The names given on any process, sorted. Collective."""
    return sorted(set().union(*_gathered(list(names))))


def of_main(value: T) -> T:
    """Process 0's value, on every process. Collective."""
    return _gathered(value)[0]


@contextmanager
def raising_together() -> Iterator[None]:
    """A block whose failure on one process is raised on all of them, so that none is left waiting.

    The block itself must not be collective, or must fail on every process alike. Collective at its end.

    Raises:
        TetherError: This process's own error, or else that of the first process that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    _raise_first(error)


def check_alike(value: str, what: str) -> None:
    """Refuses a value that differs between processes. Collective.

    Raises:
        ReferenceModelError: On every process; names the first process that differs.
    """
    values = _gathered(value)
    differing = [number for number, other in enumerate(values) if other != values[0]]
    if differing:
        raise ReferenceModelError(
            problem=f"Cannot train one policy on {len(values)} processes with different {what}s: process "
            f"{differing[0]} has {values[differing[0]]}, and process 0 has {values[0]}.",
            instead="Load the same weights on every process, and change them in memory in the same way (with the same "
            "seed).",
        )


def _raise_first(error: Exception | None) -> None:
    errors = _gathered(None if error is None else _for_others(error))
    if error is not None:
        raise error
    for process, found in enumerate(errors):
        if found is not None:
            found.problem = f"Process {process}: {found.problem}"
            raise found


def _for_others(error: Exception) -> TetherError:
    if isinstance(error, TetherError):
        return error
    return TetherError(
        problem=f"It raised `{type(error).__name__}`, so the other processes cannot go on.",
        details=str(error),
        instead="Look at the traceback of that process.",
    )


def _gathered(value: T) -> list[T]:
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_distributed() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
