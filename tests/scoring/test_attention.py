"""Attention over a packed row, on its own: every way to compute it equals attention by a mask of the whole row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention

from tether.scoring import attention, flash
from tether.scoring.attention import kernels_for, packed_attention
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


def projections(
    device: str = "cpu", dtype: torch.dtype = torch.float64, size: int = 8, links: list[Link] = LINKS
) -> list[Tensor]:
    """Query, key and value of a row, four heads sharing two."""
    generator, row = torch.Generator().manual_seed(0), sum(link.length for link in links)
    return [
        torch.randn(1, heads, row, size, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


def by_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    softcap: float | None = None,
    links: list[Link] = LINKS,
) -> Tensor:
    """Attention written out, by a mask of the whole row made from the sequence of each token."""
    sequences: list[list[int]] = []
    row = query.shape[2]
    allowed = torch.zeros(row, row, dtype=torch.bool)
    start = 0
    for parent, depth, length in links:
        sequence = [*(sequences[parent][:depth] if depth else []), *range(start, start + length)]
        for position in range(depth, depth + length):
            allowed[sequence[position], sequence[max(0, position + 1 - (window or row)) : position + 1]] = True
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
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, which itself runs on CUDA only."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert longest_query == int(query_ends.diff().max()) and longest_key == int(key_ends.diff().max())
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
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


@pytest.fixture(params=[(128, 2048), (128, 16), (3, 0)], ids=["one block", "several", "each chain cut"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's row in blocks as large as these, which makes one, some, and many of it."""
    for name, value in zip(("_QUERIES", "_CALL"), request.param, strict=True):
        monkeypatch.setattr(flash, name, value)
    flash._planned.cache_clear()
    yield
    flash._planned.cache_clear()


def test_rows_are_cut_into_blocks_as_large_as_pays() -> None:
    pair = Link(0, 30, 20), Link(1, 50, 20), Link(1, 50, 20)
    links = (Link(0, 0, 30), *pair, Link(0, 30, 410))
    found = [(len(block.mask[0, 0]), block.mask.shape[-1]) for block in flash._planned(links, 0, torch.float32)]
    assert found == [(90, 90), *((128, 30 + 128 * number) for number in (1, 2, 3)), (26, 440)]
    blocks = flash._planned((Link(0, 0, 400),), 100, torch.float32)
    found = [block.mask.shape[-1] for block in blocks]
    assert found == [128, 99 + 128, 99 + 128, 99 + 16], "keys out of the window are not computed"
    assert len({block.mask.untyped_storage().data_ptr() for block in blocks}) == 1, "one mask for all"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("softcap", [None, 0.7], ids=["in blocks", "chain by chain"])
def test_packed_attention_equals_that_by_a_mask(softcap: float | None, window: int | None, blocks: None) -> None:
    leaves = projections()
    found = packed_attention(*leaves, PackedRow(LINKS), scale=0.3, window=window, softcap=softcap)
    expected = by_mask(*leaves, window, softcap)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("strided", range(3), ids=["query", "key", "value"])
def test_projections_may_have_any_strides(strided: int) -> None:
    """As after a convolution over positions: the kernel takes the last stride for 1 without looking."""
    leaves = projections()
    parts = [leaf.mT.contiguous().mT if number == strided else leaf for number, leaf in enumerate(leaves)]
    found, expected = packed_attention(*parts, PackedRow(LINKS), scale=0.3), by_mask(*leaves, None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_links_are_on_the_host_whatever_the_default_device() -> None:
    """On the meta device the operator would run its fake, and return memory that nothing was written to."""
    with torch.device("meta"):
        row = PackedRow(LINKS)
    leaves = projections()
    torch.testing.assert_close(packed_attention(*leaves, row, scale=0.3), by_mask(*leaves, None))


def varlen_of_torch_2_11(*args: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    return own_varlen(*args, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [own_varlen, varlen_of_torch_2_11])
@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_plan_gives_each_chain_its_sequence(
    window: int | None, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    leaves, row = projections(), PackedRow(LINKS)
    found = varlen_attention(*leaves, row.varlen_plan, scale=0.3, window=window)
    expected = by_mask(*leaves, window)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))
    assert row.varlen_plan is row.varlen_plan, "one for all layers"


@pytest.mark.parametrize("window", WINDOWS)
def test_pairwise_attention_asks_for_the_kernels_without_a_plan_or_a_square_of_scores(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, **kwargs: Any) -> Tensor:
        assert not torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN plans anew for each shape"
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
        assert query.shape[1] == key.shape[1] and not kwargs.get("enable_gqa"), "which falls to the math kernel"
        masks.append(attn_mask)
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    leaves = projections()
    narrow = leaves[2][..., :6]  # values of another size than the keys, which the CPU too attends to pair by pair
    found = packed_attention(*leaves[:2], narrow, PackedRow(LINKS), scale=0.3, window=window)
    expected = by_mask(*leaves, window)[..., :6]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))
    assert len(masks) == len(LINKS)
    assert window is not None or all(isinstance(mask, CausalBias) for mask in masks), "no mask that takes memory"
    assert torch.backends.cuda.cudnn_sdp_enabled(), "the model's own attention may use it"


