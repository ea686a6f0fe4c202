"""What the options of a run alone tell: values out of range, options that contradict each other, or that nothing reads.

Knows options only: a model, rows and processes are looked at where they are known (`rules.run`).
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers.training_args import trainer_log_levels

from tether.config.former_options import written_today
from tether.config.rules.launch import launched_precision
from tether.data.names import MAPPED
from tether.losses.checks import refused_losses
from tether.losses.table import LOSSES
from tether.reference.precomputed import VERIFIED_PAIRS as VERIFIED_PAIRS
from tether.reference.updates.groups import refused_rule
from tether.refusals import Refusal, nearest_to, of_option

if TYPE_CHECKING:
    from tether.config.dpo_config import DPOConfig

StoreMode = Literal["auto", "fill", "lazy", "require"]
Dtype = Literal["float32", "bfloat16", "float16"]
STORE_MODES, DTYPES = get_args(StoreMode), get_args(Dtype)
SYNC_ALPHA, SYNC_STEPS = 0.6, 512
SAMPLE_TOKENS = 64
# Of these options the objective depends; a resumed run keeps its checkpoint's unless `resume_changes` names them.
OBJECTIVE = (
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "ld_alpha",
    "use_weighting",
    "bco_reward_shift",
    "beta_column",
    "loss_columns",
    "max_length",
    "truncation_mode",
)
# Of these it depends which rows come next.
ROW_ORDER = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_tokens_per_micro_batch",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "seed",
    "data_seed",
)
CHANGES_OF_RESUME = (*OBJECTIVE, *ROW_ORDER, "router_aux_loss_coef", "BEMACallback", "data", "manifest")
_SYNC_DEFAULTS = {"ref_model_mixup_alpha": SYNC_ALPHA, "ref_model_sync_steps": SYNC_STEPS, "ref_model_sync_rank": None}


# Least and greatest value of numbers, and what they are.
_RANGES: dict[str, tuple[float, float, str]] = {
    "max_length": (2, math.inf, "a prompt and a response need a token each"),
    "max_tokens_per_micro_batch": (1, math.inf, "it is a number of tokens"),
    "per_device_train_batch_size": (1, math.inf, "it is a number of pairs"),
    "per_device_eval_batch_size": (1, math.inf, "it is a number of pairs"),
    "eval_accumulation_steps": (1, math.inf, "it is a number of batches"),
    "gradient_accumulation_steps": (1, math.inf, "it is a number of micro-batches"),
    "precompute_ref_batch_size": (1, math.inf, "it is a number of pairs"),
    "ref_store_verify": (0, math.inf, "it is a number of pairs"),
    "ref_model_sync_steps": (1, math.inf, "it is a number of optimizer steps"),
    "report_samples": (0, math.inf, "it is a number of prompts"),
    "report_samples_max_new_tokens": (1, math.inf, "it is a number of tokens"),
    "seed": (0, 2**32 - 1, "numpy takes no other seed"),
    "data_seed": (0, 2**32 - 1, "numpy takes no other seed"),
    "dataset_num_proc": (1, math.inf, "it is a number of processes"),
    "dataloader_num_workers": (0, math.inf, "it is a number of processes"),
    "ddp_timeout": (1, math.inf, "it is a number of seconds"),
    "num_train_epochs": (0, math.inf, "it is a number of passes over the pairs"),
    "learning_rate": (0, math.inf, "a step would go up the loss"),
    "weight_decay": (0, math.inf, "weights would grow by it"),
    "adam_beta1": (0, math.nextafter(1, 0), "it is the share of an average that is kept, below 1"),
    "adam_beta2": (0, math.nextafter(1, 0), "it is the share of an average that is kept, below 1"),
    "adam_epsilon": (0, math.inf, "a step is divided by it"),
    "max_grad_norm": (0, math.inf, "it is the greatest length of a gradient, 0 for no limit"),
    "neftune_noise_alpha": (0, math.inf, "it is the size of a noise"),
    "logging_steps": (0, math.inf, "it is a number of optimizer steps, or below 1 a share of all"),
    "eval_steps": (0, math.inf, "it is a number of optimizer steps, or below 1 a share of all"),
    "save_steps": (0, math.inf, "it is a number of optimizer steps, or below 1 a share of all"),
    "eval_delay": (0, math.inf, "it is a number of steps or epochs"),
}
_FRACTIONS = frozenset(list(_RANGES)[list(_RANGES).index("num_train_epochs") :])
_MAY_BE_INFINITE = ("max_grad_norm",)
_TUNED = ("max-autotune", "max-autotune-no-cudagraphs")  # of `torch.compile`


def refused_names(
    given: Mapping[str, Any], signature: inspect.Signature, further: Mapping[str, str] | None = None
) -> Iterator[Refusal]:
    """Names that no option, or no argument, has.

    Args:
        given: What was written, by name; a value that is not known is None.
        signature: Of the constructor they were written to, which may take others for itself.
        further: What to write for the names that only arguments of a trainer have.
    """
    kind = "option" if further is None else "argument"
    known = {name: parameter for name, parameter in signature.parameters.items() if name != "self"}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name, value in given.items():
        if name in known:
            continue
        nearest = nearest_to(name, known)
        if further and name in further:
            yield Refusal(f"`{name}`", f"there is no such {kind}", f"Write {further[name]}.")
        elif today := written_today(name, value, in_python=True, known=known):
            yield Refusal(f"`{name}`", *today)
        else:
            instead = f"Did you mean `{nearest}`?" if nearest else "Remove it."
            yield Refusal(f"`{name}`", f"there is no such {kind}", instead)


def refused_options(args: DPOConfig) -> Iterator[Refusal]:
    """Everything that the options alone rule out."""
    yield from refused_losses(
        args.loss_type,
        args.loss_weights,
        args.loss_options,
        use_weighting=args.use_weighting,
        bco_reward_shift=args.bco_reward_shift,
    )
    yield from _beta_column(args)
    yield from _columns(args.columns)
    yield from _ranges(args)
    yield from _choices(args)
    yield from _reference(args)
    yield from _store(args)
    yield from _sync(args)
    yield from _precision(args)
    yield from _device(args)
    yield from _batches(args)
    yield from _saving(args)
    yield from _samples(args)


def _columns(given: Any) -> Iterator[Refusal]:
    """Columns under names that are not ours, and one column under two."""
    columns = json.loads(given) if isinstance(given, str) and _is_object(given) else given
    if columns is None:
        return
    instead = f"Write ours: theirs, such as `columns={{'prompt': 'question'}}`. Ours are {', '.join(MAPPED)}."
    values = list(columns.values()) if isinstance(columns, dict) else []
    theirs = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    if not isinstance(columns, dict) or not all(isinstance(one, str) for one in theirs):
        why = "it is a mapping of names of columns, or lists of them, by ours"
    elif unknown := [ours for ours in columns if ours not in MAPPED]:
        why = f"`{unknown[0]}` is no column of ours"
    elif len(set(theirs)) < len(theirs):
        why = "one column is named twice"
    else:
        return
    yield of_option("columns", given, why, instead)


def _beta_column(args: DPOConfig) -> Iterator[Refusal]:
    """A beta for each pair beside one for all, or in a loss whose values belong to no single pair."""
    if args.beta_column is None:
        return
    sorting = [name for name in args.loss_type if name in LOSSES and LOSSES[name].couples_pairs]
    if sorting:
        why = f"`{sorting[0]}` sorts the pairs of a batch, so its values belong to no single pair"
        yield of_option(
            "beta_column", args.beta_column, why, f"Leave one of the two out: `beta_column` or `{sorting[0]}`."
        )
    if args.beta != 0.1:
        why = "the column has a beta for every pair"
        yield of_option("beta", args.beta, why, "Leave one of the two out.", f"with `beta_column={args.beta_column!r}`")


def _ranges(args: DPOConfig) -> Iterator[Refusal]:
    """Numbers that have a least value, and those that are none."""
    for entry in fields(args):
        value = getattr(args, entry.name)
        if isinstance(value, float) and not math.isfinite(value) and entry.name not in _MAY_BE_INFINITE:
            yield of_option(entry.name, value, "it must be a finite number", "Write a number, or leave it out.")
        elif isinstance(value, int) and abs(value) >= 2**63:
            yield of_option(entry.name, value, "it has to fit into 64 bits", "Write a smaller number.")
    for name, (least, most, why) in _RANGES.items():
        value = getattr(args, name)
        if isinstance(value, int | float) and not least <= value <= most:
            whole = "a whole number" if name not in _FRACTIONS else "a number"
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most:g}"
            or_none = ", or None" if name in ("max_length", "max_tokens_per_micro_batch") else ""
            yield of_option(name, value, why, f"Write {whole} {limits}{or_none}.")
    if args.save_strategy == "steps" and args.save_steps == 0:
        yield of_option("save_steps", 0, "a checkpoint is written every so many steps", "Write 1 or more.")
    if args.router_aux_loss_coef is not None and not math.isfinite(args.router_aux_loss_coef):
        why = "the router's loss is multiplied by it, so it must be finite"
        yield of_option(
            "router_aux_loss_coef",
            args.router_aux_loss_coef,
            why,
            "Write a finite number, or None for the model's own.",
        )


def _choices(args: DPOConfig) -> Iterator[Refusal]:
    """Words of which there are a few."""
    for name, choices in (
        ("truncation_mode", ("keep_start", "keep_end")),
        ("bad_rows", ("raise", "drop")),
        ("ref_dtype", (None, *DTYPES)),
        ("ref_store_mode", STORE_MODES),
        ("ref_columns", ("policy", "other")),
        ("train_sampling_strategy", ("random", "sequential", "group_by_length", "batch_rebalance")),
        ("torch_compile_mode", (None, "default", "lite", "reduce-overhead", *_TUNED)),
        ("log_level", tuple(trainer_log_levels)),
        ("log_level_replica", tuple(trainer_log_levels)),
    ):
        value = getattr(args, name)
        if value not in choices:
            yield of_option(name, value, "there is no such choice", f"Write {one_of(choices)}.")
    if args.train_sampling_strategy == "batch_rebalance":
        yield of_option(
            "train_sampling_strategy",
            args.train_sampling_strategy,
            "transformers' rebalancing reads rows of `input_ids`, which pairs do not have",
            "Write `group_by_length`, which also evens the work of the processes.",
        )
    context = args.dataloader_multiprocessing_context
    if context is not None and (args.dataloader_num_workers == 0 or context not in ("fork", "forkserver", "spawn")):
        why = (
            "it is how processes are started that load rows, and none is"
            if args.dataloader_num_workers == 0
            else ("there is no such way to start a process")
        )
        instead = "Write `fork`, `forkserver` or `spawn`, beside `dataloader_num_workers` above 0; or leave it out."
        yield of_option("dataloader_multiprocessing_context", context, why, instead)
    if args.output_dir == "":
        yield of_option("output_dir", "", "it is the folder to write", "Name a folder, or leave it out.")
    for name in (entry.name for entry in fields(args) if entry.name.endswith("_kwargs")):
        value = getattr(args, name)
        if value is not None and not isinstance(value, dict) and not _is_object(str(value)):
            why = "it holds keyword arguments, and is no JSON object"
            yield of_option(name, value, why, 'Write a mapping, or JSON such as {"name": 1}.')
    if str(args.pad_to_multiple_of).lower() not in ("auto", "none", "null"):
        yield of_option(
            "pad_to_multiple_of",
            args.pad_to_multiple_of,
            "pairs are laid out one behind the other, without padding that could be rounded up",
            "Leave it out.",
        )


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def one_of(choices: Sequence[str | None]) -> str:
    """The choices as people would say them: "`a`, `b` or `c`"."""
    *others, last = [f"`{choice}`" for choice in choices if choice is not None]
    return f"{', '.join(others)} or {last}"


def _reference(args: DPOConfig) -> Iterator[Refusal]:
    if not args.reference_free:
        return
    for name, default in (
        ("sync_ref_model", False),
        ("precompute_ref_log_probs", False),
        ("ref_dtype", None),
        ("ref_store", None),
        ("ref_store_mode", "auto"),
        ("ref_store_verify", VERIFIED_PAIRS),
    ):
        value = getattr(args, name)
        if value != default:
            why = "a run without a reference has nothing to compute, to keep or to move"
            instead = f"Leave `{name}` out, or set `reference_free=False`."
            yield of_option(name, value, why, instead, "with `reference_free=True`")


def _store(args: DPOConfig) -> Iterator[Refusal]:
    if not (args.precompute_ref_log_probs or args.reference_free):
        for name, default in (
            ("ref_store", None),
            ("ref_store_mode", "auto"),
            ("ref_store_verify", VERIFIED_PAIRS),
            ("precompute_ref_batch_size", None),
        ):
            value = getattr(args, name)
            if value != default:
                why = "no store of reference log-probs is used, so it would have no effect"
                instead = f"Set `precompute_ref_log_probs=True`, or leave `{name}` out."
                yield of_option(name, value, why, instead, "without `precompute_ref_log_probs=True`")
    if args.ref_store == "":
        yield of_option("ref_store", "", "it is the path of a file", "Write a path, existing or new, or leave it out.")
    elif args.ref_store is not None and os.path.isdir(args.ref_store):
        yield of_option("ref_store", args.ref_store, "it is a folder", "Write the path of a file, existing or new.")


def _sync(args: DPOConfig) -> Iterator[Refusal]:
    yield from refused_rule(args.ref_model_mixup_alpha, args.ref_model_sync_rank)
    if not args.sync_ref_model:
        for name, default in _SYNC_DEFAULTS.items():
            if (value := getattr(args, name)) != default:
                instead = f"Set `sync_ref_model=True`, or leave `{name}` out."
                yield of_option(name, value, "the reference does not move", instead, "without `sync_ref_model=True`")
    elif args.precompute_ref_log_probs:
        why = "log-probs computed before training are stale once the reference has moved"
        beside = "with `precompute_ref_log_probs=True`"
        yield of_option("sync_ref_model", True, why, "Leave one of the two out.", beside)


def _precision(args: DPOConfig) -> Iterator[Refusal]:
    launched = "no" if args.bf16 or args.fp16 else launched_precision()
    if _is_on_cpu(args) and (args.fp16 or launched == "fp16"):
        subject = "`fp16=True`" if args.fp16 else "`--mixed_precision fp16`"
        why = "accelerate has no fp16 autocast there, so the policy would run in fp32"
        yield Refusal(f"{subject} on a CPU", why, "Write `bf16=True`, or leave it out.", option="fp16")
    if launched == "fp8":
        yield Refusal(
            "`--mixed_precision fp8`",
            "accelerate replaces the policy's layers when training starts, after its reference was made, and the two "
            "would compute differently",
            "Write `bf16=True`, or `--mixed_precision bf16`.",
        )


def _device(args: DPOConfig) -> Iterator[Refusal]:
    if args.activation_offloading and _is_on_cpu(args):
        yield of_option(
            "activation_offloading",
            True,
            "it moves activations from an accelerator's memory to the host's, and on a CPU they are there already",
            "Leave it out on this machine; `gradient_checkpointing=True` saves memory on every device.",
        )
    if args.use_liger_kernel:
        yield of_option(
            "use_liger_kernel",
            True,
            "its kernels are put into the policy when training starts, after its reference was made, and the two would "
            "compute differently",
            'Leave it out. `model_init_kwargs={"use_kernels": True}` loads kernels with the model, for policy and '
            "reference alike.",
            details="Its fused head would save nothing either: full logits never exist here.",
        )


def _is_on_cpu(args: DPOConfig) -> bool:
    return bool(args.use_cpu) or not torch.accelerator.is_available()


def _batches(args: DPOConfig) -> Iterator[Refusal]:
    """Micro-batches of similar length, or of so many tokens, and what cannot stand beside them."""
    budget, groups = args.max_tokens_per_micro_batch is not None, args.train_sampling_strategy == "group_by_length"
    if budget and args.train_sampling_strategy == "sequential":
        yield of_option(
            "train_sampling_strategy",
            args.train_sampling_strategy,
            "micro-batches then hold pairs of similar length, in random order",
            "Leave one of the two out.",
            "with `max_tokens_per_micro_batch`",
        )
    if args.dataloader_drop_last and (budget or groups):
        yield of_option(
            "dataloader_drop_last",
            True,
            "micro-batches of similar length are of different sizes, and every pair is in one of them",
            "Leave it out, or `train_sampling_strategy` and `max_tokens_per_micro_batch`.",
        )
    if args.padding_free and args.neftune_noise_alpha is not None:
        yield of_option(
            "padding_free",
            True,
            "NEFTune's noise depends on the length of a row, so each sequence needs a padded row of its own",
            "Leave out `padding_free` or `neftune_noise_alpha`.",
            "with `neftune_noise_alpha`",
        )
    if args.label_smoothing_factor:
        yield of_option(
            "label_smoothing_factor",
            args.label_smoothing_factor,
            "it smooths the targets of a cross-entropy over tokens, which no preference loss is",
            "Write `label_smoothing=...`, the probability that a preference label is flipped, or leave it out.",
        )


def _samples(args: DPOConfig) -> Iterator[Refusal]:
    if args.report_samples == 0 and args.report_samples_max_new_tokens != SAMPLE_TOKENS:
        yield of_option(
            "report_samples_max_new_tokens",
            args.report_samples_max_new_tokens,
            "no prompt is answered",
            "Set `report_samples` to a number of prompts, or leave `report_samples_max_new_tokens` out.",
            "without `report_samples`",
        )


def _saving(args: DPOConfig) -> Iterator[Refusal]:
    if why := _why_not_a_folder(Path(args.output_dir or ".")):
        yield of_option("output_dir", args.output_dir, why, "Name a folder that is new, or yours to write to.")
    if args.eval_steps is not None and args.eval_strategy != "steps":
        why = "nothing is evaluated" if args.eval_strategy == "no" else "evaluations come at the ends of epochs"
        yield of_option("eval_steps", args.eval_steps, why, "Set `eval_strategy='steps'`, or leave it out.")
    for name in args.resume_changes or ():
        if name not in CHANGES_OF_RESUME:
            instead = "Leave it out: a resumed run may change other options without."
            yield of_option("resume_changes", args.resume_changes, f"`{name}` is not compared when resuming", instead)
    if args.load_best_model_at_end and args.eval_strategy == "no":
        why = "nothing is evaluated, so no checkpoint is the best"
        instead = "Set `eval_strategy` and `save_strategy` too, or leave it out."
        yield of_option("load_best_model_at_end", True, why, instead)
    if args.save_strategy == "best" and args.eval_strategy == "no":
        yield of_option(
            "save_strategy",
            args.save_strategy,
            "a checkpoint is written when an evaluation is better than those before, and nothing is evaluated",
            "Set `eval_strategy` too, or `save_strategy='steps'`.",
        )


def _why_not_a_folder(path: Path) -> str:
    """Why a path is no folder and cannot become one; empty if it can."""
    for place in (path, *path.parents):
        what = "it" if place == path else f"`{place}`"
        if os.path.islink(place) and not os.path.exists(place):
            return f"{what} is a link to {os.readlink(place)}, which does not exist"
        if os.path.exists(place):  # unlike `Path`'s, it is False for a name that is too long
            return "" if os.path.isdir(place) else f"{what} is a file"
    return ""
