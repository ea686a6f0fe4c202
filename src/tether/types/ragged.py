"""Rows of different lengths, concatenated, and how integers that are planned on the host get to a device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def flatten(rows: Sequence[Sequence[int]]) -> Int[Tensor, " total"]:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Int[Tensor, " rows_plus_1"]:
    """Start of each of several concatenated rows of `lengths` elements; the last entry is the total."""
    return placed([list(accumulate(lengths, initial=0))], device)[0]


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host, in one copy for which a CUDA device's queue need not be waited for."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=copies_later(device))


def copies_later(device: torch.device | str) -> bool:
    """Whether the host may go on while a copy to or from the device is under way; MPS would read freed memory."""
    return torch.device(device).type not in ("cpu", "mps")


def places_of(mask: Bool[Tensor, " total"], lengths: Sequence[int]) -> Int[Tensor, " marked"]:
    """Where a mask is true; `lengths`, how often in each row, are known on the host, so that nothing waits for it."""
    return mask.nonzero_static(size=sum(lengths))[:, 0]


def placed(parts: Sequence[Any], device: torch.device | str) -> tuple[Int[Tensor, " _"], ...]:
    """Each part (integers, or an array of them) as a tensor on a device, all by one copy."""
    together = torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in parts])
    each: tuple[Tensor, ...] = on_device(together, device).split([len(part) for part in parts])
    return each
