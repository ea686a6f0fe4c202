"""Checks that stored log-probs are still the reference's: scores some responses again and compares.

Knows precomputed references; knows no file and no command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tether.errors import ConfigurationError, StoreError
from tether.reference.filling import names_of
from tether.reference.noise import ALIKE, Gap, Noise, measured, unreduced
from tether.reference.watch import said
from tether.types import PairBatch, ResponseLogProbs, offsets_of

if TYPE_CHECKING:
    from tether.reference.precomputed import PrecomputedReference


@dataclass(frozen=True)
class Verification:
    """The result of scoring stored responses again.

    Attributes:
        num_responses: Responses compared.
        num_missing: Responses that the store lacks.
        num_tokens: Tokens compared.
        where: The response with the largest difference.
        gap: The differences; None if nothing was compared.
        noise: The source's, measured only where there is a difference that needs it.
    """

    num_responses: int
    num_missing: int
    num_tokens: int
    where: str
    gap: Gap | None
    noise: Noise | None


def verify(
    reference: PrecomputedReference,
    batches: Iterable[PairBatch],
    name: str = "train",
    agree: Callable[[bool], bool] = bool,
) -> Verification:
    """Scores the responses of some batches again with the source, and compares them with the stored log-probs.

    Args:
        reference: One that still has its source.
        batches: The rows to check; those that the store lacks are only counted.
        name: The set's name.
        agree: Whether to measure the noise, given whether there is a difference that needs it; collective sources are
            asked on all processes or on none.
    """
    if reference.source is None:
        raise ConfigurationError(
            problem="Cannot verify a precomputed reference without a source: there is no model to score the responses "
            "again.",
            instead="Pass `source` to `PrecomputedReference`.",
        )
    stored: list[Tensor] = []
    scored: list[Tensor] = []
    where: list[str] = []
    num_missing, sample = 0, None
    for batch in batches:
        found, names = reference.stored(batch), names_of(batch, name)
        num_missing += sum(value is None for value in found)
        if all(value is None for value in found):
            continue
        answer = reference.source.log_probs(batch)
        sample = sample or (batch, answer)
        for index, (old, new) in enumerate(zip(found, answer.split(), strict=True)):
            if old is not None:
                stored.append(old)
                scored.append(new.cpu())
                where.append(names(index))
    if sample is None:
        return Verification(0, num_missing, 0, "", None, None)
    knows_tokens = reference.traits.knows_tokens
    gap = Gap.between(_joined(scored), _joined(stored), unreduced, knows_tokens)
    differences = [new - old for new, old in zip(scored, stored, strict=True)]
    largest = [float(one.abs().max() if knows_tokens else one.sum().abs() / len(one)) for one in differences]
    farthest = where[max(range(len(largest)), key=lambda index: (math.isnan(largest[index]), largest[index]))]
    differs = not gap.within(ALIKE[reference.identity.compute_dtype])
    noise = measured(reference.source.log_probs, *sample, unreduced) if agree(differs) else None
    return Verification(len(stored), num_missing, sum(map(len, stored)), farthest, gap, noise)


def check(found: Verification, reference: PrecomputedReference) -> None:
    """Refuses a difference that rounding does not explain.

    Raises:
        StoreError: With its size and the row that has it.
    """
    gap, own = found.gap, reference.identity.compute_dtype
    if gap is None or found.noise is None:
        return
    allowed = found.noise.allowed(gap, own)
    if gap.within(allowed):
        return
    raise StoreError(
        problem=f"Cannot use the log-prob store {reference.store.path}: it differs from what the reference computes "
        f"now (mean gap {gap.mean:.3g} nats per token, largest {gap.largest:.3g} in {found.where}, shift "
        f"{gap.shift:.3g}).",
        details=f"Rounding in {own} explains {said(allowed)}: in other batches, the reference is "
        f"{found.noise.mean:.2g} nats per token off itself. The identity is the same, so the stored "
        "log-probs were imported, or computed by other kernels.",
        instead=f"Remove them and score again: `tether store prune --identity {reference.identity.digest[:12]}`.",
    )


def _joined(values: list[Tensor]) -> ResponseLogProbs:
    return ResponseLogProbs(torch.cat(values), offsets_of([len(value) for value in values], values[0].device))
