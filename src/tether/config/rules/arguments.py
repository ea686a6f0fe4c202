"""Whether the trainer was given what it takes: options, models and callbacks of the kinds it knows.

Looks at kinds only, before anything is loaded.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.import_utils import is_gguf_available

from tether.config.dpo_config import DPOConfig
from tether.config.former_options import FORMER_ARGUMENTS
from tether.config.rules.options import VERIFIED_PAIRS, refused_names
from tether.errors import ArgumentTypeError
from tether.models.loading import tokenizer_of
from tether.models.origin import name_of
from tether.reference import Reference
from tether.refusals import Refusal, of_option, refuse, shown

P = ParamSpec("P")


def with_known_names(constructor: Callable[P, None]) -> Callable[P, None]:
    """A trainer's constructor that refuses names it does not know, all of them, with what each is called today."""
    options = {field.name: f"`args=DPOConfig({field.name}=...)`" for field in fields(DPOConfig)}
    further, signature = options | FORMER_ARGUMENTS, inspect.signature(constructor)

    @wraps(constructor)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        refuse(refused_names(kwargs, signature, further), ArgumentTypeError)
        constructor(*args, **kwargs)

    return checked


def refused_arguments(
    args: Any,
    model: Any,
    ref_model: Any,
    callbacks: Any,
    peft_config: Any,
    processing_class: Any,
    reference: Any,
    optimizers: Any,
    optimizer_cls_and_kwargs: Any,
    **functions: Any,
) -> Iterator[Refusal]:
    """Arguments of another kind than the trainer's; `functions` are those that it calls, or None."""
    if args is not None and not isinstance(args, DPOConfig):
        yield Refusal(
            f"`args` of type {type(args).__module__}.{type(args).__qualname__}",
            "the options of the reference and of the loss are missing in it, or mean something else",
            "Write `from tether import DPOConfig` and `DPOConfig(...)` with the same options.",
        )
    yield from _no_model("model", model)
    if ref_model is not None:
        yield from _no_model("ref_model", ref_model)
    yield from _no_callbacks(callbacks)
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        yield Refusal(
            f"a `peft_config` of type {type(peft_config).__name__}",
            "it says which adapter to put on the model",
            "Pass a PEFT config, such as `peft.LoraConfig(...)`.",
        )
    if processing_class is not None and not isinstance(tokenizer_of(processing_class), PreTrainedTokenizerBase):
        yield Refusal(
            f"a `processing_class` of type {type(processing_class).__name__}",
            "only a tokenizer turns the text of the rows into token ids",
            "Pass a transformers tokenizer (`AutoTokenizer.from_pretrained(...)`), or the processor of a "
            "vision-language model (`AutoProcessor.from_pretrained(...)`).",
        )
    yield from _no_reference(reference)
    yield from _no_optimizers(optimizers, optimizer_cls_and_kwargs)
    for name, value in functions.items():
        if value is not None and not callable(value):
            why = "it is a function that the trainer calls"
            named = " A loss by its name is `args=DPOConfig(loss_type=...)`." if name == "loss" else ""
            yield of_option(name, value, why, f"Pass a function, or leave `{name}` out.{named}")


def _no_optimizers(optimizers: Any, optimizer_cls_and_kwargs: Any) -> Iterator[Refusal]:
    is_pair = isinstance(optimizers, tuple | list) and len(optimizers) == 2
    if not is_pair or not all(value is None or hasattr(value, "step") for value in optimizers):
        why = "it is a pair of an optimizer and its scheduler, each of which may be None"
        yield of_option("optimizers", optimizers, why, "Write `optimizers=(optimizer, scheduler)`.")
    given = optimizer_cls_and_kwargs
    is_pair = isinstance(given, tuple | list) and len(given) == 2 and callable(given[0]) and isinstance(given[1], dict)
    if given is not None and not is_pair:
        why = "it is a pair of an optimizer's class and its keyword arguments"
        instead = 'Write `optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-6})`.'
        yield of_option("optimizer_cls_and_kwargs", given, why, instead)


