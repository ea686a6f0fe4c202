"""`DPOConfig`: every option of a run, checked as early as possible.

Names and defaults are TRL's where TRL has the option; Tether's own start with `ref_`. Knows options only: it loads
nothing.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import Field, dataclass, field, fields
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from tether.config.option_types import refused_types
from tether.config.rules.launch import launched_precision, refused_launch
from tether.config.rules.options import (
    CHANGES_OF_RESUME,
    DTYPES,
    SAMPLE_TOKENS,
    SYNC_ALPHA,
    SYNC_STEPS,
    VERIFIED_PAIRS,
    Dtype,
    StoreMode,
    refused_names,
    refused_options,
)
from tether.data.columns import PairColumns
from tether.data.names import MAPPED
from tether.errors import ArgumentTypeError, ConfigurationError, said
from tether.losses import (
    DIVERGENCES,
    LOSSES,
    DivergenceName,
    LossName,
    LossOptions,
    Objective,
    PreferenceLoss,
)
from tether.masking import masked
from tether.refusals import Refusal, of_option, refuse
from tether.types import TruncationMode

if TYPE_CHECKING:  # for type checkers and editors; HfArgumentParser needs a plain list of text
    LossType = LossName | Sequence[LossName]
else:
    LossType = list[str]


# What transformers takes besides the types that it declares, or makes of a value itself, as in a copy of the options.
_ALSO: dict[str, Any] = {
    "accelerator_config": AcceleratorConfig,
    "debug": list[Any] | None,
    "fsdp": bool | list[Any],
    "resume_from_checkpoint": bool,
}

# transformers' name of `gradient_checkpointing` since 5.23.
_IS_RENAMED = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if _IS_RENAMED else "gradient_checkpointing"


def _option(default: Any, text: str, **metadata: Any) -> Any:
    """A field with its help text, which `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(repr=False)
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`: those of `transformers.TrainingArguments`, and those of DPO below.

    Four defaults differ from `TrainingArguments`, as they do in TRL: `logging_steps=10`,
    `gradient_checkpointing=True`, `learning_rate=1e-6`, and `bf16=None`, which means: on where an accelerator
    supports it, off on a CPU. `logging_nan_inf_filter` is off: a loss that is NaN or infinite ends the run. With
    `bf16_full_eval` or `fp16_full_eval`, every evaluation runs in that dtype; the weights keep theirs.

    Every option has a help text at its field, which `tether train --help` shows too. These need more words:

    Args:
        bad_rows: What to do with rows that are not pairs (with an empty response, for example): `raise` refuses the
            set and names them, `drop` leaves them out and logs how many and why.
        padding_free: Rows have no padding by default wherever the model's attention is proven to allow it; True makes
            it an error where it is not.
        max_tokens_per_micro_batch: With it, or with `train_sampling_strategy="group_by_length"`, micro-batches hold
            pairs of similar length, and `per_device_train_batch_size` is the most pairs of one.
        ref_store_mode: With `precompute_ref_log_probs`, when the store is filled. `fill`: before training; the
            reference's weights are then released. `lazy`: when training first reads a row; later epochs and runs
            find it. `require`: never; a missing row is an error that names it. `auto`: `fill`, but `lazy` for
            streams.

    Raises:
        ConfigurationError: For a value out of range, naming the option.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "columns"]  # noqa: RUF012

    learning_rate: float = _option(1e-6, "The initial learning rate of the optimizer.")
    logging_steps: float = _option(10, "Log every X optimizer steps; below 1, a share of all steps.")
    logging_nan_inf_filter: bool = _option(
        False, "Filter out NaN and Inf losses when logging, for which every micro-batch is waited for."
    )
    gradient_checkpointing: bool = _option(True, "Recompute activations in the backward pass to save memory.")
    bf16: bool | None = _option(  # type: ignore[assignment]
        None, "bf16 mixed precision. Default: on where an accelerator supports it."
    )

    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keyword arguments of from_pretrained when the model is given by path or name (JSON on a command line)."
    )
    trust_remote_code: bool = _option(False, "Allow models and tokenizers that come with their own code.")
    disable_dropout: bool = _option(True, "Train without dropout. The reference never has any.")

    columns: dict[str, Any] | str | None = _option(
        None,
        "Columns of the rows under other names, ours: theirs (a mapping; JSON on a command line), such as "
        '{"prompt": "question"}; several texts, in a list, are joined by a line break. Ours are: '
        f"{', '.join(MAPPED)}.",
    )
    dataset_num_proc: int | None = _option(None, "Number of processes that tokenize.")
    max_length: int | None = _option(1024, "Tokens of prompt and response together; None for no limit.")
    truncation_mode: TruncationMode = _option("keep_start", "Which end of a sequence beyond max_length to keep.")
    bad_rows: Literal["raise", "drop"] = _option(
        "raise", "What to do with rows that are not pairs: refuse the set, or drop them."
    )

    padding_free: bool = _option(False, "Raise an error where the model is not proven to work without padding.")
    pad_to_multiple_of: int | str | None = _option("auto", "auto or none: there is no padding to round up.")
    pad_token: str | None = _option(None, "Deprecated: set the tokenizer's own.")
    activation_offloading: bool = _option(
        False, "Keep activations in host memory until the backward pass; needs an accelerator."
    )

    max_tokens_per_micro_batch: int | None = _option(
        None, "Token budget of a training micro-batch (each prompt once); the batch size is then a maximum."
    )

    precompute_ref_log_probs: bool = _option(
        False,
        "Score every row under the reference once, before training, and keep the log-probs on disk; no reference "
        "weights are held while training.",
    )
    precompute_ref_batch_size: int | None = _option(
        None,
        "Batch size of the precompute pass, as the tokens of this many of the longest pairs. Default: four training "
        "micro-batches, up to 16,384 tokens.",
    )

    loss_type: LossType = _option(["sigmoid"], f"One loss or several of: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = _option(None, "Weight of each of several losses (MPO). Default: 1 each.")
    label_smoothing: float = _option(
        0.0, "Probability that a preference label is flipped, in [0, 0.5); exo_pair needs some."
    )
    beta: float = _option(0.1, "Strength of the pull towards the reference (for IPO, the regularisation tau).")
    beta_column: str | None = _option(None, "Column of the rows that has each pair's own beta, instead of `beta`.")
    loss_columns: list[str] | None = _option(
        None, "Columns of the rows, a number in each, that your own loss reads from `scores.columns`."
    )
    f_divergence_type: DivergenceName = _option(
        "reverse_kl",
        f"The f-divergence from the reference, for losses on the difference of two rewards: {', '.join(DIVERGENCES)}.",
    )
    f_alpha_divergence_coef: float = _option(
        0.5, "Coefficient of the alpha-divergence; 1 is the reverse KL, 0 the forward KL."
    )
    ld_alpha: float | None = _option(
        None, "Weight, in [0, 1], of tokens beyond the shorter response's length (LD-DPO). Default: 1."
    )
    discopop_tau: float = _option(0.05, "Temperature of discopop.")
    use_weighting: bool = _option(False, "Weight each pair by its likelihood under the policy (WPO).")
    bco_reward_shift: bool = _option(
        True, "Subtract the running mean of rewards in bco_pair, as in its paper; TRL 1.16 does not."
    )
    router_aux_loss_coef: float | None = _option(
        None, "Weight of a mixture of experts' load-balancing loss, 0 for none. Default: the model config's."
    )
    reference_free: bool = _option(False, "No reference: each response's reward is beta times its own log-prob.")

    sync_ref_model: bool = _option(False, "Let the reference follow the policy (TR-DPO).")
    ref_model_mixup_alpha: float = _option(
        SYNC_ALPHA, "Weight of the policy in each sync, in [0, 1]; 1 replaces the reference."
    )
    ref_model_sync_steps: int = _option(SYNC_STEPS, "Optimizer steps between syncs.")
    ref_model_sync_rank: int | None = _option(
        None, "Largest rank of an averaged LoRA update. Default: twice the policy's, layer by layer."
    )

    ref_store: str | None = _option(
        None, "File of the log-prob store. Default: one in the user's cache folder, shared by all runs."
    )
    ref_store_mode: StoreMode = _option(
        "auto",
        "When the store is filled: before training (fill), when a row is first read (lazy), or never (require; a "
        "missing row is then an error). auto is fill, but lazy for streams.",
    )
    ref_store_verify: int = _option(
        VERIFIED_PAIRS,
        "Stored pairs of each set that the reference scores again, where it is at hand, before the first stored answer "
        "is used; 0 for none.",
    )
    ref_columns: Literal["policy", "other"] = _option(
        "policy",
        "Whose log-probs the columns ref_chosen_logps and ref_rejected_logps are: those of the policy as it starts, "
        "which is checked, or of another model.",
    )
    ref_dtype: Dtype | None = _option(
        None, f"Dtype of an explicit reference's weights: {', '.join(DTYPES)}. Default: the policy's."
    )

    resume_changes: list[str] | None = _option(
        None,
        "What a resumed run may change although it changes the objective or the order of pairs; an error names it. "
        f"Any of: {', '.join(CHANGES_OF_RESUME)} (manifest: the checkpoint has none, so nothing proves it).",
    )
    take_over: bool = _option(
        False,
        "Train in output_dir although another process has marked it as its own; that process can save nothing more.",
    )

    report_samples: int = _option(
        0,
        "Answer this many held-out prompts at each evaluation and after training; samples.jsonl in output_dir keeps "
        "the answers, with the reference's own beside them, and their length, repetition and KL are logged.",
    )
    report_samples_max_new_tokens: int = _option(SAMPLE_TOKENS, "Most tokens of such an answer.")

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuses names that are no options, all of them, with what each is called today."""
        refuse(refused_names(options, inspect.signature(cls.__init__, follow_wrapped=False)), ArgumentTypeError)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check()
        self._settle_padding()
        if self.bf16 is None:
            on_accelerator = not self.use_cpu and is_torch_bf16_gpu_available()
            self.bf16 = bool(on_accelerator and not self.fp16 and launched_precision() in ("no", "bf16"))
        if getattr(self, _CHECKPOINTING) is None:
            self.recomputes_activations = self.gradient_checkpointing
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # without a device to copy to, DataLoader would warn
            self.use_cpu = True  # it is so anyway, and without it torchrun's processes would not find each other
        try:
            super().__post_init__()
        except Exception as error:  # its own checks, and those of the libraries that it asks
            refuse([self._refused_below(error)], cause=error)
        refuse(refused_launch(self))

    def _refused_below(self, error: Exception) -> Refusal:
        """What transformers refused: the option that it refuses alone too, or else what it says of several."""
        for entry in fields(TrainingArguments):
            value = getattr(self, entry.name)
            if value == entry.default or entry.name == "output_dir":
                continue
            try:
                TrainingArguments(str(self.output_dir), use_cpu=self.use_cpu, **{entry.name: value})
            except Exception as alone:
                if str(alone) == str(error):
                    return of_option(entry.name, value, said(error), f"Correct `{entry.name}`, or leave it out.")
        subject = "these options of transformers.TrainingArguments"
        return Refusal(subject, said(error), "Change the option that it names.")

    def to_dict(self) -> dict[str, Any]:
        """The options, without tokens and passwords, also in those that are mappings."""
        shown: dict[str, Any] = masked(super().to_dict())
        return shown

    def __str__(self) -> str:
        values = masked({entry.name: getattr(self, entry.name) for entry in fields(self)})
        lines = "\n".join(f"{name}={values[name]!r}," for name in sorted(values))
        return f"{type(self).__name__}(\n{lines}\n)"

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        # Pickled into `training_args.bin` beside every model, and pushed to the hub with it.
        state: dict[str, Any] = masked(self.__dict__, leave_out=True)
        return state

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = self.__copy__()
        memo[id(self)] = made
        made.__dict__.update(deepcopy(self.__dict__, memo))
        return made

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
            ld_alpha=self.ld_alpha,
        )

    @property
    def pair_columns(self) -> PairColumns:
        """Further columns of the rows that the loss reads."""
        beta = () if self.beta_column is None else (self.beta_column,)
        return PairColumns(tuple(dict.fromkeys((*beta, *(self.loss_columns or ())))), frozenset(beta))

    @property
    def recomputes_activations(self) -> bool:
        """Activation checkpointing, under the name that transformers' trainer reads."""
        return bool(getattr(self, _CHECKPOINTING))

    @recomputes_activations.setter
    def recomputes_activations(self, value: bool) -> None:
        setattr(self, _CHECKPOINTING, value)

    @property
    def checkpoints_reentrantly(self) -> bool:
        """Whether layers first run without recording gradients, which only their replay in the backward does."""
        kwargs = getattr(self, f"{_CHECKPOINTING}_kwargs")
        return bool(self.recomputes_activations and isinstance(kwargs, dict) and kwargs.get("use_reentrant"))

    def set_loss(self, **options: Any) -> None:
        """Changes options of the loss while training: `set_loss(beta=0.2)`.

        Raises:
            ConfigurationError: For what cannot be; nothing is changed then.
        """
        former = {name: getattr(self, name) for name in options}
        vars(self).update(options)
        try:
            self._check()
        except ConfigurationError:
            vars(self).update(former)
            raise

    def _check(self) -> None:
        """Types and values of our own options; those of TrainingArguments are transformers' to check."""
        if isinstance(self.loss_type, str | tuple):
            self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        self._settle_values()
        refuse(refused_types(self, DPOConfig, _ALSO), ArgumentTypeError)
        refuse(refused_options(self))

    def _settle_values(self) -> None:
        """NumPy's, `decimal`'s and `fractions`' numbers as plain ones, paths as text, and whole numbers as floats where
        torch takes no others.
        """
        for entry in fields(self):
            given = getattr(self, entry.name)
            value = given.item() if isinstance(given, np.generic) else given
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            elif isinstance(value, Decimal | Fraction) or (
                type(value) is int and abs(value) < 2**53 and _takes_floats(entry)
            ):
                value = float(value)
            if value is not given:
                setattr(self, entry.name, value)
        weights: Any = self.loss_weights
        if isinstance(weights, list | tuple):
            self.loss_weights = [
                float(one) if type(one) is int or isinstance(one, Decimal | Fraction) else one for one in weights
            ]

    def _settle_padding(self) -> None:
        self.pad_to_multiple_of = None
        if self.pad_token is not None:
            warnings.warn(
                "`pad_token` is deprecated. Set `tokenizer.pad_token` and pass the tokenizer as `processing_class`.",
                FutureWarning,
                stacklevel=4,  # the caller of `DPOConfig(...)`
            )


def _takes_floats(entry: Field[Any]) -> bool:
    """Whether an option is a float, and not a share or a number of steps, as some of transformers' are."""
    is_own = entry.name not in TrainingArguments.__dataclass_fields__
    return isinstance(entry.default, float) or (is_own and str(entry.type).startswith("float"))


def objective_of(args: DPOConfig, loss: PreferenceLoss | None, former: Objective | None = None) -> Objective:
    """What a run minimises: the losses named by its options, or the user's own.

    Args:
        args: The options.
        loss: The user's own loss.
        former: What the run minimised so far; BCO's running mean goes on.
    """
    objective = Objective(
        [loss] if loss is not None else args.loss_type,
        args.loss_weights,
        lambda: args.loss_options,  # read at each step: a callback may change beta
        use_weighting=args.use_weighting,
        bco_reward_shift=args.bco_reward_shift,
        beta_column=args.beta_column,
    )
    if objective.reward_shift is not None and former is not None:
        objective.reward_shift = former.reward_shift or objective.reward_shift
    return objective


def look_for_unused_parameters(args: DPOConfig) -> None:
    """Lets DDP expect parameters without gradient, unless the user decided: a batch without images does not use the
    vision tower. Reentrant checkpointing fails with it."""
    if args.ddp_find_unused_parameters is None and not args.checkpoints_reentrantly:
        args.ddp_find_unused_parameters = True
