"""`PrecomputedReference`: log-probs kept on disk, missing ones computed by a source.

Knows the store's keys and when the source may run; knows no model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tether.distributed import any_process, is_main_process
from tether.errors import ConfigurationError, DataError, DriftError, MissingLogProbsError
from tether.reference.base import BatchSource, Kind, Reference, Traits
from tether.reference.filling import IDLE, RowSet, StorePass, names_of
from tether.reference.held import HeldTensors
from tether.reference.identity import ReferenceIdentity
from tether.reference.probing import check_probes, write_probes
from tether.reference.store_checks import StoreChecks
from tether.reference.wrapping import WrappingReference
from tether.store import LogProbStore, key_at_length
from tether.types import PairBatch, Response, ResponseLogProbs, offsets_of, on_device

StoreMode = Literal["fill", "lazy", "require"]
_EXCERPT_TOKENS, _EXCERPT_LETTERS = 40, 80
VERIFIED_PAIRS = 2
_KEPT = "store.json"

logger = logging.getLogger(__name__)


class PrecomputedReference(WrappingReference[Reference]):
    """A reference that reads log-probs computed before, by content and by the identity of the source.

    Args:
        store: The store.
        source: Computes what is missing. Without a source, or after its release, a missing record is an error.
        identity: Whose records to read; by default the source's.
        mode: `fill`: `prepare` scores what the store lacks of the sets. `lazy`: rows are scored and stored when
            first used. `require`: no missing row is ever scored, and `prepare` refuses a set with one.
        release_when_filled: In mode `fill`, release the source at the end of `prepare`. False if later rows cannot be
            known in advance (streams).
        length_limit: As `Reference.length_limit`; by default the source's.
        decode: Turns token ids into text, to show the start of a prompt in messages.
        how_to_fill: How to have missing rows scored, for messages.
        verify: Stored pairs of each set that the source scores again before the first answer is used.
        about: What the store is to note of the run with each pass, by name.

    Raises:
        ConfigurationError: If the source moves during training.

    Example:
        >>> reference = PrecomputedReference(LogProbStore(path), ExplicitReference(model))   # doctest: +SKIP
        >>> reference.prepare({"train": lambda: batches})                             # doctest: +SKIP
    """

    def __init__(
        self,
        store: LogProbStore,
        source: Reference | None = None,
        *,
        identity: ReferenceIdentity | None = None,
        mode: StoreMode = "fill",
        release_when_filled: bool = True,
        length_limit: int | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        how_to_fill: str = "",
        verify: int = VERIFIED_PAIRS,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if identity is None:
            if source is None:
                raise ValueError("Cannot build a `PrecomputedReference` without a source or the identity of one.")
            identity = source.identity
        if source is not None and source.traits.moves:
            raise ConfigurationError(
                problem=f"Cannot precompute the log-probs of a {source.identity.kind} reference: it moves during "
                "training, so stored answers would go stale.",
                instead="Use it without a store, or store the log-probs of a reference that does not move.",
            )
        super().__init__(source if source is not None else _NoSource(identity))
        self._store, self._identity = store, identity
        self._mode, self._release_when_filled = mode, release_when_filled
        self._length_limit = source.length_limit if source is not None else length_limit
        self._decode = decode
        self._how_to_fill = how_to_fill or "Fill the store first (`tether precompute`)."
        self._about = dict(about or {})
        self._num_found = self._num_computed = 0
        self._held: HeldTensors | None = HeldTensors(self._source.held_by_others())
        self._checks, self._is_at_hand = StoreChecks(self, self._source, verify), source is not None

    @property
    def kind(self) -> Kind:
        """The source's, scored ahead: `precomputed explicit`, say. The identity is the source's own."""
        of_source = super().kind
        return Kind(
            f"precomputed {of_source.name}", f"{of_source.description}, scored once and kept on disk", of_source.paper
        )

    @property
    def store(self) -> LogProbStore:
        """The store that it reads."""
        return self._store

    @property
    def source(self) -> Reference | None:
        """The reference that computes what is missing, if any."""
        return None if isinstance(self._source, _NoSource) else self._source

    @property
    def num_found(self) -> int:
        """Responses that `prepare` found in the store."""
        return self._num_found

    @property
    def num_computed(self) -> int:
        """Responses that the source scored and the store keeps."""
        return self._num_computed

    @property
    def num_passes(self) -> int:
        """The source's, without those that check what is stored."""
        return super().num_passes - self._checks.num_passes

    @property
    def identity(self) -> ReferenceIdentity:
        return self._identity

    @property
    def length_limit(self) -> int | None:
        return self._length_limit

    @property
    def traits(self) -> Traits:
        own, may_score = self._source.traits, self._mode != "require"
        return replace(
            own,
            answers_are_stored=True,
            is_collective=may_score and own.is_collective,
            runs_in_policy=may_score and own.runs_in_policy,
        )

    def prepare(self, sets: Mapping[str, BatchSource], *, show_progress: bool = False) -> None:
        """Fills or checks the store for these sets, by the mode, and then (by default) releases the source.

        First the source, if it is at hand, is compared with what it or another one stored under its identity.

        Raises:
            StoreError: If the source answers otherwise than the store.
            MissingLogProbsError: In mode `require`, for a set with a missing row; names one.
            DataError: If the source gives a log-prob that is not finite; names the row.
            KeyboardInterrupt: After Ctrl-C, with the number of rows kept.
        """
        # Under `require`, the policy may not be where a pass through it needs it: the first answer waits for that.
        if not (self._mode == "require" and self._source.traits.runs_in_policy):
            self._compare_with_source(lambda: self._checks.look_at(sets))
        if self._is_at_hand and (self._mode == "fill" or self.traits.is_collective):
            self._checks.make()
        for name, batches in sets.items():
            if self._mode == "fill":
                self._fill(name, batches(), show_progress)
            elif self._mode == "require":
                self._check(name, batches())
        if self._mode == "require" or (self._mode == "fill" and self._release_when_filled):
            self.release()

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        if self._is_at_hand and self._checks.is_due(batch):
            self._compare_with_source(lambda: self._checks.look_before(batch))
        values = self.stored(batch)
        lacking = [index for index, value in enumerate(values) if value is None]
        if lacking:
            for index, value in zip(lacking, self._compute_some(batch, lacking), strict=True):
                values[index] = value.cpu()
        else:
            self._take_part()
        joined = torch.cat([value for value in values if value is not None])
        return ResponseLogProbs(on_device(joined, batch.device), offsets_of(batch.response_lengths, batch.device))

    def stored(self, batch: PairBatch) -> list[Float[Tensor, " length"] | None]:
        """The stored log-probs of each response, on the CPU; None if the store lacks them. Scores nothing."""
        values = self._store.get(self._identity.digest, self._keys(batch), batch.response_lengths)
        return [None if value is None else torch.from_numpy(value) for value in values]

    def save(self, folder: Path | None) -> None:
        super().save(folder)
        if folder is not None:
            write_probes(folder, list(self._checks.answers.values()))
            kept = {"path": str(self._store.path), "num_records": self._store.count(self._identity.digest)}
            (folder / _KEPT).write_text(json.dumps(kept))

    def load(self, folder: Path) -> None:
        """Compares the store's probes with those of the checkpoint's run, which may have had another store.

        Raises:
            ResumeError: If the reference answered otherwise there.
        """
        super().load(folder)
        self._warn_of_lost(folder / _KEPT)
        if self._is_at_hand and self._source.traits.runs_in_policy:  # `prepare` may still wait for the policy
            check_probes(folder, self._source)
        else:
            check_probes(folder, self, self._checks.answers)

    def release(self) -> None:
        """Releases the source. An adapter's base costs nothing and stays right, so it still scores new rows."""
        self._is_at_hand = self._is_at_hand and self._source.traits.runs_in_policy
        self._source.release()
        if not self._source.held_by_others():  # it would keep the weights; what comes back is nobody else's
            self._held = None

    def _compare_with_source(self, look: Callable[[], None]) -> None:
        """Looks at the store with the source, if it is at hand as it was."""
        if not self._is_at_hand:
            return
        may_score = self._mode != "require"
        changed = self._held.changed() if self._held is not None else []
        if changed and may_score:
            raise self._moved(changed)
        # Under `require`, processes read and stop each on its own.
        if not changed and (may_score or not self._source.traits.is_collective):
            look()
        if not may_score:
            self.release()

    def _warn_of_lost(self, kept: Path) -> None:
        """Logs if the store has fewer records than when a checkpoint was written."""
        then: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        if then.get("path") != str(self._store.path) or not is_main_process():
            return
        now = self._store.count(self._identity.digest)
        if now < then["num_records"]:
            logger.warning(
                "The log-prob store %s had %d records of this reference when the checkpoint was written, and has %d "
                "now: they were pruned, or lost. Those that are needed are scored again.",
                *(self._store.path, then["num_records"], now),
            )

    def _lacking(self, batch: PairBatch) -> list[int]:
        """What has to be scored, now rather than in the middle of training: a damaged record counts as missing."""
        return self._store.missing(self._identity.digest, self._keys(batch), batch.response_lengths, verify=True)

    def _fill(self, name: str, batches: Iterable[PairBatch], show_progress: bool) -> None:
        about = {**self._about, "set": name}
        if isinstance(batches, RowSet):
            about |= {"data": batches.source, "rows": batches.num_rows}
        noting = self._store.noting(self._identity.digest, about, description=self._identity.describe())
        with ExitStack() as noted:

            def compute(batch: PairBatch, name_of: Callable[[int], str]) -> None:
                if filling.num_computed == 0 and not is_noted:  # a pass that scores nothing is not noted
                    is_noted.append(noted.enter_context(noting))
                self._compute(batch, name_of)

            is_noted: list[None] = []
            filling = StorePass(
                name,
                batches,
                self._lacking,
                compute,
                show_progress=show_progress,
                halves=not self.traits.is_collective,  # the other processes are in the middle of the same forward
            )
            try:
                filling.run()
            finally:
                self._num_found += filling.num_found
        while self._take_part():  # until no process has anything left to score
            pass

    def _take_part(self) -> bool:
        """Makes an idle pass if another process needs this one's shards for a pass of its own.

        Every pass is announced by `any_process(True)`; a process that needs none answers with this. Returns whether
        there was one.
        """
        if not (self.traits.is_collective and any_process(False)):
            return False
        self._source.log_probs(IDLE)
        return True

    def _check(self, name: str, batches: Iterable[PairBatch]) -> None:
        first, num_missing = "", 0
        for batch in batches:
            lacking = self._lacking(batch)
            self._num_found += batch.num_responses - len(lacking)
            if lacking and not first:
                first = self._named(batch, lacking[0], names_of(batch, name)(lacking[0]))
            num_missing += len(lacking)
        if first:
            raise self._missing(f"{num_missing} responses, one of them {first}")

    def _compute_some(self, batch: PairBatch, lacking: Sequence[int]) -> list[Float[Tensor, " length"]]:
        """The log-probs of some responses of a batch, scored now."""
        names = names_of(batch)
        if self._mode == "require" or self.source is None:
            raise self._missing(self._named(batch, lacking[0], names(lacking[0])))
        if len(lacking) == batch.num_responses:
            return self._compute(batch, names).split()
        return self._compute(batch.only(lacking), lambda index: names(lacking[index])).split()

    def _compute(self, batch: PairBatch, name_of: Callable[[int], str]) -> ResponseLogProbs:
        """Lets the source score a batch, and stores the log-probs."""
        if self.source is None:
            raise self._missing(self._named(batch, 0, name_of(0)))
        if self._held is not None and (changed := self._held.changed()):
            raise self._moved(changed)
        if self.traits.is_collective:
            any_process(True)
        else:
            self._checks.make()
        try:
            computed = self._source.log_probs(batch)
        except MissingLogProbsError as error:  # a released source knows no row
            raise self._missing(self._named(batch, 0, name_of(0)), error) from error
        values = [value.cpu().numpy() for value in computed.split()]
        for index, value in enumerate(values):
            if not np.isfinite(value).all():
                raise self._not_finite(batch, index, name_of(index), value)
        self._store.put(self._identity.digest, self._keys(batch), values, description=self._identity.describe())
        self._num_computed += len(values)
        return computed

    def _keys(self, batch: PairBatch) -> Sequence[bytes]:
        """The content keys, with the length fed where the answer depends on it."""
        limit = self._length_limit
        if limit is None:
            return batch.keys
        fed = zip(batch.keys, batch.fed_lengths(), strict=True)
        return [key if length <= limit else key_at_length(key, length) for key, length in fed]

    def _named(self, batch: PairBatch, index: int, name: str) -> str:
        """A response's name, with the start of its prompt if it can be decoded."""
        if self._decode is None:
            return name
        response: Response = batch.responses()[index]
        text = " ".join(self._decode(response.prompt_ids[:_EXCERPT_TOKENS]).split())
        return f"{name} (prompt: {text[:_EXCERPT_LETTERS]!r})"

    def _missing(self, what: str, why: MissingLogProbsError | None = None) -> MissingLogProbsError:
        if why is not None:
            return MissingLogProbsError(
                problem=f"Cannot find the reference log-probs of {what}: the log-prob store {self._store.path} does "
                "not hold them, and the reference's weights are not to be had again.",
                details=f"{why.problem} {why.details}",
                instead=f"{self._how_to_fill} The pass before training scores what is missing or damaged. "
                f"{why.instead}",
            )
        return MissingLogProbsError(
            problem=f"Cannot find the reference log-probs of {what}: the log-prob store {self._store.path} does not "
            f"hold them for the reference {self._identity.digest}.",
            details="`ref_store_mode='require'` only reads stored log-probs."
            if self._mode == "require"
            else "This reference has no source to compute them with.",
            instead=self._how_to_fill,
        )

    def _moved(self, names: list[str]) -> DriftError:
        return DriftError(
            problem=f"Cannot score a row for the log-prob store {self._store.path}: the reference should not change, "
            f"but its tensor `{names[0]}` did.",
            details=f"{len(names)} of its tensors changed since it was made. What it answers now would stand in the "
            "store under the weights that it had.",
            instead="Keep everything from changing it, or score all rows before (`ref_store_mode='fill'`).",
        )

    def _not_finite(self, batch: PairBatch, index: int, name: str, value: Any) -> DataError:
        token = int(np.argmin(np.isfinite(value)))
        return DataError(
            problem=f"Cannot store the reference log-probs of {self._named(batch, index, name)}: the log-prob of token "
            f"{token} of {len(value)} is {value[token]}.",
            details="It would make the loss NaN in every run that reads it.",
            instead="Drop the row, or find what makes the reference overflow on it: its dtype (try `bf16` or float32 "
            "instead of float16), or a token that it rules out.",
        )


class _NoSource(Reference):
    """Stands in for a missing source: an identity without weights."""

    def __init__(self, identity: ReferenceIdentity) -> None:
        self._identity = identity

    @property
    def identity(self) -> ReferenceIdentity:
        return self._identity

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        raise AssertionError("`PrecomputedReference` checks that there is a source before it asks one")