def _no_model(name: str, value: Any) -> Iterator[Refusal]:
    if not isinstance(value, str) and (not isinstance(value, nn.Module) or not hasattr(value, "config")):
        yield Refusal(
            f"a `{name}` of type {type(value).__name__}",
            "it is scored as a language model of transformers is",
            "Pass a path or name as text, an `AutoModelForCausalLM.from_pretrained(...)`, or a `PeftModel` of one.",
        )


def _no_callbacks(callbacks: Any) -> Iterator[Refusal]:
    if callbacks is not None and not isinstance(callbacks, list):
        yield Refusal(
            f"`callbacks` of type {type(callbacks).__name__}",
            "those of transformers are added to the list of them",
            "Write a list: `callbacks=[...]`.",
        )
        return
    for callback in callbacks or ():
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            yield Refusal(
                f"{shown(callback)} in `callbacks`",
                "it is not a `transformers.TrainerCallback`",
                "Pass callbacks, or classes of them.",
            )


def _no_reference(reference: Any) -> Iterator[Refusal]:
    is_function = callable(reference) and not isinstance(reference, type | nn.Module)
    if reference is not None and not isinstance(reference, Reference) and not is_function:
        kind = reference.__name__ if isinstance(reference, type) else f"of type {type(reference).__name__}"
        yield Refusal(
            f"a `reference` {kind}",
            "it must be a `tether.Reference`, or a function of the policy that returns one",
            "Pass an instance, such as `ExplicitReference(model)`, or `reference=lambda policy: ...`.",
        )


def refused_door(args: DPOConfig, reference: Any, ref_model: Any) -> Iterator[Refusal]:
    """Options that choose a reference, beside a reference that is chosen already."""
    if reference is None:
        return
    source = "`ExplicitReference(ref_model)`"
    wrappers = {
        "ref_model": (ref_model is not None, f"Pass {source} as `reference`."),
        "precompute_ref_log_probs": (args.precompute_ref_log_probs, _wrapped("PrecomputedReference(store, source)")),
        "sync_ref_model": (
            args.sync_ref_model,
            _wrapped("SynchronizedReference(source, lambda: policy, every=steps)"),
        ),
        "reference_free": (args.reference_free, "Leave `reference` out, or set `reference_free=False`."),
        "ref_dtype": (args.ref_dtype is not None, "Write `ExplicitReference(model, Placement(dtype=...))`."),
        "ref_store": (args.ref_store is not None, _wrapped("PrecomputedReference(LogProbStore(path), source)")),
        "ref_store_verify": (
            args.ref_store_verify != VERIFIED_PAIRS,
            _wrapped("PrecomputedReference(store, source, verify=...)"),
        ),
        "ref_store_mode": (args.ref_store_mode != "auto", _wrapped("PrecomputedReference(store, source, mode=...)")),
    }
    for option, (is_set, instead) in wrappers.items():
        if is_set:
            yield Refusal(
                f"`{option}` with `reference=...`",
                "the reference is already chosen, and the option would have no effect",
                f"{instead} Or leave `reference` out.",
                option=option,
            )


def _wrapped(code: str) -> str:
    return f"Wrap the reference, `reference=lambda policy: {code}`, and leave the option out."


def refused_loading(args: DPOConfig, model: Any, processing_class: Any, quantization_config: Any) -> Iterator[Refusal]:
    """Arguments of loading for a model that is loaded, or that no loading takes; and nothing to load a tokenizer by."""
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    if not isinstance(model, str):
        if options:
            yield Refusal(
                "`model_init_kwargs` with a model that is already an instance",
                "they are arguments of `from_pretrained`, which is not called for an instance",
                "Load the instance with them yourself, or pass the model's path or name.",
            )
        if quantization_config is not None:
            yield Refusal(
                "`quantization_config` with a model that is already an instance",
                "weights are quantized while they are loaded",
                "Pass the model's path or name, or load the instance with `quantization_config=` yourself and leave "
                "it out here.",
            )
        if processing_class is None and not name_of(model):
            yield Refusal(
                "a model made in memory without a `processing_class`",
                "there is no folder to load a tokenizer from",
                "Pass the tokenizer: `DPOTrainer(..., processing_class=tokenizer)`.",
            )
    elif quantization_config is not None and "quantization_config" in options:
        yield Refusal(
            "`quantization_config` both as an argument of the trainer and in `model_init_kwargs`",
            "a model is loaded with one, and the two may differ",
            "Give it once, to the trainer: `DPOTrainer(..., quantization_config=...)`.",
        )
    yield from _dtype(options)


