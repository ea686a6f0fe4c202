"""A model in evaluation mode for a while. Knows modules only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()`, and every module's own mode back afterwards.

    Layers in 8 bits keep theirs: they have no dropout, and on a CPU bitsandbytes (0.50) computes another product in
    training than in evaluation, so that reference and policy would differ from the first step on.
    """
    with _modes_as_before(model.modules()) as modes:
        model.eval()
        for module, mode in modes:
            if _is_in_8_bits(module):
                module.training = mode
        yield


@contextmanager
def products_of_training(model: nn.Module) -> Iterator[None]:
    """While open, layers in 8 bits compute as in training, also under `evaluation_mode`, whatever was run before."""
    with _modes_as_before(filter(_is_in_8_bits, model.modules())) as modes:
        for module, _ in modes:
            module.training = True
        yield


@contextmanager
def _modes_as_before(modules: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, bool]]]:
    """Gives some modules with their modes, which they have again afterwards."""
    modes = [(module, module.training) for module in modules]
    try:
        yield modes
    finally:
        for module, mode in modes:
            module.training = mode


def _is_in_8_bits(module: nn.Module) -> bool:
    return hasattr(getattr(module, "state", None), "is_training")
