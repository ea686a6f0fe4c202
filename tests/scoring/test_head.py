"""`token_log_probs`: a linear head, its transform and a log-softmax, tile by tile, equal to the naive code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tether.scoring import LogitTransform, token_log_probs
from tether.scoring.head import token_scores

pytestmark = pytest.mark.numerics

TOKENS, HIDDEN, VOCAB = 23, 8, 50

TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=0.3),
    "softcap": LogitTransform(softcap=4.0),
    "scale and softcap": LogitTransform(scale=1.7, softcap=4.0),
}


def inputs(dtype: torch.dtype, num_tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, targets, weight and bias; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    return normal(num_tokens, HIDDEN), targets, normal(VOCAB, HIDDEN), normal(VOCAB)


def naive(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


TILES = {
    "all at once": (10**9, 10**9, 10**9),
    "tiles": (7 * TOKENS, 10**9, 10**9),
    "tiles and parts": (30, 5, 10**9),
    "one": (1, 1, 10**9),
    "none kept": (30, 5, 0),
    "some kept": (30, 5, 400),
}


@pytest.fixture(params=TILES.values(), ids=TILES.keys())
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many logits, and how many tokens, are looked at together; how many logits stay for the backward."""
    num_logits, num_tokens, num_kept = request.param
    monkeypatch.setattr("tether.scoring.head.LOGITS_KEPT", {"cpu": num_kept})
    monkeypatch.setattr("tether.scoring.head.LOGITS_AT_A_TIME", {"cpu": num_logits, "cuda": num_logits})
    monkeypatch.setattr("tether.scoring.head.TOKENS_AT_A_TIME", num_tokens)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_token_log_probs_and_gradients_equal_the_naive_code(transform: LogitTransform, with_bias: bool) -> None:
    hidden, targets, weight, bias = inputs(torch.float64)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    head = (weight, bias if with_bias else None, transform)
    found, expected = token_log_probs(hidden, targets, *head), naive(hidden, targets, *head)
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((upstream * found).sum(), leaves),
        torch.autograd.grad((upstream * expected).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_token_log_probs_gradient_is_that_of_finite_differences(transform: LogitTransform) -> None:
    hidden, targets, weight, bias = inputs(torch.float64, num_tokens=6)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_log_probs(h, targets, w, b, transform), (hidden, weight, bias), fast_mode=True
    )


FROZEN = {
    "hidden alone": (True, False, False),
    "weight alone": (False, True, False),
    "bias alone": (False, False, True),
}


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("place", [0, 1, 2], ids=["hidden alone", "weight alone", "bias alone"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_token_log_probs_gradient_of_one_input_is_the_same_where_the_others_are_frozen(
    transform: LogitTransform, place: int
) -> None:
    hidden, targets, weight, bias = inputs(torch.float64)
    leaves = hidden, weight, bias
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number == place)
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    found, expected = (way(hidden, targets, weight, bias, transform) for way in (token_log_probs, naive))
    (ours,) = torch.autograd.grad((upstream * found).sum(), leaves[place])
    (theirs,) = torch.autograd.grad((upstream * expected).sum(), leaves[place])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_token_log_probs_in_bfloat16_is_no_further_from_exact_than_the_naive_code(
    transform: LogitTransform, frozen: bool
) -> None:
    hidden, targets, weight, bias = inputs(torch.bfloat16)
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    exact = naive(wide[0], targets, wide[1], wide[2], transform)
    (exact_grad,) = torch.autograd.grad(exact.sum(), wide[0])

    def errors(values: Tensor) -> tuple[float, float]:
        (grad,) = torch.autograd.grad(values.sum(), hidden)
        assert values.dtype == torch.float32 and grad.dtype == torch.bfloat16
        return (values - exact).abs().mean().item(), (grad - exact_grad).norm().item()

    ours = errors(token_log_probs(hidden, targets, weight, bias, transform))
    theirs = errors(naive(hidden, targets, weight, bias, transform))
    assert ours[0] <= 1.1 * theirs[0] and ours[1] <= 1.1 * theirs[1]


def test_token_log_probs_runs_its_products_in_the_autocast_dtype() -> None:
    hidden, targets, weight, bias = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (way(hidden, targets, weight, bias, LogitTransform()) for way in (token_log_probs, naive))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for grad in torch.autograd.grad(found.sum(), (hidden, weight, bias)):
        assert grad.dtype == torch.float32


class TensorsMade(TorchDispatchMode):
    """The tensors that operations make anew: by what, of which shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(value) for value in (*args, *(kwargs or {}).values())}
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not found._is_view() and id(found) not in given:
            self.made.append((func, tuple(found.shape), found.dtype))
        return found


def test_token_log_probs_cast_a_trained_head_once_for_forward_and_backward() -> None:
    hidden, targets, weight, bias = inputs(torch.float32)
    with TensorsMade() as tensors:
        with torch.autocast("cpu", torch.bfloat16):
            found = token_log_probs(hidden, targets, weight, bias)
        torch.autograd.grad(found.sum(), (hidden, weight, bias))
    assert tensors.made.count((torch.ops.aten._to_copy.default, (VOCAB, HIDDEN), torch.bfloat16)) == 1


def test_token_scores_sum_the_statistics_in_the_tile_that_is_there() -> None:
    hidden, targets, weight, bias = inputs(torch.float32)
    with TensorsMade() as tensors, torch.no_grad():
        token_scores(hidden, targets, weight, bias, statistics=True)
    tiles = [made for made in tensors.made if made[1:] == ((TOKENS, VOCAB), torch.float32)]
    assert len(tiles) == 2  # the logits, and their exponentials


def test_token_log_probs_of_no_tokens_is_empty_and_differentiable() -> None:
    for frozen in (False, True):
        hidden, _, weight, bias = inputs(torch.float32, num_tokens=0)
        weight.requires_grad_(not frozen)
        found = token_log_probs(hidden, torch.zeros(0, dtype=torch.long), weight, bias)
        assert found.shape == (0,) and found.dtype == torch.float32
        (grad,) = torch.autograd.grad(found.sum(), hidden)
        assert grad.shape == (0, HIDDEN)


def test_token_log_probs_stay_finite_where_logits_are_far_apart() -> None:
    hidden, targets, weight, _ = inputs(torch.float32)
    values = token_log_probs(1e4 * hidden, targets, weight)
    grads = torch.autograd.grad(values.sum(), (hidden, weight))
    assert bool(values.isfinite().all()) and all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, LogitTransform()),
        ({"final_logit_softcapping": 30.0}, LogitTransform(softcap=30.0)),
        ({"logit_scale": 0.25}, LogitTransform(scale=0.25)),
        ({"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
        ({"final_logit_softcapping": None, "logit_scale": None}, LogitTransform()),
    ],
)
def test_logit_transform_is_read_from_the_config(fields: dict[str, Any], expected: LogitTransform) -> None:
    model = nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**fields))  # type: ignore[assignment]
    assert LogitTransform.of(model) == expected
