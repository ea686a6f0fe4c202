"""The options of a run, looked at one by one and together: what is refused, and in which order.

Knows options only: a model, rows and processes are looked at where they are known.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from tether.errors import ConfigurationError
from tether.losses import LossOptions, check_loss_options
from tether.reference.build import check_sync_without_precompute

if TYPE_CHECKING:
    from tether.config import DPOConfig

StoreMode = Literal["auto", "fill", "lazy", "require"]
Dtype = Literal["float32", "bfloat16", "float16"]
STORE_MODES, DTYPES = get_args(StoreMode), get_args(Dtype)
SYNC_ALPHA = 0.6


def check_config(args: DPOConfig) -> None:
    """Refuses values out of range and options that contradict each other; changes nothing.

    Raises:
        ConfigurationError: Names the option.
    """
    check_losses(args, args.loss_options)
    _check_router_loss(args)
    if args.reference_free:
        _check_reference_free(args)
    _check_sync(args)
    _check_batches(args)
    _check_precision(args)
    _check_device(args)
    _check_rows(args)
    _check_reference(args)
    _check_store(args)


def check_losses(args: DPOConfig, options: LossOptions) -> None:
    """Refuses losses that do not go together with these options, or options that none of them reads."""
    check_loss_options(
        args.loss_type,
        args.loss_weights,
        options,
        use_weighting=args.use_weighting,
        bco_reward_shift=args.bco_reward_shift,
    )


def _check_router_loss(args: DPOConfig) -> None:
    if args.router_aux_loss_coef is not None and not math.isfinite(args.router_aux_loss_coef):
        refuse(
            "router_aux_loss_coef",
            args.router_aux_loss_coef,
            "the router's loss is multiplied by it",
            "a finite number, or None for the model's own",
        )


def _check_reference_free(args: DPOConfig) -> None:
    options = {
        "sync_ref_model": args.sync_ref_model,
        "precompute_ref_log_probs": args.precompute_ref_log_probs,
        "ref_dtype": args.ref_dtype,
        "ref_store": args.ref_store,
        "ref_store_mode": args.ref_store_mode if args.ref_store_mode != "auto" else None,
    }
    for option, value in options.items():
        if value:
            raise ConfigurationError(
                problem=f"`reference_free=True` together with `{option}={value!r}`.",
                details="Without a reference there is nothing to compute, to keep or to move.",
                instead=f"Leave `{option}` out, or set `reference_free=False`.",
            )


def _check_sync(args: DPOConfig) -> None:
    if not 0 <= args.ref_model_mixup_alpha <= 1:
        refuse(
            "ref_model_mixup_alpha",
            args.ref_model_mixup_alpha,
            "it is the policy's weight in an average with the reference",
            "a value in [0, 1]",
        )
    if args.ref_model_sync_steps < 1:
        refuse(
            "ref_model_sync_steps",
            args.ref_model_sync_steps,
            "it counts optimizer steps between syncs",
            "a whole number of at least 1",
        )
    _check_sync_rank(args)
    check_sync_without_precompute(args.sync_ref_model, args.precompute_ref_log_probs)


def _check_sync_rank(args: DPOConfig) -> None:
    rank = args.ref_model_sync_rank
    if rank is None:
        return
    if not args.sync_ref_model:
        refuse("ref_model_sync_rank", rank, "the reference does not move", "`sync_ref_model=True` with it")
    if rank < 1:
        refuse("ref_model_sync_rank", rank, "a matrix of rank 0 is zero", "1 or more, or None")
    if args.ref_model_mixup_alpha == 1:
        refuse("ref_model_sync_rank", rank, "a copy has the policy's rank", "an alpha below 1 with it, or None")


def _check_batches(args: DPOConfig) -> None:
    if args.max_length is not None and args.max_length < 2:
        refuse("max_length", args.max_length, "a prompt and a response have a token each", "2 or more, or None")
    if args.max_tokens_per_micro_batch is not None and args.max_tokens_per_micro_batch < 1:
        refuse("max_tokens_per_micro_batch", args.max_tokens_per_micro_batch, "a pair has tokens", "1 or more, or None")
    for name in ("per_device_eval_batch_size", "eval_accumulation_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            refuse(name, getattr(args, name), "it counts what evaluation takes at once", "1 or more")
    if args.train_sampling_strategy == "batch_rebalance":
        refuse(
            "train_sampling_strategy",
            args.train_sampling_strategy,
            "transformers' rebalancing reads rows of `input_ids`, which pairs do not have",
            "`group_by_length`, which also evens the work of the processes",
        )


def launched_precision() -> str:
    """What `accelerate launch --mixed_precision` (or its config file) asked for; the options win over it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def check_full_evaluation(args: DPOConfig) -> None:
    """Refuses evaluation in another dtype than that which mixed precision, or DeepSpeed, runs the policy in.

    Raises:
        ConfigurationError: Names both.
    """
    asked = "bf16" if args.bf16_full_eval else "fp16" if args.fp16_full_eval else None
    if asked is None:
        return
    plugin = args.deepspeed_plugin
    if plugin is None:
        runs_in, fits = args.mixed_precision, args.mixed_precision in ("no", asked)
    else:  # its engine switches off any autocast but its own
        on = (name for name in ("bf16", "fp16") if plugin.deepspeed_config.get(name, {}).get("enabled") is True)
        runs_in = next(on, "fp32")
        fits = runs_in == asked
    if fits:
        return
    raise ConfigurationError(
        problem=f"Cannot evaluate in {asked} (`{asked}_full_eval=True`): "
        + (f"mixed precision is {runs_in}." if plugin is None else f"DeepSpeed runs the policy in {runs_in}."),
        details="The policy's own forward sets its precision, in evaluation too: the option would have no effect.",
        instead=f"Leave `{asked}_full_eval` out, or train in {asked} too.",
    )


