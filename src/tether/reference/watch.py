"""Checks that the reference is the right one: by its gap to the policy at step 0, and by its drift during training.

Training against a wrong reference is silent: the loss goes down anyway. Knows references and scoring; knows no
trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tether.distributed import any_process, names_of_all, reduced
from tether.errors import DriftError, InitialGapError, TetherError
from tether.reference.adapter_state import has_adapter_off
from tether.reference.base import Reference, compute_dtype_name, score_without_gradient
from tether.reference.shared import INSTEAD, SharedWatch, named
from tether.reference.wrapping import WrappingReference
from tether.scoring.evaluation import products_of_training
from tether.types import PairBatch, ResponseLogProbs

Tolerance = tuple[float, float]  # of the mean and of the largest single gap per token, in nats

# What rounding explains, by how both were computed; docs/numerics.md shows how the numbers were set.
# Computed alike: same dtype, batch, layout and kernels, which mostly gives the same bits.
ALIKE: dict[str, Tolerance] = {
    "float64": (1e-6, 1e-5),
    "float32": (1e-4, 1e-3),
    "float16": (1e-3, 2e-2),
    "bfloat16": (5e-3, 1e-1),
}
# Read from a store: in the same dtype, but from another batch, layout or machine.
STORED: dict[str, Tolerance] = {
    "float64": (1e-3, 1e-2),
    "float32": (1e-3, 1e-2),
    "float16": (5e-2, 2.0),
    "bfloat16": (1e-1, 3.0),
}
# Policy and reference in different dtypes: by the coarser.
OTHER_DTYPE: dict[str, Tolerance] = {
    "float64": (1e-3, 1e-2),
    "float32": (1e-3, 1e-2),
    "float16": (1e-1, 2.0),
    "bfloat16": (5e-1, 5.0),
}


def tolerance(one: str, other: str, *, alike: bool) -> Tolerance:
    """How far two scorings of the same tokens with the same weights may differ by rounding alone.

    Args:
        one, other: Their compute dtypes, named as by `compute_dtype_name`.
        alike: Whether batch, layout and kernels are the same too.
    """
    if one != other:
        mean, largest = map(max, OTHER_DTYPE[one], OTHER_DTYPE[other])
        return mean, largest
    return (ALIKE if alike else STORED)[one]


@dataclass(frozen=True)
class Gap:
    """The difference of two scorings of the same tokens, in nats per token."""

    mean: float
    largest: float

    @classmethod
    def between(cls, one: Tensor, other: Tensor, reduce: Callable[[Tensor, str], Tensor]) -> Gap:
        """Over the tokens of all processes, so that each reaches the same verdict.

        Args:
            one, other: Log-probs of the same tokens.
            reduce: Reduces a tensor over the processes by `"sum"` or `"max"`.
        """
        difference = (one - other).abs().double()
        # NaN would compare as no gap at all; it counts as the largest.
        difference = torch.where(difference.isnan(), torch.inf, difference)
        total, count = reduce(
            torch.stack([difference.sum(), difference.new_tensor(difference.numel())]), "sum"
        ).tolist()
        largest = reduce(difference.max(), "max")
        return cls(total / count, float(largest))

    def within(self, allowed: Tolerance) -> bool:
        """Whether rounding explains it; never for NaN."""
        mean, largest = allowed
        return self.mean <= mean and self.largest <= largest


def initial_gap(
    policy: nn.Module,
    batch: PairBatch,
    reference: ResponseLogProbs,
    autocast_dtype: torch.dtype | None,
    reduce: Callable[[Tensor, str], Tensor],
    knows_tokens: bool = True,
) -> Gap:
    """Gap between the policy, in evaluation mode and under training's autocast, and its reference.

    Per token; if the reference only knows sums, per response, as the mean over its tokens.
    """
    scores = score_without_gradient(policy, batch, autocast_dtype)
    if not knows_tokens:
        return Gap.between(scores.means(), reference.means(), reduce)
    return Gap.between(scores.values, reference.values, reduce)


def check_initial_gap(gap: Gap, reference: Reference, policy_dtype: str, where: str = "the first batch") -> None:
    """Refuses a gap that rounding does not explain; `where` says on which rows it was found.

    Raises:
        InitialGapError: With the gap's size and its likely causes.
    """
    own, alike = reference.identity.compute_dtype, not reference.traits.answers_are_stored
    mean, largest = allowed = tolerance(policy_dtype, own, alike=alike)
    if gap.within(allowed):
        return
    own_kind = reference.identity.kind
    raise InitialGapError(
        problem=f"Cannot train against the {own_kind} reference: it should be the initial policy, but "
        f"scores {where} differently (mean gap {gap.mean:.3g} nats per token, largest {gap.largest:.3g}).",
        details=f"Rounding ({_dtypes(policy_dtype, own)}) explains a mean of {mean:g} and a largest of {largest:g}. "
        "Likely causes: the policy was changed between building the trainer and training, also by an earlier "
        "`train()`; an adapter whose initial delta is not zero; dropout that evaluation mode does not switch off; "
        "resized or reloaded embeddings; another dtype; log-probs stored for other weights.",
        instead="Build the trainer last, with the policy as it will train. If you mean another model as the reference, "
        + ("say so: `ref_columns='other'`." if own_kind == "given" else "pass it as `ref_model`."),
    )


def _dtypes(policy: str, reference: str) -> str:
    return policy if policy == reference else f"policy in {policy}, reference in {reference}"


class Start(NamedTuple):
    """The log-probs of some responses under the initial policy.

    Attributes:
        responses: Their content keys, in hexadecimal.
        log_probs: Token by token, one response after the other, in nats.
    """

    responses: list[str]
    log_probs: list[float]


class ReferenceWatch:
    """Watches one reference through a run: the gap at step 0, and a few fixed pairs from then on.

    A reference that stands still scores the fixed pairs (the sentinel) the same at every evaluation and every save.

    Attributes:
        shared: What looks at the tensors and modules that the reference shares.
        start: The initial policy's log-probs of the fixed pairs, once known; a resumed run sets it before
            `set_sentinel`.

    Args:
        reference: The reference to watch.
        autocast_dtype: Training's autocast dtype.
        reduce: Reduces a tensor over the processes by `"sum"` or `"max"`, so that all reach the same verdict.
    """

    def __init__(
        self,
        reference: Reference,
        autocast_dtype: torch.dtype | None,
        reduce: Callable[[Tensor, str], Tensor] = reduced,
    ) -> None:
        self._reference, self._autocast_dtype, self._reduce = reference, autocast_dtype, reduce
        self._gaps_known: set[bool] = set()  # whether the policy was in training
        self._knows_start = False
        self._sentinel: PairBatch | None = None
        self._before: Tensor | None = None
        self.start: Start | None = None
        self.shared = SharedWatch(reference, self._effect, partial(self.check_drift, alone=True))
        self._sampled: list[tuple[PairBatch, Tensor]] = []

    def begin(self) -> bool:
        """Called at each start from step 0; returns whether the reference claims the policy now, as one that has moved
        with an earlier training does not.
        """
        if self._reference.traits.moves and True in self._gaps_known:
            return False
        self._gaps_known.clear()
        return True

    def gap_at_start(
        self, policy: nn.Module, batch: PairBatch, answer: ResponseLogProbs, *, has_trained: bool
    ) -> dict[str, float]:
        """The gap between policy and reference on the first batch; nothing on later ones, or once it has trained.

        The first batch of an evaluation before training counts by itself, and not where the user has the adapter off.

        Raises:
            InitialGapError: If the reference is meant to be the initial policy and rounding does not explain the gap.
        """
        if has_trained or policy.training in self._gaps_known or (not policy.training and has_adapter_off(policy)):
            return {}
        self._gaps_known.add(policy.training)
        return {"reference/initial_gap": self._checked_gap(policy, batch, answer, "the first batch").mean}

    def check_rows(self, policy: nn.Module, batch: PairBatch, answer: ResponseLogProbs, where: str) -> None:
        """Looks at further rows before the first step; collective.

        Raises:
            InitialGapError: As `gap_at_start`; names the rows by `where`.
        """
        self._checked_gap(policy, batch, answer, where)

    def _checked_gap(self, policy: nn.Module, batch: PairBatch, answer: ResponseLogProbs, where: str) -> Gap:
        traits = self._reference.traits
        gap = initial_gap(policy, batch, answer, self._autocast_dtype, self._reduce, traits.knows_tokens)
        if traits.means_policy:
            check_initial_gap(gap, self._reference, compute_dtype_name(policy, self._autocast_dtype), where)
        return gap

    def set_sentinel(self, batch: PairBatch) -> None:
        """Keeps the reference's log-probs of these pairs. Collective."""
        self._sentinel = batch
        self._before = self._answers(batch)
        if self._reference.traits.moves:  # a resumed run may have other rows than its checkpoint knows, on some process
            self._knows_start = not any_process(self.start is None or self.start.responses != _keys(batch))

    def keep_sampled(self, batch: PairBatch, answer: ResponseLogProbs) -> None:
        """Keeps further answers, to be compared after a change of what passes depend on."""
        self._sampled.append((batch, answer.values))

    def _answers(self, batch: PairBatch, *, live: bool = False) -> Tensor:
        """The reference's answers; `live` if they must be computed now, by what stands behind a store."""
        reference = self._reference
        while live and isinstance(reference, WrappingReference) and reference.traits.answers_are_stored:
            reference = reference.wrapped
        with products_of_training(self.shared.modules):
            return reference.log_probs(batch).values

    def _effect(self) -> str:
        """By how much the reference's answers to fixed pairs have moved, in words; empty where it is not known."""
        if self._sentinel is None or self._before is None or self._reference.traits.is_collective:
            return ""
        try:
            gap = Gap.between(self._answers(self._sentinel), self._before, _alone)
        except (TetherError, RuntimeError):  # what changed may be its dtype
            return ""
        return f", which moves its answers to fixed pairs by {gap.mean:.3g} nats per token (largest {gap.largest:.3g})"

    def set_start(self, policy: nn.Module) -> None:
        """Keeps the initial policy's log-probs of the sentinel, for a reference that moves; on every process."""
        if self._reference.traits.moves and self._sentinel is not None and not self._knows_start:
            log_probs = score_without_gradient(policy, self._sentinel, self._autocast_dtype).values.tolist()
            self.start, self._knows_start = Start(_keys(self._sentinel), log_probs), True

    def distances(self, policy: nn.Module) -> dict[str, float]:
        """How far a synchronized reference is from the policy and from the initial policy, on the sentinel's pairs.

        The mean over the tokens of `|log p - log q|`, in nats. Empty for a reference that stands still; without the
        distance from the start if a resumed run has other rows.
        """
        if not self._reference.traits.moves or self._sentinel is None:
            return {}
        reference = self._answers(self._sentinel)
        now = score_without_gradient(policy, self._sentinel, self._autocast_dtype).values
        found = {"reference/distance": Gap.between(now, reference, self._reduce).mean}
        if self._knows_start:
            assert self.start is not None
            start = reference.new_tensor(self.start.log_probs)
            found["reference/distance_from_start"] = Gap.between(start, reference, self._reduce).mean
        return found

    def check_drift(self, *, alone: bool = False) -> None:
        """Scores the sentinel's pairs again.

        Args:
            alone: Ask no other process; nothing is checked where each pass needs all of them.

        Raises:
            DriftError: If a reference that stands still moved by more than rounding; names the tensors that changed.
        """
        traits = self._reference.traits
        if self._sentinel is None or self._before is None or traits.moves or (alone and traits.is_collective):
            return
        reduce = _alone if alone else self._reduce
        watched = [(self._sentinel, self._before), *(self._sampled if alone else ())]
        gaps = [Gap.between(self._answers(batch, live=alone), before, reduce) for batch, before in watched]
        gap = max(gaps, key=lambda gap: gap.largest)
        if gap.largest == 0:
            return
        own = self._reference.identity.compute_dtype
        allowed = tolerance(own, own, alike=not traits.answers_are_stored)
        names = self._reference.changed_tensors()  # reads every weight, so only when something is wrong
        names = names if alone else names_of_all(names)
        if gap.within(allowed) and not names:
            return
        raise DriftError(
            problem=f"Cannot go on training: the {self._reference.identity.kind} reference should not change, but "
            f"scores fixed pairs differently than before training (mean gap {gap.mean:.3g} nats per token, largest "
            f"{gap.largest:.3g}).",
            details=f"These of its tensors changed: {named(names)}."
            if names
            else "None of its weights changed, so a buffer, a hook, the config, a mode or the stored values did.",
            instead=INSTEAD,
        )


def _alone(tensor: Tensor, how: str) -> Tensor:
    return tensor


def _keys(batch: PairBatch) -> list[str]:
    return [key.hex() for key in batch.keys]
