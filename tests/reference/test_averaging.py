"""The update rules against float64 written out, and their identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tether.reference.updates.averaging import (
    BemaSchedule,
    LowRank,
    average_dora,
    average_low_rank,
    bema,
    soft_update,
    soft_update_with_residual,
)

pytestmark = pytest.mark.numerics

ALPHAS = [0.005, 0.01, 0.05, 0.6, 1.0]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(rank: int, seed: int, rows: int = 12, columns: int = 9) -> LowRank:
    return LowRank(random(rows, rank, seed=seed), random(rank, columns, seed=seed + 1))


def dense(pair: LowRank) -> torch.Tensor:
    return pair.B.double() @ pair.A.double()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_follows_a_float64_oracle_over_200_syncs(alpha: float, dtype: torch.dtype) -> None:
    reference = random(400, seed=0, dtype=dtype)
    residual = torch.zeros_like(reference)
    oracle = reference.double()
    for sync in range(200):
        policy = random(400, seed=0) + 0.05 * random(400, seed=sync + 1)
        policy = policy.to(dtype)
        oracle = alpha * policy.double() + (1 - alpha) * oracle
        if dtype == torch.float32:
            reference = soft_update(reference, policy, alpha)
        else:
            reference, residual = soft_update_with_residual(reference, residual, policy, alpha)
    error = ((reference.double() + residual.double()) - oracle).abs().max()
    assert error < (2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("alpha", [0.005, 0.01, 0.05, 0.6])
def test_a_fixed_gap_closes_in_bfloat16(alpha: float) -> None:
    start, policy = random(400, seed=0, dtype=torch.bfloat16), random(400, seed=1, dtype=torch.bfloat16)
    reference, residual = start.clone(), torch.zeros_like(start)
    syncs = 0
    while (1 - alpha) ** syncs >= 1e-5:
        reference, residual = soft_update_with_residual(reference, residual, policy, alpha)
        syncs += 1
    assert (reference - policy).float().norm() < 0.05 * (start - policy).float().norm()


@given(alpha=st.floats(0, 1), seed=st.integers(0, 50), low=st.booleans())
def test_syncing_equal_weights_changes_no_bit(alpha: float, seed: int, low: bool) -> None:
    weight = random(50, seed=seed, dtype=torch.bfloat16 if low else torch.float32)
    assert torch.equal(soft_update(weight, weight.clone(), alpha), weight)
    if low:
        moved, residual = soft_update_with_residual(weight, torch.zeros_like(weight), weight.clone(), alpha)
        assert torch.equal(moved, weight)
        assert not residual.any()


@given(seed=st.integers(0, 50))
def test_soft_update_at_alpha_1_is_the_policy_bit_for_bit(seed: int) -> None:
    reference, policy = random(50, seed=seed), random(50, seed=seed + 1)
    assert torch.equal(soft_update(reference, policy, 1.0), policy)


def test_bema_is_the_paper_written_out() -> None:
    initial = random(20, seed=0, dtype=torch.float64)
    average = oracle = initial
    for update in range(30):
        policy = initial + 0.1 * update * random(20, seed=update + 1, dtype=torch.float64)
        average, corrected = bema(average, policy, initial, update, BemaSchedule())
        b, a = (10 + update) ** -0.5, (10 + update) ** -0.2
        oracle = (1 - b) * oracle + b * policy
        torch.testing.assert_close(average, oracle, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(corrected, a * (policy - initial) + oracle, atol=1e-12, rtol=1e-12)


@given(alpha=st.floats(0.01, 1), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 30))
def test_low_rank_average_is_exact_while_the_stack_fits(alpha: float, ranks: tuple[int, int], seed: int) -> None:
    reference, policy = factors(ranks[0], seed), factors(ranks[1], seed + 100)
    averaged, error = average_low_rank(reference, policy, alpha, max_rank=8)
    oracle = alpha * dense(policy) + (1 - alpha) * dense(reference)
    assert error == 0
    torch.testing.assert_close(dense(averaged), oracle, atol=1e-5, rtol=1e-5)


def test_low_rank_average_past_its_rank_is_the_best_approximation_and_says_its_error() -> None:
    reference, policy = factors(4, 0), factors(4, 10)
    averaged, error = average_low_rank(reference, policy, 0.3, max_rank=5)
    oracle = 0.3 * dense(policy) + 0.7 * dense(reference)
    u, sizes, vh = torch.linalg.svd(oracle)
    best = u[:, :5] * sizes[:5] @ vh[:5]
    assert averaged.A.shape[0] == 5
    torch.testing.assert_close(dense(averaged), best, atol=1e-4, rtol=1e-4)
    assert error == pytest.approx(float((best - oracle).norm()), rel=1e-4)


def test_low_rank_average_of_equal_weights_stays_within_a_millionth() -> None:
    pair = factors(4, 0)
    averaged = pair
    for _ in range(20):
        averaged, _ = average_low_rank(averaged, pair, 0.3, max_rank=4)
    assert (dense(averaged) - dense(pair)).norm() < 1e-6 * dense(pair).norm() * 20


def test_low_rank_average_at_alpha_1_copies_the_factors() -> None:
    averaged, error = average_low_rank(factors(2, 0), policy := factors(3, 10), 1.0, max_rank=4)
    assert error == 0
    assert torch.equal(averaged.A, policy.A)
    assert torch.equal(averaged.B, policy.B)


def test_low_rank_average_with_a_fresh_reference_keeps_the_rank() -> None:
    fresh = LowRank(torch.zeros(12, 4), random(4, 9, seed=1))
    averaged, _ = average_low_rank(fresh, policy := factors(4, 10), 0.6, max_rank=16)
    assert averaged.A.shape[0] == 4
    torch.testing.assert_close(dense(averaged), 0.6 * dense(policy), atol=1e-6, rtol=1e-6)


def test_dora_average_is_the_average_of_the_dense_weights() -> None:
    weight = random(12, 9, seed=5)
    sides = [(factors(2, seed), random(12, seed=seed + 7).abs() + 0.5) for seed in (0, 50)]

    def dense_dora(pair: LowRank, magnitude: torch.Tensor) -> torch.Tensor:
        full = weight.double() + 1.5 * dense(pair)
        return magnitude.double()[:, None] * full / full.norm(dim=1, keepdim=True)

    reference, policy = sides
    pair, magnitude, error = average_dora(weight, reference, policy, 0.3, 1.5, max_rank=8)
    oracle = 0.3 * dense_dora(*policy) + 0.7 * dense_dora(*reference)
    assert error == 0
    torch.testing.assert_close(dense_dora(pair, magnitude), oracle, atol=1e-5, rtol=1e-5)
