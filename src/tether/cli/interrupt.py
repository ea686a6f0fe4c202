"""Ctrl-C during training: finishes the step and writes a checkpoint, so that nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback


class StopOnInterrupt(TrainerCallback):
    """While open, the first Ctrl-C stops training after its step, with a checkpoint; the second stops at once.

    With several processes the first one stops at once: they get the signal at different steps, and would wait for each
    other. They get it twice, from the terminal and from their launcher.

    Attributes:
        stopped: Whether training was stopped after a step.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._previous: Any = None

    def __enter__(self) -> StopOnInterrupt:
        is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask if is_alone else _stop_at_once)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked:
            control.should_save = not args.save_only_model  # without the optimizer, a checkpoint cannot be resumed
            control.should_training_stop = True
            self.stopped = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\ntether: stopping after this step (press Ctrl-C again to stop at once)", file=sys.stderr, flush=True)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
