"""From the flat options of a run to one reference object: the only place that chooses a kind.

Knows every kind of reference; knows no trainer.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tether.distributed import Sharding, has_shards
from tether.errors import ConfigurationError
from tether.reference.adapter_parts import check_can_follow, refuse_sharded_average
from tether.reference.base import Reference
from tether.reference.bema import BemaReference
from tether.reference.explicit import ExplicitReference, Origin
from tether.reference.free import FreeReference
from tether.reference.given import GivenReference
from tether.reference.identity import check_finite, model_tensors
from tether.reference.implicit import ImplicitReference, is_adapter_model
from tether.reference.parts import UpdateRule
from tether.reference.precomputed import PrecomputedReference, StoreMode
from tether.reference.synchronized import SynchronizedReference
from tether.store import LogProbStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceOptions:
    """What a run says of its reference.

    Attributes:
        free: No reference: every response has the same log-prob.
        precompute: Score every row once before training and read the answers from a store.
        streaming: Some rows are only known when they are read; the store is then filled on the way.
        store_path: The store's file; None for the default place.
        sync: The reference follows the policy (TR-DPO).
        alpha: Weight of the policy in each sync.
        sync_rank: Largest rank of an averaged LoRA update; None for twice the policy's.
        sync_steps: Optimizer steps between syncs.
        dtype: Dtype of an explicit reference's weights; None for the policy's.
        autocast_dtype: Autocast dtype of the reference pass; None for no autocast.
        device: Where a reference with weights of its own lives; None for where they are.
        shard: Shards a reference with weights of its own as training shards the policy; None where that stays whole.
        store_mode: When the store is filled: `fill` before training, `lazy` while it runs, `require` never; `auto`
            is `fill`, and `lazy` for what is streamed.
        origins: Where a reference that was released can be had from again.
        decode: Turns token ids into text, for messages.
        how_to_fill: What to write to have missing rows scored, for messages.
        given: The rows bring their own reference log-probs; a digest of them.
        follows: Somebody else sets the reference's weights (`BEMACallback(update_ref_model=True)`).
    """

    free: bool = False
    precompute: bool = False
    streaming: bool = False
    store_path: Path | None = None
    sync: bool = False
    alpha: float = 0.6
    sync_rank: int | None = None
    sync_steps: int = 512
    dtype: torch.dtype | None = None
    autocast_dtype: torch.dtype | None = None
    device: torch.device | None = None
    shard: Sharding | None = None
    store_mode: str = "auto"
    origins: tuple[Origin, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    how_to_fill: str = ""
    given: str | None = None
    follows: bool = False

    @property
    def releases_source(self) -> bool:
        """Whether every answer is in the store when training starts, so that the weights can go."""
        return self.precompute and (self.store_mode in ("fill", "require") or not self._reads_through)

    @property
    def _reads_through(self) -> bool:
        return self.store_mode == "lazy" or (self.store_mode == "auto" and self.streaming)


def build_reference(policy: nn.Module, ref_model: nn.Module | None, options: ReferenceOptions) -> Reference:
    """The reference of a run, from the policy as it is now.

    Args:
        policy: The unwrapped policy, before its first optimizer step.
        ref_model: A model named by the user as the reference; None for the initial policy.
        options: The run's options.

    Raises:
        ConfigurationError: If the options contradict each other or the model.
    """
    check_options(policy, ref_model, options)
    if options.given is not None:
        return GivenReference(options.given)
    if options.free:
        return FreeReference()
    source = _source(policy, ref_model, options)
    match source, options:
        case _, ReferenceOptions(precompute=True):
            return _stored(source, options)
        case _, ReferenceOptions(follows=True):
            return BemaReference(source)
        case _, ReferenceOptions(sync=True):
            return SynchronizedReference(
                source,
                lambda: policy,
                alpha=options.alpha,
                every=options.sync_steps,
                max_rank=options.sync_rank,
            )
        case _:
            return source


def _stored(source: Reference, options: ReferenceOptions) -> PrecomputedReference:
    if options.streaming and options.store_mode == "auto":
        logger.warning(
            "precompute_ref_log_probs on a stream: its rows are scored and kept when training first reads them, and "
            "found by later epochs and runs (ref_store_mode='lazy')."
        )
    modes: dict[str, StoreMode] = {"auto": "fill", "fill": "fill", "lazy": "lazy", "require": "require"}
    return PrecomputedReference(
        LogProbStore(options.store_path),
        source,
        mode=modes[options.store_mode],
        release_when_filled=options.releases_source,
        decode=options.decode,
        how_to_fill=options.how_to_fill,
    )


def _source(
    policy: nn.Module, ref_model: nn.Module | None, options: ReferenceOptions
) -> ExplicitReference | ImplicitReference:
    dtype, autocast_dtype, device, shard = options.dtype, options.autocast_dtype, options.device, options.shard
    if ref_model is not None:
        return ExplicitReference.of_other_model(
            ref_model,
            policy,
            moves=options.sync or options.follows,
            dtype=dtype,
            autocast_dtype=autocast_dtype,
            device=device if shard is None else None,  # sharding takes it there, one part for each process
            origins=(_in_memory(ref_model), *options.origins),
            shard=shard,
        )
    if is_adapter_model(policy):
        return ImplicitReference(policy, autocast_dtype=autocast_dtype, moves=options.sync or options.follows)
    elsewhere = device if shard is None and waits_for_device(policy, device) else None
    can_run = shard is None and elsewhere is None and not has_shards(policy)
    if options.releases_source and dtype is None and can_run:
        itself = Origin("the policy in memory", lambda: policy)  # until it has trained
        origins = (itself, *options.origins)
        return ExplicitReference.before_training(policy, autocast_dtype=autocast_dtype, origins=origins)
    return ExplicitReference.of_policy(
        policy, dtype=dtype, autocast_dtype=autocast_dtype, device=elsewhere, shard=shard
    )


def _in_memory(ref_model: nn.Module) -> Origin:
    """The given model itself, as long as the caller holds it: it is not kept alive for that."""
    found = weakref.ref(ref_model)

    def load() -> nn.Module:
        model = found()
        if model is None:
            raise OSError("it was given up")
        return model

    return Origin("`ref_model` in memory", load)


def waits_for_device(policy: nn.Module, device: torch.device | None) -> bool:
    """Whether the policy is still on the CPU, from where sharding will take it to its device."""
    kinds = {parameter.device.type for parameter in policy.parameters()}
    return kinds == {"cpu"} and device is not None and device.type != "cpu"


def _check_ref_model(policy: nn.Module, ref_model: nn.Module) -> None:
    """Refuses a reference model that is the policy itself, or the base that the policy's adapter sits on."""
    if ref_model is policy or (is_adapter_model(policy) and ref_model is policy.get_base_model()):
        raise ConfigurationError(
            problem="`ref_model` is the same object as `model`" + ("." if ref_model is policy else "'s base."),
            details="The reference would train with the policy, and every reward would be 0.",
            instead="Leave `ref_model` out: the reference is then the initial policy.",
        )


