"""Checks that stored log-probs are still the reference's: scores some responses again and compares.

Knows precomputed references; knows no file and no command.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tether.errors import ConfigurationError, StoreError
from tether.reference.filling import names_of
from tether.reference.watch import Gap, tolerance
from tether.types import PairBatch

if TYPE_CHECKING:
    from tether.reference.precomputed import PrecomputedReference


@dataclass(frozen=True)
class Verification:
    """The result of scoring stored responses again.

    Attributes:
        num_responses: Responses compared.
        num_missing: Responses that the store lacks.
        num_tokens: Tokens compared.
        mean: Mean absolute difference per token, in nats.
        largest: Largest difference of a token, in nats.
        where: The response with the largest difference.
    """

    num_responses: int
    num_missing: int
    num_tokens: int
    mean: float
    largest: float
    where: str


def verify(reference: PrecomputedReference, batches: Iterable[PairBatch], name: str = "train") -> Verification:
    """Scores the responses of some batches again with the source, and compares them with the stored log-probs.

    Args:
        reference: One that still has its source.
        batches: The rows to check; those that the store lacks are only counted.
        name: The set's name.
    """
    if reference.source is None:
        raise ConfigurationError(
            problem="Cannot verify a precomputed reference without a source: there is no model to score the responses "
            "again.",
            instead="Pass `source` to `PrecomputedReference`.",
        )
    num_responses = num_missing = num_tokens = 0
    total, largest, where = 0.0, 0.0, ""
    for batch in batches:
        stored, names = reference.stored(batch), names_of(batch, name)
        num_missing += sum(value is None for value in stored)
        if all(value is None for value in stored):
            continue
        for index, (old, new) in enumerate(zip(stored, reference.source.log_probs(batch).split(), strict=True)):
            if old is None:
                continue
            difference = (new.cpu() - old).abs()
            if not reference.traits.knows_tokens:  # only the mean over the tokens means something
                difference = difference.sum().expand(len(old)) / len(old)
            num_responses, num_tokens = num_responses + 1, num_tokens + len(old)
            total += float(difference.double().sum())
            if not where or not float(difference.max()) <= largest:
                largest, where = float(difference.max()), names(index)
    return Verification(num_responses, num_missing, num_tokens, total / max(num_tokens, 1), largest, where)


def check(found: Verification, reference: PrecomputedReference) -> None:
    """Refuses a difference that rounding does not explain.

    Raises:
        StoreError: With its size and the row that has it.
    """
    own = reference.identity.compute_dtype
    mean, largest = allowed = tolerance(own, own, alike=False)
    if Gap(found.mean, found.largest).within(allowed):
        return
    raise StoreError(
        problem=f"Cannot use the log-prob store {reference.store.path}: it differs from what the reference computes "
        f"now (mean gap {found.mean:.3g} nats per token, largest {found.largest:.3g} in {found.where}).",
        details=f"Rounding in {reference.identity.compute_dtype} explains a mean of {mean:g} and a largest of "
        f"{largest:g}. The identity is the same, so the stored log-probs were imported, or computed by other kernels.",
        instead=f"Remove them and score again: `tether store prune --identity {reference.identity.digest[:12]}`.",
    )
