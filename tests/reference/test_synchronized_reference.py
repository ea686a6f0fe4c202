"""TR-DPO: `pi_ref <- alpha pi_theta + (1 - alpha) pi_ref`, against an oracle in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from support.observe import bits, same_bits
from support.tiny import tiny_model
from tether.errors import ReferenceModelError, ResumeError
from tether.reference import ExplicitReference, Placement, SynchronizedReference
from tether.reference.updates.averaging import soft_update, soft_update_with_residual

pytestmark = pytest.mark.numerics

alphas = st.floats(0, 1)


def normal(seed: int, dtype: torch.dtype = torch.float32, size: int = 1000) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def synchronized(
    policy: nn.Module, *, alpha: float = 0.5, every: int = 1, dtype: torch.dtype | None = None
) -> SynchronizedReference:
    return SynchronizedReference(
        ExplicitReference.of_policy(policy, Placement(dtype=dtype)), lambda: policy, alpha=alpha, every=every
    )


def weights(reference: SynchronizedReference) -> dict[str, Tensor]:
    assert reference.module is not None
    return {name: parameter.detach().clone() for name, parameter in reference.module.named_parameters()}


def train(policy: nn.Module, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


# -------------------------------------------------------------------------------------------- the update rules


@given(alphas)
def test_soft_update_is_the_formula(alpha: float) -> None:
    reference, policy = normal(0), normal(1)
    expected = alpha * policy.double() + (1 - alpha) * reference.double()
    torch.testing.assert_close(soft_update(reference, policy, alpha).double(), expected, rtol=0, atol=5e-7)


@given(alphas)
def test_soft_update_of_equal_weights_changes_no_bit(alpha: float) -> None:
    weight = normal(0)
    assert torch.equal(soft_update(weight, weight.clone(), alpha), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_update_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    reference, policy = normal(0, dtype), normal(1, dtype)
    assert torch.equal(soft_update(reference, policy, 0.0), reference)
    assert torch.equal(soft_update(reference, policy, 1.0), policy)


@given(st.floats(0.001, 0.999))
def test_soft_update_with_residual_of_equal_weights_changes_no_bit(alpha: float) -> None:
    weight = normal(0, torch.bfloat16)
    moved, residual = soft_update_with_residual(weight, torch.zeros_like(weight), weight, alpha)
    assert torch.equal(moved, weight) and not bool(residual.any())


def test_soft_update_with_residual_does_not_lose_small_steps() -> None:
    """500 steps of alpha = 0.002 go most of the way; without the residual most of them would round away."""
    start, policy, alpha = normal(0, torch.bfloat16), normal(1, torch.bfloat16), 0.002
    reference, residual, lossy = start, torch.zeros_like(start), start
    exact = start.double()
    for _ in range(500):
        reference, residual = soft_update_with_residual(reference, residual, policy, alpha)
        lossy = soft_update(lossy, policy, alpha)
        exact = torch.lerp(exact, policy.double(), alpha)

    def error(average: Tensor) -> float:
        return ((average - exact).norm() / (policy.double() - start.double()).norm()).item()

    assert error(reference.double() + residual.double()) < 0.01
    assert error(reference.double()) < 0.01 < 0.2 < error(lossy.double())


# ---------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6, 1.0])
def test_synchronized_reference_follows_the_float64_oracle(alpha: float) -> None:
    policy = tiny_model()
    reference = synchronized(policy, alpha=alpha)
    exact = {name: weight.double() for name, weight in weights(reference).items()}
    for step in range(1, 6):
        train(policy, step)
        assert reference.advance(step)
        for name, parameter in policy.named_parameters():
            exact[name] = alpha * parameter.detach().double() + (1 - alpha) * exact[name]
    for name, weight in weights(reference).items():
        torch.testing.assert_close(weight.double(), exact[name], rtol=0, atol=2e-6)
    assert reference.num_syncs == 5


def test_synchronized_reference_with_alpha_1_becomes_the_policy_bit_for_bit() -> None:
    policy = tiny_model(dtype=torch.bfloat16)
    reference = synchronized(policy, alpha=1.0)
    train(policy, 0)
    reference.advance(1)
    assert same_bits(weights(reference), {name: p.detach() for name, p in policy.named_parameters()})
    assert reference.extra_bytes == sum(p.numel() * p.element_size() for p in policy.parameters())


def test_synchronized_reference_moves_on_its_schedule_only() -> None:
    policy = tiny_model()
    reference = synchronized(policy, every=3)
    before = weights(reference)
    train(policy, 0)
    assert [reference.advance(step) for step in (1, 2)] == [False, False]
    assert same_bits(weights(reference), before)
    assert reference.advance(3) and not same_bits(weights(reference), before)
    assert [reference.advance(step) for step in (4, 5, 6, 9)] == [False, False, True, True]
    assert reference.num_syncs == 3


def test_synchronized_reference_leaves_the_policy_alone() -> None:
    policy = tiny_model()
    reference = synchronized(policy)
    train(policy, 0)
    before = bits(policy)
    reference.advance(1)
    assert same_bits(bits(policy), before)


def test_synchronized_reference_keeps_small_steps_in_bfloat16() -> None:
    policy = tiny_model(dtype=torch.bfloat16)
    start = {name: p.detach().double() for name, p in policy.named_parameters()}
    reference = synchronized(policy, alpha=0.01)
    train(policy, 0)
    for step in range(1, 101):
        reference.advance(step)
    kept = 0.99**100  # of the starting weights
    for name, weight in weights(reference).items():
        moved = policy.get_parameter(name).detach().double() - start[name]
        expected = start[name] + (1 - kept) * moved
        assert (weight.double() - expected).norm() < 0.05 * moved.norm(), name


def test_synchronized_reference_in_another_dtype_follows_a_policy_in_fp32() -> None:
    policy = tiny_model()
    reference = synchronized(policy, alpha=0.5, dtype=torch.bfloat16)
    train(policy, 0)
    expected = {n: 0.5 * p.detach() + 0.5 * weights(reference)[n].float() for n, p in policy.named_parameters()}
    reference.advance(1)
    for name, weight in weights(reference).items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), expected[name], rtol=2**-8, atol=1e-6)


def test_synchronized_reference_shares_what_the_policy_does_not_train() -> None:
    policy = tiny_model("gpt2")
    policy.transformer.wte.requires_grad_(False)
    reference = synchronized(policy)
    train(policy, 0)
    reference.advance(1)
    assert reference.module is not None
    assert reference.module.transformer.wte.weight.data_ptr() == policy.transformer.wte.weight.data_ptr()


def test_synchronized_reference_over_another_model_moves_all_that_the_policy_trains() -> None:
    policy, other = tiny_model(), tiny_model(seed=1)
    source = ExplicitReference.of_other_model(other, policy, moves=True)
    reference = SynchronizedReference(source, lambda: policy, alpha=0.25, every=1)
    reference.advance(1)
    for name, weight in weights(reference).items():
        expected = 0.25 * policy.get_parameter(name).detach() + 0.75 * other.get_parameter(name).detach()
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("other", [{"hidden": 48}, {"layers": 3}, {"layers": 1}, {"family": "gpt2"}], ids=str)
def test_synchronized_reference_over_a_model_of_other_tensors_is_an_error_at_once(other: dict[str, Any]) -> None:
    policy = tiny_model()
    source = ExplicitReference.of_other_model(tiny_model(**other), policy, moves=True)
    with pytest.raises(ReferenceModelError, match="sync_ref_model") as caught:
        SynchronizedReference(source, lambda: policy, alpha=0.5, every=1)
    assert "ref_model" in caught.value.instead


# ---------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronized_reference_goes_on_from_its_saved_state_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    def run(policy: nn.Module, reference: SynchronizedReference, steps: range) -> dict[str, Tensor]:
        for step in steps:
            train(policy, step)
            reference.advance(step)
        return weights(reference)

    policy = tiny_model(dtype=dtype)
    whole = synchronized(policy, alpha=0.1, every=2)
    run(policy, whole, range(1, 6))
    whole.save(tmp_path)  # between two syncs
    policy_then = bits(policy)
    expected = run(policy, whole, range(6, 10))

    resumed_policy = tiny_model(dtype=dtype)
    resumed = synchronized(resumed_policy, alpha=0.1, every=2)
    resumed_policy.load_state_dict(policy_then, strict=False)
    resumed.load(tmp_path)
    assert resumed.num_syncs == 2
    assert same_bits(run(resumed_policy, resumed, range(6, 10)), expected)
    assert resumed.num_syncs == whole.num_syncs == 4


def test_synchronized_reference_saves_what_it_holds_and_nothing_shared(tmp_path: Path) -> None:
    policy = tiny_model("gpt2")
    policy.transformer.wte.requires_grad_(False)
    reference = synchronized(policy)
    reference.save(tmp_path)
    saved = (tmp_path / "synchronized_reference.safetensors").stat().st_size
    assert reference.extra_bytes <= saved < 1.5 * reference.extra_bytes
    assert json.loads((tmp_path / "synchronized_reference.json").read_text()) == {
        "alpha": 0.5,
        "rank": None,
        "every": 1,
        "num_syncs": 0,
    }


def test_synchronized_reference_refuses_a_checkpoint_without_its_state_or_with_another_schedule(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="holds no synchronized reference"):
        synchronized(tiny_model()).load(tmp_path)
    synchronized(tiny_model()).save(tmp_path)
    with pytest.raises(ResumeError, match="ref_model_sync_steps"):
        synchronized(tiny_model(), every=2).load(tmp_path)
    with pytest.raises(ResumeError, match="ref_model_mixup_alpha"):
        synchronized(tiny_model(), alpha=0.4).load(tmp_path)
