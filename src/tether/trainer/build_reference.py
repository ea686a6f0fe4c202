"""From the facts of a run to one reference object: the only place that chooses a kind.

Knows every kind of reference; what does not go together, the rules have refused by now.
"""

from __future__ import annotations

import logging
import os
import shlex
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tether.config.dpo_config import DPOConfig
from tether.config.rules.facts import Facts
from tether.config.rules.model import refused_model
from tether.distributed import Sharding, device_of, has_shards
from tether.errors import ArgumentTypeError, ConfigurationError, ReferenceModelError
from tether.models.origin import Origin, name_of
from tether.models.preparing import differing_vocabulary
from tether.reference.adapter_tensors import is_adapter_model
from tether.reference.base import Reference, compute_dtype_name
from tether.reference.bema import BemaReference
from tether.reference.explicit import ExplicitReference, Placement
from tether.reference.free import FreeReference
from tether.reference.given import GivenReference
from tether.reference.implicit import ImplicitReference
from tether.reference.precomputed import PrecomputedReference
from tether.reference.synchronized import SynchronizedReference
from tether.reference.wrapping import WrappingReference
from tether.refusals import Refusal
from tether.scoring.evaluation import running_in
from tether.store import LogProbStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What a reference needs to know that no option says.

    Attributes:
        autocast_dtype: Autocast dtype of the policy's forward, and so of the reference's; None for no autocast.
        shard: Shards a reference with weights of its own as training shards the policy; None where that stays whole.
        origins: Where a reference that was released can be had from again.
        decode: Turns token ids into text, for messages.
        given: The rows bring their own reference log-probs; a digest of them.
    """

    autocast_dtype: torch.dtype | None = None
    shard: Sharding | None = None
    origins: tuple[Origin, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    given: str | None = None


def build_reference(policy: nn.Module, facts: Facts, around: Surroundings) -> Reference:
    """The reference of a run, from the policy as it is now.

    Args:
        policy: The unwrapped policy, with its adapter, before its first optimizer step.
        facts: What the run is asked to do.
        around: What no option says.

    Raises:
        ReferenceModelError: If a weight that makes up the reference is NaN or infinite.
    """
    args = facts.args
    if facts.reference is not None:
        return _own(facts.reference, policy, around.autocast_dtype)
    if around.given is not None:
        return GivenReference(around.given, means_policy=args.ref_columns == "policy")
    if args.reference_free:
        return FreeReference()
    mode = store_mode(facts)
    source = _source(policy, facts, around, is_released=mode in ("fill", "require"))
    if mode is not None:
        return _precomputed(source, mode, facts, around)
    if facts.follows_average:
        return BemaReference(source)
    if args.sync_ref_model:
        return SynchronizedReference(
            source,
            lambda: policy,
            alpha=args.ref_model_mixup_alpha,
            every=args.ref_model_sync_steps,
            max_rank=args.ref_model_sync_rank,
        )
    return source


def _own(reference: Any, policy: nn.Module, autocast_dtype: torch.dtype | None) -> Reference:
    """The user's own: the object, or what the function makes of the policy, under the autocast of its passes."""
    if isinstance(reference, Reference):
        return reference
    with running_in(autocast_dtype, device_of(policy)):
        made = reference(policy)
    if not isinstance(made, Reference):
        raise ArgumentTypeError(
            problem=f"Cannot use what the function in `reference` returned: it is a {type(made).__name__}, not a "
            "`tether.Reference`.",
            instead="Return a reference, such as `ExplicitReference.of_policy(policy)`.",
        )
    return made


def refused_holes(reference: Reference) -> Iterator[Refusal]:
    """A reference of sums for responses of which some tokens do not count."""
    if not reference.traits.knows_tokens:
        yield Refusal(
            "a completion mask with holes with a reference that knows sums only",
            "how much of a sum belongs to the tokens that count is unknown",
            "Take the columns out (`dataset.remove_columns(['ref_chosen_logps', 'ref_rejected_logps'])`), and set "
            "`precompute_ref_log_probs=True`: its store keeps every token.",
        )


