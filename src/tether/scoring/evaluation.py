"""A model in evaluation mode, or in another precision, for a while. Knows modules only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tether.distributed import modules_of

# Those that set a module's mode and do no more, unless a model uses kernels.
_PLAIN = (nn.Module.train, PreTrainedModel.train)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()`, and every module's own mode back afterwards.

    Layers in 8 bits keep theirs: they have no dropout, and on a CPU bitsandbytes (0.50) computes another product in
    training than in evaluation, so that reference and policy would differ from the first step on.
    """
    modules = modules_of(model)
    training = [module for module in modules if module.training]
    try:
        if training and not _has_plain_modes(modules):
            model.eval()
        _set_mode(training, False)
        _set_mode(filter(_is_in_8_bits, training), True)
        yield
    finally:
        _set_mode(training, True)


def running_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """While open, products run in this dtype, whatever the weights are held in; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def products_of_training(model: nn.Module) -> Iterator[None]:
    """While open, layers in 8 bits compute as in training, also under `evaluation_mode`, whatever was run before."""
    evaluating = [module for module in modules_of(model) if _is_in_8_bits(module) and not module.training]
    try:
        _set_mode(evaluating, True)
        yield
    finally:
        _set_mode(evaluating, False)


def _set_mode(modules: Iterable[nn.Module], mode: bool) -> None:
    for module in modules:
        state = module.__dict__
        if "training" in state and not hasattr(type(module), "training"):
            state["training"] = mode  # `nn.Module.__setattr__` takes ten times as long, and does the same
        else:
            module.training = mode


def _has_plain_modes(modules: Iterable[nn.Module]) -> bool:
    """Whether `model.eval()` does nothing but set modes."""
    kinds = {type(module) for module in modules}
    are_plain = all(kind.train in _PLAIN and kind.eval in (nn.Module.eval, PreTrainedModel.eval) for kind in kinds)
    return are_plain and not any(module.use_kernels for module in modules if isinstance(module, PreTrainedModel))


def _is_in_8_bits(module: nn.Module) -> bool:
    return hasattr(vars(module).get("state"), "is_training")
