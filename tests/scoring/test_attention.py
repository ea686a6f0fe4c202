"""Attention over a packed row, on its own: every way to compute it equals attention by a mask of the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tether.scoring.attention import packed_attention
from tether.scoring.chains import Link, PackedRow
from tether.scoring.varlen import varlen_attention

pytestmark = pytest.mark.numerics

# Prompts of 5, 2 and 7 tokens with their responses, and a sequence that goes on in the middle of a response, as does
# another one in turn: its tokens before are in three places.
LINKS = [
    *(Link(0, 0, 8), Link(0, 5, 4), Link(0, 0, 8), Link(0, 0, 8), Link(3, 7, 2), Link(3, 7, 5)),
    *(Link(5, 9, 6), Link(6, 11, 3)),
]
ROW = sum(link.length for link in LINKS)
WINDOWS = [None, 4]


def projections(device: str = "cpu", dtype: torch.dtype = torch.float64, size: int = 8) -> list[Tensor]:
    """Query, key and value of a row, four heads sharing two."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, ROW, size, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


def by_mask(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None = None) -> Tensor:
    """Attention written out, by a mask of the whole row made from the sequence of each token."""
    sequences: list[list[int]] = []
    allowed = torch.zeros(ROW, ROW, dtype=torch.bool)
    start = 0
    for parent, depth, length in LINKS:
        sequence = [*(sequences[parent][:depth] if depth else []), *range(start, start + length)]
        for position in range(depth, depth + length):
            allowed[sequence[position], sequence[max(0, position + 1 - (window or ROW)) : position + 1]] = True
        sequences.append(sequence)
        start += length
    key, value = (shared.repeat_interleave(2, 1) for shared in (key, value))
    scores = query @ key.mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~allowed.to(query.device), float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), leaves)


def own_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, which itself runs on CUDA only."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert longest_query == int(query_ends.diff().max()) and longest_key == int(key_ends.diff().max())
    assert window_size[1] == 0
    parts = []
    for number in range(len(query_ends) - 1):
        q, k, v = (
            part[ends[number] : ends[number + 1]].transpose(0, 1)
            for part, ends in ((query, query_ends), (key, key_ends), (value, key_ends))
        )
        ages = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])[None]
        allowed = (ages >= 0) & ((ages <= window_size[0]) | (window_size[0] < 0))
        found = scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=enable_gqa)
        parts.append(found.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("softcap", [None, 0.7], ids=["in blocks", "chain by chain"])
def test_packed_attention_equals_that_by_a_mask(softcap: float | None, window: int | None) -> None:
    leaves = projections()
    found = packed_attention(*leaves, PackedRow(LINKS), scale=0.3, window=window, softcap=softcap)
    expected = by_mask(*leaves, window, softcap)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_plan_gives_each_chain_its_sequence(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", own_varlen)
    leaves, row = projections(), PackedRow(LINKS)
    found = varlen_attention(*leaves, row.varlen_plan, scale=0.3, window=window)
    expected = by_mask(*leaves, window)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))
    assert row.varlen_plan is row.varlen_plan, "one for all layers"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("device", "way"),
    [("cpu", "pairwise"), *(pytest.param("cuda", way, marks=pytest.mark.gpu) for way in ("pairwise", "varlen"))],
)
def test_packed_attention_in_bfloat16_is_no_further_from_exact_than_that_by_a_mask(
    device: str, way: Any, window: int | None
) -> None:
    leaves = projections(device, torch.bfloat16, size=64)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = by_mask(*wide, window)
    exact_grads = gradients(exact, wide)

    def errors(output: Tensor) -> list[float]:
        pairs = zip((output, *gradients(output, leaves)), (exact, *exact_grads), strict=True)
        return [float((ours.detach().double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]

    ours = errors(packed_attention(*leaves, PackedRow(LINKS, device), scale=0.3, window=window, kernel=way))
    naive = errors(by_mask(*leaves, window))
    assert all(own <= 1.5 * other for own, other in zip(ours, naive, strict=True)), (ours, naive)
