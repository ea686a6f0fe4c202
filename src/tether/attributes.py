"""The options that scripts written for TRL read from the trainer itself, under TRL's names.

Knows names only: each attribute is the option of `trainer.args`.
"""

from __future__ import annotations

from tether.config import DPOConfig


class OptionsAsAttributes:
    """`trainer.beta` and its kind.

    `beta` can be set while training (a schedule, say) and holds from the next step on; the others are read only.
    """

    args: DPOConfig

    @property
    def beta(self) -> float:
        """Strength of the pull towards the reference."""
        return self.args.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.args.set_beta(value)

    @property
    def loss_types(self) -> list[str]:
        """The losses that are added up."""
        return self.args.loss_type

    @property
    def loss_weights(self) -> list[float]:
        """Their weights."""
        return self.args.loss_weights or [1.0] * len(self.args.loss_type)

    @property
    def precompute_ref_logps(self) -> bool:
        """Whether reference log-probs are computed before training."""
        return self.args.precompute_ref_log_probs

    @property
    def label_smoothing(self) -> float:
        """Probability that a preference label is flipped."""
        return self.args.label_smoothing

    @property
    def f_divergence_type(self) -> str:
        """The divergence that keeps the policy near the reference."""
        return self.args.f_divergence_type

    @property
    def f_alpha_divergence_coef(self) -> float:
        """Its coefficient, where it is the alpha-divergence."""
        return self.args.f_alpha_divergence_coef

    @property
    def ld_alpha(self) -> float | None:
        """Weight of tokens beyond the length that both responses have; None for 1."""
        return self.args.ld_alpha

    @property
    def use_weighting(self) -> bool:
        """Whether pairs are weighed by how likely the policy is to say them."""
        return self.args.use_weighting

    @property
    def padding_free(self) -> bool:
        """Whether rows without padding are insisted on."""
        return self.args.padding_free