@pytest.mark.parametrize("kernel", ["varlen", "pairwise"])
def test_gradients_of_a_prompt_with_many_responses_add_up_in_fp32(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative error of its values' gradient, 48 responses in bf16: 0.005, and 0.04 to 0.2 if added up in bf16."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", own_varlen)
    links = [Link(0, 0, 9), *[Link(0, 6, 3)] * 47]
    row = PackedRow(links)
    leaves = projections(dtype=torch.bfloat16, links=links)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = gradients(by_mask(*wide, None, links=links), wide)
    if kernel == "varlen":
        found = varlen_attention(*leaves, row.varlen_plan, scale=0.3, window=None)
    else:
        found = attention._packed_pairwise(*leaves, row, 0.3, None, None, 0.0)
    for ours, theirs in zip(gradients(found, leaves), exact, strict=True):
        assert float((ours.double() - theirs)[:, :, :6].norm() / theirs[:, :, :6].norm()) < 0.008


def test_kernels_are_those_that_the_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda", 0)
    assert kernels_for(cuda, half=True) == ("pairwise",), "flash attention begins with 8.0"
    capability = (8, 0)
    assert kernels_for(cuda, half=True) == ("varlen", "pairwise")
    assert kernels_for(cuda, half=False) == kernels_for(torch.device("cpu"), half=True) == ("pairwise",)


@pytest.mark.parametrize(
    ("fits", "size", "options"),
    [
        *((True, size, {}) for size in (64, 80, 96, 128, 192, 256)),
        (False, 100, {}),  # no multiple of 8
        (False, 224, {}),  # without a backward on some cards
        (False, 264, {}),
        (False, 64, {"softcap": 30.0}),
        (False, 64, {"dropout": 0.1}),
        (False, 64, {"dtype": torch.float32}),
        (False, 64, {"value_size": 32}),
    ],
)
def test_varlen_is_called_for_what_its_kernels_have(
    fits: bool, size: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dtype": torch.bfloat16, "value_size": size} | options
    dtype, value_size = options.pop("dtype"), options.pop("value_size")
    called = []
    for name in ("varlen", "pairwise"):
        answer = lambda query, key, value, *_, name=name: called.append(name) or value.transpose(1, 2)  # noqa: E731
        monkeypatch.setattr(attention, f"_packed_{name}", answer)
    with FakeTensorMode():
        query, value = (torch.empty(1, 2, ROW, num, device="cuda", dtype=dtype) for num in (size, value_size))
        packed_attention(query, query, value, PackedRow(LINKS), scale=1.0, kernel="varlen", **options)
    assert called == ["varlen" if fits else "pairwise"]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [64, *(pytest.param(size, marks=pytest.mark.gpu) for size in (96, 128, 256))])
@pytest.mark.parametrize(
    ("device", "way"),
    [("cpu", "pairwise"), *(pytest.param("cuda", way, marks=pytest.mark.gpu) for way in ("pairwise", "varlen"))],
)
def test_packed_attention_in_bfloat16_is_no_further_from_exact_than_that_by_a_mask(
    device: str, way: Any, window: int | None, size: int
) -> None:
    leaves = projections(device, torch.bfloat16, size=size)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = by_mask(*wide, window)
    exact_grads = gradients(exact, wide)

    def errors(output: Tensor) -> list[float]:
        pairs = zip((output, *gradients(output, leaves)), (exact, *exact_grads), strict=True)
        return [float((ours.detach().double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]

    ours = errors(packed_attention(*leaves, PackedRow(LINKS, device), scale=0.3, window=window, kernel=way))
    naive = errors(by_mask(*leaves, window))
    assert all(own <= 1.5 * other for own, other in zip(ours, naive, strict=True)), (ours, naive)