def _check_precision(args: DPOConfig) -> None:
    launched = "no" if args.bf16 or args.fp16 else launched_precision()
    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    if on_cpu and (args.fp16 or launched == "fp16"):
        raise ConfigurationError(
            problem="Cannot train in fp16 ("
            + ("`fp16=True`" if args.fp16 else "`--mixed_precision fp16`")
            + ") on a CPU: "
            "accelerate has no fp16 autocast there, and the policy would run in fp32 without a word.",
            details="Its mixed precision in fp16 is for accelerators.",
            instead="Write `bf16=True`, or leave it out.",
        )
    if launched == "fp8":
        raise ConfigurationError(
            problem="Cannot train in fp8 (`--mixed_precision fp8`): the policy's layers are replaced when training "
            "starts, after its reference was made, and the two would compute differently.",
            details="accelerate puts layers of another library into the policy.",
            instead="Write `bf16=True`, or `--mixed_precision bf16`.",
        )


def _check_device(args: DPOConfig) -> None:
    if args.activation_offloading and (args.use_cpu or not torch.accelerator.is_available()):
        raise ConfigurationError(
            problem="`activation_offloading=True` without an accelerator.",
            details="It moves activations from an accelerator's memory to the host's, and on a CPU they are there already.",
            instead="Leave it out on this machine; `gradient_checkpointing=True` saves memory on every device.",
        )
    if args.use_liger_kernel:
        raise ConfigurationError(
            problem="`use_liger_kernel=True`.",
            details="Full logits never exist here, so its fused head would save nothing; its other kernels are put "
            "into the policy when training starts, after its reference was made: the two would compute "
            "differently.",
            instead='Leave it out. `model_init_kwargs={"use_kernels": True}` loads kernels with the model, for '
            "policy and reference alike.",
        )


def _check_rows(args: DPOConfig) -> None:
    if args.truncation_mode not in ("keep_start", "keep_end"):
        refuse("truncation_mode", args.truncation_mode, "there are two ends", "`keep_start` or `keep_end`")
    if args.bad_rows not in ("raise", "drop"):
        refuse("bad_rows", args.bad_rows, "a set is refused, or its rows are dropped", "`raise` or `drop`")


def _check_reference(args: DPOConfig) -> None:
    if args.precompute_ref_batch_size is not None and args.precompute_ref_batch_size < 1:
        refuse("precompute_ref_batch_size", args.precompute_ref_batch_size, "a batch has a pair", "1 or more")
    if args.ref_dtype is not None and args.ref_dtype not in DTYPES:
        refuse(
            "ref_dtype",
            args.ref_dtype,
            "it is not a dtype that weights are held in",
            f"one of {', '.join(DTYPES)}",
        )


def _check_store(args: DPOConfig) -> None:
    if args.ref_store_mode not in STORE_MODES:
        refuse(
            "ref_store_mode",
            args.ref_store_mode,
            "it says when the store of reference log-probs is filled",
            f"one of {', '.join(f'`{mode}`' for mode in STORE_MODES)}",
        )
    if args.ref_store_mode != "auto" and not args.precompute_ref_log_probs:
        raise ConfigurationError(
            problem=f"`ref_store_mode={args.ref_store_mode!r}` without `precompute_ref_log_probs=True`.",
            details="Without it no store of reference log-probs is used, so there is nothing to fill or to require.",
            instead="Set `precompute_ref_log_probs=True` too, or leave `ref_store_mode` out.",
        )
    if args.ref_store is not None and not args.precompute_ref_log_probs:
        raise ConfigurationError(
            problem=f"`ref_store={args.ref_store!r}` without `precompute_ref_log_probs=True`.",
            details="Without it no store of reference log-probs is used: the file would be neither read nor written.",
            instead="Set `precompute_ref_log_probs=True` too, or leave `ref_store` out.",
        )
    if args.ref_store is not None and os.path.isdir(args.ref_store):
        refuse("ref_store", args.ref_store, "it is a folder", "the path of a file, existing or new")


def refuse(option: str, value: Any, why: str, instead: str) -> None:
    """Refuses the value of one option: why it cannot be, and what to write."""
    raise ConfigurationError(
        problem=f"`{option}={value!r}`.", details=f"{why[0].upper()}{why[1:]}.", instead=f"Write {instead}."
    )
