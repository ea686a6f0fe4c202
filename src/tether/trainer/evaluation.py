"""What evaluation adds to scoring: its dtype, which figures it has, and what a user's `compute_metrics` is given.

Knows tensors and transformers' evaluation loop; knows no reference and no loss. Logits are built where they are asked
for, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from tether.config.dpo_config import DPOConfig
from tether.data.datasets import batch_of, truncation_of
from tether.data.truncation import Truncation
from tether.scoring.layout import padded_rows
from tether.types import PairBatch


@contextmanager
def full_evaluation(args: DPOConfig) -> Iterator[torch.dtype | None]:
    """The dtype of `bf16_full_eval` or `fp16_full_eval`; while open, transformers does not see these options.

    It would leave the policy off its device, and cast its weights in place and for good: those that the reference
    shares with them too, and those that train on after an evaluation. None under DeepSpeed, whose engine runs in that
    dtype already, or the option was refused.
    """
    asked = args.bf16_full_eval, args.fp16_full_eval
    args.bf16_full_eval = args.fp16_full_eval = False
    dtype = torch.bfloat16 if asked[0] else torch.float16 if asked[1] else None
    try:
        yield dtype if args.deepspeed_plugin is None else None
    finally:
        args.bf16_full_eval, args.fp16_full_eval = asked


def padded_logits(model: nn.Module, batch: PairBatch, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Logits and token ids of a batch as TRL hands them on: the chosen sequences, then the rejected ones.

    Args:
        model: The policy.
        batch: `n` pairs, on the model's device.
        pad_token_id: What fills the rows on the right.

    Returns:
        Logits (`2n`, longest sequence, vocabulary), and `input_ids` (`2n`, longest sequence).
    """
    rows = padded_rows(batch, pad_token_id)
    sides = [*batch.chosen, *batch.rejected]
    logits: Tensor = model(**rows.inputs, use_cache=False).logits
    # Prompt-learning adapters put virtual tokens in front of each row.
    return logits[sides, -rows.width :], rows.inputs["input_ids"][sides]


def padded_ids(batch: PairBatch, pad_token_id: int) -> Tensor:
    """The token ids of the same rows (`2n`, longest sequence)."""
    ids: Tensor = padded_rows(batch, pad_token_id).inputs["input_ids"]
    return ids[[*batch.chosen, *batch.rejected]]


@dataclass
class WithTokenIds:
    """A collator that also returns those ids as `input_ids`, for `include_for_metrics=["inputs"]`."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    pad_token_id: int

    @property
    def truncation(self) -> Truncation | None:
        return truncation_of(self.collator)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = self.collator(rows)
        return inputs | {"input_ids": padded_ids(batch_of(inputs), self.pad_token_id)}


class PairGather:
    """Gathers, over the processes, what evaluation made of a batch of `n` pairs in `2n` rows, less what does not count.

    transformers gathers rows, and accelerate cuts them to as many as the set has. Here each pair knows whether it
    counts, its two rows stay together, and processes may have different numbers of pairs.

    Args:
        accelerator: What gathers.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._counts = torch.ones(0, dtype=torch.bool)
        self._num_pairs = 0
        self._loss_is_next = False

    def begin_batch(self, pairs: Tensor) -> None:
        """Tells the pairs of the batch that comes next, a 1 for each that counts; the loop then gathers its loss."""
        self._num_pairs, self._loss_is_next = len(pairs), True
        self._counts = self._gathered(pairs) > 0

    def __call__(self, data: Any) -> Any:
        if self._loss_is_next:  # one number, repeated for a whole batch
            self._loss_is_next = False
            return self._gathered(data[:1].expand(self._num_pairs))[self._counts]
        return recursively_apply(self._gather_rows, data)

    def _gather_rows(self, tensor: Tensor) -> Any:
        half = self._num_pairs
        if tensor.ndim == 0 or tensor.shape[0] != 2 * half:
            return self._accelerator.gather(tensor)
        pairs = self._gathered(torch.stack([tensor[:half], tensor[half:]], 1))[self._counts]
        return torch.cat([pairs[:, 0], pairs[:, 1]])

    def _gathered(self, pairs: Tensor) -> Tensor:
        """One entry for each pair, of all processes; filled up with zeros to the longest."""
        gathered: Tensor = self._accelerator.gather(self._accelerator.pad_across_processes(pairs))
        return gathered
