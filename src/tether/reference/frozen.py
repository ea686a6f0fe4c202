"""`FrozenReference`: a frozen copy of the initial policy, or any other model.

Knows how to copy a model without copying what never changes. Never writes to a model it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn

from tether.distributed import Sharding, copy_of_sharded, has_shards, is_fsdp, is_sharded, local_part, twin_of_fsdp
from tether.errors import MissingLogProbsError, ReferenceModelError
from tether.reference.base import Reference, compute_dtype_name, score_without_gradient
from tether.reference.identity import ReferenceIdentity, digest_parts, digest_tensors, model_tensors, num_bytes
from tether.scoring import SCORING_VERSION
from tether.types import PairBatch, ResponseLogProbs


class FrozenReference(Reference):
    """The reference whose weights stand still: `pi_ref = pi_0`, or another model.

    Built from a model, it is a second tree of modules over that model's own tensors: nothing is copied, and the
    caller's model keeps its mode, hooks and device. `of_policy` copies what training changes.

    Args:
        model: The model to answer with. Weights that are not copied must not change while the reference lives.
        copies: Which parameters to copy; by default none.
        dtype: Hold the weights in this dtype instead of the model's own; where `shard` is given, it decides.
        autocast_dtype: Run under autocast with this dtype, as the policy does.
        device: Hold the weights there instead of where they are.
        policy: The policy; what it shares with `model` is not counted as extra bytes.
        means_policy: The model is meant to be the initial policy, not another one.
        shard: Shards the reference's module as training shards the policy; it then shares no tensor with any other.
            A model to which `fully_shard` was applied needs none: its copy is sharded the same way.

    Raises:
        ReferenceModelError: If a weight is NaN or infinite; or if the model is sharded by DeepSpeed and `shard` is
            missing, or comes too late.

    Example:
        >>> reference = FrozenReference(model)                       # doctest: +SKIP
        >>> reference.log_probs(batch).sums()                        # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        copies: Callable[[nn.Parameter], bool] = lambda parameter: False,
        dtype: torch.dtype | None = None,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        policy: nn.Module | None = None,
        means_policy: bool = False,
        shard: Sharding | None = None,
    ) -> None:
        # Two roots of FSDP2 can't share a block, and parts that ZeRO-3 gathers for one would be freed by the other.
        apart = shard is not None or has_shards(model)
        _refuse_lost_hooks(model, shard)
        dtype = shard.dtype if shard is not None else dtype
        self._module: nn.Module | None = frozen_twin(model, (lambda p: True) if apart else copies, dtype, device)
        self._autocast_dtype = autocast_dtype
        self._policy_storages = _storages(policy.parameters()) if policy is not None else set()
        self._num_passes = 0
        self._means_policy = means_policy
        self._digests = digest_tensors(model_tensors(self._module))
        self._identity = ReferenceIdentity(
            kind="frozen",
            **digest_parts(self._digests, self._module.config),
            compute_dtype=compute_dtype_name(self._module, autocast_dtype),
            scoring_version=SCORING_VERSION,
        )
        if shard is not None:
            shard.apply(self._module)

    @classmethod
    def of_policy(
        cls,
        policy: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        shard: Sharding | None = None,
    ) -> FrozenReference:
        """The policy as it is now: parameters that train are copied, those that do not are shared."""
        return cls(
            policy,
            copies=lambda p: p.requires_grad,
            dtype=dtype,
            autocast_dtype=autocast_dtype,
            device=device,
            policy=policy,
            means_policy=True,
            shard=shard,
        )

    @classmethod
    def of_other_model(
        cls,
        model: nn.Module,
        policy: nn.Module,
        *,
        moves: bool = False,
        dtype: torch.dtype | None = None,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        shard: Sharding | None = None,
    ) -> FrozenReference:
        """Another model, shared with its owner; tensors that the policy will train are copied.

        With `moves`, all floating-point tensors are copied: the reference will follow the policy, and the caller's
        model must stay what it is.
        """
        training = _storages(p for p in policy.parameters() if p.requires_grad)
        return cls(
            model,
            copies=lambda p: (moves and p.is_floating_point()) or _storage(p) in training,
            dtype=dtype,
            autocast_dtype=autocast_dtype,
            device=device,
            policy=policy,
            shard=shard,
        )

    @classmethod
    def before_training(cls, policy: nn.Module, *, autocast_dtype: torch.dtype | None = None) -> FrozenReference:
        """The policy itself, for use before its first optimizer step only; `release` it then. Costs no memory."""
        return cls(policy, autocast_dtype=autocast_dtype, policy=policy, means_policy=True)

    @property
    def identity(self) -> ReferenceIdentity:
        return self._identity

    @property
    def num_passes(self) -> int:
        return self._num_passes

    @property
    def means_policy(self) -> bool:
        return self._means_policy

    @property
    def is_collective(self) -> bool:
        return self._module is not None and has_shards(self._module)

    @property
    def module(self) -> nn.Module | None:
        return self._module

    def changed_tensors(self) -> list[str]:
        if self._module is None:
            return []
        now = digest_tensors(model_tensors(self._module))
        return [name for name, digest in self._digests.items() if now.get(name) != digest]

    @property
    def extra_bytes(self) -> int:
        if self._module is None:
            return 0
        return num_bytes(p for p in self._module.parameters() if _storage(p) not in self._policy_storages)

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        if self._module is None:
            raise MissingLogProbsError(
                asked="A log-probability was asked of a reference whose weights were released.",
                why="They were given up when training began, because every answer known to be needed was stored.",
                instead="Give every set at construction (`train_dataset`, `eval_dataset`), pass `ref_model`, or set "
                "`precompute_ref_log_probs=False`.",
            )
        self._num_passes += 1
        return score_without_gradient(self._module, batch, self._autocast_dtype)

    def release(self) -> None:
        self._module = None


