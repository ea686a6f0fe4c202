"""The names that scripts written for TRL look for on the trainer itself: its options, and what is elsewhere here.

Knows names only: each attribute is the option of `trainer.args`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from tether.config.dpo_config import DPOConfig, objective_of
from tether.errors import NotHereError
from tether.losses import DivergenceName, Objective
from tether.reference import Reference
from tether.refusals import Refusal, of_option, refuse

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
_LOSS = (
    "Pass your loss, `DPOTrainer(..., loss=function)`: it gets the log-probs of policy and reference, per token with "
    "`function.needs_tokens = True`."
)
_FIGURES = "Log figures of your own with `trainer.log({'name': value})`, or from a callback."
_ROWS = "Pass rows that are tokenized already: `prompt_ids`, `chosen_ids`, `rejected_ids`."
_MODEL = "Pass the model as it is to be trained; `peft_config=...` puts an adapter on it."
_SUMS = "Pass rows with `ref_chosen_logps` and `ref_rejected_logps`: nothing is computed then."
# Methods of TRL's trainer, former ones too, that a subclass may replace there, and that nothing would call here.
_NEVER_CALLED = {
    "_compute_loss": "Override `compute_loss(model, inputs, return_outputs, num_items_in_batch)`. Or: " + _LOSS,
    "_compute_loss_liger": _LOSS,
    "_create_model_from_path": _MODEL,
    "_get_batch_logps": _LOSS,
    "_precompute_ref_logps": _SUMS,
    "_prepare_dataset": _ROWS,
    "_prepare_deepspeed": "Pass the reference, `DPOTrainer(..., ref_model=...)`, which is then prepared as it needs.",
    "_prepare_gradient_checkpointing": _MODEL,
    "_prepare_peft_model": _MODEL,
    "_tokenize": _ROWS,
    "_truncate_inputs": _ROWS,
    "build_tokenized_answer": _ROWS,
    "compute_ref_log_probs": _SUMS,
    "compute_reference_log_probs": _SUMS,
    "concatenated_forward": _LOSS,
    "concatenated_inputs": "Padded ids: `tether.trainer.evaluation.padded_ids(inputs['batch'], pad_token_id)`.",
    "dpo_loss": _LOSS,
    "get_batch_logps": _LOSS,
    "generate_from_model_and_ref": "Set `report_samples`, the number of held-out prompts to answer.",
    "get_batch_loss_metrics": f"{_LOSS} {_FIGURES}",
    "get_batch_metrics": f"{_LOSS} {_FIGURES}",
    "process_row": _ROWS,
    "store_metrics": _FIGURES,
    "tokenize_row": _ROWS,
}


class _Forwarded(Generic[T]):
    """An attribute that is read from what the trainer has elsewhere, and cannot be set."""

    def __init__(self, read: Callable[[Any], T]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> T:
        return self if trainer is None else self._read(trainer)  # type: ignore[return-value]

    def __set__(self, trainer: Any, value: Any) -> None:
        raise AttributeError(f"Cannot set `trainer.{self._name}`: it is read only, and settled by `trainer.args`.")


class _LossOption(_Forwarded[T]):
    """An attribute that is an option of the loss, and can be set while training."""

    def __init__(self, option: str, read: Callable[[Any], T] | None = None) -> None:
        super().__init__(read or (lambda trainer: getattr(trainer.args, option)))
        self._option = option

    def __set__(self, trainer: Any, value: Any) -> None:
        trainer._set_loss_option(self._option, value)


class OptionsAsAttributes:
    """`trainer.beta` and its kind.

    The options of the loss can be set while training (a schedule, say) and hold from the next step on; the others are
    read only.

    Raises:
        ConfigurationError: At construction, where a subclass replaces methods that only TRL's trainer calls; and for a
            value that the option cannot have.
        NotHereError: Where a name is read that only TRL's trainer has.
    """

    args: DPOConfig
    reference: Reference
    _objective: Objective
    beta = _LossOption[float]("beta")
    loss_type = _LossOption[list[str]]("loss_type", lambda trainer: list(trainer.args.loss_type))
    loss_types = loss_type
    loss_weights = _LossOption[list[float]](
        "loss_weights", lambda t: t.args.loss_weights or [1.0] * len(t.args.loss_type)
    )
    label_smoothing = _LossOption[float]("label_smoothing")
    f_divergence_type = _LossOption[DivergenceName]("f_divergence_type")
    f_alpha_divergence_coef = _LossOption[float]("f_alpha_divergence_coef")
    ld_alpha = _LossOption[float | None]("ld_alpha")
    use_weighting = _LossOption[bool]("use_weighting")
    precompute_ref_logps = _Forwarded[bool](lambda trainer: trainer.args.precompute_ref_log_probs)
    padding_free = _Forwarded[bool](lambda trainer: trainer.args.padding_free)
    router_aux_loss_coef = _Forwarded[float](lambda trainer: trainer._router_coefficient)
    aux_loss_enabled = _Forwarded[bool](lambda trainer: trainer._router_coefficient != 0)
    maybe_activation_offload_context = _Forwarded[AbstractContextManager[None]](lambda trainer: trainer._activations)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Before any `__init__`, which a subclass may bypass."""
        refuse(
            Refusal(f"`{cls.__name__}.{name}`", "only TRL's trainer calls a method of that name", instead)
            for name, instead in _NEVER_CALLED.items()
            if hasattr(cls, name)
        )
        return super().__new__(cls)

    if not TYPE_CHECKING:  # or no misspelt name would be seen by a type checker

        def __getattr__(self, name: str) -> Any:
            if name in ELSEWHERE or name in _NEVER_CALLED:
                why, instead = ELSEWHERE.get(name) or ("", _NEVER_CALLED[name])
                raise NotHereError(
                    problem=f"Cannot read `trainer.{name}`: only TRL's trainer has it.", details=why, instead=instead
                )
            if "_objective" not in vars(self):
                raise NotHereError(
                    problem=f"Cannot read `{type(self).__name__}.{name}`: `DPOTrainer.__init__` was not called.",
                    instead="Call `super().__init__(...)` first in `__init__`, not `Trainer.__init__`.",
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _set_loss_option(self, option: str, value: Any) -> None:
        loss = self._objective.own_loss
        if loss is not None and option in ("loss_type", "loss_weights"):
            why, instead = "your own loss takes the place of the named ones", "Build a trainer without `loss=`."
            refuse([of_option(option, value, why, instead, "with `loss=...`")])
        if option == "ld_alpha" and not self.reference.traits.knows_tokens:
            why, instead = "it weighs single tokens, and the reference knows sums only", "Leave it as it is."
            refuse([of_option(option, value, why, instead)])
        self.args.set_loss(**{option: value})
        self._objective = objective_of(self.args, loss, self._objective)
