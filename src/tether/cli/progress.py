"""What a person sees of a run while it goes: one line per log, and a bar where there is a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressLines(TrainerCallback):
    """Prints `step 20/100  loss 0.6512  margin +0.0831  accuracy 0.625  ...` at every log and evaluation.

    Attributes:
        tokens_per_second: Prompt and response tokens that the policy was trained on, per second, up to the last log.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._bar: Any = None
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        seconds = time.perf_counter() - self._start
        if "loss" in logs:
            self.tokens_per_second = logs.get("num_tokens", 0.0) / seconds
            rate = f"learning rate {logs['learning_rate']:.1e}"
            self._say(f"step {state.global_step:>4}/{state.max_steps}  {_figures(logs, '')}  {rate}  {seconds:.0f} s")
        elif "eval_loss" in logs:
            self._say(f"held out at {state.global_step:>4}  {_figures(logs, 'eval_')}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


def _figures(logs: Mapping[str, float], prefix: str) -> str:
    return (
        f"loss {logs[f'{prefix}loss']:.4f}  margin {logs.get(f'{prefix}rewards/margins', 0.0):+.4f}  "
        f"accuracy {logs.get(f'{prefix}rewards/accuracies', 0.0):.3f}"
    )
