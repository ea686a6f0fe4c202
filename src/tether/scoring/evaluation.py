"""A model in evaluation mode for a while. Knows modules only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()`, and every module's own mode back afterwards.

    Layers in 8 bits keep theirs: they have no dropout, and on a CPU bitsandbytes (0.50) computes another product in
    training than in evaluation, so that reference and policy would differ from the first step on.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, mode in modes:
        if hasattr(getattr(module, "state", None), "is_training"):
            module.training = mode
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
