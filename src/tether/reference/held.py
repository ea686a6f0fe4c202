"""Tensors of a reference that others hold too: a change is seen at the next step, or read in rotation.

An operation in place leaves a trace in a tensor's version, a new storage in its pointer. A fused optimizer and
`tensor.data` leave neither, so the bytes are summed as well, a part of them at every step. Knows no reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.distributed import is_sharded

ROTATION_STEPS = 500  # in which every byte is read


class Slot(NamedTuple):
    """A place in a module where a tensor is, by the module's own dict: the tensor there may be another one later."""

    name: str
    holder: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that is there now."""
        tensor: Tensor | None = self.holder.get(self.key)
        return tensor


def slots_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Slot]:
    """The places of some of a model's tensors, each tensor once."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    places = {
        id(tensor): Slot(names[id(tensor)], holder, key)
        for module in model.modules()
        for holder in (vars(module)["_parameters"], vars(module)["_buffers"])
        for key, tensor in holder.items()
        if id(tensor) in names
    }
    return list(places.values())


class HeldTensors:
    """Watches tensors that must not change, as they are when this is made.

    Sharded tensors and those of quantized layers, which libraries lay out anew, are left out.

    Args:
        slots: Where they are.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = [slot for slot in slots if _is_plain(slot.tensor)]
        self._parts = list(_parts(self._slots))
        self._sums = [self._sum(part) for part in self._parts]
        self._traces = [_trace(slot.tensor) for slot in self._slots]
        self._next = 0
        self.num_bytes = sum(_num_bytes(slot.tensor) for slot in self._slots)

    def changed_at_step(self) -> list[str]:
        """Names of tensors that have changed, as far as a look at all of them and one part of their bytes tell."""
        traces = [_trace(slot.tensor) for slot in self._slots]
        due = set(self._turn())
        if traces != self._traces:
            touched = {i for i, (old, new) in enumerate(zip(self._traces, traces, strict=True)) if old != new}
            due |= {i for i, part in enumerate(self._parts) if part[0] in touched}
            self._traces = traces
        return self._changed(sorted(due))

    def _turn(self) -> Iterator[int]:
        left = -(-self.num_bytes // ROTATION_STEPS)
        while left > 0:
            _, start, stop = self._parts[self._next]
            yield self._next
            left -= stop - start
            self._next = (self._next + 1) % len(self._parts)

    def changed(self) -> list[str]:
        """Names of tensors that have changed; reads every byte."""
        return self._changed(range(len(self._parts)))

    def trained_by(self, optimizer: Any) -> list[str]:
        """Names of the tensors that an optimizer holds and that train."""
        groups = getattr(optimizer, "param_groups", ())
        held = [p for group in groups for p in group["params"] if p.requires_grad and not is_sharded(p)]
        storages = {p.untyped_storage().data_ptr() for p in held} - {0}
        return [
            slot.name
            for slot in self._slots
            if slot.tensor is not None
            and not is_sharded(slot.tensor)
            and slot.tensor.untyped_storage().data_ptr() in storages
        ]

    def _changed(self, parts: Iterable[int]) -> list[str]:
        names = (
            self._slots[self._parts[i][0]].name for i in parts if self._sum(self._parts[i]) not in (None, self._sums[i])
        )
        return list(dict.fromkeys(names))

    def _sum(self, part: tuple[int, int, int]) -> int | None:
        """The sum of a part's bytes, eight at a time; None once the tensor is sharded."""
        index, start, stop = part
        tensor = self._slots[index].tensor
        if tensor is None:
            return -1
        if is_sharded(tensor) or tensor.is_meta:
            return None
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)[start:stop]
        if flat.storage_offset() % 8:
            flat = flat.clone()
        whole = len(flat) // 8 * 8
        return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())


class Behaviour:
    """What else of a model a pass through it depends on: hooks, forwards put on single modules, the config.

    Args:
        model: As it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._config = list(model.modules()), vars(getattr(model, "config", SimpleNamespace()))
        self._known = self._now()

    def has_changed(self) -> bool:
        """Whether any of it has since this was last asked; a hook that only looks is a change too."""
        if (self._on_modules(), self._config) == self._known:
            return False
        self._known = self._now()
        return True

    def _now(self) -> tuple[list[Any], dict[str, Any]]:
        return self._on_modules(), copy.deepcopy(self._config)

    def _on_modules(self) -> list[Any]:
        return [(tuple(m._forward_hooks), tuple(m._forward_pre_hooks), vars(m).get("forward")) for m in self._modules]


def _is_plain(tensor: Any) -> bool:
    is_plain = type(tensor) in (Tensor, nn.Parameter)
    return is_plain and tensor.numel() > 0 and not (tensor.is_meta or is_sharded(tensor))


def _parts(slots: Sequence[Slot]) -> Iterator[tuple[int, int, int]]:
    """Parts of the tensors: the slot, and its bytes from where to where."""
    total = sum(_num_bytes(slot.tensor) for slot in slots)
    size = max(-(-total // ROTATION_STEPS) // 8 * 8, 1 << 20)
    for index, slot in enumerate(slots):
        for start in range(0, end := _num_bytes(slot.tensor), size):
            yield index, start, min(start + size, end)


def _num_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _trace(tensor: Tensor | None) -> tuple[int, int, int]:
    if tensor is None:
        return 0, 0, 0
    return id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()