def refused_gguf(args: DPOConfig, model: Any, ref_model: Any, quantization_config: Any) -> Iterator[Refusal]:
    """A GGUF file as a model's path, and one that cannot be read, or not like this."""
    for name, value in (("model", model), ("ref_model", ref_model)):
        if isinstance(value, str) and value.endswith(".gguf"):
            folder, file = os.path.split(value)
            yield of_option(
                name,
                value,
                "it is a GGUF file, and a model is named by its folder",
                f"Write `{name}={folder or '.'!r}` and `model_init_kwargs={{'gguf_file': {file!r}}}`.",
            )
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    if not isinstance(model, str) or options.get("gguf_file") is None:
        return
    if not is_gguf_available():
        why = "reading a GGUF file needs the package `gguf`"
        yield Refusal("`gguf_file` in `model_init_kwargs`", why, "Install it: `pip install gguf`.")
    if quantization_config is not None or options.get("quantization_config") is not None:
        yield Refusal(
            "a quantization with a `gguf_file`",
            "its weights are read as they are in the file, and trained as plain ones",
            "Leave one of the two out. To train on a base in 4 or 8 bits, save the model with `save_pretrained` and "
            "name that folder.",
        )


def _dtype(options: Mapping[str, Any]) -> Iterator[Refusal]:
    dtype = options.get("dtype")
    if "torch_dtype" in options:
        yield Refusal(
            f"`torch_dtype={options['torch_dtype']!r}` in `model_init_kwargs`",
            "its name is now `dtype`",
            f"Write `dtype={options['torch_dtype']!r}`, or leave it out for float32.",
        )
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not isinstance(named, torch.dtype):
        yield Refusal(
            f"`dtype={dtype!r}` in `model_init_kwargs`",
            "there is no such dtype",
            "Write `float32`, `bfloat16`, `float16`, or `auto` for the one that the weights were saved in.",
        )


def refused_data_parallel(args: DPOConfig) -> Iterator[Refusal]:
    """Several GPUs in one process, as `Trainer` would use them."""
    if args.n_gpu > 1:
        yield Refusal(
            f"{args.n_gpu} GPUs in one process",
            "Trainer would use `nn.DataParallel`, which cuts a batch of pairs at the wrong places and replicates the "
            "reference at every step",
            f"Start one process for each GPU: `torchrun --nproc_per_node {args.n_gpu} script.py` (or "
            "`accelerate launch`), or show a single one: `CUDA_VISIBLE_DEVICES=0`.",
        )


def refused_loss(args: DPOConfig, loss: Any) -> Iterator[Refusal]:
    """A loss of the user's own beside named ones, or columns that no loss reads."""
    if loss is None and args.loss_columns:
        yield of_option(
            "loss_columns",
            args.loss_columns,
            "the named losses read no further columns",
            "Pass your own, `DPOTrainer(..., loss=function)`, which finds them in `scores.columns`; or leave it out.",
        )
    if loss is not None and (args.loss_type != ["sigmoid"] or args.loss_weights is not None):
        weights = "" if args.loss_weights is None else f" and `loss_weights={args.loss_weights!r}`"
        yield Refusal(
            f"`loss=...` with `loss_type={args.loss_type!r}`{weights}",
            "your own loss takes the place of the named ones",
            "Leave `loss_type` and `loss_weights` out; your function may call `tether.losses.LOSSES[name]` and add "
            "what it gives.",
        )
