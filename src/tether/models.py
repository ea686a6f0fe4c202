"""Policies and reference models as a run needs them: what is refused, and what is changed about them.

Knows transformers and PEFT; knows no files, no data and no training.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tether.distributed import whole_shape
from tether.errors import ArgumentTypeError, ConfigurationError
from tether.scoring import rotary_limit, uneven_forwards
from tether.scoring.packing import reads_rows
from tether.scoring.projection import base_model_of
from tether.scoring.router import has_router
from tether.scoring.score import can_pack, can_pack_images

# Dropout that attention modules and layers hold as a number rather than as an `nn.Dropout`.
_DROPOUT_NUMBERS = ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "dropout_p", "layerdrop")


def check_padding_free(model: nn.Module, new_adapter: PeftConfig | None = None, *, with_images: bool = False) -> None:
    """Refuses a model whose rows have to be padded, as it is or with the adapter that it will get.

    Raises:
        ConfigurationError: If packed rows do not give the model's own numbers, or are not proven to with images.
    """
    packs = can_pack_images(model) if with_images else can_pack(model)
    if not packs or (new_adapter is not None and reads_rows(new_adapter)):
        raise ConfigurationError(
            problem=f"`padding_free=True` with a {type(model).__name__}{' and images' * with_images}.",
            details="Without padding, its images are not proven to give the log-probs of each sequence alone."
            if with_images
            else "Without padding, it gives other log-probs than for each sequence alone.",
            instead="Set `padding_free=False`: it is then trained on padded rows.",
        )


def check_even_forwards(model: nn.Module, max_length: int | None) -> None:
    """Refuses a model to shard whose rows may need a forward of their own.

    Raises:
        ConfigurationError: If its rotary embeddings depend on a length that rows may reach.
    """
    limit = rotary_limit(model)
    if limit is not None and (max_length is None or max_length > limit):
        raise uneven_forwards(limit, max_length)


def broadcasts_buffers(model: nn.Module, max_length: int | None, asked: bool | None, num_processes: int) -> bool | None:
    """`ddp_broadcast_buffers` for a policy: as asked (None for DDP's own default), or False where a row may need a
    forward of its own.

    DDP sends the buffers at the start of every forward, and waits for all processes to do so. Where rotary embeddings
    depend on the length, processes make different numbers of forwards in a step. Nothing is lost: the only buffers that
    such a model changes are those embeddings, and `score` resets them before each forward.

    Raises:
        ConfigurationError: If the buffers of such a model were asked to be sent.
    """
    limit = rotary_limit(model)
    if limit is None or (max_length is not None and max_length <= limit):
        return asked
    if asked and num_processes > 1:
        raise ConfigurationError(
            problem="`ddp_broadcast_buffers=True` for a model whose rotary embeddings depend on the length beyond "
            f"{limit}, with rows of {'any number of' if max_length is None else f'up to {max_length}'} tokens.",
            details="Buffers are sent at every forward, and a row above that has a forward of its own: the processes would "
            "make different numbers of forwards, and wait for each other for ever.",
            instead=f"Leave `ddp_broadcast_buffers` out, or write `max_length={limit}` or less.",
        )
    return False


def router_coefficient(model: PreTrainedModel | PeftModel, asked: float | None, *, reentrant: bool) -> float:
    """Weight of the load-balancing loss: as asked, else as the model's config says; 0 where it has no experts.

    Args:
        model: The policy.
        asked: `router_aux_loss_coef`.
        reentrant: Whether layers will be checkpointed reentrantly.

    Raises:
        ConfigurationError: If one is asked for and the model has no router, or if the loss would have no gradient.
    """
    base, config = base_model_of(model), model.config.get_text_config()
    routes = has_router(base)
    own = getattr(config, "router_aux_loss_coef", 0.0) if routes else 0.0
    coefficient = float(own if asked is None else asked)
    if coefficient and not routes:
        raise ConfigurationError(
            problem=f"Cannot use `router_aux_loss_coef={asked!r}` with this {type(base).__name__}: it is not a mixture "
            "of experts that returns its router's logits, so there is no loss to weigh.",
            details="Of some families with experts there are dense models too, which have no router.",
            instead="Leave `router_aux_loss_coef` out, or write 0.",
        )
    if coefficient and reentrant:
        raise ConfigurationError(
            problem="Cannot use `use_reentrant=True` in the options of gradient checkpointing with a router's loss, here "
            f"weighed by {coefficient:g}: the loss would have no gradient.",
            details="Layers then run without a gradient at first, and the router's logits are taken from that forward.",
            instead='Write `gradient_checkpointing_kwargs={"use_reentrant": False}`, the default, or '
            "`router_aux_loss_coef=0`.",
        )
    return coefficient


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """Wraps the model with a fresh adapter, if one is asked for."""
    if peft_config is None:
        return _in_bfloat16_if_quantized(model) if isinstance(model, PeftModel) else model
    if not isinstance(peft_config, PeftConfig):
        raise ArgumentTypeError(
            problem=f"`peft_config` is a {type(peft_config).__name__}.",
            details="It says which adapter to put on the model.",
            instead="Pass a PEFT config, such as `peft.LoraConfig(...)`.",
        )
    if isinstance(model, PeftModel):
        raise ConfigurationError(
            problem="`peft_config` together with a model that already has an adapter.",
            details="It is not clear whether the first adapter belongs to the reference.",
            instead="Leave `peft_config` out to go on training the adapter, or merge it first "
            "(`model = model.merge_and_unload()`) to start a new one on top.",
        )
    return _in_bfloat16_if_quantized(get_peft_model(model, peft_config))


def _in_bfloat16_if_quantized(model: PeftModel) -> PeftModel:
    """The adapter of a base in 4 or 8 bits trains in bfloat16 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, sec. 3).

    DoRA's magnitudes stay as they are: their steps are smaller than bfloat16 can hold.
    """
    base = model.get_base_model()
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def keep_differentiable(model: nn.Module) -> None:
    """Keeps layers in 4 bits that run on a CPU in the form that has a backward.

    bitsandbytes (0.50) packs their weights anew at the first forward in evaluation mode, for a product without one,
    and leaves them so: in training no gradient would come through them, with no more than a warning.

    Raises:
        ConfigurationError: If that has happened already.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigurationError(
                problem=f"A model in 4 bits on a CPU that has been evaluated there before (`{name}`).",
                details="bitsandbytes then packs the weights for a product without a backward: nothing would train.",
                instead="Load the model anew and pass it as it is, or pass its path.",
            )
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
        alpha: Its scale, times the rank; by default `2 * rank`.
        dropout: Dropout in front of `A`.
        target_modules: Names of the layers that get one; by default what PEFT takes for the model's family, and
            `["all-linear"]` is every linear layer but the head.
        further: Other fields of `peft.LoraConfig`, such as `use_dora`.
    """
    targets = "all-linear" if target_modules == ["all-linear"] else target_modules
    scale: Any = 2 * rank if alpha is None else alpha  # PEFT declares an int, and takes any number
    return LoraConfig(
        r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **further
    )


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0: modules, and the numbers that attention and layers keep."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_NUMBERS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def check_embeds(model: PreTrainedModel | PeftModel, largest: int, where: str) -> None:
    """Refuses token ids that the policy has no embedding for; on an accelerator they would end the process.

    Args:
        model: The policy.
        largest: The largest id of a set.
        where: The row that has it: "Row 3 of the train set".

    Raises:
        ConfigurationError: If the model embeds fewer tokens.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = whole_shape(embeddings.weight)[0]
    if largest >= rows:
        raise ConfigurationError(
            problem=f"{where} has the token id {largest}, and the model embeds {rows} tokens.",
            details="The tokenizer has tokens that the model was not made for, such as those added to it later.",
            instead="Call `model.resize_token_embeddings(len(tokenizer))` before, or use the model's own tokenizer.",
        )


