"""`WrappingReference`: a reference around another one, which forwards the whole contract.

Knows no kind of source and no kind of wrapper.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn

from tether.reference.base import BatchSource, Kind, Reference, Traits
from tether.reference.held import Slot
from tether.reference.identity import ReferenceIdentity
from tether.scoring import Reads
from tether.types import PairBatch, ResponseLogProbs

Source = TypeVar("Source", bound=Reference)


class WrappingReference(Reference, Generic[Source]):
    """A reference that is its source in everything that a subclass does not override.

    A wrapper that changes the answers overrides `identity` too: stored log-probs are filed under it.

    Args:
        source: The reference to forward to.

    Example:
        >>> class CountingReference(WrappingReference):
        ...     num_pairs = 0
        ...
        ...     def log_probs(self, batch):
        ...         self.num_pairs += batch.num_pairs
        ...         return super().log_probs(batch)
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def wrapped(self) -> Source:
        """The reference it forwards to."""
        return self._source

    @property
    def identity(self) -> ReferenceIdentity:
        return self._source.identity

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        return self._source.log_probs(batch)

    @property
    def num_passes(self) -> int:
        return self._source.num_passes

    @property
    def kind(self) -> Kind:
        return self._source.kind

    @property
    def traits(self) -> Traits:
        return self._source.traits

    def changed_tensors(self) -> list[str]:
        return self._source.changed_tensors()

    def held_by_others(self) -> list[Slot]:
        return self._source.held_by_others()

    def keep(self, names: Collection[str]) -> bool:
        return self._source.keep(names)

    @property
    def length_limit(self) -> int | None:
        return self._source.length_limit

    @property
    def reads(self) -> Reads | None:
        return self._source.reads

    @property
    def extra_bytes(self) -> int:
        return self._source.extra_bytes

    @property
    def module(self) -> nn.Module | None:
        return self._source.module

    def in_policy(self) -> AbstractContextManager[None]:
        return self._source.in_policy()

    def figures(self) -> dict[str, float]:
        return self._source.figures()

    def export(self, folder: Path | None, *, merged: bool = False) -> None:
        self._source.export(folder, merged=merged)

    def prepare(self, sets: Mapping[str, BatchSource], *, show_progress: bool = False) -> None:
        self._source.prepare(sets, show_progress=show_progress)

    def advance(self, step: int) -> bool:
        return self._source.advance(step)

    def save(self, folder: Path | None) -> None:
        self._source.save(folder)

    def load(self, folder: Path) -> None:
        self._source.load(folder)

    def release(self) -> None:
        self._source.release()
