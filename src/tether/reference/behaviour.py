"""What a pass through a model depends on beside its weights: modules, hooks, forwards, numbers on modules, the config.

Knows no reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tether.distributed import plain_class
from tether.reference.held import Slot, sum_of_bytes
from tether.reference.identity import identity_digests

_ATTRIBUTE_STEPS = 50  # in which the numbers on every module are looked at
_LARGE = 1 << 16  # bytes of a buffer
# Who puts hooks and forwards on a model that training needs, and that leave what it computes.
_LIBRARIES = ("accelerate", "deepspeed", "peft", "torch.distributed", "transformers")
_SWITCHES = ("training", "gradient_checkpointing")

Found = dict[tuple[str, str], Any]


class Behaviour:
    """Sees changes of a model's behaviour since this was made.

    Args:
        model: As it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._config = getattr(model, "config", SimpleNamespace())
        self._known, self._ways = _glance(model.modules()), _ways(model)
        self._settings = copy.deepcopy(vars(self._config))
        self._modules = dict(model.named_modules())
        self._buffers = _buffers(self._modules.values())
        self._contents = [_content(*place) for place in self._buffers]
        self._classes = {kind: kind.forward for kind in map(plain_class, self._modules.values())}
        self._numbers = {path: _numbers(module) for path, module in self._modules.items()}
        self._next = 0

    def changes(self, *, everything: bool = False) -> list[str]:
        """What has changed since this was last asked, in words; a hook that only looks is a change too.

        Args:
            everything: Look at the numbers on every module, not on some in rotation, and at buffers on a device, for
                which a step would have to wait.
        """
        changed = [*self._changed_ways(everything), *self._changed_classes(), *self._changed_settings()]
        return [*changed, *self._changed_numbers(everything)]

    def lacking(self, slots: Sequence[Slot]) -> list[str]:
        """The names of places in modules that are not a part of the model any more."""
        own = {id(module) for module in self._model.modules()}
        return [slot.name for slot in slots if id(slot.module) not in own]

    def _changed_ways(self, everything: bool) -> list[str]:
        glance, contents = _glance(self._modules.values()), self._contents
        if everything or all(_is_at_hand(*place) for place in self._buffers):
            contents = [_content(*place) for place in self._buffers]
        if glance == self._known and contents == self._contents:
            return []
        known, self._ways = self._ways, _ways(self._model)
        self._modules = dict(self._model.named_modules())
        self._known, self._contents = _glance(self._modules.values()), contents
        own, other = _of_user(known), _of_user(self._ways)
        return [
            f"{what} of `{path}`" for what, path in dict.fromkeys([*own, *other]) if not _same(own, other, (what, path))
        ]

    def _changed_classes(self) -> list[str]:
        known, self._classes = self._classes, {kind: kind.forward for kind in self._classes}
        return [f"the forward of every `{kind.__name__}`" for kind in known if self._classes[kind] is not known[kind]]

    def _changed_settings(self) -> list[str]:
        now = vars(self._config)
        if now == self._settings:
            return []
        before, self._settings = self._settings, copy.deepcopy(now)
        names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        return [f"`config.{name}`" for name in names if _matters(name, before, now)]

    def _changed_numbers(self, everything: bool) -> list[str]:
        num = len(self._numbers) if everything else -(-len(self._numbers) // _ATTRIBUTE_STEPS)
        found = []
        for path in islice(_around(list(self._numbers), self._next), num):
            known, now = self._numbers[path], _numbers(self._modules.get(path, nn.Module()))
            if known != now:
                found += [f"`{f'{path}.{name}'.lstrip('.')}`" for name in known if known[name] != now.get(name)]
                # What changes once may be a counter: it is told once.
                self._numbers[path] = {name: value for name, value in now.items() if known.get(name) == value}
        self._next = (self._next + num) % len(self._numbers)
        return found


def _around(paths: list[str], start: int) -> Iterator[str]:
    yield from paths[start:]
    yield from paths[:start]


def _glance(modules: Iterable[nn.Module]) -> list[tuple[Any, ...]]:
    """What shows that some of `_ways` have changed, at little cost."""
    known = (vars(module) for module in modules)
    return [
        (tuple(m["_forward_hooks"]), tuple(m["_forward_pre_hooks"]), m.get("forward"), tuple(m["_modules"].values()))
        for m in known
    ]


def _buffers(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """The places of the buffers that are not saved, but for rotary frequencies that follow the length of a row."""
    return [
        (vars(module)["_buffers"], name)
        for module in modules
        if getattr(module, "rope_type", "default") not in ("dynamic", "longrope")
        for name in vars(module)["_non_persistent_buffers_set"]
    ]


def _ways(model: nn.Module) -> Found:
    """Modules, hooks, forwards of single modules, and buffers that are not saved."""
    found: Found = {}
    for path, module in model.named_modules():
        known = vars(module)
        if hooks := {**known["_forward_pre_hooks"], **known["_forward_hooks"]}:
            found["a hook", path] = hooks
        if "forward" in known:
            found["the forward", path] = known.get("_original_forward", known["forward"])
        if known["_modules"]:
            found["a module", path] = list(known["_modules"].values())
        for holder, name in _buffers([module]):
            found["the buffer", f"{path}.{name}"] = _content(holder, name)
    return found


def _is_at_hand(holder: dict[str, Tensor | None], name: str) -> bool:
    buffer = holder.get(name)
    return buffer is None or buffer.device.type == "cpu"


def _content(holder: dict[str, Tensor | None], name: str) -> int:
    buffer = holder.get(name)
    if buffer is None or buffer.is_meta:
        return 0
    return sum_of_bytes(buffer) if buffer.nbytes <= _LARGE else buffer.data_ptr()


def _of_user(ways: Found) -> Found:
    found: Found = {}
    for (what, path), value in ways.items():
        if what == "a hook":
            value = {key: hook for key, hook in value.items() if not _of_library(hook)}
        elif what == "the forward":
            own = getattr(value, "__self__", None)
            is_plain = isinstance(own, nn.Module) and getattr(value, "__func__", None) is type(own).forward
            value = None if is_plain or _of_library(value) else value
        found[what, path] = value
    return found


def _same(one: Found, other: Found, key: tuple[str, str]) -> bool:
    return bool((one.get(key) or None) == (other.get(key) or None))


def _of_library(function: Any) -> bool:
    function = function.func if isinstance(function, partial) else function
    return str(getattr(function, "__module__", "")).startswith(_LIBRARIES)


def _matters(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether an entry of a config is one that identities count; scoring switches a private one, the attention."""
    if name.startswith("_"):
        return False
    digests = [
        identity_digests({}, SimpleNamespace(to_dict=lambda entry=entry: {name: _plain(entry)}))["config"]
        for entry in (before.get(name), now.get(name))
    ]
    return digests[0] != digests[1]


def _plain(entry: Any) -> Any:
    return entry.to_dict() if hasattr(entry, "to_dict") else entry


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Numbers and words on a module, such as an adapter's scaling; not its switches."""
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(module).items()
        if name[0] != "_" and name not in _SWITCHES and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(entry, int | float | str) for entry in value.values())
    return isinstance(value, int | float | str | torch.dtype)
