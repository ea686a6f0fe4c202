"""The parameters of the losses, and the type of a loss.

Knows no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor

from tether.types import PairScores

DivergenceName = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
"""The names in `DIVERGENCES`."""

if TYPE_CHECKING:
    _Divergence = DivergenceName
else:
    _Divergence = str  # `check_loss_options` refuses another name, and lists the known ones


@dataclass(frozen=True)
class LossOptions:
    """The parameters of the losses; each loss reads those in its equation.

    Attributes:
        beta: Strength of the pull towards the reference; for IPO the regularisation `tau`. With `beta_column`, one for
            each pair.
        label_smoothing: Probability that a preference label is flipped, in [0, 0.5).
        f_divergence_type: The divergence that keeps the policy near the reference: one of `DIVERGENCES`.
        f_alpha_divergence_coef: Coefficient of the alpha-divergence.
        discopop_tau: Temperature of DiscoPOP's blend.
        ld_alpha: Weight, in [0, 1], of a response's tokens beyond the length that both responses of the pair have
            (LD-DPO); None for 1.
    """

    beta: float | Float[Tensor, " pairs"] = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: _Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None

    @property
    def needs_per_token(self) -> bool:
        """Whether the reference must return log-probs per token; otherwise a sum per response is enough."""
        return self.ld_alpha is not None and self.ld_alpha != 1


PreferenceLoss = Callable[[PairScores, LossOptions], Float[Tensor, " pairs"]]
"""A loss, built in or your own: one value per pair. The trainer takes the mean over the pairs of an optimizer step.

With an attribute `needs_tokens` that is true, it also gets the log-probs of every token, in `PairScores.tokens`."""
