"""What happens to a reference while transformers trains: it is told of each step, and watched.

Knows the trainer's events; what is done about them, the trainer says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from tether.reference import Reference
from tether.reference.watch import ReferenceWatch


class FollowTraining(TrainerCallback):
    """Tells the reference of each finished optimizer step, and looks for drift whenever training pauses.

    Args:
        reference: The reference.
        watch: What looks at it.
        begin: Called when training begins, with the trainer's state.
        begin_epoch: Called with the number of the epoch that begins. transformers tells a batch sampler too, but not
            through the wrappers of a resumed, distributed run.
    """

    def __init__(
        self,
        reference: Reference,
        watch: ReferenceWatch,
        begin: Callable[[Any], None],
        begin_epoch: Callable[[int], None],
    ) -> None:
        self._reference, self._watch = reference, watch
        self._begin, self._begin_epoch = begin, begin_epoch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reference.advance(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.check_drift()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.check_drift()
