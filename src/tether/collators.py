"""Which collator makes a run's batches; and padded rows of a collator of the user's own, taken apart into pairs.

Knows the keys of TRL's preference collators; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tether.batches import Collator
from tether.data import PairCollator
from tether.errors import ConfigurationError, DataError
from tether.store import content_key
from tether.types import PairBatch, Response

_KEYS = ("input_ids", "attention_mask", "completion_mask")


def pair_collator(given: Any, max_length: int | None, truncation_mode: str) -> Collator:
    """What the trainer makes its batches with: our own collator, or the user's.

    Args:
        given: None, or a callable that returns the padded layout of TRL's collator. It truncates by itself.
        max_length: For our own.
        truncation_mode: The same.
    """
    return PairCollator(max_length, truncation_mode) if given is None else PairsOfPadded(given)


@dataclass
class PairsOfPadded:
    """Calls a collator and makes a `PairBatch` of the padded rows it returns.

    The rows are `n` chosen and then `n` rejected sequences, padded on either side; `completion_mask` is 1 where a
    token belongs to the response. What the collator truncated or changed is what is trained on.

    Args:
        collator: The user's own; one that returns `pairs` and `batch` already is left alone.

    Raises:
        ConfigurationError: If it returns other keys.
        DataError: If a row has no token of prompt or response.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        made = self.collator([dict(row) for row in rows])
        if isinstance(made.get("batch"), PairBatch):
            return dict(made)
        if set(made) != set(_KEYS):
            raise ConfigurationError(
                asked=f"`data_collator` returned the keys {', '.join(sorted(made))}.",
                why=f"A batch of text pairs is made of {', '.join(_KEYS)}; nothing would read the others.",
                instead="Return these three, as `trl.trainer.dpo_trainer.DataCollatorForPreference` does, or leave "
                "`data_collator` out.",
            )
        sequences = [_response(*row) for row in zip(*(made[key] for key in _KEYS), strict=True)]
        half = len(sequences) // 2
        pairs = list(zip(sequences[:half], sequences[half:], strict=True))
        return {"pairs": torch.ones(half, dtype=torch.int64), "batch": PairBatch.of_pairs(pairs)}


def _response(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Response:
    present = attention_mask.bool()
    ids = input_ids[present].tolist()
    start = int((completion_mask[present] == 0).sum())
    if len(ids) < 2 or start == len(ids):
        raise DataError(
            asked=f"`data_collator` returned a row of {len(ids)} tokens, {len(ids) - start} of them of the response.",
            why="A response is scored token by token, each predicted from what stands before it.",
            instead="Drop rows whose prompt fills `max_length` before they reach the collator.",
        )
    start = max(start, 1)  # truncated from the left: the first token is the context of the second
    return Response(tuple(ids[:start]), tuple(ids[start:]), content_key(ids[:start], ids[start:]))
