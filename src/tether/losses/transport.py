"""Alignment by optimal transport: losses that compare sorted values, and so couple the pairs of a micro-batch.

Values are sorted within one micro-batch of one process: larger micro-batches estimate better, and gradient
accumulation is not the same as one large batch. A value belongs to a rank, not to a pair; only the mean matters.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tether.losses.options import LossOptions
from tether.losses.pairwise import smoothed
from tether.types import PairScores


def aot(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """AOT, paired: the policy's margins dominate the reference's, as distributions.

    `-(1 - eps) log sigma(z_i) - eps log sigma(-z_i)`, with `z_i = beta (u_(i) - v_(i))`: sorted
    `u = log pi_theta(y_w|x) - log pi_theta(y_l|x)` minus sorted `v`, the same under the reference

    Melnyk et al. 2024, arXiv 2406.05882, with the logistic loss.
    """
    policy = (scores.policy_chosen - scores.policy_rejected).sort().values
    reference = (scores.reference_chosen - scores.reference_rejected).sort().values
    return smoothed(options.beta * (policy - reference), options.label_smoothing)


def aot_unpaired(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """AOT, unpaired: the rewards of chosen responses dominate those of rejected ones, as distributions.

    `-(1 - eps) log sigma(z_i) - eps log sigma(-z_i)`, with `z_i = beta (u_(i) - v_(i))`: sorted `u = h_w` minus
    sorted `v = h_l`

    Melnyk et al. 2024, arXiv 2406.05882, with the logistic loss.
    """
    chosen, rejected = scores.chosen_logratios.sort().values, scores.rejected_logratios.sort().values
    return smoothed(options.beta * (chosen - rejected), options.label_smoothing)
