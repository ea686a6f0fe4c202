"""The names that scripts written for TRL look for on the trainer itself: its options, and what is elsewhere here.

Knows names only: each attribute is the option of `trainer.args`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tether.config import DPOConfig
from tether.errors import ConfigurationError, NotHereError
from tether.losses import DivergenceName

# What TRL's trainer has and this one does not: why, and what to write instead.
ELSEWHERE = {
    "compute_ref_log_probs": (
        "The reference computes its own log-probs, whatever its kind.",
        "Write `trainer.reference.log_probs(inputs['batch'])`; `.sums()` of it has one number for each response.",
    ),
    "_metrics": (
        "Figures are summed up on the device and read once for each log.",
        "Log your own with `trainer.log({'name': value})`, or from a callback.",
    ),
}
# Methods of TRL's trainer that a subclass may replace there, and that nothing would call here.
_NEVER_CALLED = {
    "_compute_loss": "Override `compute_loss(model, inputs, return_outputs, num_items_in_batch)`, or pass your own "
    "loss: `DPOTrainer(..., loss=function)`.",
    "_prepare_dataset": "Pass rows that are tokenized already: `prompt_ids`, `chosen_ids`, `rejected_ids`.",
    "_precompute_ref_logps": "Pass rows with `ref_chosen_logps` and `ref_rejected_logps`: nothing is computed then.",
    "compute_ref_log_probs": "Pass rows with `ref_chosen_logps` and `ref_rejected_logps`: nothing is computed then.",
}


class OptionsAsAttributes:
    """`trainer.beta` and its kind.

    `beta` can be set while training (a schedule, say) and holds from the next step on; the others are read only.

    Raises:
        ConfigurationError: Where a subclass is defined that replaces a method which only TRL's trainer calls.
        NotHereError: Where a name is read that only TRL's trainer has.
    """

    args: DPOConfig
    _router_coefficient: float
    _activations: AbstractContextManager[None]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, instead in _NEVER_CALLED.items():
            if name in vars(cls):
                raise ConfigurationError(
                    problem=f"Cannot use `{cls.__name__}.{name}`: it replaces a method that only TRL's trainer has, "
                    "so it would never be called.",
                    instead=instead,
                )

    if not TYPE_CHECKING:  # or no misspelt name would be seen by a type checker

        def __getattr__(self, name: str) -> Any:
            if name in ELSEWHERE:
                why, instead = ELSEWHERE[name]
                raise NotHereError(
                    problem=f"Cannot read `trainer.{name}`: only TRL's trainer has it.", details=why, instead=instead
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        return list(self.args.loss_type)

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
    def f_divergence_type(self) -> DivergenceName:
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

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss of a mixture of experts; 0 for other models."""
        return self._router_coefficient

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether there is such a loss."""
        return self._router_coefficient != 0

    @property
    def maybe_activation_offload_context(self) -> AbstractContextManager[None]:
        """What a training step is run in, by `training_step`."""
        return self._activations