def frozen_twin(
    model: nn.Module,
    owns: Callable[[nn.Parameter], bool],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """A second tree of modules: parameters that `owns` picks are copied, all others are the very same tensors.

    Buffers are copied (they are small, and a training forward may write to them). Parameters that must change dtype
    or device are copied too, so that the given model never does; buffers keep their dtype, as rotary frequencies
    must. The copy of a sharded parameter is sharded alike, and is never whole for longer than it takes to cut it.
    """
    if is_fsdp(model):
        return twin_of_fsdp(model, dtype)

    def copies(parameter: nn.Parameter) -> bool:
        casts = dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype
        return casts or owns(parameter) or (device is not None and parameter.device != device)

    kept = {id(parameter): parameter for parameter in model.parameters() if not copies(parameter)}
    kept |= {id(p): copy_of_sharded(p, dtype) for p in model.parameters() if id(p) not in kept and is_sharded(p)}
    twin = copy.deepcopy(model, dict(kept))
    for module in twin.modules():
        if "_original_forward" in vars(module):  # accelerate's autocast wrapper still points to the original
            vars(module).pop("_original_forward")
            vars(module).pop("forward", None)
    for parameter in twin.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for module in twin.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return twin.eval()


def _refuse_lost_hooks(model: nn.Module, shard: Sharding | None) -> None:
    """Refuses a model of ZeRO-3 whose copy could not gather its own weights."""
    if shard is None and has_shards(model) and not is_fsdp(model):
        raise ReferenceModelError(
            asked="A frozen copy of a model whose parameters are partitioned (ZeRO-3, or another sharding).",
            why="The copy would have parts of weights, and nothing that gathers them for a forward.",
            instead="Train with `DPOTrainer(deepspeed=...)`, pass `shard`, or build the reference before the model is "
            "sharded.",
        )


def _storage(parameter: torch.Tensor) -> int:
    parameter = local_part(parameter)  # all partitioned ones have the same, empty storage
    return parameter.untyped_storage().data_ptr()


def _storages(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {_storage(parameter) for parameter in parameters}
