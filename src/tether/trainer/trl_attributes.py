"""The names that scripts written for TRL look for on the trainer itself: its options, and what is elsewhere here.

Knows names only: each attribute is the option of `trainer.args`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from tether.config.dpo_config import DPOConfig
from tether.errors import ConfigurationError, NotHereError
from tether.losses import DivergenceName

T = TypeVar("T")

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


class _Forwarded(Generic[T]):
    """An attribute that is read from what the trainer has elsewhere, and cannot be set."""

    def __init__(self, read: Callable[[Any], T]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> T:
        return self if trainer is None else self._read(trainer)  # type: ignore[return-value]

    def __set__(self, trainer: Any, value: Any) -> NoReturn:
        raise AttributeError(f"Cannot set `trainer.{self._name}`: it is read only, and settled by `trainer.args`.")


class OptionsAsAttributes:
    """`trainer.beta` and its kind.

    `beta` can be set while training (a schedule, say) and holds from the next step on; the others are read only.

    Raises:
        ConfigurationError: Where a subclass is defined that replaces a method which only TRL's trainer calls.
        NotHereError: Where a name is read that only TRL's trainer has.
    """

    args: DPOConfig
    loss_types = _Forwarded[list[str]](lambda trainer: list(trainer.args.loss_type))
    loss_weights = _Forwarded[list[float]](lambda t: t.args.loss_weights or [1.0] * len(t.args.loss_type))
    precompute_ref_logps = _Forwarded[bool](lambda trainer: trainer.args.precompute_ref_log_probs)
    label_smoothing = _Forwarded[float](lambda trainer: trainer.args.label_smoothing)
    f_divergence_type = _Forwarded[DivergenceName](lambda trainer: trainer.args.f_divergence_type)
    f_alpha_divergence_coef = _Forwarded[float](lambda trainer: trainer.args.f_alpha_divergence_coef)
    ld_alpha = _Forwarded[float | None](lambda trainer: trainer.args.ld_alpha)
    use_weighting = _Forwarded[bool](lambda trainer: trainer.args.use_weighting)
    padding_free = _Forwarded[bool](lambda trainer: trainer.args.padding_free)
    router_aux_loss_coef = _Forwarded[float](lambda trainer: trainer._router_coefficient)
    aux_loss_enabled = _Forwarded[bool](lambda trainer: trainer._router_coefficient != 0)
    maybe_activation_offload_context = _Forwarded[AbstractContextManager[None]](lambda trainer: trainer._activations)

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
