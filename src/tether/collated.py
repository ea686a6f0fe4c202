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
from tether.config import DPOConfig
from tether.data import PairCollator, batch_of
from tether.errors import ConfigurationError, DataError
from tether.evaluation import padded_ids
from tether.store import content_key
from tether.types import PairBatch, Response

_KEYS = ("input_ids", "attention_mask", "completion_mask")


def collator_of(args: DPOConfig, given: Any, *, with_input_ids: bool, pad_token_id: int) -> Collator:
    """The run's collator: our own, or what the user's makes, as pairs.

    Args:
        args: The run's options.
        given: The user's own collator, or None.
        with_input_ids: Also return padded `input_ids`, which `include_for_metrics=["inputs"]` reads.
        pad_token_id: What fills them.
    """
    collator: Collator = PairCollator(args.max_length, args.truncation_mode)
    if given is not None:
        collator = CollatedPairs(given)
    return WithTokenIds(collator, pad_token_id) if with_input_ids else collator


@dataclass
class WithTokenIds:
    """A collator that also returns `input_ids`: padded, the chosen sequences and then the rejected ones."""

    collator: Collator
    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = self.collator(rows)
        return inputs | {"input_ids": padded_ids(batch_of(inputs), self.pad_token_id)}


@dataclass
class CollatedPairs:
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
