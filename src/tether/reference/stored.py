"""`StoredReference`: answers kept on disk, missing ones computed by a source.

Knows the store's keys and the order of a pass over the data; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tether.errors import MissingLogProbsError
from tether.reference.base import BatchSource, Reference
from tether.reference.identity import ReferenceIdentity
from tether.store import LogProbStore
from tether.types import PairBatch, ResponseLogProbs, offsets_of


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

    def changed_tensors(self) -> list[str]:
        return self._source.changed_tensors() if self._source is not None else []

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
        for batch in bar:
            missing = self._store.missing(self._identity.digest, batch.keys, batch.response_lengths)
            self._num_found += batch.num_responses - len(missing)
            self._num_computed += len(missing)
            if missing:
                self._compute(batch)
            bar.set_postfix(found=self._num_found, computed=self._num_computed)

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        values = self._store.get(self._identity.digest, batch.keys, batch.response_lengths)
        if any(value is None for value in values):
            return self._compute(batch)
        joined = torch.from_numpy(np.concatenate([value for value in values if value is not None]))
        return ResponseLogProbs(joined.to(batch.device), offsets_of(batch.response_lengths, batch.device))

    def _compute(self, batch: PairBatch) -> ResponseLogProbs:
        if self._source is None:
            raise MissingLogProbsError(
                asked=f"Reference log-probs that {self._store.path} does not hold (reference {self._identity.digest}).",
                why="This reference only reads: it was given no source to compute them with.",
                instead="Give `StoredReference` a source, or fill the store first (`tether precompute`).",
            )
        computed = self._source.log_probs(batch)
        values = [value.cpu().numpy() for value in computed.split()]
        self._store.put(self._identity.digest, batch.keys, values, description=self._identity.describe())
        return computed

    def release(self) -> None:
        """Releases the source; an adapter's base, which costs nothing and stays true, goes on answering new rows."""
        if self._source is not None:
            self._source.release()