def check_options(
    policy: nn.Module, ref_model: nn.Module | None, options: ReferenceOptions, *, new_adapter: Any = None
) -> None:
    """Refuses options that contradict each other or the model; changes nothing.

    Args:
        policy: The policy, as it is now.
        ref_model: The reference model, if one is named.
        options: The run's options.
        new_adapter: The PEFT configuration of an adapter that the policy will get before its reference is built.

    Raises:
        ConfigurationError: Names the option.
        ReferenceModelError: If a weight of the policy is NaN or infinite and no reference would look at it.
    """
    has_adapter = new_adapter is not None or is_adapter_model(policy)
    if options.free and ref_model is not None:
        raise ConfigurationError(
            problem="`reference_free=True` together with `ref_model`.",
            details="Without a reference there is nothing to compare with.",
            instead="Leave `ref_model` out, or set `reference_free=False`.",
        )
    if ref_model is not None:
        _check_ref_model(policy, ref_model)
        check_finite(model_tensors(policy))  # a reference made from the policy looks at its weights itself
    check_sync_without_precompute(options.sync, options.precompute)
    if options.sync:
        _check_sync(policy, ref_model, options, new_adapter)
    if options.precompute and options.streaming and options.store_mode == "fill":
        raise ConfigurationError(
            problem="`ref_store_mode='fill'` with a stream (`IterableDataset`).",
            details="The rows of a stream are only known when they are read, so they cannot be scored before training.",
            instead="Set `ref_store_mode='lazy'` (or leave it out): rows are scored when first read, and found later.",
        )
    if options.dtype is not None and options.shard is not None:
        raise ConfigurationError(
            problem="`ref_dtype` together with ZeRO-3 or FSDP2.",
            details="A sharded reference is held and cast as the policy is, by the options of the sharding.",
            instead="Leave `ref_dtype` out.",
        )
    if options.follows:
        _check_can_follow(options, has_adapter and ref_model is not None)
    if options.dtype is not None and ref_model is None and has_adapter:
        raise ConfigurationError(
            problem="`ref_dtype` with a PEFT model and no `ref_model`.",
            details="The reference is the policy's own base; it has no weights of its own to hold in another dtype.",
            instead="Leave `ref_dtype` out, or pass `ref_model`.",
        )


