"""What could change a model's answers, other than its weights and its input, as one key that is cheap to take.

Classes with their functions, forwards and hooks put on instances, configs, attention functions, adapters, dtypes,
devices and autocast. Valid in this process only: functions and classes count by identity, so versions need no place.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from tether.distributed import device_of
from tether.scoring.attention import own_implementation

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Classes that nobody patches, or that are too large to look through at each call.
_TRUSTED = ("builtins", "torch.", "transformers.modeling_utils", "transformers.generation", "transformers.integrations")
# Fields that two models with the same answers differ in, or that scoring itself changes.
_UNIMPORTANT = frozenset(
    {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "use_cache", "architectures", "dtype"}
)
_STATES = frozenset({"training", "gradient_checkpointing"})
_SCALARS = (bool, int, float, str)

_numbers: dict[int, tuple[weakref.ref[Any], int]] = {}
_next = count()


class Fingerprint(NamedTuple):
    """A key, and the functions whose identities are in it, which must live as long as it is remembered."""

    key: tuple[Any, ...]
    functions: tuple[Any, ...]


def fingerprint(model: nn.Module) -> Fingerprint:
    """The key of a model as it is now, under the autocast that is on now. About 0.5 ms for 30 layers."""
    parts: list[Any] = []
    kinds: dict[type, None] = {}
    configs: dict[int, PretrainedConfig] = {}
    tensors: set[Any] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        state, kind = module.__dict__, type(module)
        kinds[kind] = None
        parts.append(kind)
        if _changed(state):
            parts.extend(_put_on(state))
        if "config" in state and isinstance(state["config"], PretrainedConfig):
            configs[id(state["config"])] = state["config"]
            if "layer_idx" in state or "is_causal" in state:
                parts.extend(_scalars(state))
        for parameter in state["_parameters"].values():
            if parameter is not None:
                tensors.add((parameter.dtype, parameter.device))
        if children := state["_modules"]:
            waiting.extend([child for child in children.values() if child is not None])
    functions = tuple(_functions_of(kinds))
    device = device_of(model).type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    everywhere = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    hooks = tuple(_callable(hook) for hooks in everywhere for hook in hooks.values())
    settings = tuple(map(_settings, configs.values()))
    key = (tuple(parts), tuple(map(id, functions)), settings, frozenset(tensors), autocast, hooks)
    return Fingerprint(key, functions)


def _changed(state: dict[str, Any]) -> bool:
    """Whether anything was put on a module. Most have nothing, and this is asked of all of them."""
    return (
        "forward" in state
        or "_disable_adapters" in state
        or "peft_config" in state
        or bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"])
        or bool(state["_backward_pre_hooks"])
    )


def _scalars(state: dict[str, Any]) -> Iterator[Any]:
    """The fields of an attention or a layer: its scale, its window, whether it is causal."""
    for name, value in state.items():
        if isinstance(value, _SCALARS) and name not in _STATES:
            yield name, value


def _put_on(state: dict[str, Any]) -> Iterator[Any]:
    """What was put on one instance: its own forward, hooks, and which of its adapters are active."""
    if "forward" in state:
        yield _callable(state["forward"])
    for name in _HOOKS:
        if hooks := state.get(name):
            yield name, tuple(map(_callable, hooks.values()))
    if "_disable_adapters" in state:
        active, merged = state.get("_active_adapter"), state.get("merged_adapters")
        yield (
            state["_disable_adapters"],
            active if isinstance(active, str) else str(active),
            str(merged) if merged else "",
        )
    if "peft_config" in state:
        yield _adapters(state["peft_config"])


def _functions_of(kinds: Iterable[type]) -> Iterator[Any]:
    """The functions of the classes and of the files they come from, so that one that is replaced is noticed."""
    seen: dict[type, None] = {}
    files: dict[str, None] = {}
    for kind in kinds:
        for parent in kind.__mro__:
            if parent not in seen and not parent.__module__.startswith(_TRUSTED):
                seen[parent] = files[parent.__module__] = None
    for namespace in (*map(vars, seen), *(vars(sys.modules[name]) for name in files if name in sys.modules)):
        yield from [value for value in namespace.values() if type(value) is FunctionType]


def _settings(config: PretrainedConfig) -> Any:
    name = own_implementation(config._attn_implementation)
    functions = tuple(
        _callable(functions[name]) if name in functions else None
        for functions in (AttentionInterface(), AttentionMaskInterface())
    )
    return name, functions, _fields(config)


def _fields(config: Any) -> Any:
    return tuple(
        (name, _value(value))
        for name, value in vars(config).items()
        if name not in _UNIMPORTANT and name != "_attn_implementation_internal"
    )


def _value(value: Any) -> Any:
    if value is None or isinstance(value, _SCALARS):
        return value
    return _fields(value) if isinstance(value, PretrainedConfig) else repr(value)


def _adapters(configs: Any) -> Any:
    return tuple((name, repr(sorted(vars(config).items(), key=str))) for name, config in configs.items())


def _callable(function: Any) -> Any:
    """A hook or a forward. A method of a module counts by its function, so that a copied model has the same key."""
    if isinstance(function, MethodType):
        owner = function.__self__
        return _number(function.__func__), type(owner) if isinstance(owner, nn.Module) else _number(owner)
    if isinstance(function, partial):
        return _callable(function.func), tuple(map(_argument, (*function.args, *function.keywords.values())))
    cells = getattr(function, "__closure__", None) or ()
    return _number(function), tuple(_argument(cell.cell_contents) for cell in cells if _is_filled(cell))


def _argument(value: Any) -> Any:
    if isinstance(value, _SCALARS):
        return value
    return _number(value) if callable(value) else type(value)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _number(thing: Any) -> Any:
    """A number for an object that no other object gets, even after it is gone."""
    known = _numbers.get(id(thing))
    if known is not None and known[0]() is thing:
        return known[1]
    try:
        reference = weakref.ref(thing, partial(_forget, id(thing)))
    except TypeError:
        return type(thing)
    number = next(_next)
    _numbers[id(thing)] = (reference, number)
    return number


def _forget(place: int, reference: weakref.ref[Any]) -> None:
    if place in _numbers and _numbers[place][0] is reference:
        del _numbers[place]
