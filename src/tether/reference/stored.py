"""`StoredReference`: answers kept on disk, missing ones computed by a source.

Knows the store's keys and the order of a pass over the data; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tether.distributed import any_process
from tether.errors import MissingLogProbsError
from tether.reference.base import BatchSource, Reference
from tether.reference.identity import ReferenceIdentity
from tether.store import LogProbStore
from tether.types import PairBatch, Response, ResponseLogProbs, offsets_of

# What a process has scored that needs no answer itself, while others need its part of the weights.
_IDLE = PairBatch.of_pairs([(Response((0,), (0,)), Response((0,), (0,)))])


class StoredReference(Reference):
    """A reference that reads what was computed before, by content, under the identity of who computed it.

    Args:
        store: The store.
        source: Computes what is missing. Without a source, or once it was released, a missing record is an error.
        identity: Whose records to read; by default the source's.
        release_when_filled: Release the source at the end of `prepare`. False where later rows cannot be known in
            advance (streams).

    Example:
        >>> reference = StoredReference(LogProbStore(path), FrozenReference(model))   # doctest: +SKIP
        >>> reference.prepare({"train": lambda: batches})                             # doctest: +SKIP
    """

    def __init__(
        self,
        store: LogProbStore,
        source: Reference | None = None,
        *,
        identity: ReferenceIdentity | None = None,
        release_when_filled: bool = True,
    ) -> None:
        if identity is None:
            if source is None:
                raise ValueError("a StoredReference needs a source or the identity of one")
            identity = source.identity
        self._store, self._source, self._identity = store, source, identity
        self._release_when_filled = release_when_filled
        self._num_found = self._num_computed = 0

    @property
    def store(self) -> LogProbStore:
        """The store that is read."""
        return self._store

    @property
    def num_found(self) -> int:
        """Responses that `prepare` was asked for and found in the store."""
        return self._num_found

    @property
    def num_computed(self) -> int:
        """Responses that `prepare` was asked for and had the source compute."""
        return self._num_computed

    @property
    def identity(self) -> ReferenceIdentity:
        return self._identity

    @property
    def num_passes(self) -> int:
        return self._source.num_passes if self._source is not None else 0

    @property
    def means_policy(self) -> bool:
        return self._source is not None and self._source.means_policy

    @property
    def answers_are_stored(self) -> bool:
        return True

    def changed_tensors(self) -> list[str]:
        return self._source.changed_tensors() if self._source is not None else []

    @property
    def is_collective(self) -> bool:
        return self._source is not None and self._source.is_collective

    @property
    def runs_in_policy(self) -> bool:
        return self._source is not None and self._source.runs_in_policy

    @property
    def extra_bytes(self) -> int:
        return self._source.extra_bytes if self._source is not None else 0

    def in_policy(self) -> AbstractContextManager[None]:
        return self._source.in_policy() if self._source is not None else super().in_policy()

    @property
    def module(self) -> nn.Module | None:
        return self._source.module if self._source is not None else None

    def prepare(self, sets: Mapping[str, BatchSource], *, show_progress: bool = False) -> None:
        """Computes and stores what the sets need and the store lacks, then (by default) releases the source."""
        for name, batches in sets.items():
            self._fill(batches(), f"Reference log-probs ({name})", show_progress)
        if self._release_when_filled:
            self.release()

    def _fill(self, batches: Iterable[PairBatch], title: str, show_progress: bool) -> None:
        # None: on only where standard error is a terminal.
        bar = tqdm(batches, desc=title, unit="batch", disable=None if show_progress else True)
        for batch in self._rounds(bar):
            missing = []
            if batch is not None:
                missing = self._store.missing(self._identity.digest, batch.keys, batch.response_lengths)
                self._num_found += batch.num_responses - len(missing)
                self._num_computed += len(missing)
            if batch is not None and missing:
                self._compute(batch)
            else:
                self._take_part()
            bar.set_postfix(found=self._num_found, computed=self._num_computed)

    def _rounds(self, batches: Iterable[PairBatch]) -> Iterator[PairBatch | None]:
        """The batches; where passes are collective, None for as long as only other processes still have some."""
        if not self.is_collective:
            yield from batches
            return
        iterator = iter(batches)
        while any_process((batch := next(iterator, None)) is not None):
            yield batch

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        values = self._store.get(self._identity.digest, batch.keys, batch.response_lengths)
        if any(value is None for value in values):
            return self._compute(batch)
        self._take_part()
        joined = torch.from_numpy(np.concatenate([value for value in values if value is not None]))
        return ResponseLogProbs(joined.to(batch.device), offsets_of(batch.response_lengths, batch.device))

    def _compute(self, batch: PairBatch) -> ResponseLogProbs:
        if self._source is None:
            raise MissingLogProbsError(
                asked=f"Reference log-probs that {self._store.path} does not hold (reference {self._identity.digest}).",
                why="This reference only reads: it was given no source to compute them with.",
                instead="Give `StoredReference` a source, or fill the store first (`tether precompute`).",
            )
        if self.is_collective:
            any_process(True)
        computed = self._source.log_probs(batch)
        values = [value.cpu().numpy() for value in computed.split()]
        self._store.put(self._identity.digest, batch.keys, values, description=self._identity.describe())
        return computed

    def _take_part(self) -> None:
        """Makes a pass for nothing where another process needs one, to which this one has a part of the weights."""
        if self.is_collective and any_process(False):
            assert self._source is not None
            self._source.log_probs(_IDLE)

    def release(self) -> None:
        """Releases the source; an adapter's base, which costs nothing and stays true, goes on answering new rows."""
        if self._source is not None:
            self._source.release()
