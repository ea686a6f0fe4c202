"""The preference losses: one pure function each, from sequence log-probabilities to one loss per pair.

Knows tensors and `PairScores`; nothing of models, references or training.

Notation: `h_w = log pi_theta(y_w|x) - log pi_ref(y_w|x)` (chosen), `h_l` (rejected), `delta = h_w - h_l`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from tether.types import PairScores


@dataclass(frozen=True)
class LossOptions:
    """The numbers that parametrise the losses; each loss reads those its equation names.

    Attributes:
        beta: Strength of the pull towards the reference; for IPO the regularisation `tau`.
        label_smoothing: Probability that a preference label is flipped, in [0, 0.5).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0


def sigmoid(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """DPO; with label smoothing `eps`, conservative DPO.

    `-(1 - eps) log sigma(beta delta) - eps log sigma(-beta delta)`

    Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    logits, eps = options.beta * scores.delta, options.label_smoothing
    return -(1 - eps) * logsigmoid(logits) - eps * logsigmoid(-logits)


def hinge(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Hinge on the normalised likelihood margin (RSO).

    `max(0, 1 - beta delta)`

    Liu et al. 2023, arXiv 2309.06657, Eq. 10; Zhao et al. 2023 (SLiC), arXiv 2305.10425.
    """
    return relu(1 - options.beta * scores.delta)


def ipo(scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
    """Identity preference optimisation, on log-ratios averaged over each response's tokens.

    `(h_w / |y_w| - h_l / |y_l| - 1 / (2 tau))^2`, with `tau = beta`

    Azar et al. 2023, arXiv 2310.12036, Eq. 17. The average per token is the authors' own form, which the paper
    does not spell out; TRL uses it as well.
    """
    chosen = scores.chosen_logratios / scores.chosen_lengths
    rejected = scores.rejected_logratios / scores.rejected_lengths
    return (chosen - rejected - 1 / (2 * options.beta)).square()


PreferenceLoss = Callable[[PairScores, LossOptions], Float[Tensor, " pairs"]]

LOSSES: dict[str, PreferenceLoss] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}
