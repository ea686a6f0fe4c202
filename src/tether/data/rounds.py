"""Whole rounds of rows for several processes: fills the last round up, and marks the rows that do so.

A round is one batch for each process. Knows rows and their order; knows no batch and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, TypeVar

from torch.utils.data import Dataset, IterableDataset, Sampler

REPEATED = "tether_repeated"  # marks a row repeated to give all processes the same number
T = TypeVar("T")


def own_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
    """The rows of a batch that count, and True; or, if all of them are repeated, these rows and False."""
    own = [row for row in rows if not row.get(REPEATED)]
    if own:
        return own, True
    return [{name: value for name, value in row.items() if name != REPEATED} for row in rows], False


def filled(elements: Iterable[T], size: int, repeated: Callable[[T], T]) -> Iterator[T]:
    """The elements, followed by the first ones again (marked) until their number is a multiple of `size`.

    Example:
        >>> list(filled([1, 2, 3], 5, lambda number: -number))
        [1, 2, 3, -1, -2]
    """
    first: list[T] = []
    missing = 0
    for element in elements:
        if len(first) < size:
            first.append(element)
        missing = (missing - 1) % size
        yield element
    yield from map(repeated, islice(cycle(first), missing))


class FilledStream(IterableDataset[Any]):
    """A stream in whole rounds, so that accelerate need not fill it up when it deals rows to the processes.

    Args:
        rows: The stream; every process reads all of it.
        size: Rows of a round.
    """

    def __init__(self, rows: Any, size: int) -> None:
        self.rows, self.size = rows, size

    def __iter__(self) -> Iterator[Any]:
        return filled(self.rows, self.size, lambda row: {**row, REPEATED: True})

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of a pass, as `datasets.IterableDataset.set_epoch`."""
        self.rows.set_epoch(epoch)


class FilledOrder(Sampler[int]):
    """The order of a set in whole rounds: a repeated row has the number `~index`.

    Args:
        order: A sampler of the set.
        size: Rows of a round.
    """

    def __init__(self, order: Any, size: int) -> None:
        self.order, self.size = order, size

    def __len__(self) -> int:
        return len(self.order) + -len(self.order) % self.size

    def __iter__(self) -> Iterator[int]:
        return filled(self.order, self.size, lambda index: ~index)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch, if the sampler supports it."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


class MarkedRows(Dataset[Any]):
    """The rows of a set by the numbers of a `FilledOrder`.

    Args:
        rows: The set.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__([number if number >= 0 else ~number for number in numbers])
        return [row if number >= 0 else {**row, REPEATED: True} for row, number in zip(rows, numbers, strict=True)]