def refused_own(reference: Reference, facts: Facts) -> Iterator[Refusal]:
    """A model of the user's reference that no `ref_model` could be, and sums where single tokens are read."""
    if not reference.traits.knows_tokens and (facts.objective.needs_tokens or facts.args.loss_options.needs_per_token):
        why = "it knows the sum of each response only (`Traits.knows_tokens`), and the loss reads single tokens"
        yield Refusal("this `reference`", why, "Leave out `ld_alpha`, and a loss with `needs_tokens`.")
    module, tokenizer = reference.module, facts.tokenizer
    if isinstance(module, PreTrainedModel | PeftModel):
        yield from refused_model("reference", module)
        if details := differing_vocabulary(module, tokenizer):
            yield Refusal(
                "this `reference`",
                "its model has another vocabulary than the policy, and both must read the same token ids",
                "Use a model of the same tokenizer family.",
                details,
            )


def check_own(reference: Reference, policy: nn.Module, autocast_dtype: torch.dtype | None) -> None:
    """Refuses a reference that trains with the policy, follows another one, or is wrong about its own dtype.

    Called when it has scored ahead: one that is released by then may share the policy's weights.

    Raises:
        ReferenceModelError: Says what of it.
    """
    module = None if reference.traits.runs_in_policy else reference.module
    trained = {p.untyped_storage().data_ptr() for p in policy.parameters() if p.requires_grad} - {0}
    for name, parameter in () if module is None else module.named_parameters():
        if parameter.untyped_storage().data_ptr() in trained:
            raise ReferenceModelError(
                problem=f"Cannot use this reference: its weight `{name}` is one that the policy trains, so it would "
                "change with the policy.",
                instead="Copy what trains, `reference=lambda policy: ExplicitReference.of_policy(policy)`, or take "
                "another model.",
            )
    layer: Any = reference
    while isinstance(layer, WrappingReference):
        if isinstance(layer, SynchronizedReference) and _plain(layer.follows) is not _plain(policy):
            raise ReferenceModelError(
                problem="Cannot use this reference: it follows another model than the policy that trains.",
                instead="Write `reference=lambda policy: SynchronizedReference(source, lambda: policy, every=...)`, "
                "with the policy that the function is called with.",
            )
        layer = layer.wrapped
    if reference.traits.means_policy:
        _check_dtype(reference, compute_dtype_name(policy, autocast_dtype))


def _check_dtype(reference: Reference, policy_dtype: str) -> None:
    own = reference.identity.compute_dtype
    if own == policy_dtype:
        return
    if "tf32" in (own, policy_dtype):
        written = "Make it in a function, `reference=lambda policy: ...`, which is called when TF32 has been set."
    else:
        written = f"Write `Placement(autocast_dtype=torch.{policy_dtype})` for an `ExplicitReference`, "
        written += f"`autocast_dtype=torch.{policy_dtype}` for an `ImplicitReference`."
    if reference.traits.runs_in_policy:
        raise ReferenceModelError(
            problem=f"Cannot use this reference: it is made for {own}, and its passes run through the policy, in "
            f"{policy_dtype}.",
            instead=written,
        )
    logger.warning(
        "The reference computes in %s and the policy in %s, so they differ by rounding. %s", own, policy_dtype, written
    )


def _plain(model: Any) -> Any:
    """The model that `torch.compile` wrapped."""
    return getattr(model, "_orig_mod", model)


def follow_average(reference: Reference, leaders: Sequence[Any]) -> None:
    """Lets averaging callbacks set the reference's weights.

    Raises:
        ConfigurationError: If the reference takes none.
    """
    if leaders and not isinstance(reference, BemaReference):
        raise ConfigurationError(
            problem=f"Cannot use `BEMACallback(update_ref_model=True)` with a {type(reference).__name__} in "
            "`reference`: it takes no weights of an average.",
            instead="Pass `reference=lambda policy: BemaReference(ExplicitReference.of_policy(policy))`, or set "
            "`update_ref_model=False`.",
        )
    for leader in leaders:
        leader.follow_with(reference)


