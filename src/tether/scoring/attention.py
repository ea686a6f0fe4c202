"""Exact attention over a packed row: every token attends to those before it in its sequence, and to nothing else.

Registered with transformers' public attention interfaces; nothing is patched. Knows tensors; knows no pairs, no
models beyond their config.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tether.scoring.chains import PackedRow
from tether.scoring.flash import flash_attention
from tether.scoring.varlen import varlen_attention

# How packed rows are attended to on CUDA. The CPU has one way, whatever this is.
Kernel = Literal["varlen", "pairwise"]

# Each followed by the model's own implementation. The kernel is in the name, because checkpointing runs layers again.
_SCORING, _KEPT = "tether_packed", "tether_packed_or"
_NAME = re.compile(f"(?:{_SCORING}|{_KEPT})_[a-z]+:")


class UnsupportedAttentionError(RuntimeError):
    """The model's attention does something that a packed row does not support, but the padded layout does."""


def kernels_for(device: torch.device, half: bool) -> tuple[Kernel, ...]:
    """The kernels that may attend to packed rows here, the fastest first."""
    has_varlen = device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)
    return ("varlen", "pairwise") if has_varlen else ("pairwise",)


def own_implementation(name: str | None) -> str | None:
    """The name of a model's own attention implementation, without what scoring puts before it."""
    return name and _NAME.sub("", name)


@contextmanager
def packed_attention_of(model: nn.Module, kernel: Kernel, keep: bool) -> Iterator[None]:
    """While open, the attention of the model's text part reads packed rows, and no mask is made for them.

    Args:
        model: The base causal language model.
        kernel: How to attend on CUDA.
        keep: Leave the attention able to read packed rows, because activation checkpointing runs it again during the
            backward, after scoring. Plain calls then go through to the model's own implementation.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    plain = own_implementation(config._attn_implementation) or "eager"
    scoring, kept = (f"{prefix}_{kernel}:{plain}" for prefix in (_SCORING, _KEPT))
    _register(plain, kernel, scoring, kept)
    try:
        with _named(config, scoring):  # the mask registry does not know it, so transformers makes no mask
            yield
    finally:
        if keep:
            config._attn_implementation = kept


def restore(model: nn.Module) -> None:
    """Undoes what `packed_attention_of(..., keep=True)` left in place."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if (config._attn_implementation or "").startswith(_KEPT):
        config._attn_implementation = own_implementation(config._attn_implementation)


def _register(plain: str, kernel: Kernel, scoring: str, kept: str) -> None:
    if kept in AttentionInterface():
        return
    for name in (scoring, kept):
        AttentionInterface.register(name, partial(_attend, plain, kernel))
    if plain in AttentionMaskInterface():
        AttentionMaskInterface.register(kept, AttentionMaskInterface()[plain])


