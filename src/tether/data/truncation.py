"""Where a row is cut: the one rule that dropping, planning and collating share.

Knows numbers of tokens; knows no tokens, no rows and no trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tether.types import TruncationMode


@dataclass(frozen=True)
class Truncation:
    """What is kept of a prompt and a response that are longer than a limit.

    Every number of tokens may be an integer or an array (one entry per row).

    Args:
        max_length: Tokens of prompt and response together; None for no limit.
        mode: Which end of a longer sequence stays: `keep_start` or `keep_end`.

    Example:
        >>> Truncation(10).span(8, 5) == (0, 8, 10), Truncation(10, "keep_end").span(8, 5) == (3, 8, 13)
        (True, True)
    """

    max_length: int | None = None
    mode: TruncationMode = "keep_start"

    def span(self, num_prompt: Any, num_response: Any) -> tuple[Any, Any, Any]:
        """Where the fed part of prompt + response starts, where its response begins, and where it stops."""
        whole = num_prompt + num_response
        length = whole if self.max_length is None else np.minimum(whole, self.max_length)
        start = whole - length if self.mode == "keep_end" else 0 * whole
        # A response that fills the row loses its first token, which becomes the context of its second.
        return start, np.maximum(num_prompt, start + 1), start + length

    def leaves_room(self, num_prompt: Any) -> Any:
        """Whether a token of a response is fed after a prompt of this length."""
        _, begin, stop = self.span(num_prompt, 1)
        return begin < stop

    def num_tokens(self, num_prompt: Any, num_chosen: Any, num_rejected: Any) -> Any:
        """Tokens of a pair as it is laid out: both responses, and the prompt once if both keep the same part of it."""
        (first, begin, end), (second, _, stop) = (self.span(num_prompt, n) for n in (num_chosen, num_rejected))
        shared = (first == second) & (first < num_prompt)  # otherwise each begins with a token of its own response
        return (end - first) + (stop - second) - np.where(shared, begin - first, 0)
