"""Shards a second model like the policy: for a reference with weights of its own.

The only file that knows how accelerate, DeepSpeed and FSDP2 shard a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from tether.distributed.shards import deepspeed, forget_gathered, gather, is_sharded, local_shard, plain_class
from tether.errors import ConfigurationError


@dataclass(frozen=True)
class Sharding:
    """How training shards the policy, to be applied to a second model.

    Attributes:
        apply: Shards a model in place, so that it runs beside the policy.
        dtype: Dtype it casts the weights to; None if it keeps theirs.
    """

    apply: Callable[[nn.Module], None]
    dtype: torch.dtype | None = None


def sharding_of(accelerator: Any) -> Sharding | None:
    """How training will shard the policy, to be applied to its reference; None if models stay whole.

    Raises:
        ConfigurationError: For a kind of sharding that is untested with a reference; names it.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        config = plugin.deepspeed_config
        _refuse_untested_zero(config)
        return Sharding(lambda model: _shard_by_zero(model, config), _deepspeed_dtype(accelerator))
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is None or accelerator.distributed_type != "FSDP":
        return None
    _refuse_untested_fsdp(fsdp)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return Sharding(lambda model: fsdp2_prepare_model(accelerator, model))


def cast_as_training_will(model: nn.Module, accelerator: Any) -> None:
    """Casts the policy to the precision of DeepSpeed's config, as DeepSpeed would when training starts.

    The reference must equal what trains. Built before this rounding, it would differ from the policy by too little for
    an error, and by too much for a first loss of log 2.
    """
    dtype = _deepspeed_dtype(accelerator)
    if dtype is None:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and not is_sharded(tensor):  # partitioned ones have that precision already
            tensor.data = tensor.data.to(dtype)


def autocast_dtype(accelerator: Any) -> torch.dtype | None:
    """Dtype of the autocast that the accelerator runs the policy's forward under; None for none.

    Options are not enough: `accelerate launch --mixed_precision` sets it too, and DeepSpeed's engine disables any
    autocast but its own.
    """
    kind = accelerator.device.type
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.deepspeed_config.get("torch_autocast", {}).get("enabled") is True:
        named: torch.dtype | None = deepspeed().runtime.config.get_torch_autocast_dtype(plugin.deepspeed_config)
        return named or torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False), accelerator.autocast():
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _deepspeed_dtype(accelerator: Any) -> torch.dtype | None:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    config = {} if plugin is None else plugin.deepspeed_config
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled") is True:
            return dtype
    return None


def copy_of_sharded(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """A frozen parameter with the content of a partitioned one, partitioned the same way. Collective.

    Never gathered for longer than it takes to partition it again.
    """
    holder = nn.Module()
    values = gather(parameter)
    holder.copied = nn.Parameter(values.to(dtype if values.is_floating_point() else None), requires_grad=False)
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    deepspeed().zero.Init(module=holder, data_parallel_group=group, dtype=holder.copied.dtype)
    return holder.copied


def _shard_by_zero(model: nn.Module, training_config: Mapping[str, Any]) -> None:
    """Partitions a model that only scores, and adds the hooks that gather its weights."""
    zero = {
        key: value
        for key, value in training_config["zero_optimization"].items()
        if value != "auto" and key != "offload_optimizer"
    }
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    config |= {name: training_config[name] for name in ("bf16", "fp16") if name in training_config}
    deepspeed().initialize(model=model, config=config)
    model.eval()


def _refuse_untested_zero(config: Mapping[str, Any]) -> None:
    zero = config["zero_optimization"]
    nvme = (zero.get("offload_param") or {}).get("device") == "nvme"
    found = "offload_param to NVMe" if nvme else None
    for name in ("mics_shard_size", "zero_hpz_partition_size", "zero_quantized_weights"):
        if int(zero.get(name) or 0) > (1 if name == "zero_hpz_partition_size" else 0):
            found = name
    if found:
        raise ConfigurationError(
            problem=f"Cannot use DeepSpeed ZeRO-3 with `{found}`: it is untested, and the reference could be read from "
            "the wrong copy of its weights, or not at all.",
            instead="Leave it out of the DeepSpeed config, or store the reference's log-probs first, in a run without "
            "DeepSpeed (`precompute_ref_log_probs=True`).",
        )


def _refuse_untested_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigurationError(
            problem=f"Cannot use FSDP version {plugin.fsdp_version}: it flattens the parameters, so a reference cannot "
            "tell them apart.",
            instead='Use FSDP2: `fsdp_config={"fsdp_version": 2, ...}`.',
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigurationError(
            problem="Cannot use FSDP with `cpu_ram_efficient_loading=True`: only the first process has weights while "
            "the reference is built.",
            instead='Write `fsdp_config={"cpu_ram_efficient_loading": False, ...}`.',
        )


def twin_of_fsdp(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A second tree of modules with shards of its own, sharded by `fully_shard` exactly as the given model is.

    No weight is gathered: the tree is made without content, sharded, and given each process's shard.

    Args:
        model: A model that `fully_shard` was applied to.
        dtype: Dtype of floating-point weights, instead of the model's own.
    """
    forget_gathered(model)
    memo: dict[int, Any] = {id(state): state for state in _fsdp_states(model)}  # copied hooks are removed below
    for parameter in model.parameters():
        kind = dtype if parameter.is_floating_point() else None
        empty = torch.empty(parameter.shape, dtype=kind or parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    with _plain_classes(model):
        twin = copy.deepcopy(model, memo)
    _take_fsdp_off(twin)
    _shard_alike(twin, model)
    device = next(model.parameters()).device
    # `to_empty` would empty the buffers too.
    twin._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    contents = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        local_shard(parameter).copy_(local_shard(contents[name]))
    return twin.eval()


def _fsdp_states(model: nn.Module) -> list[Any]:
    """One state for each call of `fully_shard`, parents before children."""
    states = {id(state): state for module in model.modules() if (state := _fsdp_state(module)) is not None}
    return list(states.values())


def _fsdp_state(module: nn.Module) -> Any:
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None


@contextmanager
def _plain_classes(model: nn.Module) -> Iterator[None]:
    """While open, sharded modules have their original classes, because `FSDPModule` refuses to be copied."""
    sharded: list[tuple[Any, type]] = [(m, type(m)) for m in model.modules() if isinstance(m, FSDPModule)]
    for module, _ in sharded:
        module.__class__ = plain_class(module)
    try:
        yield
    finally:
        for module, kind in sharded:
            module.__class__ = kind


def _take_fsdp_off(twin: nn.Module) -> None:
    """Removes the hooks and marks that `fully_shard` left on the copied modules."""
    for module in twin.modules():
        for name, hooks in list(vars(module).items()):
            if isinstance(name, str) and name.startswith("__composable_api"):
                del vars(module)[name]
            elif name.endswith("_hooks") and isinstance(hooks, dict):
                for key, hook in list(hooks.items()):
                    if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                        del hooks[key]


def _shard_alike(twin: nn.Module, model: nn.Module) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    for state in reversed(_fsdp_states(model)):  # children before parents
        modules = [twin.get_submodule(names[id(module)]) for module in state._modules]
        settings: dict[str, Any] = {"mp_policy": state._mp_policy}
        group = state._fsdp_param_group
        if group is not None:
            settings |= {"mesh": group.mesh_info.mesh, "offload_policy": group.offload_policy}
            if not state._auto_reshard_after_forward:
                settings["reshard_after_forward"] = group._reshard_after_forward
        fully_shard(modules[0] if len(modules) == 1 else modules, **settings)
