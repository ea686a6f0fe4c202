"""Keeps activations in host memory until their backward (`activation_offloading`).

Knows torch's hooks for saved tensors; knows no model but its weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_MIN_BYTES = 1024  # below, the call costs more than the memory is worth


class OffloadedActivations(saved_tensors_hooks):
    """While open, what autograd saves for the backward is moved to host memory, and back when needed.

    The results are the same, bit for bit. Weights stay where they are, since they are not held for the backward
    alone. The copies run in stream order, so no step waits for one.

    Args:
        model: Its weights are not moved.
        source: Kind of device whose tensors are moved.
        min_bytes: Smaller tensors are not moved.
    """

    def __init__(self, model: nn.Module, source: str, min_bytes: int = _MIN_BYTES) -> None:
        self._model, self._source, self._min_bytes = model, source, min_bytes
        self._weights: set[int] = set()
        super().__init__(self._to_host, self._back)

    def __enter__(self) -> None:
        # Collected each time, because sharding libraries replace the weights once training starts.
        self._weights = {p.untyped_storage().data_ptr() for p in self._model.parameters() if _has_storage(p)}
        super().__enter__()

    def _to_host(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if not self._moves(tensor):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def _back(self, kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, host = kept
        return host.to(device, non_blocking=True)

    def _moves(self, tensor: Tensor) -> bool:
        if tensor.device.type != self._source or tensor.nbytes < self._min_bytes or not _has_storage(tensor):
            return False
        return tensor.untyped_storage().data_ptr() not in self._weights


def activations_of(model: nn.Module, *, offloaded: bool) -> AbstractContextManager[None]:
    """The context of a training step; `DPOConfig` refuses offloading without an accelerator."""
    if not offloaded:
        return nullcontext()
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return OffloadedActivations(model, accelerator.type)


def _has_storage(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
