"""Rows of different lengths, concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor


def flatten(rows: Sequence[Sequence[int]]) -> Int[Tensor, " total"]:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Int[Tensor, " rows_plus_1"]:
    """Start of each of several concatenated rows of `lengths` elements; the last entry is the total."""
    return on_device(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int64), device)


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host, in one copy for which a CUDA device's queue need not be waited for."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
