"""What a run is refused for beyond its options: what they ask of this model, these rows and these processes.

Knows the facts of a run (`rules.facts`); changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from tether.config.rules.facts import Facts
from tether.config.rules.model import refused_model, refused_optimizer, refused_tokens, refused_training
from tether.config.rules.reference import refused_reference
from tether.data.datasets import MARGIN_COLUMN
from tether.losses.metrics import EVALUATED
from tether.refusals import Refusal, of_option
from tether.scoring import rotary_limit, uneven_forwards
from tether.scoring.packing import reads_rows
from tether.scoring.projection import base_model_of
from tether.scoring.router import has_router
from tether.scoring.score import can_pack

# What evaluation gives besides the figures of pairs.
_OF_THE_RUN = ("num_tokens", "runtime", "samples_per_second", "steps_per_second")
_MAKE_OPTIMIZER = "or let the trainer make it, `optimizer_cls_and_kwargs=(torch.optim.AdamW, {...})`."


def refused_run(facts: Facts) -> Iterator[Refusal]:
    """Everything that a run is refused for, once its models are loaded and before anything of them is changed."""
    for name, model in (("model", facts.policy), ("ref_model", facts.ref_model)):
        if model is not None:
            yield from refused_model(name, model)
    yield from refused_tokens(facts)
    yield from refused_training(facts)
    yield from refused_optimizer(facts)
    yield from refused_reference(facts)
    yield from _layout(facts)
    yield from _activations(facts)
    yield from _router(facts)
    yield from _rows(facts)
    yield from _best(facts)
    yield from _samples(facts)


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
        elif facts.sets_with_images:
            why = "whether images are read alike without padding is found out on the first batch"
            instead = "Leave it out: rows are packed where that is proven."
            yield of_option("padding_free", True, why, instead, "with images")
    for model in (policy, facts.ref_model):
        if model is None:
            continue
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


def _activations(facts: Facts) -> Iterator[Refusal]:
    if facts.args.activation_offloading and facts.is_sharded:
        why = "a layer's gathered weights would be moved to the host with its activations, at every forward"
        instead = "Leave it out; `gradient_checkpointing=True` keeps no activations but the layers' inputs."
        yield of_option("activation_offloading", True, why, instead, "with ZeRO-3 or FSDP2")


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
        if args.max_steps <= 0:
            yield Refusal(
                "a stream (`IterableDataset`) without `max_steps`",
                "the end of a stream is not known ahead, and the learning rate follows a schedule",
                "Set `max_steps`, or pass a `datasets.Dataset`.",
            )
    if args.eval_strategy != "no" and facts.sets.keys() == {"train"}:
        why = "there is no set to evaluate on"
        yield of_option("eval_strategy", args.eval_strategy, why, "Pass `eval_dataset`, or leave `eval_strategy` out.")
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


def _samples(facts: Facts) -> Iterator[Refusal]:
    """Answers by weights that are cut over processes, or to prompts with images."""
    asked = facts.args.report_samples
    if asked and facts.is_sharded:
        yield of_option(
            "report_samples",
            asked,
            "each process answers prompts of its own, and its answers are of different lengths, but a forward needs "
            "the shards of all",
            "Leave it out here; `tether ask OUTPUT_DIR` answers with the saved model.",
            "with weights that are sharded (ZeRO-3, FSDP2)",
        )
    if asked and facts.sets_with_images:
        why = "only text is answered, and the prompts are about their images"
        yield of_option("report_samples", asked, why, "Leave it out.", "with rows that have images")


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
