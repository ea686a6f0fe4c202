"""Checks that the reference is the right one: by its gap to the policy at step 0, and by its drift during training.

Training against a wrong reference is silent: the loss goes down anyway. Knows references and scoring; knows no
trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tether.distributed import any_process, is_main_process, names_of_all, num_processes, reduced
from tether.errors import DriftError, InitialGapError, TetherError
from tether.reference.adapter_state import has_adapter_off
from tether.reference.base import Reference, compute_dtype_name, score_without_gradient
from tether.reference.noise import ALIKE, Gap, Noise, Reduce, Tolerance, coarser, measured, rounds_coarsely, unreduced
from tether.reference.shared import INSTEAD, SharedWatch, named
from tether.reference.wrapping import WrappingReference
from tether.scoring.evaluation import products_of_training
from tether.types import PairBatch, ResponseLogProbs, join_log_probs

logger = logging.getLogger(__name__)

_MUCH_NOISE = 1e-2  # nats per token: visible in the first loss of short answers


def check_initial_gap(
    gap: Gap, reference: Reference, policy_dtype: str, noise: Noise | None = None, where: str = "the first batch"
) -> None:
    """Refuses a gap that rounding does not explain; `where` says on which rows it was found.

    Args:
        gap: The gap.
        reference: The reference.
        policy_dtype: The policy's compute dtype.
        noise: That of the policy; None if both were computed alike, in the same batch.
        where: The rows.

    Raises:
        InitialGapError: With the gap's size and its likely causes.
    """
    own = reference.identity.compute_dtype
    dtype = coarser(policy_dtype, own)
    allowed = ALIKE[dtype] if noise is None else noise.allowed(gap, dtype)
    if gap.within(allowed):
        return
    own_kind = reference.identity.kind
    raise InitialGapError(
        problem=f"Cannot train against the {own_kind} reference: it should be the initial policy, but "
        f"scores {where} differently (mean gap {gap.mean:.3g} nats per token, largest {gap.largest:.3g}, shift "
        f"{gap.shift:.3g}).",
        details=f"Rounding ({_dtypes(policy_dtype, own)}) explains {said(allowed)}{_measured(noise)}. "
        "Likely causes: the policy was changed between building the trainer and training, also by another trainer; an "
        "adapter whose initial delta is not zero; dropout that evaluation mode does not switch off; "
        "resized or reloaded embeddings; another dtype; log-probs stored for other weights, or stored where rounding "
        "is coarser than here.",
        instead="Build the trainer last, with the policy as it will train. If you mean another model as the reference, "
        + ("say so: `ref_columns='other'`." if own_kind == "given" else "pass it as `ref_model`."),
    )


def said(allowed: Tolerance) -> str:
    """A tolerance in words."""
    shift = "" if allowed.shift == float("inf") else f" and a shift of {allowed.shift:.3g}"
    return f"a mean of {allowed.mean:.3g}, a largest of {allowed.largest:.3g}{shift}"


def _measured(noise: Noise | None) -> str:
    return "" if noise is None else f": the policy, in other batches, is {noise.mean:.2g} nats per token off itself"


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
        noise: The policy's, once measured; None where reference and policy are computed alike, in the same batch.

    Args:
        reference: The reference to watch.
        autocast_dtype: Training's autocast dtype.
        reduce: Reduces a tensor over the processes by `"sum"` or `"max"`, so that all reach the same verdict.
    """

    def __init__(
        self,
        reference: Reference,
        autocast_dtype: torch.dtype | None,
        reduce: Reduce = reduced,
    ) -> None:
        self._reference, self._autocast_dtype, self._reduce = reference, autocast_dtype, reduce
        self._gaps_known: set[bool] = set()  # whether the policy was in training
        self._knows_start = False
        self._sentinel: PairBatch | None = None
        self._before: ResponseLogProbs | None = None
        self.start: Start | None = None
        self.noise: Noise | None = None
        self.shared = SharedWatch(reference, self._effect, partial(self.check_drift, alone=True))
        self._sampled: list[tuple[PairBatch, ResponseLogProbs]] = []
        self._measured_on: tuple[PairBatch, ResponseLogProbs] | None = None  # until those rows are checked

    @property
    def noise_spread(self) -> float:
        """`Noise.spread`; 0 where it plays no part."""
        return 0.0 if self.noise is None else self.noise.spread

    def begin(self) -> bool:
        """Called at each start from step 0; returns whether the policy should be the initial one, as it is not after an
        earlier training.
        """
        if True in self._gaps_known:
            return False
        self._gaps_known.clear()
        return True

    def gap_at_start(self, policy: nn.Module, batch: PairBatch, answer: ResponseLogProbs) -> dict[str, float]:
        """The gap between a policy that has not trained and the reference on the first batch; nothing on later ones.

        The first batch of an evaluation before training counts by itself, and not where the user has the adapter off.

        Raises:
            InitialGapError: If the reference is meant to be the initial policy and rounding does not explain the gap.
        """
        if policy.training in self._gaps_known or (not policy.training and has_adapter_off(policy)):
            return {}
        scores = self._scored(policy, batch)
        if self.noise is None and self.has_noise(policy):
            self._measure(policy, batch, scores, self._reduce)
        gap = self._judge(policy, scores, answer, "the first batch", self._reduce)
        self._gaps_known.add(policy.training)  # what was refused is looked at again
        found = {"reference/initial_gap": gap.mean}
        return found if self.noise is None else found | {"reference/noise": self.noise.mean}

    def check_rows(self, policy: nn.Module, parts: Iterable[tuple[PairBatch, ResponseLogProbs]], where: str) -> None:
        """Looks at further rows before the first step, the same on all processes; collective.

        Args:
            policy: The policy.
            parts: Batches and the reference's answers; taken together.
            where: Which rows they are, for the message.

        Raises:
            InitialGapError: As `gap_at_start`.
        """
        known, self._measured_on = self._measured_on, None
        found, answers = [], []
        for batch, answer in parts:
            found.append(known[1] if known is not None and known[0] is batch else self._scored(policy, batch))
            answers.append(answer)
        self._judge(policy, _one_after_another(found), _one_after_another(answers), where, self._reduce_same)

    def has_noise(self, policy: nn.Module) -> bool:
        """Whether the reference is the policy, but its answers were not computed as the policy's are."""
        traits, own = self._reference.traits, self._reference.identity.compute_dtype
        return traits.means_policy and (traits.answers_are_stored or own != self._dtype_of(policy))

    def is_noisy(self, policy: nn.Module) -> bool:
        """Whether that may be more than a shift worth seeing, so that only many tokens tell the two apart."""
        return self.has_noise(policy) and rounds_coarsely(self._common_dtype(policy))

    def measure_noise(self, policy: nn.Module, batch: PairBatch, shift: float) -> float:
        """Measures the policy's noise on some rows, the same on all processes, unless it plays no part; collective.

        Returns:
            How many times as many rows it takes to see a shift of so many nats per token under that noise.
        """
        if not self.has_noise(policy):
            return 0.0
        scores = self._scored(policy, batch)
        self._measure(policy, batch, scores, self._reduce_same)
        self._measured_on = batch, scores
        assert self.noise is not None
        gap = Gap.between(scores, scores, self._reduce_same, self._reference.traits.knows_tokens)
        return self.noise.share_needed(gap, shift)

    def _judge(
        self, policy: nn.Module, scores: ResponseLogProbs, answer: ResponseLogProbs, where: str, reduce: Reduce
    ) -> Gap:
        gap = Gap.between(scores, answer, reduce, self._reference.traits.knows_tokens)
        if self._reference.traits.means_policy:
            check_initial_gap(gap, self._reference, self._dtype_of(policy), self.noise, where)
        return gap

    def _scored(self, policy: nn.Module, batch: PairBatch) -> ResponseLogProbs:
        return score_without_gradient(policy, batch, self._autocast_dtype)

    def _dtype_of(self, policy: nn.Module) -> str:
        return compute_dtype_name(policy, self._autocast_dtype)

    def _common_dtype(self, policy: nn.Module) -> str:
        return coarser(self._dtype_of(policy), self._reference.identity.compute_dtype)

    def _measure(self, policy: nn.Module, batch: PairBatch, scores: ResponseLogProbs, reduce: Reduce) -> None:
        """Scores the rows again, in the reference's dtype if that is the coarser one."""
        policy_dtype, own = self._dtype_of(policy), self._reference.identity.compute_dtype
        dtype = self._common_dtype(policy)
        autocast_dtype = self._autocast_dtype if dtype == policy_dtype else getattr(torch, dtype, None)
        score = partial(score_without_gradient, policy, autocast_dtype=autocast_dtype)
        self.noise = measured(score, batch, scores, reduce)
        if self.noise.mean > _MUCH_NOISE and is_main_process():
            logger.warning(_NOISY, self.noise.mean, _dtypes(policy_dtype, own))

    def _reduce_same(self, tensor: Tensor, how: str) -> Tensor:
        """Rows that all processes have in common count once."""
        return self._reduce(tensor, how) / (num_processes() if how == "sum" else 1)

    def set_sentinel(self, batch: PairBatch) -> None:
        """Keeps the reference's log-probs of these pairs. Collective."""
        self._sentinel = batch
        self._before = self._answers(batch)
        if self._reference.traits.moves:  # a resumed run may have other rows than its checkpoint knows, on some process
            self._knows_start = not any_process(self.start is None or self.start.responses != _keys(batch))

    def keep_sampled(self, batch: PairBatch, answer: ResponseLogProbs) -> None:
        """Keeps further answers, to be compared after a change of what passes depend on."""
        self._sampled.append((batch, answer))

    def _answers(self, batch: PairBatch, *, live: bool = False) -> ResponseLogProbs:
        """The reference's answers; `live` if they must be computed now, by what stands behind a store."""
        reference = self._reference
        while live and isinstance(reference, WrappingReference) and reference.traits.answers_are_stored:
            reference = reference.wrapped
        with products_of_training(self.shared.modules):
            return reference.log_probs(batch)

    def _effect(self) -> str:
        """By how much the reference's answers to fixed pairs have moved, in words; empty where it is not known."""
        if self._sentinel is None or self._before is None or self._reference.traits.is_collective:
            return ""
        try:
            gap = Gap.between(self._answers(self._sentinel), self._before, unreduced)
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
        now = self._scored(policy, self._sentinel)
        found = {"reference/distance": Gap.between(now, reference, self._reduce).mean}
        if self._knows_start:
            assert self.start is not None
            start = replace(reference, values=reference.values.new_tensor(self.start.log_probs))
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
        reduce = unreduced if alone else self._reduce
        watched = [(self._sentinel, self._before), *(self._sampled if alone else ())]
        gaps = [Gap.between(self._answers(batch, live=alone), before, reduce) for batch, before in watched]
        gap = max(gaps, key=lambda gap: gap.largest)
        if gap.largest == 0:
            return
        own = self._reference.identity.compute_dtype
        stored = self.noise if traits.answers_are_stored else None  # removed and scored again, maybe, in another batch
        allowed = ALIKE[own] if stored is None else stored.allowed(gap, own)
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


def _one_after_another(parts: Sequence[ResponseLogProbs]) -> ResponseLogProbs:
    return join_log_probs(parts, range(sum(part.num_responses for part in parts)))


_NOISY = (
    "Rounding moves the policy's log-probs by %.2g nats per token from one batch to another (%s). The reference's "
    "answers have this noise too, so the first loss is not exactly that of equal models. A reference in the same batch "
    "and dtype has none (`precompute_ref_log_probs=False`), one with `ref_dtype='float32'` less."
)


def _keys(batch: PairBatch) -> list[str]:
    return [key.hex() for key in batch.keys]
