"""`DPOConfig`: every option of a run, checked as early as possible.

Names and defaults are TRL's where TRL has the option; what is our own begins with `ref_`. Knows options only: it
loads nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from tether.config.option_types import refused_types
from tether.config.rules.launch import launched_precision, refused_launch
from tether.config.rules.options import DTYPES, SYNC_ALPHA, SYNC_STEPS, Dtype, StoreMode, refused_names, refused_options
from tether.errors import ArgumentTypeError
from tether.losses import (
    DIVERGENCES,
    LOSSES,
    DivergenceName,
    LossName,
    LossOptions,
    Objective,
    PreferenceLoss,
    check_loss_options,
)
from tether.refusals import refuse
from tether.types import TruncationMode

if TYPE_CHECKING:  # what may be written, for editors; HfArgumentParser reads a list of plain words only
    LossType = LossName | Sequence[LossName]
else:
    LossType = list[str]


def _option(default: Any, text: str, **metadata: Any) -> Any:
    """A field with its help text (the command's `--help` shows it)."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`: those of `transformers.TrainingArguments`, and those of DPO below.

    Four defaults differ from `TrainingArguments`, as they do in TRL: `logging_steps=10`,
    `gradient_checkpointing=True`, `learning_rate=1e-6`, and `bf16=None`, which here means: on where an accelerator
    supports it, off on a CPU. With `bf16_full_eval` or `fp16_full_eval`, every evaluation runs in that dtype; the
    weights stay what they are.

    Args:
        model_init_kwargs: Keyword arguments of `from_pretrained` when the model is given by path or name.
        trust_remote_code: Allow models and tokenizers that bring their own code.
        disable_dropout: Train without dropout. The reference never has any.
        dataset_num_proc: Processes that tokenize.
        max_length: Tokens of prompt and response together; None for no limit.
        truncation_mode: Which end of a longer sequence stays: `keep_start` or `keep_end`.
        bad_rows: What becomes of rows that are no pairs (an empty response, say): `raise` refuses the set and names
            them, `drop` leaves them out and says how many and why.
        padding_free: Insist on rows without padding. They are laid out so by default wherever the model's attention is
            proven to allow it; True makes it an error where it is not.
        pad_to_multiple_of: `auto` or None: there is no padding to round up.
        pad_token: Deprecated, as in TRL: set the tokenizer's own.
        activation_offloading: Keep what the backward needs in host memory; needs an accelerator.
        max_tokens_per_micro_batch: Token budget of a training micro-batch, each prompt counted once;
            `per_device_train_batch_size` is then the most pairs it may have. With it, or with
            `train_sampling_strategy="group_by_length"`, micro-batches hold pairs of similar length.
        precompute_ref_log_probs: Score every row under the reference once, before training, and keep the answers
            on disk; no reference weights are held while training.
        precompute_ref_batch_size: How much that pass takes at once: the tokens of this many of the longest pairs. By
            default four training micro-batches, up to 16,384 tokens.
        loss_type: One loss or several, of the names in `docs/losses.md`; `loss=` of the trainer takes one's own.
        loss_weights: Weight of each loss when there are several (MPO); by default 1 each.
        label_smoothing: Probability that a preference label is flipped, in [0, 0.5); `exo_pair` needs some.
        beta: Strength of the pull towards the reference (for IPO, the regularisation tau).
        f_divergence_type: The divergence behind that pull (f-DPO), for losses on the difference of two rewards:
            `reverse_kl`, `forward_kl`, `js_divergence`, `alpha_divergence`.
        f_alpha_divergence_coef: Coefficient of the alpha-divergence; 1 is the reverse KL, 0 the forward KL.
        ld_alpha: Weight, in [0, 1], of tokens beyond the length that both responses have (LD-DPO); None for 1.
        discopop_tau: Temperature of `discopop`.
        use_weighting: Weigh each pair by how likely the policy is to say it itself (WPO).
        bco_reward_shift: Keep `bco_pair`'s running mean of rewards, as its paper does; TRL 1.16 has none.
        router_aux_loss_coef: Weight of a mixture of experts' load-balancing loss; by default the model config's own,
            0 for none.
        reference_free: No reference at all: each response's reward is `beta` times its own log-prob.
        sync_ref_model: The reference follows the policy (TR-DPO).
        ref_model_mixup_alpha: Weight of the policy in each sync, in [0, 1]; 1 replaces the reference.
        ref_model_sync_steps: Optimizer steps between syncs.
        ref_model_sync_rank: Largest rank of an averaged LoRA update; by default twice the policy's, layer by layer.
        ref_store: File of the log-prob store; by default one in the user's cache folder, shared by all runs.
        ref_store_mode: With `precompute_ref_log_probs`, when the store is filled. `fill`: before training, and the
            reference's weights are then given up. `lazy`: while training reads a row for the first time; later epochs
            and runs find it. `require`: never; a missing row is an error that names it. `auto` is `fill`, and `lazy`
            for the rows of a stream.
        ref_dtype: Dtype of an explicit reference's weights: `float32`, `bfloat16`, `float16`; by default the
            policy's.

    Raises:
        ConfigurationError: For a value out of range, naming the option.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    learning_rate: float = _option(1e-6, "The initial learning rate of the optimizer.")
    logging_steps: float = _option(10, "Log every X optimizer steps; below 1, a share of all steps.")
    gradient_checkpointing: bool = _option(True, "Recompute activations in the backward pass to save memory.")
    bf16: bool | None = _option(  # type: ignore[assignment]
        None, "bf16 mixed precision. Default: on where an accelerator supports it."
    )

    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keyword arguments of from_pretrained when the model is given by path or name (JSON on a command line)."
    )
    trust_remote_code: bool = _option(False, "Allow models and tokenizers that bring their own code.")
    disable_dropout: bool = _option(True, "Train without dropout.")

    dataset_num_proc: int | None = _option(None, "Processes that tokenize.")
    max_length: int | None = _option(1024, "Tokens of prompt and response together; None for no limit.")
    truncation_mode: TruncationMode = _option("keep_start", "Which end of a longer sequence stays.")
    bad_rows: Literal["raise", "drop"] = _option(
        "raise", "What becomes of rows that are no pairs: refuse the set, or drop them."
    )

    padding_free: bool = _option(False, "Insist on rows without padding, which is the default where it is proven.")
    pad_to_multiple_of: int | str | None = _option("auto", "auto or none: there is no padding to round up.")
    pad_token: str | None = _option(None, "Deprecated: set the tokenizer's own.")
    activation_offloading: bool = _option(False, "Keep what the backward needs in host memory.")

    max_tokens_per_micro_batch: int | None = _option(
        None, "Token budget of a training micro-batch (each prompt once); with it, the batch size is a maximum."
    )

    precompute_ref_log_probs: bool = _option(
        False, "Score every row under the reference once, before training, and keep the answers on disk."
    )
    precompute_ref_batch_size: int | None = _option(
        None,
        "What the precompute pass takes at once, in longest pairs. Default: 4 micro-batches, to 16,384 tokens.",
    )

    loss_type: LossType = _option(["sigmoid"], f"One loss or several of: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = _option(None, "Weight of each loss when there are several. Default: 1 each.")
    label_smoothing: float = _option(0.0, "Probability that a preference label is flipped, in [0, 0.5).")
    beta: float = _option(0.1, "Strength of the pull towards the reference (for IPO: tau).")
    f_divergence_type: DivergenceName = _option(
        "reverse_kl", f"The divergence behind that pull: {', '.join(DIVERGENCES)}."
    )
    f_alpha_divergence_coef: float = _option(0.5, "Coefficient of the alpha-divergence; 1 is the reverse KL.")
    ld_alpha: float | None = _option(
        None, "Weight, in [0, 1], of tokens beyond the length that both responses have (LD-DPO). Default: 1."
    )
    discopop_tau: float = _option(0.05, "Temperature of discopop.")
    use_weighting: bool = _option(False, "Weigh each pair by how likely the policy is to say it itself (WPO).")
    bco_reward_shift: bool = _option(True, "Keep bco_pair's running mean of rewards; TRL 1.16 has none.")
    router_aux_loss_coef: float | None = _option(
        None, "Weight of a mixture of experts' load-balancing loss. Default: the model's own; 0 for none."
    )
    reference_free: bool = _option(False, "No reference: each response's reward is beta times its own log-prob.")

    sync_ref_model: bool = _option(False, "The reference follows the policy (TR-DPO).")
    ref_model_mixup_alpha: float = _option(SYNC_ALPHA, "Weight of the policy in each sync, in [0, 1]; 1 replaces it.")
    ref_model_sync_steps: int = _option(SYNC_STEPS, "Optimizer steps between syncs.")
    ref_model_sync_rank: int | None = _option(
        None, "Largest rank of an averaged LoRA update. Default: twice the policy's, layer by layer."
    )

    ref_store: str | None = _option(None, "File of the log-prob store. Default: one in the user's cache folder.")
    ref_store_mode: StoreMode = _option(
        "auto", "When the store is filled: before training, while it runs, or never (a missing row is then an error)."
    )
    ref_dtype: Dtype | None = _option(
        None, f"Dtype of an explicit reference's weights: {', '.join(DTYPES)}. Default: the policy's."
    )

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuses names that are no options, all of them, with what each is called today."""
        refuse(refused_names(options, inspect.signature(cls.__init__, follow_wrapped=False)), ArgumentTypeError)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str | tuple):
            self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        # The options of TrainingArguments are transformers' to check.
        refuse(refused_types(self, DPOConfig, TrainingArguments), ArgumentTypeError)
        refuse(refused_options(self))
        self._settle_padding()
        if self.bf16 is None:
            on_accelerator = not self.use_cpu and is_torch_bf16_gpu_available()
            self.bf16 = bool(on_accelerator and not self.fp16 and launched_precision() in ("no", "bf16"))
        if self.activation_checkpointing is None:  # transformers' new name of the same option
            self.activation_checkpointing = self.gradient_checkpointing
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and DataLoader would say so
            self.use_cpu = True  # it is what happens; unsaid, the processes of torchrun would not find each other
        super().__post_init__()
        refuse(refused_launch(self))

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
    def checkpoints_reentrantly(self) -> bool:
        """Whether layers run without a gradient at first, and with one only when the backward runs them again."""
        kwargs = self.activation_checkpointing_kwargs
        return bool(self.activation_checkpointing and isinstance(kwargs, dict) and kwargs.get("use_reentrant"))

    def set_beta(self, value: float) -> None:
        """Changes `beta` while training.

        Raises:
            ConfigurationError: If it is not positive.
        """
        check_loss_options(
            self.loss_type,
            self.loss_weights,
            replace(self.loss_options, beta=value),
            use_weighting=self.use_weighting,
            bco_reward_shift=self.bco_reward_shift,
        )
        self.beta = value

    def _settle_padding(self) -> None:
        self.pad_to_multiple_of = None
        if self.pad_token is not None:
            warnings.warn(
                "`pad_token` is deprecated. Set `tokenizer.pad_token` and pass the tokenizer as `processing_class`.",
                FutureWarning,
                stacklevel=4,  # whoever wrote `DPOConfig(...)`
            )


def objective_of(args: DPOConfig, loss: PreferenceLoss | None) -> Objective:
    """What a run minimises: the losses that its options name, or the user's own."""
    return Objective(
        [loss] if loss is not None else args.loss_type,
        args.loss_weights,
        lambda: args.loss_options,  # as it is at each step: a callback may change beta
        use_weighting=args.use_weighting,
        bco_reward_shift=args.bco_reward_shift,
    )


def look_for_unused_parameters(args: DPOConfig) -> None:
    """Lets DDP expect parameters without gradient, unless the user said otherwise: a batch without images uses no
    vision tower. Reentrant checkpointing fails with it."""
    if args.ddp_find_unused_parameters is None and not args.checkpoints_reentrantly:
        args.ddp_find_unused_parameters = True
