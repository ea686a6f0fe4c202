"""f-divergences: the reward of a log-ratio under the divergence that keeps the policy near the reference.

Wang et al. 2023, "Beyond Reverse KL", arXiv 2309.16240: the reward of a response is `beta f'(pi_theta / pi_ref)` plus
a constant of the prompt, which cancels only in the difference of two responses. So only losses on that difference
can use another divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from tether.losses.options import LossOptions
from tether.types import PairScores


def reverse_kl(logratios: Tensor, coefficient: float) -> Tensor:
    """`g(h) = h`; `f(u) = u log u`."""
    return logratios


def forward_kl(logratios: Tensor, coefficient: float) -> Tensor:
    """`g(h) = 1 - exp(-h)`; `f(u) = -log u`."""
    return 1 - bounded_exp(-logratios)


def js_divergence(logratios: Tensor, coefficient: float) -> Tensor:
    """`g(h) = log 2 + log sigma(h)`; `f(u) = u log u - (u + 1) log((u + 1) / 2)`."""
    return math.log(2) + logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, coefficient: float) -> Tensor:
    """`g(h) = (exp((a - 1) h) - 1) / (a - 1)`, with `a` the coefficient: 1 is the reverse KL, 0 the forward KL.

    The paper writes `(1 - u^-alpha) / alpha`; its alpha is `1 - a`. TRL uses `a` as well; at 0.5 both are equal.
    """
    if abs(coefficient - 1) < 1e-6:
        return logratios
    power = coefficient - 1
    return (bounded_exp(power * logratios) - 1) / power


Divergence = Callable[[Tensor, float], Tensor]

DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def bounded_exp(exponent: Tensor) -> Tensor:
    """`exp`, continued by its tangent where its square might overflow.

    It stays monotone, with a gradient of the right sign. TRL clamps the exponent, or lets it overflow.
    """
    limit = 300.0 if exponent.dtype == torch.float64 else 30.0
    return exponent.clamp(max=limit).exp() + math.exp(limit) * torch.relu(exponent - limit)


def worth(logratios: Float[Tensor, " pairs"], options: LossOptions) -> Float[Tensor, " pairs"]:
    """`g(h)` under the divergence of the options."""
    return DIVERGENCES[options.f_divergence_type](logratios, options.f_alpha_divergence_coef)


def reward_margin(scores: PairScores, options: LossOptions, *, per_token: bool = False) -> Float[Tensor, " pairs"]:
    """`z = beta (g(h_w) - g(h_l)) - m`.

    Args:
        scores: Log-probs of the pairs.
        options: The divergence and beta.
        per_token: Divide `g` of each response by its tokens.
    """
    logits = options.beta * worth_difference(scores, options, per_token=per_token)
    return logits if scores.margins is None else logits - scores.margins


def worth_difference(scores: PairScores, options: LossOptions, *, per_token: bool = False) -> Float[Tensor, " pairs"]:
    """`g(h_w) - g(h_l)`, or the difference of both per token."""
    chosen, rejected = worth(scores.chosen_logratios, options), worth(scores.rejected_logratios, options)
    if per_token:
        return chosen / scores.chosen_lengths - rejected / scores.rejected_lengths
    return chosen - rejected