def check_vocabulary(ref_model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a reference to which the policy's token ids mean something else.

    An embedding padded to another size is fine; ids that do not fit are not, and neither is a tokenizer in the
    reference's own folder that gives the same tokens other ids.
    """
    largest = max(tokenizer.get_vocab().values())
    embeddings: Any = ref_model.get_input_embeddings()
    rows = whole_shape(embeddings.weight)[0]
    if largest >= rows:
        _refuse_vocabulary(f"The tokenizer's largest id is {largest}, and the reference embeds {rows} tokens")
    own = _own_vocabulary(ref_model)
    if own is None:
        return
    meanings = {number: token for token, number in own.items()}
    differing = {
        number: token
        for token, number in tokenizer.get_vocab().items()
        if own.get(token, number) != number or meanings.get(number, token) != token
    }
    if differing:
        number, token = min(differing.items())
        there = repr(meanings[number]) if number in meanings else "nothing"
        _refuse_vocabulary(
            f"{len(differing)} ids mean other tokens there (id {number} is {token!r} for the policy, {there} for the "
            "reference)"
        )


def _own_vocabulary(ref_model: PreTrainedModel | PeftModel) -> dict[str, int] | None:
    name = getattr(ref_model.config, "_name_or_path", "")
    if not name:
        return None
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError, KeyError):  # weights without a tokenizer beside them
        return None
    return vocabulary


def _refuse_vocabulary(why: str) -> None:
    raise ConfigurationError(
        problem="The reference model has another vocabulary than the policy.",
        details=f"{why}: both must read the same token ids.",
        instead="Use a reference of the same tokenizer family, or leave `ref_model` out to use the initial policy.",
    )
