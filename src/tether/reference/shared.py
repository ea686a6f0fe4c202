"""Watches what a reference shares with others: its tensors, and what else its passes depend on.

Knows references; what a change does to their answers, `watch` finds out. Knows no trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tether.distributed import names_of_all, num_processes, raising_together
from tether.errors import DriftError
from tether.reference.base import Reference
from tether.reference.behaviour import Behaviour
from tether.reference.held import HeldTensors, slots_of

logger = logging.getLogger(__name__)

_STEPS_APART = 10  # of processes that tell each other what they found: one that stops alone leaves the others waiting

INSTEAD = (
    "Keep training from changing it (through a bias, `modules_to_save`, tied or shared embeddings), or give the "
    "reference its own weights with `ref_model`."
)


class SharedWatch:
    """Watches one reference's weights, and the modules that its passes run through.

    Attributes:
        modules: These modules: the policy's or the reference's own; an empty one where there are none.

    Args:
        reference: The reference.
        effect: By how much its answers have moved, in words.
        compare: Compares its answers with those at the start, on this process alone; raises if they moved.
    """

    def __init__(self, reference: Reference, effect: Callable[[], str], compare: Callable[[], None]) -> None:
        self._reference, self._effect, self._compare = reference, effect, compare
        self._held = HeldTensors(())
        self._found: set[str] = set()
        self._behaviour: Behaviour | None = None
        self.modules = nn.Module()

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
            self.modules, self._behaviour = model, Behaviour(model)

    def tell_changes(self) -> None:
        """Warns of what has changed about the modules since the trainer was built; policy and reference share it.

        Raises:
            DriftError: If modules were exchanged; names their tensors.
        """
        if changes := self._changes(everything=True):
            logger.warning(
                "These have changed since the trainer was built, and the %s reference computes with them, as the "
                "policy may: %s. A hook that only looks is harmless; else build the trainer after the change.",
                self._reference.identity.kind,
                _listed(changes),
            )

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
                problem=f"Cannot train {named([*names])}: the {self._reference.identity.kind} reference shares what "
                "was frozen when the trainer was built, and would change with it.",
                instead="Let train what shall train before building the trainer (`requires_grad_(True)`): the "
                "reference copies that.",
            )
        logger.warning(
            "The reference keeps its own copy (%.1f MB) of %d tensors that were frozen when the trainer was built and "
            "train now: %s.",
            sum(names.values()) / 1e6,
            len(names),
            named([*names]),
        )

    def check(self, step: int | None = None) -> None:
        """Looks at every byte of the tensors, or after a step for traces of a change and, in rotation, at bytes.

        Every process must take part: what one finds after a step, all raise within `_STEPS_APART`.

        Args:
            step: The optimizer step, counted from 1; None to look at everything.

        Raises:
            DriftError: Names the tensors that changed.
        """
        self._found = set(self._held.changed()) if step is None else self._found | set(self._held.changed_at_step())
        if step is not None and step % _STEPS_APART and num_processes() > 1:
            return
        if names := names_of_all(self._found):
            raise self._moved(names)
        with raising_together():
            self._check_behaviour(everything=step is None)

    def _check_behaviour(self, *, everything: bool) -> None:
        if changes := self._changes(everything=everything):
            self._compare()  # on this process alone: maybe a profiler's hooks
            logger.warning(
                "These have changed in training, and the %s reference computes with them: %s. Its answers to fixed "
                "pairs are still the same.",
                self._reference.identity.kind,
                _listed(changes),
            )

    def _changes(self, *, everything: bool) -> list[str]:
        if self._behaviour is None:
            return []
        changes = self._behaviour.changes(everything=everything)
        if changes and (lost := self._behaviour.lacking(self._held.slots)):
            raise self._moved(lost)
        return changes

    def _moved(self, names: Sequence[str]) -> DriftError:
        return DriftError(
            problem=f"Cannot go on training: the {self._reference.identity.kind} reference should not change, but "
            f"these of its tensors did: {named(names)}{self._effect()}.",
            details="It shares them with the policy or with the model that it was made of, and something wrote to "
            "them: an optimizer that holds them, a callback, whoever else has the model.",
            instead=INSTEAD,
        )


def named(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return _listed([f"`{name}`" for name in names])


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:5]) + (", ..." if len(words) > 5 else "")
