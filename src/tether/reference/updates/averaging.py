"""Update rules of a reference that follows the policy: pure functions on tensors.

Knows no model and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def soft_update(
    reference: Float[Tensor, "*shape"], policy: Float[Tensor, "*shape"], alpha: float
) -> Float[Tensor, "*shape"]:
    """`alpha * policy + (1 - alpha) * reference`, as `lerp`.

    The formula written out changes a third of the elements when both sides are equal; `lerp` changes none, and is
    exact at alpha = 0 and alpha = 1.

    Gorbatovski et al. 2024 (TR-DPO), arXiv 2404.09656: its soft update; alpha = 1 is its hard one.

    Args:
        reference: `pi_ref_prev`.
        policy: `pi_theta`, in any floating-point dtype.
        alpha: Weight of the policy, in [0, 1].
    """
    return torch.lerp(reference, policy.to(reference.dtype), alpha)


def soft_update_with_residual(
    reference: Float[Tensor, "*shape"],
    residual: Float[Tensor, "*shape"],
    policy: Float[Tensor, "*shape"],
    alpha: float,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """`soft_update` for weights in low precision, whose rounding error is carried along.

    In bf16 a step of `alpha * (policy - reference)` below 2^-9 of a weight would round away forever; the average
    is kept as `reference + residual`, which has twice the significant bits.

    Returns:
        The new reference and its new residual, both in the reference's dtype.
    """
    average = soft_update(reference.float() + residual.float(), policy.float(), alpha)
    rounded = average.to(reference.dtype)
    return rounded, (average - rounded.float()).to(residual.dtype)


class BemaSchedule(NamedTuple):
    """How much the policy and the correction weigh in each update of `bema`.

    Block and Zhang 2025, arXiv 2508.00180, Algorithm 1.

    Attributes:
        ema_power: `kappa`.
        bias_power: `eta`.
        multiplier: `gamma`.
        lag: `rho`.
        min_ema_weight: Smallest `b_t`; the paper has none.
    """

    ema_power: float = 0.5
    bias_power: float = 0.2
    multiplier: float = 1.0
    lag: float = 10.0
    min_ema_weight: float = 0.0

    def weights(self, update: int) -> tuple[float, float]:
        """`b_t`, the weight of the policy in the average, and `a_t`, that of the correction; `t` counts from 0."""
        age = self.lag + self.multiplier * update
        return min(1.0, max(age**-self.ema_power, self.min_ema_weight)), age**-self.bias_power


def bema(
    average: Float[Tensor, "*shape"],
    policy: Float[Tensor, "*shape"],
    initial: Float[Tensor, "*shape"],
    update: int,
    schedule: BemaSchedule,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Bias-corrected exponential moving average.

    `EMA_t = (1 - b_t) EMA_{t-1} + b_t theta_t` and `BEMA_t = a_t (theta_t - theta_0) + EMA_t`, with
    `b_t = (rho + gamma t)^-kappa` and `a_t = (rho + gamma t)^-eta`.

    Block and Zhang 2025, arXiv 2508.00180, Algorithm 1.

    Args:
        average: `EMA_{t-1}`; `theta_0` at first.
        policy: `theta_t`.
        initial: `theta_0`.
        update: `t`, counted from 0.
        schedule: `rho`, `gamma`, `kappa` and `eta`.

    Returns:
        `EMA_t`, to be kept, and `BEMA_t`, to be used.
    """
    step, correction = schedule.weights(update)
    moved = soft_update(average, policy, step)
    return moved, moved + correction * (policy.to(moved.dtype) - initial.to(moved.dtype))


class LowRank(NamedTuple):
    """A matrix `B A` by its factors."""

    B: Float[Tensor, "*batch rows rank"]
    A: Float[Tensor, "*batch rank columns"]


def average_low_rank(reference: LowRank, policy: LowRank, alpha: float, max_rank: int) -> tuple[LowRank, float]:
    """Factors of `alpha B_pi A_pi + (1 - alpha) B_ref A_ref`: the average of the matrices, not of the factors.

    Mixing the factors instead is off by `-alpha (1 - alpha) (B_pi - B_ref)(A_pi - A_ref)`. The factors are stacked,
    which is exact; past `max_rank` they are recompressed (see `add_low_rank`).

    Args:
        reference: `B_ref`, `A_ref`.
        policy: `B_pi`, `A_pi`.
        alpha: Weight of the policy, in [0, 1]; 1 copies its factors.
        max_rank: Largest rank of the result.

    Returns:
        The factors, in the reference's dtype, and the Frobenius norm of what the truncation left out (0 while the
        stack fits).
    """
    dtype = reference.A.dtype
    if alpha == 1.0 and policy.A.shape[-2] <= max_rank:
        return LowRank(policy.B.to(dtype, copy=True), policy.A.to(dtype, copy=True)), 0.0
    return add_low_rank([(1 - alpha, reference), (alpha, policy)], max_rank)


