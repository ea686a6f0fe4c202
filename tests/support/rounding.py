"""Products that round otherwise, as those of a processor do that is not here: what a test's bounds must allow for.

Knows nothing of `tether` but the names of its operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Matrix products and attention, each with the place of the factor that is rounded.
PRODUCTS = {
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::bmm": 0,
    "aten::convolution": 0,
    "aten::linear": 0,
    "aten::matmul": 0,
    "aten::mm": 0,
    "aten::scaled_dot_product_attention": 0,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 0,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 0,
    "tether::packed_attention": 0,
    "tether::packed_attention_backward": 0,
}


class OtherRounding(TorchDispatchMode):
    """While open, one factor of every product in fp32 is off by some rounding, drawn anew for each shape.

    As with real kernels, the same product gives the same bits again, and rows in another batch round otherwise.

    Args:
        times: How much, relative to what kernels differ by. Logits and gradients of `tiny_model` are off by 1e-6 of
            their size from one set of kernels to the next (`ATEN_CPU_CAPABILITY`, `MKL_CBWR`), by 2e-6 at most; under
            `OtherRounding(10)` by 1e-5.
    """

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times = times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = PRODUCTS.get(func.name().split(".")[0])
        if place is not None and args[place].dtype == torch.float32:
            args = (*args[:place], self._rounded(args[place]), *args[place + 1 :])
        return func(*args, **(kwargs or {}))

    def _rounded(self, factor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(factor.shape)))
        noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        return (factor * (1 + self.times * torch.finfo(torch.float32).eps * noise)).float()


class RoundsByBatch(TorchDispatchMode):
    """While open, one in 256 entries of every product in bfloat16 is off by its last digit; which, the shape decides.

    So do kernels that add in an order of their own for each number of rows, as those of AMX and of GPUs: the same
    product gives the same bits again, and rows in another batch round otherwise. What it does to a deep model is not a
    matter of how many are off: each layer rounds again.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in ("aten::addmm", "aten::linear", "aten::mm") and found.dtype == torch.bfloat16:
            generator = torch.Generator().manual_seed(hash(tuple(found.shape)))
            places = torch.randint(found.numel(), (max(1, found.numel() // 256),), generator=generator)
            entries = found.view(-1)
            entries[places] *= 1 + 0.75 * torch.finfo(torch.bfloat16).eps
        return found
