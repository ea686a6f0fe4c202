"""What a test looks at from outside: the traces left on a model, its bits, the largest tensor, the bytes alive.

Knows torch and PEFT's surface; imports nothing of `tether`.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a visitor could leave something on, except the numbers in it."""
    config: Any = model.config
    return {
        "class": type(model),
        "state": list(model.state_dict()),
        "vars": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "modes": [module.training for module in model.modules()],
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad is None for parameter in model.parameters()],
        "objects": [id(parameter) for parameter in model.parameters()],
        "storages": [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())],
        "adapters": [
            (getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None))
            for module in model.modules()
        ],
        "attention": config._attn_implementation,
        "config": config.to_dict(),
    }


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two copies are equal, element by element (NaN equals NaN)."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name].nan_to_num(), second[name].nan_to_num())
        for name in first
    )


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
