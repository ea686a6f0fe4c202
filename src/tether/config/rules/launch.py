"""What the launcher, DeepSpeed and the environment decide: dtypes and parallelism under which no score is proven.

Knows the options of accelerate, DeepSpeed and transformers that ask for it; what is supported has its home in
`distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from accelerate import ParallelismConfig

from tether.refusals import Refusal, of_option

if TYPE_CHECKING:
    from tether.config.dpo_config import DPOConfig

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


def launched_precision() -> str:
    """What `accelerate launch --mixed_precision` (or its config file) asked for; the options win over it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def refused_launch(args: DPOConfig) -> Iterator[Refusal]:
    """What is known once `TrainingArguments` has read the environment and the DeepSpeed config."""
    yield from _full_evaluation(args)
    if args.local_rank != -1 and str(args.local_rank) != os.environ.get("LOCAL_RANK"):
        why = "which process this is, and which device it takes, is read from the launcher's environment"
        yield of_option("local_rank", args.local_rank, why, "Leave it out, and start the script with `torchrun`.")
    if args.parallelism_config is not None:
        yield from _sizes(args.parallelism_config, "`{}={}` in `parallelism_config`")
    elif os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        yield from _sizes(ParallelismConfig(), "`--parallelism_config_{} {}`")
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        yield _cut("`--use_megatron_lm`", "tp_size")
    plugin = args.deepspeed_plugin
    degree = 1 if plugin is None else plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 1)
    if degree > 1:
        yield _cut(f"`autotp_size={degree}` in the DeepSpeed config", "tp_size")
    if isinstance(args.model_init_kwargs, dict):
        yield from _loading(args.model_init_kwargs)


def refused_cut(name: str, model: Any) -> Iterator[Refusal]:
    """A model whose weights were cut over processes when it was loaded.

    Args:
        name: The trainer's name for it.
        model: A model in memory; a wrapper of PEFT's says what its base is.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False):
        yield from _sizes(model.config.distributed_config, f"a `{name}` loaded with `{{}}={{}}`")
    elif (getattr(model, "_tp_size", None) or 1) > 1:  # older transformers
        yield _cut(f"a `{name}` loaded with `tp_size={model._tp_size}`", "tp_size")


def _full_evaluation(args: DPOConfig) -> Iterator[Refusal]:
    """Evaluation in another dtype than that which mixed precision, or DeepSpeed, runs the policy in."""
    asked = "bf16" if args.bf16_full_eval else "fp16" if args.fp16_full_eval else None
    if asked is None:
        return
    plugin = args.deepspeed_plugin
    if plugin is None:
        runs_in, fits = args.mixed_precision, args.mixed_precision in ("no", asked)
    else:  # its engine switches off any autocast but its own
        on = (name for name in ("bf16", "fp16") if plugin.deepspeed_config.get(name, {}).get("enabled") is True)
        runs_in = next(on, "fp32")
        fits = runs_in == asked
    if not fits:
        said = f"mixed precision is {runs_in}" if plugin is None else f"DeepSpeed runs the policy in {runs_in}"
        why = f"{said}, and the policy's own forward sets its precision in evaluation too"
        yield of_option(f"{asked}_full_eval", True, why, f"Leave it out, or train in {asked} too.")


def _loading(options: Mapping[str, Any]) -> Iterator[Refusal]:
    for option, size in _OF_LOADING.items():
        value = options.get(option)
        if value is not None and value != 1:
            yield _cut(f"`{option}={value!r}` in `model_init_kwargs`", size, "model_init_kwargs")
    inner: Any = options.get("distributed_config")
    if inner is not None:
        yield from _sizes(inner, "`{}={}` in the `distributed_config` of `model_init_kwargs`")
        if _value(inner, "tp_plan"):
            yield _cut("`tp_plan` in the `distributed_config` of `model_init_kwargs`", "tp_size")


def _sizes(config: Any, words: str) -> Iterator[Refusal]:
    for name in _KINDS:
        value = int(_value(config, name) or 1)
        if value > 1:
            yield _cut(words.format(name, value), name)


def _value(config: Any, name: str) -> Any:
    """Of an object of accelerate's or transformers', or of the mapping that a file has for one."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _cut(subject: str, size: str, option: str = "") -> Refusal:
    kind, why = _KINDS[size]
    return Refusal(
        subject,
        f"{kind} parallelism is not supported, because {why}",
        "Leave it out. Data parallelism, FSDP2 and DeepSpeed ZeRO are supported (docs/distributed.md).",
        option=option,
    )
