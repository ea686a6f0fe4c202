"""Losses that judge each response of a pair separately: the level of its reward counts, not only the difference.

`r_w = beta h_w` and `r_l = beta h_l`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from tether.losses.options import LossOptions
from tether.types import PairScores


def nca_pair(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Noise contrastive alignment of a pair: keeps the likelihood of the chosen response from falling.

    `-log sigma(r_w) - log sigma(-r_w) / 2 - log sigma(-r_l) / 2`

    Chen et al. 2024, arXiv 2402.05369, the pairwise form of its NCA loss.
    """
    chosen, rejected = _rewards(scores, options)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Binary classifier optimisation: chosen and rejected responses on either side of the shift `delta`.

    `-log sigma(r_w - delta) - log sigma(-(r_l - delta))`, with `delta` the running mean of all rewards so far

    Jung et al. 2024, arXiv 2404.04656, whose `delta` is half the sum of the expected chosen and rejected reward. In
    training the mean over the responses of all micro-batches and processes so far, this one included, estimates
    it; it is saved in checkpoints.

    TRL 1.16: has no `delta` (earlier versions did). `bco_reward_shift=False` does the same.
    """
    chosen, rejected = _rewards(scores, options)
    if scores.reward_shift is not None:
        chosen, rejected = chosen - scores.reward_shift, rejected - scores.reward_shift
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Self-play preference optimisation where the chosen response wins with probability 1.

    `(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2`

    Wu et al. 2024, arXiv 2405.00675, Eq. 4.7 with `eta = 1 / beta`.
    """
    target = 0.5 / options.beta
    return (scores.chosen_logratios - target).square() + (scores.rejected_logratios + target).square()


def apo_zero(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Anchored preference optimisation for chosen responses better than the model's own: raises them.

    `1 - sigma(r_w) + sigma(r_l)`

    D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7. The paper omits the constant 1; TRL has it as well.
    """
    chosen, rejected = _rewards(scores, options)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Anchored preference optimisation for chosen responses worse than the model's own: lowers both.

    `sigma(r_w) + 1 - sigma(r_w - r_l)`

    D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8. The paper omits the constant 1; TRL has it as well.
    """
    chosen, rejected = _rewards(scores, options)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def sft(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Likelihood of the chosen response, to be added to other losses.

    `-log pi_theta(y_w|x) / |y_w|`

    Wang et al. 2024 (MPO), arXiv 2411.10442, its generation loss; Pang et al. 2024, arXiv 2404.19733, its NLL term.

    TRL 1.16: averages over the tokens of the micro-batch, so long responses weigh more, and by an amount that depends
    on the rest of the micro-batch. Equal if its chosen responses have the same length.
    """
    whole = scores.policy_chosen if scores.whole_policy_chosen is None else scores.whole_policy_chosen
    return -whole / scores.chosen_lengths


def _rewards(scores: PairScores, options: LossOptions) -> tuple[Tensor, Tensor]:
    return options.beta * scores.chosen_logratios, options.beta * scores.rejected_logratios
