"""A packed row's attention as one call of torch's variable-length flash attention, on CUDA in half precision.

Each query sequence is a prompt with its first response, or a further response alone, so the queries are the row
itself. The keys of a sequence are its prompt and response, gathered. Causal attention aligned at the end does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tether.scoring.groups import Group, groups_of
from tether.types import offsets_of, on_device


class VarlenPlan(NamedTuple):
    """Where the key sequences of a packed row are, and where each sequence ends.

    Attributes:
        key_places: For every key of every sequence, its place in the row.
        query_ends, key_ends: Cumulative lengths, from 0, as int32.
        longest_query, longest_key: Lengths of the longest sequences.
    """

    key_places: Int[Tensor, " keys"]
    query_ends: Int[Tensor, " sequences+1"]
    key_ends: Int[Tensor, " sequences+1"]
    longest_query: int
    longest_key: int


_plans = WeakTensorKeyDictionary()  # one plan for all layers: planning copies to the device


def plan_of(lengths: Int[Tensor, " entries"], device: torch.device) -> VarlenPlan:
    """The plan of a row, computed once and cached for as long as `lengths` lives.

    Args:
        lengths: The row's structure, from `lengths_tensor`.
        device: Where the row is.
    """
    plan: VarlenPlan | None = _plans.get(lengths)
    if plan is None or plan.key_places.device != device:
        plan = _plans[lengths] = _new_plan(groups_of(lengths), device)
    return plan


def _new_plan(groups: Iterable[Group], device: torch.device) -> VarlenPlan:
    places: list[Tensor] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    for start, prompt_length, response_lengths in groups:
        prompt = torch.arange(start, start + prompt_length)
        ends = accumulate(response_lengths, initial=start + prompt_length)
        for number, (begin, length) in enumerate(zip(ends, response_lengths, strict=False)):
            places += [prompt, torch.arange(begin, begin + length)]
            query_lengths.append(length + (prompt_length if number == 0 else 0))
            key_lengths.append(prompt_length + length)
    return VarlenPlan(
        on_device(torch.cat(places), device),
        offsets_of(query_lengths, device).int(),
        offsets_of(key_lengths, device).int(),
        max(query_lengths),
        max(key_lengths),
    )


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
        if "enable_gqa" in signature(varlen.varlen_attn).parameters:
            grouping = {"enable_gqa": True}
        else:  # torch 2.11
            keys, values = (shared.repeat_interleave(query.shape[1] // key.shape[1], 1) for shared in (keys, values))
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
