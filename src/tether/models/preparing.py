"""Prepares policies and reference models for a run, and refuses those that cannot be used.

Knows transformers and PEFT; knows no files, no data and no training.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tether.distributed import full_shape
from tether.errors import ConfigurationError
from tether.models.gguf import gguf_option
from tether.models.origin import name_of
from tether.scoring import rotary_limit
from tether.scoring.projection import base_model_of

# Dropout that attention modules and layers store as a number rather than as an `nn.Dropout`.
_DROPOUT_NUMBERS = ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "dropout_p", "layerdrop")


def broadcasts_buffers(model: nn.Module, max_length: int | None, asked: bool | None) -> bool | None:
    """`ddp_broadcast_buffers` for a policy: as asked (None for DDP's default), or False if a row may need a
    forward of its own.

    DDP sends the buffers at the start of every forward, and waits for all processes to do so. With rotary embeddings
    that depend on the length, processes make different numbers of forwards in a step. Nothing is lost: those embeddings
    are the only buffers that such a model changes, and `score` resets them before each forward.
    """
    limit = rotary_limit(model)
    return asked if limit is None or (max_length is not None and max_length <= limit) else False


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """Wraps the model with a fresh adapter, if one is requested."""
    if peft_config is None:
        return _in_bfloat16_if_quantized(model) if isinstance(model, PeftModel) else model
    return _in_bfloat16_if_quantized(get_peft_model(model, peft_config))


def _in_bfloat16_if_quantized(model: PeftModel) -> PeftModel:
    """The adapter of a base in 4 or 8 bits trains in bfloat16 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, sec. 3).

    DoRA's magnitudes keep their dtype: their updates are too small for bfloat16.
    """
    base = model.get_base_model()
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def keep_differentiable(model: nn.Module) -> None:
    """Keeps 4-bit layers that run on a CPU in the form that has a backward.

    In evaluation mode, bitsandbytes (0.50) repacks their weights at the first forward, for a product without a
    backward, and does not undo it: in training no gradient would flow through them, with only a warning. A model to
    which this has happened is refused (`rules.run`).
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def lora_config(
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    **further: Any,
) -> PeftConfig:
    """A fresh LoRA adapter for a causal language model: the update of a layer is `alpha / rank * B A`.

    Args:
        rank: Rank of the update.
        alpha: Scale of the update, times the rank; by default `2 * rank`.
        dropout: Dropout before `A`.
        target_modules: Names of the layers to adapt; by default PEFT's choice for the model's family. `["all-linear"]`
            is every linear layer but the head, and one entry that is no name is a regular expression.
        further: Other fields of `peft.LoraConfig`, such as `use_dora`.
    """
    targets: Any = target_modules
    if target_modules is not None and len(target_modules) == 1 and not re.fullmatch(r"[\w.]*\w", target_modules[0]):
        (targets,) = target_modules
    scale: Any = 2 * rank if alpha is None else alpha  # PEFT declares an int, but takes any number
    return LoraConfig(
        r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **further
    )


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0: modules, and the numbers that attention modules and layers store."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_NUMBERS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def check_embeds(model: PreTrainedModel | PeftModel, largest: int, where: str) -> None:
    """Refuses token ids without an embedding in the policy; on an accelerator they would crash the process.

    Args:
        model: The policy.
        largest: The largest id of a set.
        where: The row that has it: "Row 3 of the train set".

    Raises:
        ConfigurationError: If the model embeds fewer tokens.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = full_shape(embeddings.weight)[0]
    if largest >= rows:
        raise ConfigurationError(
            problem=f"{where} has the token id {largest}, but the model embeds only {rows} tokens.",
            details="The tokenizer has tokens that the model does not know, such as tokens that were added later.",
            instead="Call `model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)` first, or use the "
            "model's own tokenizer.",
        )


def position_limit(model: nn.Module) -> int | None:
    """Tokens of the longest row that a model has positions for, if it learned one for each; None for all others."""
    base: Any = base_model_of(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    limits = []
    for module in decoder.modules():
        for name, positions in (*module.named_children(), *module.named_buffers(recurse=False)):
            if isinstance(positions, nn.Embedding) and (name == "wpe" or "pos" in name):
                limits.append(full_shape(positions.weight)[0] - getattr(positions, "offset", 0))
            elif name == "embed_positions" and isinstance(positions, torch.Tensor):
                limits.append(positions.shape[-2])
    return min(limits, default=None)


def differing_vocabulary(ref_model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why the policy's token ids mean something else to a reference model; empty if they do not.

    An embedding padded to another size is allowed. Refused are ids out of its range, and a tokenizer in the reference's
    own folder that gives the same tokens other ids.
    """
    largest = max(tokenizer.get_vocab().values())
    embeddings: Any = ref_model.get_input_embeddings()
    rows = full_shape(embeddings.weight)[0]
    if largest >= rows:
        return f"The tokenizer's largest id is {largest}, and the reference embeds {rows} tokens."
    own = _own_vocabulary(ref_model)
    if own is None:
        return ""
    meanings = {number: token for token, number in own.items()}
    differing = {
        number: token
        for token, number in tokenizer.get_vocab().items()
        if own.get(token, number) != number or meanings.get(number, token) != token
    }
    if not differing:
        return ""
    number, token = min(differing.items())
    there = repr(meanings[number]) if number in meanings else "nothing"
    return (
        f"{len(differing)} ids mean other tokens there (id {number} is {token!r} for the policy, {there} for the "
        "reference)."
    )


def _own_vocabulary(ref_model: PreTrainedModel | PeftModel) -> dict[str, int] | None:
    name = name_of(ref_model)
    if not name:
        return None
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(name, **gguf_option(ref_model)).get_vocab()
    except (OSError, ValueError, KeyError):  # a folder without a tokenizer
        return None
    return vocabulary