def store_mode(facts: Facts) -> Literal["fill", "lazy", "require"] | None:
    """When the store is filled: `auto` is `fill`, and `lazy` where rows are streamed; None without a store."""
    if not facts.args.precompute_ref_log_probs:
        return None
    asked = facts.args.ref_store_mode
    return ("lazy" if facts.streams else "fill") if asked == "auto" else asked


def _precomputed(
    source: Reference, mode: Literal["fill", "lazy", "require"], facts: Facts, around: Surroundings
) -> PrecomputedReference:
    args = facts.args
    if facts.streams and args.ref_store_mode == "auto":
        logger.warning(
            "precompute_ref_log_probs on a stream: its rows are scored and kept when training first reads them, and "
            "found by later epochs and runs (ref_store_mode='lazy')."
        )
    return PrecomputedReference(
        LogProbStore(Path(args.ref_store) if args.ref_store else None),
        source,
        mode=mode,
        release_when_filled=mode != "lazy",
        decode=around.decode,
        how_to_fill=how_to_fill(args, name_of(facts.policy)),
        verify=args.ref_store_verify,
        about={
            "model": name_of(facts.policy if facts.ref_model is None else facts.ref_model) or "made in memory",
            "run": args.run_name or os.path.abspath(args.output_dir or "."),
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
        },
    )


def _source(
    policy: nn.Module, facts: Facts, around: Surroundings, *, is_released: bool
) -> ExplicitReference | ImplicitReference:
    args = facts.args
    moves = args.sync_ref_model or facts.follows_average
    placement = _placement(policy, facts, around)
    if facts.ref_model is not None:
        return ExplicitReference.of_other_model(
            facts.ref_model, policy, placement, moves=moves, origins=(_in_memory(facts.ref_model), *around.origins)
        )
    if is_adapter_model(policy):
        return ImplicitReference(policy, autocast_dtype=around.autocast_dtype, moves=moves)
    stays = placement == Placement(autocast_dtype=around.autocast_dtype) and not has_shards(policy)
    if is_released and stays:
        itself = Origin("the policy in memory", lambda: policy, is_live=True)  # until it has trained
        return ExplicitReference.before_training(
            policy, autocast_dtype=around.autocast_dtype, origins=(itself, *around.origins)
        )
    return ExplicitReference.of_policy(policy, placement)


def _placement(policy: nn.Module, facts: Facts, around: Surroundings) -> Placement:
    args = facts.args
    # Sharding takes a model to its device, one shard on each process.
    waits = around.shard is None and (facts.ref_model is not None or waits_for_device(policy, args.device))
    return Placement(
        dtype=getattr(torch, args.ref_dtype) if args.ref_dtype else None,
        autocast_dtype=around.autocast_dtype,
        device=args.device if waits else None,
        shard=around.shard,
    )


def _in_memory(ref_model: nn.Module) -> Origin:
    """The given model itself, as long as the caller holds it: it is not kept alive for that."""
    found = weakref.ref(ref_model)

    def load() -> nn.Module:
        model = found()
        if model is None:
            raise OSError("it was given up")
        return model

    return Origin("`ref_model` in memory", load, is_live=True)


def waits_for_device(policy: nn.Module, device: torch.device | None) -> bool:
    """Whether the policy is still on the CPU, from where sharding will take it to its device."""
    kinds = {parameter.device.type for parameter in policy.parameters()}
    return kinds == {"cpu"} and device is not None and device.type != "cpu"


def how_to_fill(args: DPOConfig, model_name: str) -> str:
    """What to write to have the rows scored that a store lacks, for messages."""
    options: dict[str, Any] = {
        "model": model_name or "MODEL",
        "train_data": "ROWS.jsonl",
        "ref_store": args.ref_store,
        "max_length": args.max_length if args.max_length is not None else "none",
        "truncation_mode": args.truncation_mode if args.truncation_mode != "keep_start" else None,
    }
    words = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
    return f"Run this once with `ref_store_mode='fill'`; or, from a shell: `tether precompute {words}`."
