"""Update rules of a reference that follows the policy: pure functions on tensors.

Knows no model and no schedule.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def soft_update(
    reference: Float[Tensor, "*shape"], policy: Float[Tensor, "*shape"], alpha: float
) -> Float[Tensor, "*shape"]:
    """`alpha * policy + (1 - alpha) * reference`, as `lerp`.

    The formula written out changes a third of the elements when both sides are equal; `lerp` changes none, and is
    exact at alpha = 0 and alpha = 1.

    Gorbatovski et al. 2024 (TR-DPO), arXiv 2404.09656, Eq. 5 (soft); alpha = 1 is Eq. 6 (hard).

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

    In bf16 a step of `alpha * (policy - reference)` below 2^-9 of a weight would round away for ever; the average
    is kept as `reference + residual`, which has twice the significant bits.

    Returns:
        The new reference and its new residual, both in the reference's dtype.
    """
    average = soft_update(reference.float() + residual.float(), policy.float(), alpha)
    rounded = average.to(reference.dtype)
    return rounded, (average - rounded.float()).to(residual.dtype)
