"""`WrappingReference`: what every reference around another one has in common.

Hands on what concerns the source's weights; knows no kind of source and no kind of wrapper.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn

from tether.reference.base import Reference
from tether.types import PairBatch, ResponseLogProbs

Source = TypeVar("Source", bound=Reference)


class WrappingReference(Reference, Generic[Source]):
    """A reference that changes how long another one's answers are good, and leaves the rest to that one.

    A wrapper says itself who it is (`identity`), whether it moves, and what of it belongs into a checkpoint.

    Args:
        source: Whose weights they are.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def num_passes(self) -> int:
        return self._source.num_passes

    @property
    def is_collective(self) -> bool:
        return self._source.is_collective

    @property
    def runs_in_policy(self) -> bool:
        return self._source.runs_in_policy

    @property
    def means_policy(self) -> bool:
        """At the start; a reference that moves is another one later."""
        return self._source.means_policy

    @property
    def length_limit(self) -> int | None:
        return self._source.length_limit

    @property
    def extra_bytes(self) -> int:
        return self._source.extra_bytes

    @property
    def module(self) -> nn.Module | None:
        return self._source.module

    def changed_tensors(self) -> list[str]:
        return self._source.changed_tensors()

    def in_policy(self) -> AbstractContextManager[None]:
        return self._source.in_policy()

    def export(self, folder: Path | None, *, merged: bool = False) -> None:
        self._source.export(folder, merged=merged)

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        return self._source.log_probs(batch)
