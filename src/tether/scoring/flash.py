"""A packed row's attention on a CPU, without softcap and dropout: torch's flash kernel in blocks, as one operator.

A block is some queries that are neighbours in the row, all keys that any of them sees, and a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.scoring.chains import Chain, Link, PackedRow, chains_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The kernel computes every score of a causal block too, unless there are more than 512 keys. So long chains are cut.
_QUERIES = 128
_CALL = 2048  # a call of the kernel takes as long as about so many scores


def flash_attention(
    query: Float[Tensor, "1 heads row size"],
    key: Float[Tensor, "1 key_heads row size"],
    value: Float[Tensor, "1 key_heads row size"],
    row: PackedRow,
    *,
    scale: float,
    window: int | None,
) -> Float[Tensor, "1 row heads size"]:
    """`packed_attention` for CPU tensors, without softcap and dropout.

    Args:
        query, key, value: Of the whole row.
        row: The row's structure.
        scale: Factor on the scores.
        window: Each query sees at most this many positions, its own included.
    """
    # The kernel takes the numbers of a head for neighbours in memory, whatever the strides say.
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    output: Tensor = _packed_flash(query, key, value, row.links, scale, window or 0)[0]
    return output


class _Block(NamedTuple):
    """Queries and the keys that any of them sees, by their places in the row; and what hides the others from each."""

    queries: slice
    keys: list[slice]
    mask: Float[Tensor, "1 1 queries keys"]

    def part(self, tensor: Tensor) -> Tensor:
        """The block's part of keys or values."""
        parts = [tensor[:, :, places] for places in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _blocks(links: Int[Tensor, " entries"], window: int, dtype: torch.dtype) -> list[_Block]:
    return _planned(tuple(map(Link._make, links.view(-1, 3).tolist())), window, dtype)


@lru_cache(maxsize=2)  # every layer asks for the same ones, in the forward and in the backward
def _planned(links: tuple[Link, ...], window: int, dtype: torch.dtype) -> list[_Block]:
    chains = chains_of(links)
    longest = max(chain.start + chain.length for chain in chains)
    usual = ~_visible(longest - _QUERIES, _QUERIES, longest, window)
    usual_mask = _mask(usual, dtype)
    blocks, first = [], 0
    for allowed, seen in _joined(_allowed(chains, window)):
        keys = _slices(seen)
        hidden = ~torch.cat([allowed[:, places] for places in keys], 1)
        num_queries, num_keys = hidden.shape
        end = slice(-num_queries, None), slice(-num_keys, None)
        # All blocks of single chains share one mask: those of their own would take memory that grows with its square.
        mask = usual_mask[end] if hidden.equal(usual[end]) else _mask(hidden, dtype)
        blocks.append(_Block(slice(first, first + num_queries), keys, mask[None, None]))
        first += num_queries
    return blocks


def _allowed(chains: Sequence[Chain], window: int) -> Iterator[Bool[Tensor, "queries row"]]:
    """Which places of the row the queries of each chain see, `_QUERIES` queries at a time."""
    for chain in chains:
        lengths = [part.stop - part.start for part in chain.sequence]
        for first in range(chain.start, sum(lengths), _QUERIES):
            num_queries = min(_QUERIES, sum(lengths) - first)
            allowed = torch.zeros(num_queries, chains[-1].own.stop, dtype=torch.bool)
            visible = _visible(first, num_queries, sum(lengths), window)
            for part, visible_part in zip(chain.sequence, visible.split(lengths, 1), strict=True):
                allowed[:, part] = visible_part
            yield allowed


def _visible(first: int, num_queries: int, length: int, window: int) -> Bool[Tensor, "queries length"]:
    """Which positions of a sequence are seen by the queries from its position `first` on."""
    visible = torch.ones(num_queries, length, dtype=torch.bool).tril_(first)
    return visible.triu_(first + 1 - window) if window else visible


def _joined(parts: Iterable[Bool[Tensor, "queries row"]]) -> Iterator[tuple[Tensor, Bool[Tensor, " row"]]]:
    """Neighbours in one where that takes less time, and which places any of their queries sees."""
    joined: list[Tensor] = []
    seen = torch.tensor(False)
    for part in parts:
        num_before, seen_by_part = sum(map(len, joined)), part.any(0)
        apart = num_before * seen.sum() + len(part) * seen_by_part.sum() + _CALL
        if joined and (num_before + len(part)) * (seen | seen_by_part).sum() > apart:
            yield torch.cat(joined), seen
            joined, seen = [], torch.tensor(False)
        joined.append(part)
        seen = seen | seen_by_part
    yield torch.cat(joined), seen


def _mask(hidden: Bool[Tensor, "queries keys"], dtype: torch.dtype) -> Float[Tensor, "queries keys"]:
    """To be added to the scores. Finite: the kernel takes 512 keys at a time, of which a query may see none."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min / 2)


def _slices(seen: Bool[Tensor, " row"]) -> list[slice]:
    """The places that are seen, neighbours in one slice."""
    edges = torch.nn.functional.pad(seen.to(torch.int8), (1, 1)).diff().nonzero().flatten().tolist()
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


@torch.library.custom_op("tether::packed_attention", mutates_args=(), device_types="cpu")
def _packed_flash(
    query: Tensor, key: Tensor, value: Tensor, links: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Output (1, row, heads, size) and log-sum-exp (1, row, heads)."""
    _, heads, row, size = query.shape
    output = query.new_empty(1, row, heads, size)
    normalizer = query.new_empty(1, row, heads, dtype=torch.promote_types(query.dtype, torch.float32))
    for block in _blocks(links, window, normalizer.dtype):
        own = query[:, :, block.queries]
        out, lse = _flash(own, block.part(key), block.part(value), attn_mask=block.mask, scale=scale)
        output[:, block.queries] = out.transpose(1, 2)
        normalizer[:, block.queries] = lse.transpose(1, 2)
    return output, normalizer


@torch.library.custom_op("tether::packed_attention_backward", mutates_args=(), device_types="cpu")
def _packed_flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizer: Tensor,
    links: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = query.dtype
    # Torch's flash backward takes about five times as long in half precision as in fp32, unlike its forward.
    wide = (tensor.to(normalizer.dtype) for tensor in (grad.transpose(1, 2), query, key, value, output.transpose(1, 2)))
    grad, query, key, value, output = wide
    normalizer = normalizer.transpose(1, 2)
    query_grad, *key_grads = _like_projections(query, key, value)
    for total in key_grads:
        total.zero_()
    for block in _blocks(links, window, normalizer.dtype):
        of_query, *of_keys = _flash_backward(
            grad[:, :, block.queries],
            query[:, :, block.queries],
            block.part(key),
            block.part(value),
            output[:, :, block.queries],
            normalizer[:, :, block.queries],
            0.0,
            False,
            attn_mask=block.mask,
            scale=scale,
        )
        query_grad[:, block.queries] = of_query.transpose(1, 2)
        for total, found in zip(key_grads, of_keys, strict=True):
            lengths = [places.stop - places.start for places in block.keys]
            for places, piece in zip(block.keys, found.transpose(1, 2).split(lengths, 1), strict=True):
                total[:, places] += piece
    query_grad, key_grad, value_grad = (total.to(dtype).transpose(1, 2) for total in (query_grad, *key_grads))
    return query_grad, key_grad, value_grad


def _like_projections(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """In the memory layout of transformers' projections, so that later operations need no copy."""
    return [
        torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format)
        for tensor in (query, key, value)
    ]


@_packed_flash.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, links: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    _, heads, row, size = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(1, row, heads, size), query.new_empty(1, row, heads, dtype=dtype)


@_packed_flash_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    empty = _like_projections(query, key, value)
    query_grad, key_grad, value_grad = (tensor.transpose(1, 2) for tensor in empty)
    return query_grad, key_grad, value_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, links, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, links, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, links, output, normalizer = ctx.saved_tensors
    grads = _packed_flash_backward(grad, query, key, value, output, normalizer, links, ctx.scale, ctx.window)
    return (*grads, None, None, None)


_packed_flash.register_autograd(_backward, setup_context=_save)
