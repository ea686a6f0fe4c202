"""Rows of different lengths, concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def flatten(rows: Sequence[Sequence[int]]) -> Int[Tensor, " total"]:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Int[Tensor, " rows_plus_1"]:
    """Start of each of several concatenated rows of `lengths` elements; the last entry is the total."""
    return sent(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int64), device)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; what leaves the host is copied at once, without waiting for the work that is under way."""
    leaves_host = tensor.device.type == "cpu" and torch.device(device).type != "mps"
    return tensor.to(device, non_blocking=leaves_host)


def places_of(mask: Bool[Tensor, " total"], lengths: Sequence[int]) -> Int[Tensor, " marked"]:
    """Where a mask is true; `lengths`, how often in each row, are known on the host, so that nothing waits for it."""
    return mask.nonzero_static(size=sum(lengths))[:, 0]
