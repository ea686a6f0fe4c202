"""Tensors of which each process holds a shard: a `DTensor` of FSDP2, a partitioned parameter of ZeRO-3.

Gathers them one at a time, and writes and exchanges shards. Works with full tensors too. Knows no reference.
A *collective* call must be made by every process, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tether.distributed.processes import is_distributed, is_main_process
from tether.errors import ReferenceModelError, TetherError

T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a shard of the tensor."""
    return isinstance(tensor, DTensor) or _partitioned(tensor) is not None


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once, as `model.modules()` in another order, in a fifth of its time: this is asked at each pass."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        for module in waiting.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                waiting.append(module)
    return list(found.values())


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of the model is sharded, so that each forward is collective."""
    modules = modules_of(model)
    return _has_fsdp(modules) or any(map(is_sharded, _parameters_of(modules)))


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes; FSDP2 with CPU offload keeps its shards on the host."""
    parameter = next(model.parameters())
    kind = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device.type
    return parameter.device if kind == parameter.device.type else torch.device(kind)


def is_fsdp(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or to some of its modules."""
    return _has_fsdp(modules_of(model))


def _has_fsdp(modules: Iterable[nn.Module]) -> bool:
    return any(issubclass(kind, FSDPModule) for kind in {type(module) for module in modules})


def _parameters_of(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    return (parameter for module in modules for parameter in module._parameters.values() if parameter is not None)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `fully_shard` changed it."""
    kind: Any = type(module)
    plain: type[nn.Module] = kind.__mro__[kind._orig_cls_mro_index] if isinstance(module, FSDPModule) else kind
    return plain


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of the full tensor; a partitioned parameter's own `shape` is empty."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def gather(tensor: Tensor) -> Tensor:
    """The full tensor, without gradient; a copy where it had to be gathered. Collective for a sharded tensor.

    Raises:
        ReferenceModelError: If the tensor has no content (it is on the meta device).
    """
    if _partitioned(tensor) is not None:
        with deepspeed().zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return full
    if tensor.is_meta:
        raise ReferenceModelError(
            problem="Cannot read a weight on the meta device: it has a shape but no content.",
            instead="Load the weights on every process before the reference is built (with FSDP: "
            "`cpu_ram_efficient_loading=False`).",
        )
    return tensor.detach()


def on_main_process(function: Callable[[str, Tensor], T], tensors: Mapping[str, Tensor]) -> dict[str, T]:
    """`function(name, full tensor)` of each tensor, called on the main process; the results on all. Collective.

    Tensors are gathered one at a time, in the order of their names, and none is kept.

    Raises:
        TetherError: Raised by the function; on every process.
    """
    answers: dict[str, T] = {}
    error: TetherError | None = None
    for name in sorted(tensors):
        tensor = gather(tensors[name])
        if is_main_process() and error is None:
            try:
                answers[name] = function(name, tensor)
            except TetherError as caught:  # the others are still gathering
                error = caught
    if is_distributed():
        shared: list[Any] = [answers, error]
        dist.broadcast_object_list(shared)
        answers, error = shared
    if error is not None:
        raise error
    return answers


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of the tensor, without gradient and writable; the tensor itself if it is not sharded.

    Call `forget_gathered` on its model before and after writing.
    """
    shard: Tensor
    if (partitioned := _partitioned(tensor)) is not None:
        shard = partitioned.ds_tensor.data
    elif isinstance(tensor, DTensor):
        shard = tensor.detach().to_local()  # type: ignore[attr-defined]
    else:
        shard = tensor.detach()
    return shard


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of `tensor`, sharded as `like` is. Collective unless both are sharded alike.

    Args:
        tensor: A tensor, full or sharded, or already the shard.
        like: A tensor of the same full shape.
    """
    if _are_sharded_alike(tensor, like):
        return local_shard(tensor)
    if not is_sharded(tensor) and tensor.shape == local_shard(like).shape:
        return tensor.detach()
    full = gather(tensor)
    if (partitioned := _partitioned(like)) is not None:
        shard = torch.zeros_like(partitioned.ds_tensor, dtype=full.dtype)  # the last one is padded
        start = shard.numel() * dist.get_rank(partitioned.ds_process_group)
        own = full.flatten()[start : start + shard.numel()]
        shard[: own.numel()] = own
        return shard
    if isinstance(like, DTensor):
        # Each process takes its own; none is sent.
        return local_shard(distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None))
    return full


def forget_gathered(model: nn.Module) -> None:
    """Frees gathered parameters that earlier passes left behind; the next pass gathers them again.

    The root of FSDP2 keeps its parameters gathered after a forward, and ZeRO-3 keeps small ones gathered forever.
    Either would hide the shard from whoever reads or writes it.
    """
    modules = modules_of(model)
    if _has_fsdp(modules):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    for parameter in _parameters_of(modules):
        partitioned = _partitioned(parameter)
        if partitioned is not None and partitioned.ds_status.name == "AVAILABLE":
            partitioned.partition()


def _partitioned(tensor: Tensor) -> Any:
    """The tensor if it is a parameter that DeepSpeed partitions, otherwise None."""
    return tensor if hasattr(tensor, "ds_id") else None


def _are_sharded_alike(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        return one.device_mesh == other.device_mesh and one.placements == other.placements
    ours, theirs = _partitioned(one), _partitioned(other)
    if ours is not None and theirs is not None:
        return bool(ours.ds_process_group == theirs.ds_process_group and ours.ds_tensor.shape == theirs.ds_tensor.shape)
    return not is_sharded(one) and not is_sharded(other)


@contextmanager
def exchanged(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the named parameters have the given values: full ones, or this process's shards.

    Full parameters are exchanged by pointer, so no weight moves. A shard of ZeRO-3 too; FSDP2 gathers from memory of
    its own, so there the values are copied in and out. Must not be open while a graph of the policy is alive.
    """
    if not values:
        yield
        return
    forget_gathered(model)
    parameters = dict(model.named_parameters())
    with ExitStack() as restored:
        for name, value in values.items():
            restored.callback(_put(parameters[name], value))
        # Last in, first out: what was gathered of the exchanged values goes first.
        restored.callback(forget_gathered, model)
        yield


def _put(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    """Gives a parameter another value; returns what undoes it."""
    if isinstance(parameter, DTensor):
        local = local_shard(parameter)
        before = local.clone()
        local.copy_(value)

        def copy_back() -> None:
            local.copy_(before)

        return copy_back
    partitioned = _partitioned(parameter)
    holder: Any = parameter if partitioned is None else partitioned.ds_tensor
    held = holder.data
    holder.data = value.to(held.device)

    def point_back() -> None:
        holder.data = held

    return point_back


def gather_shard(shard: Tensor, like: Tensor) -> Tensor:
    """The full tensor of this process's `shard`, sharded as `like` is. Collective if `like` is sharded.

    The shard may have another dtype than `like`, as an average in fp32 of bf16 weights has.
    """
    if isinstance(like, DTensor):
        placed: Any = DTensor.from_local(
            shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        full: Tensor = placed.full_tensor()
        return full
    if (partitioned := _partitioned(like)) is None:
        return shard
    group = partitioned.ds_process_group
    # Shards may be offloaded to the CPU, where not every backend gathers.
    sent = shard.to(deepspeed().accelerator.get_accelerator().current_device_name()).contiguous()
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    shape = full_shape(like)
    return torch.cat(received)[: shape.numel()].view(shape)


def deepspeed() -> Any:
    """DeepSpeed, imported only if it partitioned a parameter or the run's config asks for it."""
    import deepspeed as library

    return library
