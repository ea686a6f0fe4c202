"""Losses of the difference between the chosen and the rejected response.

They depend on `g(h_w) - g(h_l)` alone, so any constant of the prompt cancels.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from tether.losses.divergence import bounded_exp, reward_margin, worth_difference
from tether.losses.options import LossOptions
from tether.types import PairScores


def sigmoid(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """DPO; with label smoothing `eps`, conservative DPO; with a margin `m`, DPO with an offset.

    `-(1 - eps) log sigma(z) - eps log sigma(-z)`

    Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3;
    Amini et al. 2024, arXiv 2402.10571 (the offset).

    TRL 1.16: ignores `label_smoothing` here, and has no margin.
    """
    return smoothed(reward_margin(scores, options), options.label_smoothing)


def sigmoid_norm(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """DPO on log-ratios averaged over each response's tokens.

    `-(1 - eps) log sigma(z) - eps log sigma(-z)`, with `z = beta (g(h_w) / |y_w| - g(h_l) / |y_l|) - m`

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, its length-normalised DPO.

    TRL 1.16: ignores `label_smoothing` here, and has no margin.
    """
    return smoothed(reward_margin(scores, options, per_token=True), options.label_smoothing)


def hinge(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Hinge on the normalised likelihood margin (RSO).

    `max(0, 1 - z)`

    Liu et al. 2023, arXiv 2309.06657, Eq. 10; Zhao et al. 2023 (SLiC), arXiv 2305.10425.
    """
    return relu(1 - reward_margin(scores, options))


def ipo(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Identity preference optimisation, on log-ratios averaged over each response's tokens.

    `(g(h_w) / |y_w| - g(h_l) / |y_l| - 1 / (2 tau))^2`, with `tau = beta`

    Azar et al. 2023, arXiv 2310.12036, Eq. 17. The average per token is the authors' own form, not spelled out in
    the paper; TRL uses it as well.
    """
    return (worth_difference(scores, options, per_token=True) - 1 / (2 * options.beta)).square()


def robust(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Robust DPO: an unbiased estimate of the loss on clean labels when a share `eps` of the labels is flipped.

    `(-(1 - eps) log sigma(z) + eps log sigma(-z)) / (1 - 2 eps)`

    Chowdhury et al. 2024, arXiv 2403.00409.
    """
    logits, eps = reward_margin(scores, options), options.label_smoothing
    return (-(1 - eps) * logsigmoid(logits) + eps * logsigmoid(-logits)) / (1 - 2 * eps)


def exo_pair(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """EXO from preferences: the reverse KL between the policy's preference and the smoothed label.

    `sigma(z) (log sigma(z) - log(1 - eps)) + sigma(-z) (log sigma(-z) - log eps)`

    Ji et al. 2024, arXiv 2402.00856, Eq. 16. Needs `eps > 0`; the paper uses 1e-3.
    """
    logits, eps = reward_margin(scores, options), options.label_smoothing
    chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-eps))
    rejected = torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(eps))
    return chosen + rejected


def discopop(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """DiscoPOP, the log-ratio modulated loss: the logistic loss blended into the exponential one.

    `-(1 - s) log sigma(z) + s exp(-z)`, with `s = sigma(z / tau)`

    Lu et al. 2024, arXiv 2406.08414, Eq. 5.

    TRL 1.16: computes `s` and `exp(-z)` separately, so their product is NaN for large negative `z`.
    """
    logits = reward_margin(scores, options)
    modulation = logits / options.discopop_tau
    exponential = bounded_exp(logsigmoid(modulation) - logits)  # s exp(-z) in one step: exp(-z) alone may overflow
    return -torch.sigmoid(-modulation) * logsigmoid(logits) + exponential


def hypo(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """HyPO: DPO that takes the reference for neutral where it prefers the rejected response.

    `-log sigma(beta (d_theta - max(0, d_ref)))`, with `d = log pi(y_w|x) - log pi(y_l|x)` under policy and reference

    Yuan et al. 2026, arXiv 2602.11902.

    TRL 1.16: has no such loss.
    """
    policy = scores.policy_chosen - scores.policy_rejected
    reference = scores.reference_chosen - scores.reference_rejected
    return -logsigmoid(options.beta * (policy - relu(reference)))


def smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """The logistic loss of `logits`, with label smoothing."""
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)
