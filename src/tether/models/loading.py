"""Models, tokenizers and processors: from what a user names or passes to objects in memory.

Knows transformers and PEFT's folders; knows no data and no training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.peft_utils import find_adapter_config_file

from tether.errors import ConfigurationError, TetherError, said
from tether.models.gguf import gguf_option, use_as_plain, without_absent_file
from tether.models.origin import Origin, absolute, name_of
from tether.refusals import Refusal, nearest_to, of_option, refuse

logger = logging.getLogger(__name__)

_READS_IMAGES = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
_CONFIG_OPTIONS = ("trust_remote_code", "revision", "token", "subfolder", "cache_dir", "code_revision")


class Loaded(NamedTuple):
    """The models and the tokenizer of a run.

    Attributes:
        policy: The model to train.
        ref_model: The reference model, if one is named.
        processing_class: The tokenizer or the processor.
        origins: Where the reference's model can be loaded from again.
    """

    policy: PreTrainedModel | PeftModel
    ref_model: PreTrainedModel | PeftModel | None
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    origins: tuple[Origin, ...]


def load(
    model: str | PreTrainedModel | PeftModel,
    ref_model: str | PreTrainedModel | PeftModel | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    *,
    init_kwargs: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads models given by path or name; models in memory are passed through."""
    given = init_kwargs if isinstance(init_kwargs, dict) else None
    options = loading_options(given, quantization_config)
    with naming_model("model", model, arguments=given):
        policy = load_model(model, options, trust_remote_code)
    of_reference = without_absent_file(ref_model, options or {}) if isinstance(ref_model, str) else options
    with naming_model("ref_model", ref_model, arguments=given):
        reference = None if ref_model is None else load_model(ref_model, of_reference, trust_remote_code)
    origins = where_from(model if ref_model is None else ref_model, of_reference, trust_remote_code)
    revision = (options or {}).get("revision")
    return Loaded(
        policy, reference, load_processing_class(processing_class, policy, trust_remote_code, revision), origins
    )


