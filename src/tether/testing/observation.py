"""What code can leave behind: traces on a model, changed weights, and another state of the random generators.

Observes from outside: knows torch and the attributes that PEFT adds to a module; knows no reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that code could change, except its numbers; compare with `==`."""
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


def random_state() -> dict[str, Any]:
    """The state of the random generators of torch (every device) and NumPy; compare with `==`.

    Python's own is left out: type checkers that draw samples (beartype) use it in every call.
    """
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "random numbers of torch": torch.get_rng_state().tolist(),
        "random numbers of NumPy": [name, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["random numbers of the GPUs"] = [generator.tolist() for generator in torch.cuda.get_rng_state_all()]
    return state
