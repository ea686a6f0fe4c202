"""A PEFT model's adapter off, or on, for a while; and how its adapters are set.

Knows PEFT's switches and its advice; knows no reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from tether.distributed import modules_of

# What a forward asks of an adapter's parts: what they do not have themselves they ask of the module inside.
_SWITCHES: dict[type, tuple[str, ...]] = {
    PeftModel: ("active_adapters", "_adapters_disabled"),
    BaseTunerLayer: ("active_adapters", "disable_adapters", "merged_adapters", "scaling"),
    AuxiliaryTrainingWrapper: ("active_adapters", "disable_adapters"),
}


@contextmanager
def adapter_off(policy: PeftModel) -> Iterator[None]:
    """PEFT's `disable_adapter`, with every `requires_grad` as it was and without its advice on biases.

    Trained biases stay in force under it; `ImplicitReference` exchanges them.
    """
    tuner = policy.base_model
    if isinstance(tuner, BaseTuner) and type(tuner).disable_adapter_layers is BaseTuner.disable_adapter_layers:
        with _switched([module for module in modules_of(policy) if _is_off(module) is False], off=True):
            yield
        return
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
    off = [module for module in modules_of(policy) if _is_off(module)]
    # With prompts, `disable_adapter` puts the base's forward in place of the model's own.
    bypass = vars(policy).pop("forward", None) if policy in off else None
    try:
        with _switched(off, off=False):
            yield
    finally:
        if bypass is not None:
            vars(policy)["forward"] = bypass


def has_adapter_off(policy: nn.Module) -> bool:
    """Whether an adapter of the policy is off just now."""
    return any(map(_is_off, modules_of(policy)))


def adapter_settings(model: nn.Module) -> Any:
    """The adapters' configurations, and what is active, off, merged or scaled in each layer; None without an adapter.

    Without the fields that do not change the answer.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    cosmetic = ("base_model_name_or_path", "inference_mode")
    described = {
        name: {key: value for key, value in asdict(config).items() if key not in cosmetic}
        for name, config in configs.items()
    }
    states = {
        path: [getattr(module, name, None) for name in switches]
        for path, module in model.named_modules()
        for kind, switches in _SWITCHES.items()
        if isinstance(module, kind)
    }
    return [described, states]


def _is_off(module: nn.Module) -> bool | None:
    """None for a module that cannot be switched."""
    off: bool | None = vars(module).get(_flag(module))
    return off


@contextmanager
def _switched(modules: list[nn.Module], *, off: bool) -> Iterator[None]:
    """While open, these modules are off or on, which all of them were not."""
    for module in modules:
        vars(module)[_flag(module)] = off
    try:
        yield
    finally:
        for module in modules:
            vars(module)[_flag(module)] = not off


def _flag(module: nn.Module) -> str:
    return "_adapters_disabled" if isinstance(module, PeftModel) else "_disable_adapters"
