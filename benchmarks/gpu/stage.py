"""One stage of the measurements: where it runs and how large, and its results, kept as JSON after each of them.

What fails is kept as failed and costs no other result, because a machine may be at hand for minutes only.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch

# Nothing is begun later than this.
SECONDS = 230
# `real-shaped` has the medians of the real pairs, which need not be at hand.
SHAPES = harness.SHAPES | {"real-shaped": (130, 260)}
Rows = list[dict[str, Any]]


@dataclass
class Stage:
    """What a stage is measured on, and what it has found.

    Attributes:
        toy: Everything small, to try that it works.
        folder: Where the JSON is written.
        results: What was measured.
        left_out, failed: What was not, with the reason.
    """

    name: str
    toy: bool
    folder: Path
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    results: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.device == "cpu":
            self.left_out["peak memory, host syncs"] = "a CPU counts neither"

    @property
    def seconds_left(self) -> float:
        return SECONDS - (time.monotonic() - self._begun)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def measure(self, what: str, run: Callable[[], Any]) -> None:
        """Keeps the result of `run`, or its results, or why there are none."""
        found = self.attempt(what, run)
        if isinstance(found, list):
            print(f"{what}: {len(found)} results", flush=True)
            self.results += found
        elif found is not None:
            print(f"{what}: {harness.line_of(found) if 'times_faster' in found else found}", flush=True)
            self.results.append(found)
        self.write()

    def attempt(self, what: str, run: Callable[[], Any]) -> Any:
        """What `run` returns; None if it fails, or if no time is left, which the JSON says."""
        if self.seconds_left < 0:
            self.left_out[what] = "no time was left"
            return None
        try:
            return run()
        except Exception:
            self.failed[what] = traceback.format_exc()
            print(f"{what} failed\n{self.failed[what]}", flush=True)
            return None
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Frees what nothing holds any more; trainers are cycles."""
        gc.collect()
        torch.cuda.empty_cache()

    def write(self) -> Path:
        return harness.write_results(
            self.name,
            self.results,
            self.device,
            folder=self.folder,
            scale="toy" if self.toy else "full",
            left_out=self.left_out,
            failed=self.failed,
        )

    def each_shape(self, count: int, vocab_size: int) -> Iterator[tuple[str, list[Rows]]]:
        """Every shape of data, with so many batches of 8 pairs; of 2 pairs, an eighth as long, at toy scale."""
        size, shorter = (2, 8) if self.toy else (8, 1)
        for name, (prompt, answer) in SHAPES.items():
            rows = harness.synthetic_rows(prompt // shorter, answer // shorter, count * size, vocab_size=vocab_size)
            yield name, harness.batches_of(rows, size)
