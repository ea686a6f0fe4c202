"""What a test looks at from outside: the traces left on a model, its bits, the largest tensor, the bytes alive.

What a user's tests look at too has its home in `tether.testing`.
"""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tether.testing import bits, same_bits, traces

__all__ = ["LargestTensor", "bits", "same_bits", "tensor_bytes_alive", "traces"]


def tensor_bytes_alive() -> int:
    """Bytes of the distinct storages behind all tensors that exist in this process, parameters or not."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type != "meta":  # not the fakes of `torch.compile`
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class LargestTensor(TorchDispatchMode):
    """Watches every operation, forward and backward, for the largest tensor it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return made
