"""What a run is refused for because of its reference: options, models, rows and sharding that do not go together."""

from __future__ import annotations

from collections.abc import Iterator

from tether.config.rules.facts import Facts
from tether.losses import LOSSES
from tether.reference.adapter_tensors import is_adapter_model
from tether.reference.updates.adapters import refused_followers, refused_shards
from tether.reference.updates.groups import UpdateRule
from tether.refusals import Refusal, of_option

# What evaluation gives besides the figures of pairs.
_OF_THE_RUN = ("num_tokens", "runtime", "samples_per_second", "steps_per_second")
_MAKE_OPTIMIZER = "or let the trainer make it, `optimizer_cls_and_kwargs=(torch.optim.AdamW, {...})`."


def refused_reference(facts: Facts) -> Iterator[Refusal]:
    """What options, models, rows and sharding say of the reference, where they do not go together."""
    args = facts.args
    yield from _ref_model(facts)
    yield from _given(facts) if facts.brings_log_probs else _columns(facts)
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
    readers = {f"loss_type={name!r}": LOSSES[name].needs_tokens for name in args.loss_type}
    readers |= {f"ld_alpha={args.ld_alpha!r}": args.loss_options.needs_per_token}
    readers |= {"loss=...": facts.objective.own_loss is not None and facts.objective.needs_tokens}
    for option in (option for option, needs_tokens in readers.items() if needs_tokens):
        yield Refusal(
            f"`{option}` {beside}",
            "it weighs single tokens, and the columns are sums over a response",
            f"Leave `{option.split('=')[0]}` out, or take the columns out (`dataset.remove_columns`) and set "
            "`precompute_ref_log_probs=True`: its store keeps every token.",
        )


def _columns(facts: Facts) -> Iterator[Refusal]:
    if facts.args.ref_columns != "policy":
        why = "the training rows have no reference log-probs, so it would have no effect"
        instead = "Leave it out, or add the columns `ref_chosen_logps` and `ref_rejected_logps` to every set."
        yield of_option("ref_columns", facts.args.ref_columns, why, instead)


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
