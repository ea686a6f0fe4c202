"""What a run is refused for beyond its options: what they ask of this model, these rows and these processes.

Knows the facts of a run (`rules.facts`); changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from tether.config.rules.facts import Facts
from tether.config.rules.launch import refused_cut
from tether.data.datasets import MARGIN_COLUMN
from tether.losses import LOSSES
from tether.losses.metrics import EVALUATED
from tether.models.preparing import differing_vocabulary
from tether.reference.implicit import is_adapter_model
from tether.reference.updates.adapters import refused_followers, refused_shards
from tether.reference.updates.groups import UpdateRule
from tether.refusals import Refusal, of_option
from tether.scoring import rotary_limit, uneven_forwards
from tether.scoring.packing import reads_rows
from tether.scoring.projection import base_model_of
from tether.scoring.router import has_router
from tether.scoring.score import can_pack, can_pack_images

# What evaluation gives besides the figures of pairs.
_OF_THE_RUN = ("num_tokens", "runtime", "samples_per_second", "steps_per_second")
_MAKE_OPTIMIZER = "or let the trainer make it, `optimizer_cls_and_kwargs=(torch.optim.AdamW, {...})`."


def refused_run(facts: Facts) -> Iterator[Refusal]:
    """Everything that a run is refused for, once its models are loaded and before anything of them is changed."""
    for name, model in (("model", facts.policy), ("ref_model", facts.ref_model)):
        if model is not None:
            yield from _model(name, model)
    yield from _tokens(facts)
    yield from _training(facts)
    yield from _optimizer(facts)
    yield from refused_reference(facts)
    yield from _layout(facts)
    yield from _router(facts)
    yield from _rows(facts)
    yield from _best(facts)


# ---- models ----------------------------------------------------------------------------------------------------------


def _model(name: str, model: Any) -> Iterator[Refusal]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    yield from refused_cut(name, base)
    if isinstance(base, PreTrainedModel) and base.get_output_embeddings() is None and not base.can_generate():
        yield Refusal(
            f"a `{name}` of type {type(base).__name__}",
            "it has no head that predicts tokens, so a response has no log-probability",
            "Load it with `AutoModelForCausalLM.from_pretrained(...)`, or pass its path.",
        )
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            yield Refusal(
                f"a `{name}` in 4 bits that has been evaluated on a CPU before",
                f"bitsandbytes has packed the weights of `{path}` for a product without a backward",
                "Load the model anew and pass it as it is, or pass its path.",
            )
            return


def _tokens(facts: Facts) -> Iterator[Refusal]:
    """Token ids that mean something else to a model than to the tokenizer."""
    pad_token = facts.args.pad_token
    if pad_token is not None and pad_token not in facts.tokenizer.get_vocab():
        why = f"the vocabulary of the {type(facts.tokenizer).__name__} has no such token"
        yield of_option("pad_token", pad_token, why, "Name a token that it has, or leave `pad_token` out.")
    if facts.ref_model is not None and (details := differing_vocabulary(facts.ref_model, facts.tokenizer)):
        yield Refusal(
            "this `ref_model`",
            "it has another vocabulary than the policy, and both must read the same token ids",
            "Use a reference of the same tokenizer family, or leave `ref_model` out to use the initial policy.",
            details,
        )


def _training(facts: Facts) -> Iterator[Refusal]:
    """A policy of which nothing would train, or not as it should."""
    policy: nn.Module = facts.policy
    if facts.new_adapter is not None:
        if is_adapter_model(policy):
            yield Refusal(
                "`peft_config` with a model that already has an adapter",
                "it would be unclear whether the first adapter belongs to the reference",
                "Leave `peft_config` out to go on training the adapter, or merge it first "
                "(`model = model.merge_and_unload()`) to start a new one on top.",
            )
        return
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        yield Refusal(
            "a model of which nothing trains",
            "`requires_grad` is False for all its parameters",
            "Call `model.requires_grad_(True)` to train the whole model, or pass `peft_config` to train an adapter.",
            "PEFT leaves a base frozen after `merge_and_unload()`, and loads an adapter frozen unless "
            "`is_trainable=True`.",
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in policy.modules()):
        yield Refusal(
            "an adapter that is merged into its base",
            "its layers compute with the merged weights alone, so its tensors would get no gradient",
            "Call `model.unmerge_adapter()` before; or, to start a new adapter on top, "
            "`model = model.merge_and_unload()` and pass `peft_config`.",
        )
    if facts.args.deepspeed_plugin is None:  # whose optimizer keeps float32 copies and scales the loss itself
        yield from refused_float16(policy)


def refused_float16(policy: nn.Module) -> Iterator[Refusal]:
    """Weights that would train in float16."""
    halves = [name for name, p in policy.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if halves:
        yield Refusal(
            f"weights in `float16` for training, such as `{halves[0]}`",
            "most steps are too small for it, and gradients overflow",
            'Load the model in float32, `model_init_kwargs={"dtype": "float32"}` or `model.float()`, and write '
            "`bf16=True` or `fp16=True` for products in 16 bits; or train in `bfloat16`.",
            "`fp16=True` alone does not help: it scales the gradients of weights in `float32` only. An adapter in "
            "float32 on a base in float16 is fine.",
        )


def _optimizer(facts: Facts) -> Iterator[Refusal]:
    """An optimizer that would move nothing of the policy."""
    trained, held = held_by(facts.optimizer, facts.policy, has_new_adapter=facts.new_adapter is not None)
    if held is None or held & trained:
        return
    on_base = facts.new_adapter is not None
    yield Refusal(
        "the optimizer in `optimizers`",
        "it was made of a fresh adapter's base, which is frozen"
        if on_base
        else "it holds none of the weights that train: its own are another model's, or frozen",
        "Put the adapter on first (`model = get_peft_model(model, peft_config)`), leave `peft_config` out, and make "
        f"the optimizer of that model's parameters; {_MAKE_OPTIMIZER}"
        if on_base
        else f"Make it of the parameters of the model that you pass as `model`; {_MAKE_OPTIMIZER}",
    )


def held_by(optimizer: Any, policy: nn.Module, *, has_new_adapter: bool) -> tuple[set[int], set[int] | None]:
    """The parameters that train, and those of an optimizer, each by `id`; None for none, or DeepSpeed's stand-in."""
    trained = set() if has_new_adapter else {id(p) for p in policy.parameters() if p.requires_grad}
    if not hasattr(optimizer, "param_groups"):
        return trained, None
    return trained, {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


# ---- the reference ---------------------------------------------------------------------------------------------------


def refused_reference(facts: Facts) -> Iterator[Refusal]:
    """What options, models, rows and sharding say of the reference, where they do not go together."""
    args = facts.args
    yield from _ref_model(facts)
    if facts.brings_log_probs:
        yield from _given(facts)
    if args.sync_ref_model:
        yield from _sync(facts)
    if facts.follows_average:
        yield from _average(facts)
    if args.ref_dtype is not None and facts.is_sharded:
        why = "a sharded reference is held and cast as the policy is, by the options of the sharding"
        yield of_option("ref_dtype", args.ref_dtype, why, "Leave `ref_dtype` out.", "with ZeRO-3 or FSDP2")
    if args.ref_dtype is not None and facts.ref_model is None and facts.has_adapter:
        why = "the reference is the policy's own base, which has no weights of its own to hold in another dtype"
        beside = "with a PEFT model and no `ref_model`"
        yield of_option("ref_dtype", args.ref_dtype, why, "Leave `ref_dtype` out, or pass `ref_model`.", beside)


def _ref_model(facts: Facts) -> Iterator[Refusal]:
    """A reference model that would train with the policy, or that nothing asks."""
    policy, ref_model = facts.policy, facts.ref_model
    base = policy.get_base_model() if is_adapter_model(policy) else policy
    if ref_model is not None and ref_model in (policy, base):
        whose = "`model`" if ref_model is policy else "`model`'s base"
        yield Refusal(
            "`ref_model`",
            f"it is the same object as {whose}, so it would train with the policy, and every reward would be 0",
            "Leave `ref_model` out: the reference is then the initial policy.",
        )
    if ref_model is not None and facts.args.reference_free:
        yield Refusal(
            "`ref_model` with `reference_free=True`",
            "a run without a reference compares with nothing",
            "Leave `ref_model` out, or set `reference_free=False`.",
        )


def _given(facts: Facts) -> Iterator[Refusal]:
    """Rows that bring the reference's log-probs, and what asks for another reference, or for more than sums."""
    args = facts.args
    beside = "with rows that bring `ref_chosen_logps` and `ref_rejected_logps`"
    columns = "`dataset.remove_columns(['ref_chosen_logps', 'ref_rejected_logps'])`"
    others = {
        "ref_model=...": facts.ref_model is not None,
        "reference=...": facts.reference is not None,
        "precompute_ref_log_probs=True": args.precompute_ref_log_probs,
        "sync_ref_model=True": args.sync_ref_model,
        "reference_free=True": args.reference_free,
        f"ref_dtype={args.ref_dtype!r}": args.ref_dtype is not None,
    }
    for option in (option for option, is_set in others.items() if is_set):
        yield Refusal(
            f"`{option}` {beside}",
            "they say twice what the reference is",
            f"Leave the option out to use the columns, or take them out ({columns}) to use the option.",
        )
    readers = {f"loss_type={name!r}": LOSSES[name].needs_per_token for name in args.loss_type}
    readers |= {f"ld_alpha={args.ld_alpha!r}": args.loss_options.needs_per_token}
    for option in (option for option, needs_tokens in readers.items() if needs_tokens):
        yield Refusal(
            f"`{option}` {beside}",
            "it weighs single tokens, and the columns are sums over a response",
            f"Leave `{option.split('=')[0]}` out, or take the columns out (`dataset.remove_columns`) and set "
            "`precompute_ref_log_probs=True`: its store keeps every token.",
        )


def _sync(facts: Facts) -> Iterator[Refusal]:
    policy, args = facts.policy, facts.args
    configs = [policy.peft_config[name] for name in policy.active_adapters] if is_adapter_model(policy) else []
    configs += [] if facts.new_adapter is None else [facts.new_adapter]
    if not configs:
        if args.ref_model_sync_rank is not None:
            why = "the whole model trains, and only LoRA updates have a rank"
            yield of_option("ref_model_sync_rank", args.ref_model_sync_rank, why, "Leave it out.")
        return
    if 0 <= args.ref_model_mixup_alpha <= 1:
        yield from refused_followers(configs, UpdateRule(args.ref_model_mixup_alpha, args.ref_model_sync_rank))
    if facts.ref_model is not None:
        yield Refusal(
            "`sync_ref_model=True` with a PEFT model and a `ref_model`",
            "an adapter's average lives on the policy's own base, and cannot be averaged into another model",
            "Leave `ref_model` out: the reference starts as the policy is now.",
        )
    yield from refused_shards(None if facts.is_sharded else policy)


def _average(facts: Facts) -> Iterator[Refusal]:
    """A reference that cannot take the weights of an averaging callback."""
    args = facts.args
    for other, applies, why in (
        ("`reference_free=True`", args.reference_free, "a run without a reference has none to set"),
        (
            "rows that bring `ref_chosen_logps`",
            facts.brings_log_probs,
            "their numbers are fixed, and no weights answer",
        ),
        ("ZeRO-3 or FSDP2", facts.is_sharded, "each process holds a part of the weights, not of their average"),
        (
            "`precompute_ref_log_probs=True`",
            args.precompute_ref_log_probs,
            "log-probs computed before training would be stale",
        ),
        ("`sync_ref_model=True`", args.sync_ref_model, "both would set the reference's weights"),
        (
            "a PEFT model and a `ref_model`",
            facts.has_adapter and facts.ref_model is not None,
            "an adapter's average lives on the policy's own base",
        ),
    ):
        if applies:
            yield Refusal(
                f"`BEMACallback(update_ref_model=True)` with {other}",
                why,
                f"Leave {other} out, or set `update_ref_model=False`: the average is still saved.",
            )


# ---- forwards --------------------------------------------------------------------------------------------------------


def _layout(facts: Facts) -> Iterator[Refusal]:
    """Rows without padding where they are not proven, and forwards that would not be the same on all processes."""
    args, policy, name = facts.args, facts.policy, type(facts.policy).__name__
    if args.padding_free:
        reads = facts.new_adapter is not None and reads_rows(facts.new_adapter)
        instead = "Set `padding_free=False`: it is then trained on padded rows."
        if reads or not can_pack(policy):
            why = "without padding it would not give the log-probs of each sequence alone"
            yield of_option("padding_free", True, why, instead, f"with a {name}")
        elif facts.sets_with_images and not can_pack_images(policy):
            why = "without padding its images are not proven to give the log-probs of each sequence alone"
            yield of_option("padding_free", True, why, instead, f"with a {name} and images")
    for model in filter(None, (policy, facts.ref_model)):
        limit, longest = rotary_limit(model), facts.truncation.max_length
        if limit is None or (longest is not None and longest <= limit):
            continue
        if facts.is_sharded:
            yield uneven_forwards(limit, longest)
        elif model is policy and args.ddp_broadcast_buffers and args.world_size > 1:
            yield replace(
                uneven_forwards(limit, longest),
                subject="`ddp_broadcast_buffers=True` with a model whose rotary embeddings depend on the length",
                instead=f"Leave `ddp_broadcast_buffers` out, or write `max_length={limit}` or less.",
            )


def _router(facts: Facts) -> Iterator[Refusal]:
    """The loss of a mixture of experts, for a model that has none, or in a forward without a gradient."""
    base, coefficient = base_model_of(facts.policy), router_coefficient(facts)
    if coefficient and not has_router(base):
        yield of_option(
            "router_aux_loss_coef",
            coefficient,
            f"a {type(base).__name__} returns no logits of a router, so there is no loss to weigh",
            "Leave `router_aux_loss_coef` out, or write 0.",
            details="Of some families with experts there are dense models too, which have no router.",
        )
    elif coefficient and facts.args.checkpoints_reentrantly:
        yield Refusal(
            f"`use_reentrant=True` with a router's loss, weighed by {coefficient:g}",
            "layers then run without a gradient at first, and the router's logits are taken from that forward",
            'Write `gradient_checkpointing_kwargs={"use_reentrant": False}`, the default, or `router_aux_loss_coef=0`.',
        )


def router_coefficient(facts: Facts) -> float:
    """Weight of the load-balancing loss: as asked, else as the model's config says; 0 where it has no experts."""
    asked = facts.args.router_aux_loss_coef
    if asked is not None:
        return float(asked)
    config = facts.policy.config.get_text_config()
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if has_router(base_model_of(facts.policy)) else 0.0


# ---- rows and evaluation ---------------------------------------------------------------------------------------------


def _rows(facts: Facts) -> Iterator[Refusal]:
    """Options that no row would need, and columns that no option reads."""
    args = facts.args
    if args.precompute_ref_log_probs and facts.streams and args.ref_store_mode == "fill":
        why = "the rows of a stream are only known when they are read, so they cannot be scored before training"
        instead = "Set `ref_store_mode='lazy'` (or leave it out): rows are scored when first read, and found later."
        yield of_option("ref_store_mode", "fill", why, instead, "with a stream (`IterableDataset`)")
    if facts.trains_on_stream:
        planned = {
            "max_tokens_per_micro_batch": args.max_tokens_per_micro_batch is not None,
            "train_sampling_strategy": args.train_sampling_strategy == "group_by_length",
        }
        for name in (name for name, is_set in planned.items() if is_set):
            why = (
                "micro-batches are planned over a whole set, and the rows of a stream are only known when they are read"
            )
            instead = "Pass a `datasets.Dataset` or a list of dicts as `train_dataset`, or leave it out."
            yield of_option(name, getattr(args, name), why, instead, "with a stream (`IterableDataset`)")
    if any(MARGIN_COLUMN in names for names in facts.columns.values()):
        yield from facts.objective.refused_margin()


def _best(facts: Facts) -> Iterator[Refusal]:
    """A best checkpoint by a figure that evaluation lacks, or without what its weights were measured against."""
    args = facts.args
    metric = args.metric_for_best_model
    if metric is not None and args.eval_strategy != "no":
        names = [name.removeprefix("eval_") for name in facts.sets if name not in ("train", "eval")]
        yield from refused_metric(
            metric, names, has_own=facts.has_own_figures, has_router=router_coefficient(facts) != 0
        )
    if args.load_best_model_at_end and args.save_only_model:
        found = {
            "`sync_ref_model=True`": args.sync_ref_model,
            "`BEMACallback(update_ref_model=True)`": facts.follows_average,
            "`bco_pair`": facts.objective.reward_shift is not None,
        }
        for name in (name for name, applies in found.items() if applies):
            yield Refusal(
                f"`load_best_model_at_end=True` and `save_only_model=True` with {name}",
                "a checkpoint of weights alone does not hold what the best policy was measured against",
                "Leave `save_only_model` out, or `load_best_model_at_end`.",
            )


def refused_metric(metric: str, names: Sequence[str], *, has_own: bool, has_router: bool) -> Iterator[Refusal]:
    """A figure that the first evaluation would not have.

    Args:
        metric: `metric_for_best_model`.
        names: Of the sets to evaluate on, where there are several by name.
        has_own: Whether further figures may come, from `compute_metrics`, a subclass or a callback.
        has_router: Whether the load-balancing loss of a mixture of experts is one.
    """
    sets = [f"{name}_" for name in names] or [""]
    figures = (*EVALUATED, *_OF_THE_RUN, *(("aux_loss",) if has_router else ()))
    asked = metric.removeprefix("eval_")
    if any(asked in [name + figure for figure in figures] or (has_own and asked.startswith(name)) for name in sets):
        return
    yield of_option(
        "metric_for_best_model",
        metric,
        "evaluation gives no figure of that name",
        f"Write `eval_` and one of: {', '.join(name + figure for name in sets for figure in EVALUATED)}.",
        details="With several sets, a figure's name begins with that of its set." if sets != [""] else "",
    )


def adds_figures(callback: Any) -> bool:
    """Whether a callback may add figures of its own to those of an evaluation; transformers' add none."""
    own: Any = callback if isinstance(callback, type) else type(callback)
    return own.on_evaluate is not TrainerCallback.on_evaluate and not own.__module__.startswith("transformers.")
