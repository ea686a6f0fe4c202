"""`ExplicitReference`: a frozen copy of the initial policy, or any other model.

Never writes to a model it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tether.distributed import (
    Sharding,
    device_of,
    forget_gathered,
    full_shape,
    gather,
    gather_shard,
    has_shards,
    local_shard,
    shard_like,
)
from tether.errors import ConfigurationError, MissingLogProbsError, ReferenceModelError
from tether.models.origin import Origin
from tether.reference.adapter_state import adapter_settings
from tether.reference.adapter_tensors import all_tensors, base_tensors, is_adapter_model
from tether.reference.base import Kind, Traits, compute_dtype_name, score_without_gradient
from tether.reference.held import Slot, slots_of
from tether.reference.identity import ReferenceIdentity, digest_tensors, identity_digests, num_bytes
from tether.reference.twin import frozen_twin, refuse_lost_hooks, take_own
from tether.reference.updates.groups import DenseGroup, MovableReference, Tensors, UpdateGroup, UpdateRule
from tether.scoring import SCORING_VERSION, Reads, reads_of, rotary_limit
from tether.types import PairBatch, ResponseLogProbs


@dataclass(frozen=True)
class Placement:
    """How and where a reference holds weights of its own, and in which dtype it computes with them.

    Attributes:
        dtype: Hold the weights in this dtype instead of the model's own; with `shard`, the sharding decides.
        autocast_dtype: Run under autocast with this dtype, as the policy does.
        device: Hold the weights on this device instead of where they are.
        shard: Shards the module as training shards the policy; it then shares no tensor with any other. A model to
            which `fully_shard` was applied needs none: its copy is sharded the same way.
    """

    dtype: torch.dtype | None = None
    autocast_dtype: torch.dtype | None = None
    device: torch.device | None = None
    shard: Sharding | None = None


_AS_GIVEN = Placement()


class ExplicitReference(MovableReference):
    """The reference whose weights stand still: `pi_ref = pi_0`, or another model.

    Built from a model, it is a second tree of modules over that model's tensors: nothing is copied, and the caller's
    model keeps its mode, hooks and device. `of_policy` copies the weights that training changes.

    Args:
        model: The model that scores. Weights that are not copied must not change while the reference lives.
        placement: How and where the weights are held; by default as the model's own.
        copies: Which parameters to copy; by default none.
        policy: The policy; what it shares with `model` is not counted as extra bytes.
        means_policy: The model is meant to be the initial policy.
        origins: Where to load the weights again if a response must be scored after `release`; the first one with this
            reference's digest is used. Not for sharded weights.

    Raises:
        ReferenceModelError: If a weight is NaN or infinite; or if the model is sharded by DeepSpeed already and
            `placement` has no `shard`.

    Example:
        >>> reference = ExplicitReference(model)                       # doctest: +SKIP
        >>> reference.log_probs(batch).sums()                        # doctest: +SKIP
    """

    kind = Kind("explicit", "weights that stand still")

    def __init__(
        self,
        model: nn.Module,
        placement: Placement = _AS_GIVEN,
        *,
        copies: Callable[[nn.Parameter], bool] = lambda parameter: False,
        policy: nn.Module | None = None,
        means_policy: bool = False,
        origins: Sequence[Origin] = (),
    ) -> None:
        shard = placement.shard
        # Two roots of FSDP2 can't share a block, and shards that ZeRO-3 gathers for one would be freed by the other.
        apart = shard is not None or has_shards(model)
        refuse_lost_hooks(model, shard)
        if shard is not None:
            placement = replace(placement, dtype=shard.dtype)
        copied = (lambda p: True) if apart else copies
        self._module: nn.Module | None = frozen_twin(model, copied, placement.dtype, placement.device)
        self._length_limit, self._reads = rotary_limit(self._module), reads_of(self._module)
        # Reading weights again would be collective, and one process alone may need an answer.
        self._origins = () if apart else tuple(origins)
        self._is_apart = apart
        self._placement = replace(placement, device=device_of(self._module))
        self._policy_storages = _storages(policy.parameters()) if policy is not None else set()
        self._given = _storages(model.parameters()) if not apart else set()
        self._num_passes = 0
        self._means_policy = means_policy
        self._digests = digest_tensors(all_tensors(self._module))
        self._identity = ReferenceIdentity(
            kind=self.kind.name,
            **_digests_of(self._module, self._digests),
            compute_dtype=compute_dtype_name(self._module, placement.autocast_dtype),
            scoring_version=SCORING_VERSION,
        )
        if shard is not None:
            shard.apply(self._module)

    @classmethod
    def of_policy(cls, policy: nn.Module, placement: Placement = _AS_GIVEN) -> ExplicitReference:
        """The policy as it is now: parameters that train are copied, the others are shared."""
        return cls(
            policy,
            placement,
            copies=lambda p: p.requires_grad,
            policy=policy,
            means_policy=True,
        )

    @classmethod
    def of_other_model(
        cls,
        model: nn.Module,
        policy: nn.Module,
        placement: Placement = _AS_GIVEN,
        *,
        moves: bool = False,
        origins: Sequence[Origin] = (),
    ) -> ExplicitReference:
        """Another model, whose tensors are shared; those that the policy will train are copied.

        With `moves`, all floating-point tensors are copied: the reference will follow the policy, and the caller's
        model must not change.
        """
        training = _storages(p for p in policy.parameters() if p.requires_grad)
        return cls(
            model,
            placement,
            copies=lambda p: (moves and p.is_floating_point()) or _storage(p) in training,
            policy=policy,
            origins=origins,
        )

    @classmethod
    def before_training(
        cls, policy: nn.Module, *, autocast_dtype: torch.dtype | None = None, origins: Sequence[Origin] = ()
    ) -> ExplicitReference:
        """The policy itself, only for use before its first optimizer step; call `release` then. Costs no memory."""
        return cls(policy, Placement(autocast_dtype=autocast_dtype), policy=policy, means_policy=True, origins=origins)

    @property
    def identity(self) -> ReferenceIdentity:
        return self._identity

    @property
    def num_passes(self) -> int:
        return self._num_passes

    @property
    def traits(self) -> Traits:
        is_collective = self._module is not None and has_shards(self._module)
        return Traits(means_policy=self._means_policy, is_collective=is_collective)

    @property
    def module(self) -> nn.Module | None:
        return self._module

    def changed_tensors(self) -> list[str]:
        if self._module is None:
            return []
        now = digest_tensors(all_tensors(self._module))
        return [name for name, digest in self._digests.items() if now.get(name) != digest]

    def held_by_others(self) -> list[Slot]:
        if self._module is None:
            return []
        return slots_of(self._module, {n: p for n, p in self._module.named_parameters() if _storage(p) in self._given})

    def keep(self, names: Collection[str]) -> bool:
        if self._module is None or self._is_apart:
            return False
        take_own(self._module, [p for name, p in self._module.named_parameters() if name in names])
        return True

    @property
    def extra_bytes(self) -> int:
        if self._module is None:
            return 0
        return num_bytes(p for p in self._module.parameters() if _storage(p) not in self._policy_storages)

    @property
    def length_limit(self) -> int | None:
        return self._length_limit

    @property
    def reads(self) -> Reads | None:
        return self._reads

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        if self._module is None:
            self._module = self._bring_back()
        self._num_passes += 1
        return score_without_gradient(self._module, batch, self._placement.autocast_dtype)

    def release(self) -> None:
        self._module = None

    def export(self, folder: Path | None, *, merged: bool = False) -> None:
        if self._module is None:
            return super().export(folder, merged=merged)
        forget_gathered(self._module)
        state: dict[str, Tensor] = {}
        gathered: dict[int, Tensor] = {}  # tied tensors are saved once
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:  # one at a time, kept by the process that writes
                full = gather(tensor)
                gathered[id(tensor)] = full.cpu() if folder is not None else full.new_empty(0)
            state[name] = gathered[id(tensor)]
        if folder is not None:
            self._module.save_pretrained(folder, state_dict=state)  # type: ignore[operator]

    def tensors(self) -> Tensors:
        assert self._module is not None, "released"
        forget_gathered(self._module)
        named = (*self._module.named_parameters(), *self._module.named_buffers())
        return {name: local_shard(tensor) for name, tensor in named}

    def write(self, name: str, tensor: Tensor) -> None:
        self._refuse_given(name)
        local_shard(self._own(name)).copy_(tensor)

    def _refuse_given(self, name: str) -> None:
        """Refuses to change a tensor of the model that the reference was made of, which is the caller's."""
        if _storage(self._own(name)) in self._given:
            raise ReferenceModelError(
                problem=f"Cannot move this reference: its weight `{name}` is shared with the model it was made of, "
                "which would change with it.",
                instead="Make it with its own weights: `ExplicitReference.of_policy(policy)`, or "
                "`ExplicitReference.of_other_model(model, policy, moves=True)`.",
            )

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        return shard_like(tensor, self._own(name))

    def gather(self, name: str, shard: Tensor) -> Tensor:
        return gather_shard(shard, self._own(name))

    def _own(self, name: str) -> Tensor:
        """The tensor of that name as the module has it now: sharding replaces the objects."""
        assert self._module is not None, "released"
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self._module.get_submodule(path), leaf)
        return tensor

    def update_groups(self, policy: nn.Module, rule: UpdateRule) -> list[UpdateGroup]:
        """Every parameter that the policy trains, and every buffer, each on its own."""
        assert self._module is not None, "released"
        _check_same_parameters(policy, self._module)
        if rule.max_rank is not None:
            raise ConfigurationError(
                problem=f"Cannot use `ref_model_sync_rank={rule.max_rank}` with a full model: it limits the rank of an "
                "averaged LoRA update, and this policy has none.",
                instead="Leave `ref_model_sync_rank` out, or train with `peft_config=LoraConfig(...)`.",
            )
        trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        buffers = [name for name, buffer in self._module.named_buffers() if buffer.is_floating_point()]
        for name in trained:
            self._refuse_given(name)
        return [DenseGroup(name, rule.alpha) for name in (*trained, *buffers)]

    def _twin_of(self, origin: Origin) -> nn.Module:
        """Shares nothing with a live model: who holds that may train it."""
        return frozen_twin(
            origin.load(), lambda parameter: origin.is_live, self._placement.dtype, self._placement.device
        )

    def _bring_back(self) -> nn.Module:
        """Has the weights again from an origin: of a live model as a copy, and in any case proven by their digest."""
        refused = []
        for origin in self._origins:
            try:
                twin = self._twin_of(origin)
                found = _digests_of(twin, digest_tensors(all_tensors(twin)))["weights"]
            except (OSError, ValueError, TypeError, RuntimeError) as error:  # gone, unreadable, sharded by now
                refused.append(f"{origin.name} cannot be read ({' '.join(str(error).split())[:200]})")
                continue
            if found == self._identity.weights:
                return twin
            refused.append(f"{origin.name} has other weights by now (digest {found[:12]})")
        raise MissingLogProbsError(
            problem="Cannot compute log-probs with a reference whose weights were released (digest "
            f"{self._identity.weights[:12]}): "
            + (
                "they cannot be loaded again."
                if refused
                else "weights that were sharded are not loaded again."
                if self._is_apart
                else "nothing says where to load them from again."
            ),
            details="They were released when training began, because all log-probs known to be needed were stored."
            + (f" They cannot be loaded because {'; '.join(refused)}." if refused else ""),
            instead="Pass every set at construction (`train_dataset`, `eval_dataset`), pass the model or `ref_model` "
            "by path, or set `ref_store_mode='lazy'`, which keeps the weights.",
        )


def _digests_of(model: nn.Module, digests: Mapping[str, bytes]) -> dict[str, str]:
    """The digests of an identity: of a base its own, of a model with an adapter also the adapter's."""
    base: Any = model.get_base_model() if is_adapter_model(model) else model
    of_adapter = digests.keys() - base_tensors(base).keys()
    return identity_digests(digests, base.config, of_adapter, adapter_settings(model))


def _check_same_parameters(policy: nn.Module, reference: nn.Module) -> None:
    own, other = ({name: full_shape(p) for name, p in model.named_parameters()} for model in (policy, reference))
    differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if differing:
        raise ReferenceModelError(
            problem="Cannot use `sync_ref_model=True` with this `ref_model`: its parameters differ from the policy's "
            f"in name or shape ({len(differing)} in all, {differing[0]!r} among them).",
            details="An average of weights needs the same tensors on both sides.",
            instead="Pass a `ref_model` of the policy's architecture and size, or set `sync_ref_model=False`.",
        )


def _storage(parameter: torch.Tensor) -> int:
    parameter = local_shard(parameter)  # all partitioned ones have the same, empty storage
    return parameter.untyped_storage().data_ptr()


def _storages(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {_storage(parameter) for parameter in parameters}
