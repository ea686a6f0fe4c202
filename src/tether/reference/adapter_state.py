"""A PEFT model's adapter off, or on, for a while.

Knows PEFT's switches and its advice; knows no reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn


@contextmanager
def adapter_off(policy: PeftModel) -> Iterator[None]:
    """PEFT's `disable_adapter`, with every `requires_grad` as it was afterwards and without its advice on biases.

    Trained biases stay in force under it; `ImplicitReference` exchanges them.
    """
    trains = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
            with policy.disable_adapter():
                yield
    finally:
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


@contextmanager
def adapter_on(policy: PeftModel) -> Iterator[None]:
    """The adapter in force, also where the user has it off just now; PEFT's own way would change `requires_grad`."""
    off = [module for module in policy.modules() if _is_off(module)]
    # With prompts, `disable_adapter` puts the base's forward in place of the model's own.
    bypass = vars(policy).pop("forward", None) if policy in off else None
    _set_off(off, False)
    try:
        yield
    finally:
        _set_off(off, True)
        if bypass is not None:
            vars(policy)["forward"] = bypass


def has_adapter_off(policy: nn.Module) -> bool:
    """Whether an adapter of the policy is off just now."""
    return any(map(_is_off, policy.modules()))


def _is_off(module: nn.Module) -> bool:
    return vars(module).get(_flag(module)) is True


def _set_off(modules: list[nn.Module], off: bool) -> None:
    for module in modules:
        setattr(module, _flag(module), off)


def _flag(module: nn.Module) -> str:
    return "_adapters_disabled" if isinstance(module, PeftModel) else "_disable_adapters"