def _attend(
    plain: str,
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_row: PackedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Called by transformers in each layer: handles packed rows, and passes everything else to the model's own."""
    # A vision tower may be handed the row too; it attends in both directions, to something that is not the row.
    if packed_row is None or not getattr(module, "is_causal", True):
        # "eager" is not in the registry: each model file has its own.
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        usual: Any = AttentionInterface().get_interface(plain, own)  # type: ignore[arg-type]
        config = getattr(module, "config", None)
        with nullcontext() if config is None else _named(config, plain):
            result: tuple[Tensor, Tensor | None] = usual(module, query, key, value, attention_mask, **kwargs)
        return result
    if kwargs.get("s_aux") is not None:
        raise UnsupportedAttentionError("attention sinks need the padded layout")
    scale = kwargs.get("scaling")
    output = packed_attention(
        query,
        key,
        value,
        packed_row,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        dropout=kwargs.get("dropout") or 0.0,
        kernel=kernel,
    )
    return output, None


@contextmanager
def _named(config: Any, name: str) -> Iterator[None]:
    """While open, the config names an attention; transformers' flash attention loads its kernel by that name."""
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_attention(
    query: Float[Tensor, "1 heads row size"],
    key: Float[Tensor, "1 key_heads row size"],
    value: Float[Tensor, "1 key_heads row value_size"],
    row: PackedRow,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = "pairwise",
) -> Float[Tensor, "1 row heads value_size"]:
    """Attention over a packed row; for each sequence, equal to causal attention over it alone.

    Args:
        query, key, value: Of the whole row; fewer key than query heads share keys (grouped-query attention).
        row: The row's structure.
        scale: Factor on the scores.
        window: Each query sees at most this many positions, its own included.
        softcap: Scores are `softcap * tanh(score / softcap)`.
        dropout: Probability of dropping an attention weight.
        kernel: How to attend on CUDA; `varlen` only where it fits.

    Returns:
        Positions before heads, as transformers' attention functions return it.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kind == "cpu" and softcap is None and dropout == 0.0 and query.shape[-1] == value.shape[-1]:
        output = flash_attention(query, key, value, row, scale=scale, window=window)
    elif kernel == "varlen" and _fits_varlen(query, value, softcap, dropout):
        output = _packed_varlen(query, key, value, row, scale, window)
    else:
        output = _packed_pairwise(query, key, value, row, scale, window, softcap, dropout)
    return output


def _fits_varlen(query: Tensor, value: Tensor, softcap: float | None, dropout: float) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    size = query.shape[-1]
    has_kernel = size % 8 == 0 and (size <= 192 or 224 < size <= 256)  # between them, some cards have no backward
    return query.is_cuda and half and softcap is None and dropout == 0.0 and has_kernel and size == value.shape[-1]


@torch.compiler.disable
def _packed_varlen(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float, window: int | None
) -> Tensor:
    return varlen_attention(query, key, value, row.varlen_plan, scale=scale, window=window)


# --- chain by chain, through autograd: any device, softcap and dropout ------------------------------------------


@torch.compiler.disable
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])  # cuDNN plans each shape
def _packed_pairwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    sizes, pieces = row.pieces
    wide = torch.promote_types(key.dtype, torch.float32)  # for the sum of a token's gradients, one of each chain
    # `split`, not slices: the backward of a slice fills a tensor of the whole row with zeros.
    keys, values = (tensor.to(wide).split(sizes, dim=2) for tensor in (key, value))
    queries = query.split([chain.length for chain in row.chains], dim=2)
    outputs = []
    for q, sequence in zip(queries, pieces, strict=True):
        k, v = (torch.cat([parts[piece] for piece in sequence], 2).to(query.dtype) for parts in (keys, values))
        outputs.append(_attend_at_end(q, k, v, scale, window, softcap, dropout))
    return torch.cat(outputs, 2).transpose(1, 2)


def _attend_at_end(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None, dropout: float
) -> Tensor:
    """Causal attention of the last `query.shape[2]` positions of a sequence."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if query.shape[1] != key.shape[1]:  # with `enable_gqa`, only flash attention takes them, and it takes no mask
        key, value = (shared.repeat_interleave(query.shape[1] // shared.shape[1], 1) for shared in (key, value))
    mask: Tensor = _lower_right(num_queries, num_keys)
    if softcap is not None or (window is not None and window < num_keys):
        mask = _allowed(num_queries, num_keys, window, query.device)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = softcap * torch.tanh((query @ key.mT) * scale / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def _lower_right(num_queries: int, num_keys: int) -> CausalBias:
    """`causal_lower_right`, which cannot be called in a dispatch mode (a counter of FLOPs, selective checkpointing)."""
    bias = torch.empty(0).as_subclass(CausalBias)
    bias.variant, bias.seq_len_q, bias.seq_len_kv = CausalVariant.LOWER_RIGHT, num_queries, num_keys
    return bias


def _allowed(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each of the last queries of a sequence may see."""
    keys = torch.arange(num_keys, device=device)
    ages = keys[num_keys - num_queries :, None] - keys
    return ages >= 0 if window is None else (ages >= 0) & (ages < window)