def check_sync_without_precompute(sync: bool, precompute: bool) -> None:
    """Refuses a synchronized reference whose answers are stored; known before there is any model."""
    if sync and precompute:
        raise ConfigurationError(
            problem="`sync_ref_model=True` together with `precompute_ref_log_probs=True`.",
            details="Log-probs computed before training are stale once the reference has moved.",
            instead="Set one of the two to False.",
        )


def _check_sync(policy: nn.Module, ref_model: nn.Module | None, options: ReferenceOptions, new_adapter: Any) -> None:
    adapters = [policy.peft_config[name] for name in policy.active_adapters] if is_adapter_model(policy) else []
    adapters += [] if new_adapter is None else [new_adapter]
    check_can_follow(adapters, UpdateRule(options.alpha, options.sync_rank))
    if adapters and ref_model is not None:
        raise ConfigurationError(
            problem="`sync_ref_model=True` with a PEFT model and a `ref_model`.",
            details="An adapter's average lives on the policy's own base; it cannot be averaged into another model.",
            instead="Leave `ref_model` out: the reference starts as the policy is now.",
        )
    if adapters:
        refuse_sharded_average(None if options.shard is not None else policy)


def _check_can_follow(options: ReferenceOptions, crosses_models: bool) -> None:
    reasons = {
        "`reference_free=True`": (options.free, "Without a reference there is nothing to set."),
        "rows that bring `ref_chosen_logps`": (
            options.given is not None,
            "Their numbers are fixed: no weights answer.",
        ),
        "ZeRO-3 or FSDP2": (options.shard is not None, "Each process holds a part of the weights, not their average."),
        "`precompute_ref_log_probs=True`": (options.precompute, "Log-probs computed before training would be stale."),
        "`sync_ref_model=True`": (options.sync, "Both would set the reference's weights, each by its own rule."),
        "a PEFT model and a `ref_model`": (
            crosses_models,
            "An adapter's average lives on the policy's own base; `ref_model` has no such tensors.",
        ),
    }
    for other, (given, why) in reasons.items():
        if given:
            raise ConfigurationError(
                problem=f"`BEMACallback(update_ref_model=True)` together with {other}.",
                details=why,
                instead=f"Leave {other} out, or set `update_ref_model=False`: the average is still saved.",
            )
