"""A second tree of modules over a model's own tensors, or over copies of them.

Knows how to copy a model without copying what never changes; knows no reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tether.distributed import Sharding, copy_of_sharded, has_shards, is_fsdp, is_sharded, twin_of_fsdp
from tether.errors import ReferenceModelError
from tether.reference.rebinding import rebind, rebind_to


def frozen_twin(
    model: nn.Module,
    owns: Callable[[nn.Parameter], bool],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """A second tree of modules: parameters that `owns` picks are copied, all others are the same tensors.

    Buffers are copied: they are small, and a training forward may write to them. Parameters that change dtype or
    device are copied too, so that the given model does not change; buffers keep their dtype, as rotary frequencies
    must. The copy of a sharded parameter is sharded alike.
    """
    if is_fsdp(model):
        twin = twin_of_fsdp(model, dtype)
        rebind(model, twin)
        return twin

    def copies(parameter: nn.Parameter) -> bool:
        casts = dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype
        return casts or owns(parameter) or (device is not None and parameter.device != device)

    kept = {id(parameter): parameter for parameter in model.parameters() if not copies(parameter)}
    kept |= {id(p): copy_of_sharded(p, dtype) for p in model.parameters() if id(p) not in kept and is_sharded(p)}
    twin = copy.deepcopy(model, dict(kept))
    _unwrap_forwards(twin)
    for parameter in twin.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for module in twin.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    rebind(model, twin)
    return twin.eval()


def take_own(twin: nn.Module, shared: Iterable[Tensor]) -> None:
    """Puts copies of some tensors that a twin shares in their place, everywhere in it."""
    own = {id(t): nn.Parameter(t.detach().clone(), requires_grad=False) for t in shared}
    for module in twin.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, own.get(id(parameter), parameter))
    rebind_to(own, twin)


def _unwrap_forwards(twin: nn.Module) -> None:
    """Takes accelerate's autocast wrapper off, which still points to the original."""
    for module in twin.modules():
        if "_original_forward" in vars(module):
            vars(module).pop("forward", None)
            forward = vars(module).pop("_original_forward")
            if getattr(forward, "__func__", None) is not type(module).forward:
                vars(module)["forward"] = forward


def refuse_lost_hooks(model: nn.Module, shard: Sharding | None) -> None:
    """Refuses a model of ZeRO-3 whose copy could not gather its own weights."""
    if shard is None and has_shards(model) and not is_fsdp(model):
        raise ReferenceModelError(
            problem="Cannot copy a model whose parameters are partitioned (ZeRO-3, or another sharding): the copy "
            "could not gather its weights for a forward.",
            instead="Train with `DPOTrainer(deepspeed=...)`, pass `shard`, or build the reference before the model is "
            "sharded.",
        )
