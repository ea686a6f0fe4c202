"""`DPOConfig`: every option of a run, checked as early as possible.

Names and defaults are TRL's where TRL has the option; what is our own begins with `ref_`. Knows options only: it
loads nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from tether.errors import ConfigurationError
from tether.losses import LOSSES, LossOptions

_DTYPES = ("float32", "bfloat16", "float16")


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
    supports it, off on a CPU.

    Args:
        model_init_kwargs: Keyword arguments of `from_pretrained` when the model is given by path or name.
        trust_remote_code: Allow models and tokenizers that bring their own code.
        disable_dropout: Train without dropout. The reference never has any.
        dataset_num_proc: Processes that tokenize.
        max_length: Tokens of prompt and response together; None for no limit.
        truncation_mode: Which end of a longer sequence stays: `keep_start` or `keep_end`.
        max_tokens_per_micro_batch: Token budget of a training micro-batch, each prompt counted once;
            `per_device_train_batch_size` is then the most pairs it may have. With it, or with
            `train_sampling_strategy="group_by_length"`, micro-batches hold pairs of similar length.
        precompute_ref_log_probs: Score every row under the reference once, before training, and keep the answers
            on disk; no reference weights are held while training.
        precompute_ref_batch_size: Pairs per batch of that pass; by default the per-device batch size.
        loss_type: One loss or several: `sigmoid`, `hinge`, `ipo`.
        loss_weights: Weight of each loss when there are several; by default 1 each.
        label_smoothing: Probability that a preference label is flipped, in [0, 0.5) (conservative DPO).
        beta: Strength of the pull towards the reference (for IPO, the regularisation tau).
        activation_offloading: Keep what the backward needs in host memory; needs an accelerator.
        sync_ref_model: The reference follows the policy (TR-DPO).
        ref_model_mixup_alpha: Weight of the policy in each sync, in [0, 1]; 1 replaces the reference.
        ref_model_sync_steps: Optimizer steps between syncs.
        ref_store: File of the log-prob store; by default one in the user's cache folder, shared by all runs.
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
    truncation_mode: str = _option(
        "keep_start", "Which end of a longer sequence stays.", choices=["keep_start", "keep_end"]
    )

    max_tokens_per_micro_batch: int | None = _option(
        None, "Token budget of a training micro-batch (each prompt once); with it, the batch size is a maximum."
    )

    precompute_ref_log_probs: bool = _option(
        False, "Score every row under the reference once, before training, and keep the answers on disk."
    )
    precompute_ref_batch_size: int | None = _option(
        None, "Pairs per batch of the precompute pass. Default: the per-device batch size."
    )

    loss_type: list[str] = _option(["sigmoid"], f"One loss or several of: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = _option(None, "Weight of each loss when there are several. Default: 1 each.")
    label_smoothing: float = _option(0.0, "Probability that a preference label is flipped, in [0, 0.5).")
    beta: float = _option(0.1, "Strength of the pull towards the reference (for IPO: tau).")

    activation_offloading: bool = _option(False, "Keep what the backward needs in host memory.")

    sync_ref_model: bool = _option(False, "The reference follows the policy (TR-DPO).")
    ref_model_mixup_alpha: float = _option(0.6, "Weight of the policy in each sync, in [0, 1]; 1 replaces it.")
    ref_model_sync_steps: int = _option(512, "Optimizer steps between syncs.")

    ref_store: str | None = _option(None, "File of the log-prob store. Default: one in the user's cache folder.")
    ref_dtype: str | None = _option(
        None, f"Dtype of an explicit reference's weights: {', '.join(_DTYPES)}. Default: the policy's."
    )

    def __post_init__(self) -> None:
        loss_type: str | list[str] = self.loss_type
        self.loss_type = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        self._check()
        if self.bf16 is None:
            on_accelerator = not self.use_cpu and is_torch_bf16_gpu_available()
            self.bf16 = bool(on_accelerator and not self.fp16)
        if self.activation_checkpointing is None:  # transformers' new name of the same option
            self.activation_checkpointing = self.gradient_checkpointing
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and DataLoader would say so
            self.use_cpu = True  # it is what happens; unsaid, the processes of torchrun would not find each other
        super().__post_init__()

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(beta=self.beta, label_smoothing=self.label_smoothing)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Dtype of mixed precision, which policy and reference share; None for none."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def set_beta(self, value: float) -> None:
        """Changes `beta` while training.

        Raises:
            ConfigurationError: If it is not positive.
        """
        _check_beta(value)
        self.beta = value

    def _check(self) -> None:
        unknown = [name for name in self.loss_type if name not in LOSSES]
        if unknown or not self.loss_type:
            why = f"there is no loss named {unknown[0]!r}" if unknown else "a policy needs a loss to train"
            _refuse("loss_type", self.loss_type, why, f"one or more of {', '.join(LOSSES)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            _refuse(
                "loss_weights",
                self.loss_weights,
                f"there are {len(self.loss_type)} losses",
                f"{len(self.loss_type)} weights, in the order of `loss_type`",
            )
        _check_beta(self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            _refuse(
                "label_smoothing",
                self.label_smoothing,
                "it is the probability that a label is flipped; from 0.5 on, labels say nothing or the opposite",
                "a value in [0, 0.5)",
            )
        if self.label_smoothing and "sigmoid" not in self.loss_type:
            _refuse(
                "label_smoothing",
                self.label_smoothing,
                f"no loss of {self.loss_type} has it in its equation",
                "0, or add `sigmoid` to `loss_type`",
            )
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            _refuse(
                "ref_model_mixup_alpha",
                self.ref_model_mixup_alpha,
                "it is the policy's weight in an average with the reference",
                "a value in [0, 1]",
            )
        if self.ref_model_sync_steps < 1:
            _refuse(
                "ref_model_sync_steps",
                self.ref_model_sync_steps,
                "it counts optimizer steps between syncs",
                "a whole number of at least 1",
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigurationError(
                asked="`sync_ref_model=True` together with `precompute_ref_log_probs=True`.",
                why="Log-probs computed before training are stale once the reference has moved.",
                instead="Set one of the two to False.",
            )
        if self.max_length is not None and self.max_length < 2:
            _refuse("max_length", self.max_length, "a prompt and a response have a token each", "2 or more, or None")
        if self.max_tokens_per_micro_batch is not None and self.max_tokens_per_micro_batch < 1:
            _refuse(
                "max_tokens_per_micro_batch", self.max_tokens_per_micro_batch, "a pair has tokens", "1 or more, or None"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            _refuse(
                "train_sampling_strategy",
                self.train_sampling_strategy,
                "transformers' rebalancing reads rows of `input_ids`, which pairs do not have",
                "`group_by_length`, which also evens the work of the processes",
            )
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            _refuse(
                "fp16",
                self.fp16,
                "accelerate has no fp16 autocast on a CPU: the policy would run in fp32 without a word",
                "`bf16=True`, or `fp16=False`",
            )
        if self.activation_offloading and (self.use_cpu or not torch.accelerator.is_available()):
            raise ConfigurationError(
                asked="`activation_offloading=True` without an accelerator.",
                why="It moves activations from an accelerator's memory to the host's, and on a CPU they are there "
                "already.",
                instead="Leave it out on this machine; `gradient_checkpointing=True` saves memory on every device.",
            )
        if self.use_liger_kernel:
            raise ConfigurationError(
                asked="`use_liger_kernel=True`.",
                why="Full logits never exist here, so its fused head would save nothing; its other kernels are put "
                "into the policy when training starts, after its reference was made: the two would compute "
                "differently.",
                instead='Leave it out. `model_init_kwargs={"use_kernels": True}` loads kernels with the model, for '
                "policy and reference alike.",
            )
        if self.truncation_mode not in ("keep_start", "keep_end"):
            _refuse("truncation_mode", self.truncation_mode, "there are two ends", "`keep_start` or `keep_end`")
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            _refuse("precompute_ref_batch_size", self.precompute_ref_batch_size, "a batch has a pair", "1 or more")
        if self.ref_dtype is not None and self.ref_dtype not in _DTYPES:
            _refuse(
                "ref_dtype",
                self.ref_dtype,
                "it is not a dtype that weights are held in",
                f"one of {', '.join(_DTYPES)}",
            )
        if self.ref_store is not None and os.path.isdir(self.ref_store):
            _refuse("ref_store", self.ref_store, "it is a folder", "the path of a file, existing or new")


def refuse_data_parallel(args: DPOConfig) -> None:
    """Refuses several GPUs in one process, as `Trainer` would use them."""
    if args.n_gpu > 1:
        raise ConfigurationError(
            asked=f"{args.n_gpu} GPUs are visible to one process.",
            why="Trainer would use `nn.DataParallel`, which cuts a batch of pairs at the wrong places and replicates "
            "the reference at every step.",
            instead=f"Start one process for each GPU: `torchrun --nproc_per_node {args.n_gpu} script.py` (or "
            "`accelerate launch`), or show a single one: `CUDA_VISIBLE_DEVICES=0`.",
        )


def _check_beta(beta: float) -> None:
    if not beta > 0:
        _refuse("beta", beta, "rewards are scaled by it, so it must be positive", "`beta=0.1`, say")


def _refuse(option: str, value: Any, why: str, instead: str) -> None:
    raise ConfigurationError(
        asked=f"`{option}={value!r}`.", why=f"{why[0].upper()}{why[1:]}.", instead=f"Write {instead}."
    )
