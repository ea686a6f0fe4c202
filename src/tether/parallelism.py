"""Parallelism that cuts rows or single weights over processes: refused by name, because no score is proven under it.

Knows the options of accelerate, DeepSpeed and transformers that ask for it; what is supported has its home in
`distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from accelerate import ParallelismConfig

from tether.errors import ConfigurationError

if TYPE_CHECKING:
    from tether.config import DPOConfig

_ROWS = "each process would hold a part of every row, and a response's log-probability is read from whole rows"
_WEIGHTS = "each process would hold a part of the weights that no other gathers, and a reference is made of whole ones"
_KINDS = {
    "tp_size": ("tensor", _WEIGHTS),
    "cp_size": ("context", _ROWS),
    "sp_size": ("sequence", _ROWS),
    "pp_size": ("pipeline", _WEIGHTS),
    "ep_size": ("expert", _WEIGHTS),
}
_OF_LOADING = {"tp_plan": "tp_size", "tp_size": "tp_size", "device_mesh": "tp_size"}


def check_parallelism(args: DPOConfig) -> None:
    """Refuses options, and settings of a launcher, that ask for such parallelism.

    Raises:
        ConfigurationError: Names the option.
    """
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
    if args.parallelism_config is not None:
        _refuse_sizes(args.parallelism_config, "`{}={}` in `parallelism_config`")
    elif launched:
        _refuse_sizes(ParallelismConfig(), "`--parallelism_config_{} {}`")
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        _refuse("`--use_megatron_lm`", "tp_size")
    plugin = args.deepspeed_plugin
    degree = 1 if plugin is None else plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 1)
    if degree > 1:
        _refuse(f"`autotp_size={degree}` in the DeepSpeed config", "tp_size")
    if isinstance(args.model_init_kwargs, dict):
        _check_loading(args.model_init_kwargs)


def check_not_cut(name: str, model: Any) -> None:
    """Refuses a model whose weights were cut like that when it was loaded.

    Args:
        name: The trainer's name for it.
        model: A model in memory; a wrapper of PEFT's says what its base is.

    Raises:
        ConfigurationError: Names the kind of parallelism.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False):
        _refuse_sizes(model.config.distributed_config, f"a `{name}` loaded with `{{}}={{}}`")


def _check_loading(options: Mapping[str, Any]) -> None:
    for option, size in _OF_LOADING.items():
        value = options.get(option)
        if value is not None and value != 1:
            _refuse(f"`{option}={value!r}` in `model_init_kwargs`", size)
    inner: Any = options.get("distributed_config")
    if inner is not None:
        _refuse_sizes(inner, "`{}={}` in the `distributed_config` of `model_init_kwargs`")
        if _value(inner, "tp_plan"):
            _refuse("`tp_plan` in the `distributed_config` of `model_init_kwargs`", "tp_size")


def _refuse_sizes(config: Any, words: str) -> None:
    for name, value in _sizes(config):
        if value > 1:
            _refuse(words.format(name, value), name)


def _sizes(config: Any) -> Iterator[tuple[str, int]]:
    for name in _KINDS:
        yield name, int(_value(config, name) or 1)


def _value(config: Any, name: str) -> Any:
    """Of an object of accelerate's or transformers', or of the mapping that a file has for one."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _refuse(asked: str, size: str) -> NoReturn:
    kind, why = _KINDS[size]
    raise ConfigurationError(
        problem=f"Cannot train with {asked}: {kind} parallelism is not supported, because {why}.",
        details="The scores of policy and reference would be wrong, or the processes wait for each other for ever.",
        instead="Leave it out. Data parallelism, FSDP2 and DeepSpeed ZeRO are covered (docs/distributed.md).",
    )
