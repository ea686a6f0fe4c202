"""Attention over a packed row, on its own: every way to compute it equals attention sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tether.scoring.attention import packed_attention
from tether.scoring.groups import lengths_tensor
from tether.scoring.varlen import plan_of, varlen_attention

pytestmark = pytest.mark.numerics

GROUPS = [(5, [3, 4]), (2, [6]), (7, [1, 2, 5])]
ROW = sum(prompt + sum(responses) for prompt, responses in GROUPS)
WINDOWS = [None, 4]


def projections(device: str = "cpu", dtype: torch.dtype = torch.float64, size: int = 8) -> list[Tensor]:
    """Query, key and value of a row, four heads sharing two."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, ROW, size, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Each sequence `prompt + response` by itself, with a mask written out."""
    output = torch.zeros_like(query.transpose(1, 2))
    start = 0
    for prompt_length, responses in GROUPS:
        end = start + prompt_length
        prompt = list(range(start, end))
        for length in responses:
            places = prompt + list(range(end, end + length))
            ages = torch.arange(len(places))[:, None] - torch.arange(len(places))[None]
            allowed = (ages >= 0) & (ages < (window or len(places)))
            found = scaled_dot_product_attention(
                *(part[:, :, places] for part in (query, key, value)),
                attn_mask=allowed.to(query.device),
                scale=0.3,
                enable_gqa=True,
            )
            output = output.index_copy(1, torch.tensor(places, device=query.device), found.transpose(1, 2))
            end += length
        start = end
    return output


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
def test_packed_attention_equals_sequence_by_sequence(window: int | None) -> None:
    leaves = projections()
    found = packed_attention(*leaves, lengths_tensor(GROUPS), scale=0.3, window=window)
    expected = one_by_one(*leaves, window)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_plan_gives_each_response_its_prompt_and_itself(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", own_varlen)
    leaves = projections()
    lengths = lengths_tensor(GROUPS)
    plan = plan_of(lengths, leaves[0].device)
    found = varlen_attention(*leaves, plan, scale=0.3, window=window)
    expected = one_by_one(*leaves, window)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))
    assert plan_of(lengths, leaves[0].device) is plan, "one for all layers"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("way", ["pairwise", "varlen"])
def test_packed_attention_on_cuda_is_no_further_from_exact_than_sequence_by_sequence(
    way: Any, window: int | None, size: int
) -> None:
    leaves = projections("cuda", torch.bfloat16, size)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = one_by_one(*wide, window)
    exact_grads = gradients(exact, wide)

    def errors(output: Tensor) -> list[float]:
        pairs = zip((output, *gradients(output, leaves)), (exact, *exact_grads), strict=True)
        return [float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]

    ours = errors(packed_attention(*leaves, lengths_tensor(GROUPS), scale=0.3, window=window, kernel=way))
    naive = errors(one_by_one(*leaves, window))
    assert all(own <= 1.5 * other for own, other in zip(ours, naive, strict=True)), (ours, naive)
