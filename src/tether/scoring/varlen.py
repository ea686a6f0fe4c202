"""A packed row's attention as one call of torch's variable-length flash attention, on CUDA in half precision.

The query sequences are the row's chains. The keys of each are those of its sequence, gathered. Causal attention aligned
at the end does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tether.scoring.chains import VarlenPlan


def varlen_attention(
    query: Float[Tensor, "1 heads row size"],
    key: Float[Tensor, "1 key_heads row size"],
    value: Float[Tensor, "1 key_heads row size"],
    plan: VarlenPlan,
    *,
    scale: float,
    window: int | None,
) -> Float[Tensor, "1 row heads size"]:
    """`packed_attention` for CUDA tensors in half precision, without softcap and dropout.

    Args:
        query, key, value: Of the whole row.
        plan: The row's plan.
        scale: Factor on the scores.
        window: Each query sees at most this many positions, its own included.
    """
    from torch.nn.attention import varlen  # defines operators, which only CUDA needs

    rows, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    keys, values = (_Gathered.apply(tensor, plan.key_places) for tensor in (keys, values))
    grouping: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _shares_keys(varlen.varlen_attn):
            grouping = {"enable_gqa": True}
        else:  # torch 2.11
            keys, values = (shared.repeat_interleave(query.shape[1] // key.shape[1], 1) for shared in (keys, values))
    # The ends are two tensors even where they are equal: for one and the same, torch 2.15 takes cuDNN on Hopper, which
    # makes a plan for each new shape.
    output = varlen.varlen_attn(
        rows.contiguous(),
        keys,
        values,
        plan.query_ends,
        plan.key_ends,
        plan.longest_query,
        plan.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouping,
    )
    assert isinstance(output, Tensor)
    return output[None]


@cache  # it is asked in every layer
def _shares_keys(attention: Callable[..., Any]) -> bool:
    return "enable_gqa" in signature(attention).parameters


class _Gathered(torch.autograd.Function):
    """`tensor[places]`. Its gradient is added up in fp32: a prompt's keys get one from each of its responses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = len(tensor)
        return tensor.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        total = wide.new_zeros((ctx.num_rows, *grad.shape[1:]))
        return total.index_add_(0, places, wide).to(grad.dtype), None