def add_low_rank(terms: Sequence[tuple[float, LowRank]], max_rank: int) -> tuple[LowRank, float]:
    """Factors of the weighted sum of low-rank matrices.

    Stacks the factors, `[w_1 B_1, w_2 B_2, ...]` over `[A_1; A_2; ...]`, which is exact. Past `max_rank`, QR of both
    stacks and an SVD of the small core between them give the best approximation of that rank (Eckart-Young), in
    float64. Costs `O((rows + columns) rank^2)`.

    Args:
        terms: Weight and factors of each matrix; terms that are zero do not count towards the rank.
        max_rank: Largest rank of the result.

    Returns:
        The factors, in the first term's dtype, and the Frobenius norm of what the truncation left out.
    """
    first = terms[0][1]
    dtype = first.A.dtype
    nonzero = [(weight, pair) for weight, pair in terms if weight and bool(pair.B.any()) and bool(pair.A.any())]
    if not nonzero:
        return LowRank(torch.zeros_like(first.B), first.A.clone()), 0.0
    stacked_b = torch.cat([weight * pair.B.double() for weight, pair in nonzero], -1)
    stacked_a = torch.cat([pair.A.double() for _, pair in nonzero], -2)
    if stacked_a.shape[-2] <= max_rank:
        return LowRank(stacked_b.to(dtype), stacked_a.to(dtype)), 0.0
    left, left_core = torch.linalg.qr(stacked_b)
    right, right_core = torch.linalg.qr(stacked_a.mT)
    u, sizes, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    roots = sizes[..., :max_rank].sqrt()
    factors = LowRank(
        (left @ (u[..., :max_rank] * roots[..., None, :])).to(dtype),
        ((roots[..., :, None] * vh[..., :max_rank, :]) @ right.mT).to(dtype),
    )
    return factors, float(sizes[..., max_rank:].square().sum().sqrt())


def low_rank_norm(pair: LowRank) -> float:
    """Frobenius norm of `B A`, without making the product."""
    b, a = pair.B.double(), pair.A.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt())


def average_dora(
    weight: Float[Tensor, "rows columns"],
    reference: tuple[LowRank, Float[Tensor, " rows"]],
    policy: tuple[LowRank, Float[Tensor, " rows"]],
    alpha: float,
    scaling: float,
    max_rank: int,
) -> tuple[LowRank, Float[Tensor, " rows"], float]:
    """The average of two DoRA weights over one base, as a DoRA weight again.

    DoRA's weight is `c (W + s B A)` row by row, with `c = m / ||W + s B A||`. With `c' = alpha c_pi +
    (1 - alpha) c_ref`, the average is `c' (W + s B' A')` for the stack of `alpha (c_pi / c') B_pi` and
    `(1 - alpha) (c_ref / c') B_ref`, and its magnitude is `m' = c' ||W + s B' A'||`. Exact while the stack fits.

    Liu et al. 2024 (DoRA), arXiv 2402.09353, Eq. 5.

    Args:
        weight: The frozen base `W`.
        reference, policy: Factors and magnitude `m` of each.
        alpha: Weight of the policy.
        scaling: `s`.
        max_rank: Largest rank of the result.

    Returns:
        Factors and magnitude, in the reference's dtypes, and a bound on the Frobenius norm of what the truncation
        changed in the weight: `max(c') s` times that of the factors.
    """
    norms = (_row_norms(weight, factors, scaling) for factors, _ in (reference, policy))
    c_ref, c_pi = (m.double() / norm for (_, m), norm in zip((reference, policy), norms, strict=True))
    mixed = alpha * c_pi + (1 - alpha) * c_ref
    scaled_ref, scaled_pi = (
        LowRank((c / mixed)[:, None] * factors.B.double(), factors.A.double())
        for c, (factors, _) in ((c_ref, reference), (c_pi, policy))
    )
    averaged, error = average_low_rank(scaled_ref, scaled_pi, alpha, max_rank)
    kind = reference[0].A.dtype
    factors = LowRank(averaged.B.to(kind), averaged.A.to(kind))
    # The norm of the factors as they are kept, so that the row's scale is `c'` whatever the rounding.
    magnitude = mixed * _row_norms(weight, factors, scaling)
    return factors, magnitude.to(reference[1].dtype), float(mixed.abs().max()) * abs(scaling) * error


def _row_norms(weight: Tensor, factors: LowRank, scaling: float) -> Tensor:
    """`||W + s B A||` of each row, some rows at a time: the sum in float64 is never whole."""
    num_rows = max(1, 2**22 // weight.shape[1])
    a = factors.A.double()
    norms = [
        torch.linalg.vector_norm(rows.double() + scaling * b.double() @ a, dim=1)
        for rows, b in zip(weight.split(num_rows), factors.B.split(num_rows), strict=True)
    ]
    return torch.cat(norms)
