"""Checks that the reference is the right one: by its gap to the policy at step 0, and by its drift during training.

Training against a wrong reference is silent: the loss goes down anyway. Knows references and scoring; knows no
trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.distributed import any_process, names_of_all, reduced
from tether.errors import DriftError, InitialGapError
from tether.reference.adapter_state import has_adapter_off
from tether.reference.base import Reference, compute_dtype_name, score_without_gradient
from tether.reference.behaviour import Behaviour
from tether.reference.held import HeldTensors, slots_of
from tether.scoring.evaluation import products_of_training
from tether.types import PairBatch, ResponseLogProbs

logger = logging.getLogger(__name__)

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
        self._held = HeldTensors(())
        self._model = nn.Module()
        self._behaviour: Behaviour | None = None
        self._sentinel: PairBatch | None = None
        self._before: Tensor | None = None
        self.start: Start | None = None

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

    def hold(self) -> None:
        """Begins to watch the reference's weights: what others hold too, and its own, which `ref_model` gives away."""
        traits, module = self._reference.traits, self._reference.module
        if module is None or traits.moves or traits.runs_in_policy:
            self._held = HeldTensors(self._reference.held_by_others())
        else:
            self._held = HeldTensors(slots_of(module, dict(module.named_parameters())))

    def watch_behaviour(self, policy: nn.Module) -> None:
        """Begins to watch what else a pass of the reference depends on: in the policy's modules, or in its own."""
        model = policy if self._reference.traits.runs_in_policy else self._reference.module
        if model is not None:
            self._model, self._behaviour = model, Behaviour(model)

    def tell_changes(self) -> None:
        """Warns of what has changed about the modules since the trainer was built; policy and reference share it."""
        if changes := self._changes(everything=True):
            logger.warning(
                "These have changed since the trainer was built, and the %s reference computes with them, as the "
                "policy may: %s. A hook that only looks is harmless; else build the trainer after the change.",
                self._reference.identity.kind,
                _listed_plain(changes),
            )

    def _changes(self, *, everything: bool) -> list[str]:
        if self._behaviour is None:
            return []
        changes = self._behaviour.changes(everything=everything)
        if changes and (lost := [slot.name for slot in self._held.slots if self._behaviour.lacks(slot.module)]):
            raise self._moved(lost)
        return changes

    def keep_what_trains(self, optimizer: Any) -> None:
        """Lets the reference copy what it shares and what trains now, before the step that would change it.

        Raises:
            DriftError: Names the tensors, if they have changed already or it can't copy them.
        """
        names = self._held.trained_by(optimizer)
        if not names:
            return
        if changed := self._held.changed(names):
            raise self._moved(changed)
        if self._reference.traits.moves or not self._reference.keep(names):
            raise DriftError(
                problem=f"Cannot train {_listed([*names])}: the {self._reference.identity.kind} reference shares what "
                "was frozen when the trainer was built, and would change with it.",
                instead="Let train what shall train before building the trainer (`requires_grad_(True)`): the "
                "reference copies that.",
            )
        logger.warning(
            "The reference keeps its own copy (%.1f MB) of %d tensors that were frozen when the trainer was built and "
            "train now: %s.",
            sum(names.values()) / 1e6,
            len(names),
            _listed([*names]),
        )

    def check_held(self, *, everything: bool) -> None:
        """Looks at what others hold too: for traces of a change and, in rotation, at the bytes.

        Args:
            everything: Read every byte; then every process must take part.

        Raises:
            DriftError: Names the tensors that changed.
        """
        names = names_of_all(self._held.changed()) if everything else self._held.changed_at_step()
        if names:
            raise self._moved(names)
        if changes := self._changes(everything=everything):
            self.check_drift(alone=True)  # on this process, maybe: a profiler's hooks
            logger.warning(
                "These have changed in training, and the %s reference computes with them: %s. Its answers to fixed "
                "pairs stay within rounding.",
                self._reference.identity.kind,
                _listed_plain(changes),
            )

    def _moved(self, names: Sequence[str]) -> DriftError:
        by = ""
        if self._sentinel is not None and self._before is not None and not self._reference.traits.is_collective:
            gap = Gap.between(self._answers(), self._before, _alone)
            by = (
                f", which moves its answers to fixed pairs by {gap.mean:.3g} nats per token (largest {gap.largest:.3g})"
            )
        return DriftError(
            problem=f"Cannot go on training: the {self._reference.identity.kind} reference should not change, but "
            f"these of its tensors did: {_listed(names)}{by}.",
            details="It shares them with the policy or with the model that it was made of, and something wrote to "
            "them: an optimizer that holds them, a callback, whoever else has the model.",
            instead=_INSTEAD,
        )

    def set_sentinel(self, batch: PairBatch) -> None:
        """Keeps the reference's log-probs of these pairs. Collective."""
        self._sentinel = batch
        self._before = self._answers()
        if self._reference.traits.moves:  # a resumed run may have other rows than its checkpoint knows, on some process
            self._knows_start = not any_process(self.start is None or self.start.responses != _keys(batch))

    def _answers(self) -> Tensor:
        assert self._sentinel is not None
        with products_of_training(self._model):
            return self._reference.log_probs(self._sentinel).values

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
        reference = self._answers()
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
        gap = Gap.between(self._answers(), self._before, reduce)
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
            details=f"These of its tensors changed: {_listed(names)}."
            if names
            else "None of its weights changed, so a buffer, a hook, the config, a mode or the stored values did.",
            instead=_INSTEAD,
        )


def _alone(tensor: Tensor, how: str) -> Tensor:
    return tensor


_INSTEAD = (
    "Keep training from changing it (through a bias, `modules_to_save`, tied or shared embeddings), or give the "
    "reference its own weights with `ref_model`."
)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _listed_plain(changes: Sequence[str]) -> str:
    return ", ".join(changes[:5]) + (", ..." if len(changes) > 5 else "")


def _keys(batch: PairBatch) -> list[str]:
    return [key.hex() for key in batch.keys]
