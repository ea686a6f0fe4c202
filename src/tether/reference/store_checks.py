"""Checks that a store's answers are those of the source at hand, before the first of them is used.

A source is asked for the kept probes again, and for a few stored rows of each set. Knows stores, references and
batches; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from tether.distributed import any_process, is_main_process, of_main, raising_together
from tether.errors import StoreError
from tether.reference.base import BatchSource, Reference
from tether.reference.filling import IDLE, few_rows
from tether.reference.noise import MEASURED_IN
from tether.reference.probing import Difference, Scope, ask, compare, is_near, length_for, make_probe
from tether.reference.verifying import check, verify
from tether.store.probe import KeptProbe, Text
from tether.types import PairBatch

if TYPE_CHECKING:
    from tether.reference.precomputed import PrecomputedReference

_ROWS = 32  # to look for stored ones in, at least
_PAIRS_AT_ONCE = 4


class StoreChecks:
    """What a precomputed reference has checked of its store. Collective where its source is.

    Args:
        reference: The reference.
        source: Its source, which computes the answers.
        num_pairs: Stored pairs of each set to score again.

    Attributes:
        answers: The source's answers to the probes that were compared or made, by their texts.
        num_passes: Passes that the source made for the checks.
    """

    def __init__(self, reference: PrecomputedReference, source: Reference, num_pairs: int) -> None:
        self._reference, self._source, self._num_pairs = reference, source, num_pairs
        self._scope, self._may_lack = Scope(0, ()), False
        self.answers: dict[tuple[Text, ...], KeptProbe] = {}
        self.num_passes = 0

    @property
    def _is_collective(self) -> bool:
        return self._source.traits.is_collective  # training may shard the policy later

    def look_at(self, sets: Mapping[str, BatchSource]) -> None:
        """Compares probes as long as the rows of these sets, and a few stored ones of their rows.

        Raises:
            StoreError: If the source answers otherwise than the store.
        """
        rows = {name: few_rows(batches(), max(_ROWS, 4 * self._num_pairs)) for name, batches in sets.items()}
        with self._looking():
            self._compare(Scope.of(batch for batch in rows.values() if batch is not None))
            for name, batch in rows.items():
                self._verify(name, batch)

    def is_due(self, batch: PairBatch) -> bool:
        """Whether nothing was looked at yet, or only rows much shorter than this batch's."""
        if self._is_collective and self._scope.longest:  # other processes may have no such rows
            return False
        return not is_near(self._scope.longest, max(batch.fed_lengths()))

    def look_before(self, batch: PairBatch) -> None:
        """As `look_at` for a batch where no set was looked at; later, compares probes for longer rows."""
        if not self._scope.longest:
            self.look_at({"": lambda: [batch]})
            return
        with self._looking():
            self._compare(Scope.of([batch]))

    def make(self) -> None:
        """Makes the probes that the store lacks for the rows looked at."""
        if not self._may_lack or self._reference.store.read_only:
            return
        self._may_lack = False
        if any(is_near(probe.length, self._scope.longest) for probe in self.answers.values()):
            return
        if not (self._is_collective or is_main_process()):
            return
        with self._looking():
            probe = make_probe(self._source, self._scope.longest, self._scope.token_ids)
        identity = self._reference.identity
        if probe is not None:
            self.answers[probe.texts] = probe
            if is_main_process():
                self._reference.store.put_probe(identity.digest, probe, description=identity.describe())

    def _compare(self, scope: Scope) -> None:
        if self._is_collective:
            scope = of_main(scope)
        if is_near(self._scope.longest, scope.longest):
            return
        length = length_for(self._source, scope.longest)
        self._scope, self._may_lack = scope._replace(longest=length), True
        known = self._reference.store.probes(self._reference.identity.digest)
        for probe in _due(of_main(known) if self._is_collective else known, length):
            if probe.texts not in self.answers:
                self.answers[probe.texts] = ask(self._source, probe.texts)._replace(noise=probe.noise)
            if (found := compare(self._source, probe, self.answers[probe.texts])) is not None:
                raise self._refused(found)

    def _verify(self, name: str, batch: PairBatch | None) -> None:
        """Scores a few stored pairs of a batch again, and compares."""
        pairs = [] if batch is None else _spread(self._stored_pairs(batch), self._num_pairs)
        agree = any_process if self._is_collective else bool
        for start in count(0, _PAIRS_AT_ONCE):
            some = pairs[start : start + _PAIRS_AT_ONCE]
            if not agree(bool(some)):
                return
            with raising_together() if self._is_collective else nullcontext():
                if batch is not None and some:
                    check(verify(self._reference, [_only_pairs(batch, some)], name, agree), self._reference)
                    continue
                self._source.log_probs(IDLE)
                for _ in range(MEASURED_IN if agree(False) else 0):
                    self._source.log_probs(IDLE)

    def _stored_pairs(self, batch: PairBatch) -> list[int]:
        stored = [value is not None for value in self._reference.stored(batch)]
        pairs = enumerate(zip(batch.chosen, batch.rejected, strict=True))
        return [pair for pair, (chosen, rejected) in pairs if stored[chosen] and stored[rejected]]

    def _refused(self, found: Difference) -> StoreError:
        identity, path = self._reference.identity, self._reference.store.path
        return StoreError(
            problem=f"Cannot use the log-prob store {path}: the reference that filled it had the same weights, but "
            f"answers differently now ({found}).",
            details=found.explain(identity.compute_dtype),
            instead="Name another `ref_store` for this reference, or remove what is stored: `tether store prune "
            f"--identity {identity.digest[:12]}`.",
        )

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Counts passes; whoever asks again after a refusal is refused again."""
        before = self._source.num_passes
        try:
            yield
        except StoreError:
            self._scope = Scope(0, ())
            raise
        finally:
            self.num_passes += self._source.num_passes - before


def _due(known: Sequence[KeptProbe], length: int) -> list[KeptProbe]:
    """The probes to compare: the shortest that serve rows of that length, or else the longest."""
    kept = [probe.length for probe in known]
    due = min((other for other in kept if is_near(other, length)), default=max(kept, default=0))
    return [probe for probe in known if probe.length == due]


def _spread(things: Sequence[int], num: int) -> list[int]:
    num = min(num, len(things))
    return [things[len(things) * (2 * place + 1) // (2 * num)] for place in range(num)]


def _only_pairs(batch: PairBatch, pairs: Sequence[int]) -> PairBatch:
    responses = batch.responses()
    chosen = [(responses[batch.chosen[pair]], responses[batch.rejected[pair]]) for pair in pairs]
    rows = tuple(batch.rows[pair] for pair in pairs) if batch.rows else ()
    return replace(PairBatch.of_pairs(chosen).to(batch.device), rows=rows)