@contextmanager
def naming_model(
    option: str, name: Any, what: str = "model", remedy: str = "", arguments: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """While open, an error in loading by path or name becomes one that names the option.

    Args:
        option: What named it: "model".
        name: The path or name; anything else is no name, and its errors are left alone.
        what: What is loaded.
        remedy: What else to write instead.
        arguments: The user's own of `from_pretrained`, which are to blame unless a file is missing.

    Raises:
        ConfigurationError: With the library's message; at once for what can only be a folder, but is none.
    """
    if not isinstance(name, str):
        yield
        return
    path, kinds = Path(name), _kinds(what)
    refuse(absent_folder(option, name, what))
    try:
        yield
    except (TetherError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of transformers, PEFT, safetensors, the hub, or a config of another kind
        if arguments and not isinstance(error, OSError):
            instead = "Correct the one that this is about, or leave it out."
            refuse([of_option("model_init_kwargs", dict(arguments), said(error), instead)], cause=error)
        why = f"it is not a folder in {Path.cwd()}, and cannot be loaded from the hub"
        if path.exists():
            why = f"transformers cannot load the {what} of this folder"
        refuse(
            [of_option(option, name, why, remedy or kinds, details=f"{said(error).partition('. ')[0]}.")], cause=error
        )


def _kinds(what: str) -> str:
    return f"Name a folder written by `save_pretrained` that holds a {what.split()[0]}, or a name on the hub."


def absent_folder(option: str, name: str, what: str = "model") -> Iterator[Refusal]:
    """A name that can only be a folder's, where there is none."""
    path = Path(name)
    if is_meant_as_path(name) and not path.exists():
        near = nearest_to(path.name, sorted(one.name for one in path.parent.iterdir())) if path.parent.is_dir() else ""
        instead = f"Did you mean `{path.parent / near}`?" if near else _kinds(what)
        where = f"Paths start at the current folder, {Path.cwd()}."
        yield of_option(option, name, "there is no such folder", instead, details=where)


def is_meant_as_path(name: str) -> bool:
    """Whether a name can only be that of a folder or file, not one on the hub; one beside others is taken for such."""
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        return True
    return len(path.parts) == 2 and path.parent.is_dir()


def load_model(
    model: str | PreTrainedModel | PeftModel, init_kwargs: dict[str, Any] | None, trust_remote_code: bool
) -> PreTrainedModel | PeftModel:
    """A causal language model from a path or name; an instance is passed through, without `torch.compile` around it.

    As in TRL, the dtype is float32 unless `init_kwargs` sets it: weights trained in bf16 lose small updates.
    The folder of an adapter gives its base with that adapter on it, ready to train. A `gguf_file` gives plain weights.
    """
    if not isinstance(model, str):
        inner: PreTrainedModel | PeftModel | None = getattr(model, "_orig_mod", None)
        if inner is not None:  # it would be saved under other names, which load as fresh weights
            logger.warning("The model is trained without the `torch.compile` around it; set `torch_compile=True`.")
        return model if inner is None else inner
    loaded = _load(absolute(model), init_kwargs, trust_remote_code)
    use_as_plain(loaded)
    return loaded


def _load(model: str, init_kwargs: dict[str, Any] | None, trust_remote_code: bool) -> PreTrainedModel | PeftModel:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    options["dtype"] = _dtype_of(options)
    if find_adapter_config_file(model) is None:
        loaded: PreTrainedModel = _auto_class(model, options).from_pretrained(model, **options)
        return loaded
    # transformers would load the adapter into the base's own layers, frozen; AutoPeftModel would also resize the base.
    name = PeftConfig.from_pretrained(model).base_model_name_or_path
    with naming_model("model", model, f"base of this adapter, {name},"):
        base = _auto_class(name, options).from_pretrained(name, **options)
    return PeftModel.from_pretrained(_sized_for(base, model), model, is_trainable=True)


def _sized_for(base: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The base with as many tokens as when the adapter was saved: PEFT saves embeddings that had grown with it."""
    embeddings: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    weights = load_peft_weights(adapter, device="cpu")

    def saved(layer: Any) -> int:
        """Rows of a layer in the adapter's file; 0 if it is not there."""
        paths = [f".{name}." for name, module in base.named_modules() if module is layer]
        named = (key for key in weights if key.endswith(".weight") and any(path in key for path in paths))
        return max((weights[key].shape[0] for key in named), default=0)

    num_before, num_saved = embeddings.weight.shape[0], saved(embeddings)
    if num_saved in (0, num_before):
        return base
    has_own_head = head is not None and head.weight is not embeddings.weight
    if has_own_head and saved(head) < num_saved:
        raise ConfigurationError(
            problem=f"Cannot load the adapter {adapter}: it was trained with {num_saved} tokens, its base has "
            f"{num_before}, and the head's rows for the others were not saved.",
            instead="Save it again with `save_embedding_layers=True` and the head in `modules_to_save`, or save the "
            "base with all its tokens and name that folder in the adapter's `base_model_name_or_path`.",
        )
    base.resize_token_embeddings(num_saved, mean_resizing=False)  # every row is then loaded
    return base


def _auto_class(name: str, options: dict[str, Any]) -> Any:
    """The auto class of a model: one that reads images, if it was saved as such."""
    if options.get("gguf_file") is not None:
        return AutoModelForCausalLM
    passed = {key: options[key] for key in _CONFIG_OPTIONS if key in options}
    config = AutoConfig.from_pretrained(name, **passed)
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def _dtype_of(options: Mapping[str, Any]) -> Any:
    dtype = options.get("dtype", "float32")
    return getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype


def where_from(
    model: str | PreTrainedModel | PeftModel, init_kwargs: dict[str, Any] | None, trust_remote_code: bool
) -> tuple[Origin, ...]:
    """Where a model can be loaded from again, if that is known.

    Whether it is still the same model is not checked here; a reference proves it by its digest.
    """
    name = name_of(model)
    if not name:
        return ()
    kwargs = dict(init_kwargs or {})
    if not isinstance(model, str):
        kwargs["dtype"] = next(p.dtype for p in model.parameters() if p.is_floating_point())
        kwargs |= gguf_option(model)
    return (Origin(name, lambda: load_model(name, kwargs, trust_remote_code)),)


def loading_options(init_kwargs: dict[str, Any] | None, quantization_config: Any) -> dict[str, Any] | None:
    """The keyword arguments of `from_pretrained`, with the trainer's quantization."""
    if quantization_config is None:
        return init_kwargs
    return {**(init_kwargs or {}), "quantization_config": quantization_config}


def load_processing_class(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    model: PreTrainedModel | PeftModel,
    trust_remote_code: bool,
    revision: str | None = None,
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer, or the processor of a model that reads images; by default from the model's folder."""
    if processing_class is None:
        options = ({"revision": revision} if revision else {}) | gguf_option(model)
        name = name_of(model)
        with naming_model(
            "model", name, "tokenizer", "Pass the tokenizer: `DPOTrainer(..., processing_class=tokenizer)`."
        ):
            processing_class = load_processing_class_of(name, trust_remote_code, config=model.config, **options)
    assert isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin)
    return processing_class


def load_processing_class_of(
    name: str, trust_remote_code: bool, *, config: Any = None, **options: Any
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The processor beside a model that reads images, or the tokenizer beside any other.

    Args:
        name: Path or name of the model.
        trust_remote_code: Whether code that comes with it may run.
        config: The model's config; loaded if not given.
        options: Further arguments of `from_pretrained`.

    Raises:
        OSError, ValueError, KeyError: If there is none.
    """
    options["trust_remote_code"] = trust_remote_code
    if config is None and options.get("gguf_file") is None:
        with suppress(OSError, ValueError):  # a folder may have a tokenizer without a model
            config = AutoConfig.from_pretrained(name, **options)
    loads = AutoProcessor if reads_images(config) else AutoTokenizer
    loaded = loads.from_pretrained(name, **options)
    assert isinstance(loaded, PreTrainedTokenizerBase | ProcessorMixin)
    return loaded


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer itself, or that of a processor."""
    return (
        getattr(processing_class, "tokenizer", None)
        if isinstance(processing_class, ProcessorMixin)
        else processing_class
    )


def reads_images(config: Any) -> bool:
    """Whether a config is that of a vision-language model."""
    saved_as = set(getattr(config, "architectures", None) or ())
    return getattr(config, "vision_config", None) is not None and bool(saved_as & _READS_IMAGES)


def use_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None) -> None:
    """Sets the padding token: that of the deprecated option or, if the tokenizer has none, its end token."""
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def hub_name(model: PreTrainedModel | PeftModel) -> str | None:
    """The name on the hub that a model was loaded by; None for a local folder or a model created in memory."""
    name = name_of(model)
    return None if not name or os.path.isdir(name) else name


def default_output_dir(model: str | PreTrainedModel | PeftModel) -> str:
    """The output folder if none is given: named after the model."""
    return f"{name_of(model).rstrip('/').split('/')[-1] or 'model'}-DPO"
