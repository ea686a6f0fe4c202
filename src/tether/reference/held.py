"""Tensors of a reference that others hold too: a change is seen at the next step, or read in rotation.

An operation in place leaves a trace in a tensor's version, a new storage in its pointer. A fused optimizer and
`tensor.data` leave neither, so the bytes are summed as well, a part of them at every step; on a device these sums are
read a step later, when nothing waits for them. Knows no reference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tether.distributed import is_sharded, local_shard
from tether.types import copies_later

ROTATION_STEPS = 500  # in which every byte is read
_LEAST_BYTES = 1 << 20  # of a part
_PLAIN = (Tensor, nn.Parameter)


@dataclass(eq=False)
class Slot:
    """A place in a module where a tensor is, by the module's own dict: the tensor there may be another one later.

    Attributes:
        name: The tensor's name.
        module: The module.
        holder: The module's dict of parameters or of buffers.
        key: The tensor's key in it.
        kept: The reference's own copy, once what is in this place trains.
    """

    name: str
    module: nn.Module
    holder: dict[str, Any]
    key: str
    kept: Tensor | None = None

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that the reference has now."""
        return self.kept if self.kept is not None else self.holder.get(self.key)


def slots_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[Slot]:
    """The places of some of a model's tensors, each tensor once."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    places = {
        id(tensor): Slot(names[id(tensor)], module, holder, key)
        for module in model.modules()
        for holder in (vars(module)["_parameters"], vars(module)["_buffers"])
        for key, tensor in holder.items()
        if id(tensor) in names
    }
    return list(places.values())


class HeldTensors:
    """Watches tensors that must not change, as they are when this is made: of a sharded one, this process's shard.

    One that is sharded later is not looked at any more; make another of these then.

    Args:
        slots: Where they are.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = [slot for slot in slots if _is_readable(slot.tensor)]
        # FSDP2 puts a whole tensor in a shard's place while it is gathered; the shard stays where it was.
        self._shards = [
            slot.tensor if slot.tensor is not None and is_sharded(slot.tensor) else None for slot in self._slots
        ]
        self._sizes = [_num_bytes(self._own(index)) for index in range(len(self._slots))]
        self._parts = list(self._all_parts())
        self._sums = _Sums(self._sum(part) for part in self._parts).read()
        self._traces = self._traces_now()
        self._trained = self._training()
        self._next = 0
        self._late: tuple[list[int], _Sums] | None = None  # of the step before

    @property
    def slots(self) -> Sequence[Slot]:
        """The places of what is watched."""
        return self._slots

    @property
    def num_bytes(self) -> int:
        """How many bytes are watched, without the scales of quantized tensors."""
        return sum(self._sizes)

    def changed_at_step(self) -> list[str]:
        """Names of tensors that have changed, as far as a look at all of them and one part of their bytes tell; on a
        device, as of the step before.
        """
        traces = self._traces_now()
        due = set(self._turn())
        if traces != self._traces:
            touched = {i for i, (old, new) in enumerate(zip(self._traces, traces, strict=True)) if old != new}
            due |= {i for i, part in enumerate(self._parts) if part[0] in touched}
            self._traces = traces
        asked = self._ask(sorted(due))
        if asked[1].are_on_host:
            return self._told(*asked)
        before, self._late = self._late, asked
        return [] if before is None else self._told(*before)

    def _turn(self) -> Iterator[int]:
        left = -(-self.num_bytes // ROTATION_STEPS)
        while left > 0:
            _, start, stop = self._parts[self._next]
            yield self._next
            left -= stop - start
            self._next = (self._next + 1) % len(self._parts)

    def changed(self, names: Collection[str] | None = None) -> list[str]:
        """Names of tensors that have changed, by default of all; reads every byte."""
        named = [names is None or slot.name in names for slot in self._slots]
        return self._told(*self._ask([i for i, part in enumerate(self._parts) if named[part[0]]]))

    def trained_by(self, optimizer: Any) -> dict[str, int]:
        """The bytes of the tensors, by name, that an optimizer trains, or that have come to require a gradient."""
        groups = getattr(optimizer, "param_groups", ())
        held = [p for group in groups for p in group["params"] if p.requires_grad]
        storages = {local_shard(p).untyped_storage().data_ptr() for p in held} - {0}
        training = self._training()
        found = [
            index
            for index in range(len(self._slots))
            if (training[index] and not self._trained[index])
            or (storages and (own := self._own(index)) is not None and own.untyped_storage().data_ptr() in storages)
        ]
        return {self._slots[index].name: self._sizes[index] for index in found}

    def _training(self) -> list[bool]:
        return [slot.tensor is not None and slot.tensor.requires_grad for slot in self._slots]

    def _ask(self, parts: list[int]) -> tuple[list[int], _Sums]:
        return parts, _Sums(self._sum(self._parts[i]) for i in parts)

    def _told(self, parts: list[int], sums: _Sums) -> list[str]:
        found = zip(parts, sums.read(), strict=True)
        names = (self._slots[self._parts[i][0]].name for i, total in found if total not in (None, self._sums[i]))
        return list(dict.fromkeys(names))

    def _own(self, index: int) -> Tensor | None:
        """What this process holds of a tensor; None where that cannot be compared any more."""
        tensor, shard = self._slots[index].tensor, self._shards[index]
        if tensor is None or tensor.is_meta:
            return None
        if shard is not None:
            return local_shard(tensor if is_sharded(tensor) else shard)
        return None if is_sharded(tensor) else tensor.detach()

    def _all_parts(self) -> Iterator[tuple[int, int, int]]:
        """Parts of the tensors: the slot, and its bytes from where to where."""
        size = max(-(-self.num_bytes // ROTATION_STEPS) // 16 * 16, _LEAST_BYTES)
        for index, end in enumerate(self._sizes):
            for start in range(0, end, size):
                yield index, start, min(start + size, end)

    def _sum(self, part: tuple[int, int, int]) -> Tensor | None:
        """A sum of a part's bytes; None where it cannot be compared any more, as once the tensor is sharded."""
        index, start, stop = part
        slot, own = self._slots[index], self._own(index)
        if slot.tensor is None:
            return torch.tensor(-1)
        if own is None:
            return None
        numbers, width = own.contiguous().reshape(-1), own.element_size()
        total = _sum_of(_bytes(numbers[start // width : stop // width]))
        return total if start > 0 else total + sum(_sum_of(_bytes(scale)) for scale in _scales(slot))

    def _traces_now(self) -> list[tuple[int, ...]]:
        return [self._trace(index) for index in range(len(self._slots))]

    def _trace(self, index: int) -> tuple[int, ...]:
        slot, own = self._slots[index], self._own(index)
        if own is None:
            return ()
        traces = id(slot.tensor), 0 if own.is_inference() else own._version, own.data_ptr()
        return traces if type(slot.tensor) in _PLAIN else (*traces, *_traces_of(_scales(slot)))


class _Sums:
    """Sums on their way to the host."""

    def __init__(self, sums: Iterable[Tensor | None]) -> None:
        known = list(sums)
        self._is_known = [total is not None for total in known]
        device = next((t.device for t in known if t is not None and t.device.type != "cpu"), torch.device("cpu"))
        later = copies_later(device)
        made = [total.to(device, non_blocking=later) for total in known if total is not None]
        self._read: Tensor | None = torch.stack(made).to("cpu", non_blocking=later) if made else None
        self.are_on_host = not later
        self._copied = None if self.are_on_host else torch.Event(device)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[int | None]:
        """The sums, None for what could not be summed."""
        if self._copied is not None:
            self._copied.synchronize()
        found = iter([] if self._read is None else self._read.tolist())
        return [next(found) if known else None for known in self._is_known]


def _is_readable(tensor: Tensor | None) -> bool:
    if tensor is None or tensor.is_meta:
        return False
    is_known = type(tensor) in _PLAIN or is_sharded(tensor) or hasattr(tensor, "quant_state") or hasattr(tensor, "SCB")
    return is_known and local_shard(tensor).numel() > 0


def _scales(slot: Slot) -> list[Tensor]:
    """What a quantized weight of bitsandbytes has beside its bytes. In 8 bits, its first forward moves that away."""
    weight: Any = slot.tensor
    if type(weight) in _PLAIN:
        return []
    found, state = [], getattr(weight, "quant_state", None)
    while state is not None:
        found += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = getattr(state, "state2", None)
    of_rows = getattr(weight, "SCB", None)
    if of_rows is None:
        of_rows = getattr(getattr(slot.module, "state", None), "SCB", None)
    return found if of_rows is None else [*found, of_rows]


def _traces_of(tensors: Iterable[Tensor]) -> Iterator[int]:
    for tensor in tensors:
        yield from (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def sum_of_bytes(tensor: Tensor) -> int:
    """A sum of a tensor's bytes in which each place counts differently."""
    return int(_sum_of(_bytes(tensor)))


def _sum_of(flat: Tensor) -> Tensor:
    """The same of bytes, where they are; eight are taken at a time."""
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat[: len(flat) // 8 * 8].view(torch.int64)
    total = (words * _factors(len(words), flat.device)).sum()
    rest = flat[len(words) * 8 :].long()
    return total + (rest * torch.arange(1, len(rest) + 1, device=flat.device)).sum() if len(rest) else total


@cache
def _all_factors(num: int, device: torch.device) -> Tensor:
    made = torch.randint(-(2**62), 2**62, (num,), generator=torch.Generator().manual_seed(0))
    return (2 * made + 1).to(device)  # odd, so that any change of a single word changes the sum


def _factors(num: int, device: torch.device) -> Tensor:
    return _all_factors(1 << max(num, _LEAST_BYTES // 8).bit_length(), device)[:num]


def _num_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
