"""The progress of a run in the terminal: a table with a row for each log, and a bar if there is a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

# The figures as they are headed, their metrics, and how they are written. Accuracy and margin can rise to perfection
# while the model is ruined; the last two then fall.
_COLUMNS = (
    ("    loss", "loss", ".4f"),
    ("    margin", "rewards/margins", "+.4f"),
    ("  accuracy", "rewards/accuracies", ".3f"),
    ("  rewards/chosen", "rewards/chosen", "+.4f"),
    ("  token accuracy", "mean_token_accuracy", ".3f"),
)
HEADER = "".join(title for title, _, _ in _COLUMNS)
_LABEL = 13


class ProgressLines(TrainerCallback):
    """Prints a row of figures at every log and evaluation, within 80 columns.

    The last step is logged too, so that a run shorter than `logging_steps` shows its result.

    Attributes:
        tokens_per_second: Prompt and response tokens per second that the policy was trained on in this run, up to the
            last log, without the time of evaluations and saves; None if not known yet.
        has_begun: Whether a step has begun.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self.has_begun = False
        self._bar: Any = None
        self._has_header = self._has_ended = False
        self._start = 0.0
        self._counted: tuple[float, float] | None = None  # number of tokens, and the time of that count
        self._stepped = self._aside = 0.0  # when the last step ended, and seconds that were not spent on steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._aside, self._has_ended = time.perf_counter(), 0.0, False
        self._counted = (0.0, self._start) if state.global_step == 0 else None  # a resumed run starts above 0
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.has_begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stepped = time.perf_counter()
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            seconds = self._count(logs.get("num_tokens", 0.0))
            self._print_row(f"{state.global_step}/{state.max_steps}", logs, "", _duration(seconds))
        elif "eval_loss" in logs:
            is_best = self._has_ended and args.load_best_model_at_end and state.best_global_step
            self._print_row(f"held out {state.best_global_step if is_best else state.global_step}", logs, "eval_")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._aside += now - self._stepped
        self._stepped = now

    on_save = on_evaluate

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_ended = True
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _count(self, num_tokens: float) -> float:
        """Updates the token count; returns the seconds since training began."""
        now = time.perf_counter()
        if self._counted is None:
            self._counted, self._aside = (num_tokens, now), 0.0
        before, since = self._counted
        if num_tokens > before:
            self.tokens_per_second = (num_tokens - before) / (now - since - self._aside)
        return now - self._start

    def _print_row(self, label: str, logs: Mapping[str, float], prefix: str, end: str = "") -> None:
        if not self._has_header:
            self._print(f"{'step':>{_LABEL}}{HEADER}")
            self._has_header = True
        self._print(f"{label:>{_LABEL}}{figures(logs, prefix)}{end:>7}".rstrip())

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


def figures(logs: Mapping[str, float], prefix: str) -> str:
    """The figures of a log under `HEADER`; `-` for those that it lacks."""
    return "".join(f"{_shown(logs, prefix, *column):>{len(column[0])}}" for column in _COLUMNS)


def _shown(logs: Mapping[str, float], prefix: str, title: str, name: str, digits: str) -> str:
    if name == "rewards/accuracies":
        return accuracy_of(logs, prefix, digits)
    if prefix + name not in logs:
        return "-"
    # With a small beta the loss of IPO is in the thousands, which must not touch the column before.
    written = (format(logs[prefix + name], digits[:-2] + end) for end in (digits[-2:], "1f", "0e"))
    return next(text for text in written if len(text) < len(title))


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 999 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.0f} h"


def accuracy_of(logs: Mapping[str, float], prefix: str, digits: str) -> str:
    """The accuracy as displayed: `-` if every pair is tied, so that none is ordered right or wrong."""
    num_pairs = logs.get(f"{prefix}pairs/total")
    if num_pairs is not None and num_pairs == logs.get(f"{prefix}pairs/tied"):
        return "-"
    return format(logs.get(f"{prefix}rewards/accuracies", 0.0), digits)
