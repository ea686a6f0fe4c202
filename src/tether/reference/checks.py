"""Is the reference who it should be? The gap to the policy at step 0, and drift during training.

Training against a wrong reference is silent: the loss goes down all the same. Knows references and scoring; knows no
trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tether.errors import DriftError, InitialGapError
from tether.reference.base import Reference, score_without_gradient
from tether.types import PairBatch, ResponseLogProbs

# Largest mean and largest single gap per token, in nats, that rounding explains. How they were set: docs/numerics.md.
TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-3, 1e-2),
    "float32": (1e-3, 1e-2),
    "float16": (2e-2, 0.5),
    "bfloat16": (1e-1, 3.0),
}


@dataclass(frozen=True)
class Gap:
    """How far two scorings of the same tokens are apart, in nats per token."""

    mean: float
    largest: float

    @classmethod
    def between(cls, one: Tensor, other: Tensor, reduce: Callable[[Tensor, str], Tensor]) -> Gap:
        """Of the tokens of all processes, so that each comes to the same verdict.

        Args:
            one, other: Log-probs of the same tokens.
            reduce: Reduces a tensor over the processes by `"sum"` or `"max"`.
        """
        difference = (one - other).abs().double()
        # NaN compares as no gap at all; it is the largest there is.
        difference = torch.where(difference.isnan(), torch.inf, difference)
        total, count = reduce(
            torch.stack([difference.sum(), difference.new_tensor(difference.numel())]), "sum"
        ).tolist()
        largest = reduce(difference.max(), "max")
        return cls(total / count, float(largest))


def initial_gap(
    policy: nn.Module,
    batch: PairBatch,
    reference: ResponseLogProbs,
    autocast_dtype: torch.dtype | None,
    reduce: Callable[[Tensor, str], Tensor],
) -> Gap:
    """Gap between the policy, in evaluation mode and under training's autocast, and what its reference said."""
    return Gap.between(score_without_gradient(policy, batch, autocast_dtype).values, reference.values, reduce)


def check_initial_gap(gap: Gap, reference: Reference, policy_dtype: str) -> None:
    """Refuses a gap that rounding does not explain.

    Raises:
        InitialGapError: With the gap's size and its likely causes.
    """
    mean, largest = map(max, TOLERANCES[policy_dtype], TOLERANCES[reference.identity.compute_dtype])
    if gap.mean <= mean and gap.largest <= largest:
        return
    raise InitialGapError(
        asked=f"The {reference.identity.kind} reference was meant to be the initial policy, but scores the first batch "
        f"differently: {gap.mean:.3g} nats per token in the mean, {gap.largest:.3g} at most.",
        why=f"Rounding in {policy_dtype} explains {mean:g} in the mean and {largest:g} at most. Likely causes: the "
        "policy was changed between building the trainer and training; an adapter whose initial delta is not zero; "
        "dropout that evaluation mode does not switch off; resized or reloaded embeddings; another dtype; log-probs "
        "stored for other weights.",
        instead="Build the trainer last, from the policy as it will train. If another model is meant, pass it as "
        "`ref_model`.",
    )


class Sentinel:
    """A few fixed pairs, scored again now and then: a reference that stands still says the same of them for ever.

    Args:
        reference: The reference to watch.
        batch: The pairs.
    """

    def __init__(self, reference: Reference, batch: PairBatch) -> None:
        self._reference, self._batch = reference, batch
        self._before = reference.log_probs(batch).values

    def distance(self, other: Tensor) -> Tensor:
        """Mean absolute gap per token to other log-probs of the sentinel's pairs, in nats."""
        return (self._before - other).abs().mean()

    def check(self, reduce: Callable[[Tensor, str], Tensor]) -> None:
        """Scores the pairs again.

        Raises:
            DriftError: If the reference moved by more than rounding; names the tensors that changed.
        """
        if self._reference.moves:
            return
        gap = Gap.between(self._reference.log_probs(self._batch).values, self._before, reduce)
        if gap.largest == 0:
            return
        mean, largest = TOLERANCES[self._reference.identity.compute_dtype]
        names = self._reference.changed_tensors()  # reads every weight, so only when something is amiss
        if gap.mean <= mean and gap.largest <= largest and not names:
            return
        raise DriftError(
            asked=f"The {self._reference.identity.kind} reference should stand still, but scores fixed pairs "
            f"differently than before training: {gap.mean:.3g} nats per token in the mean, {gap.largest:.3g} at most.",
            why=f"These of its tensors changed: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
            if names
            else "None of its weights changed, so a buffer, a mode or the stored values did.",
            instead="Keep training from reaching them (a bias, `modules_to_save`, tied or shared embeddings), or give "
            "the reference weights of its own with `ref_model`.",
        )
