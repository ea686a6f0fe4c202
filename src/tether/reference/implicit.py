"""`ImplicitReference`: the policy's own base, with its adapter off or with the adapter it started from.

Knows what an adapter changes; `adapter_state` switches it. Holds no second set of base weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from tether.distributed import (
    device_of,
    exchanged,
    forget_gathered,
    full_shape,
    gather,
    has_shards,
    local_shard,
    modules_of,
    shard_like,
)
from tether.errors import ArgumentTypeError, ConfigurationError, DriftError, ReferenceModelError
from tether.reference.adapter_state import adapter_off, adapter_on, adapter_settings
from tether.reference.adapter_tensors import base_tensors, beside_base, is_adapter_model
from tether.reference.base import Kind, Traits, compute_dtype_name, score_without_gradient
from tether.reference.export import export_adapter
from tether.reference.held import Slot, slots_of
from tether.reference.identity import ReferenceIdentity, digest_tensors, identity_digests, num_bytes
from tether.reference.updates.adapters import adapter_groups, refused_shards
from tether.reference.updates.groups import MovableReference, Tensors, UpdateGroup, UpdateRule
from tether.refusals import refuse
from tether.scoring import SCORING_VERSION, Reads, reads_of, rotary_limit
from tether.scoring.evaluation import evaluation_mode
from tether.types import PairBatch, ResponseLogProbs

_MOST_WRITTEN = 1 << 20  # numbers in a buffer


class ImplicitReference(MovableReference):
    """The implicit reference: the policy without what training adds to it.

    A *fresh* adapter, whose initial delta is exactly zero, is simply switched off. An adapter that already changes
    the base (a continued one, PiSSA, random prompts) is kept as a frozen copy of its tensors. Either way, tensors
    that train and still reach the forward (such as trained biases) are swapped for frozen copies around the pass, in
    place and by pointer: no weight is moved, and PEFT never has to hold a second adapter. A copy may have another
    rank than the policy's adapter, as an average has, but not another dtype: that would cut the tensor off from the
    hooks that reduce its gradient.

    Must be built before the first optimizer step. A pass must come before the policy's forward of the same step,
    because that forward's graph refers to the policy's tensors. Training may shard the policy after this was built.

    Args:
        policy: The PEFT model that trains.
        autocast_dtype: Run under autocast with this dtype, as the policy does; by default that of the autocast which is
            on when the reference is made.
        moves: The reference will follow the policy, so the adapter is copied even if it changes nothing yet.
    """

    kind = Kind("implicit", "the policy's own base, with its adapter off or as it started")

    def __init__(self, policy: PeftModel, *, autocast_dtype: torch.dtype | None = None, moves: bool = False) -> None:
        if not is_adapter_model(policy):
            raise ArgumentTypeError(
                problem=f"Cannot make an `ImplicitReference` of a {type(policy).__name__}: it has no adapter to switch "
                "off.",
                instead="Pass a `PeftModel`, or write `ExplicitReference.of_policy(policy)`.",
            )
        self._policy = policy
        device = device_of(policy).type
        if autocast_dtype is None and torch.is_autocast_enabled(device):
            autocast_dtype = torch.get_autocast_dtype(device)
        self._autocast_dtype = autocast_dtype
        self._num_passes = 0
        trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        without = cache(lambda: _probed_off(policy, trainable))  # one forward for both questions
        self._starts_at_zero = has_zero_delta(policy, without)
        self._adapter_off = self._starts_at_zero and not moves
        kept = _reaching_forward(policy, trainable, without) if self._adapter_off else trainable
        # By name: FSDP2 puts other parameter objects into the modules when it shards them.
        self._copies = {name: local_shard(parameter).clone() for name, parameter in kept.items()}
        self._buffers = _written_buffers(policy)
        self._active = list(policy.active_adapters)
        tensors = self._tensors()
        own = {id(t) for t in trainable.values()} | {id(slot.tensor) for slot, _ in self._buffers}
        self._shared = slots_of(policy, {name: tensor for name, tensor in tensors.items() if id(tensor) not in own})
        self._digests = digest_tensors(tensors)
        base = policy.get_base_model()
        of_adapter = self._digests.keys() - base_tensors(base).keys()
        adapter_config = None
        if not self._adapter_off:
            with adapter_on(policy):
                adapter_config = adapter_settings(policy)
        self._identity = ReferenceIdentity(
            kind=self.kind.name,
            **identity_digests(self._digests, base.config, of_adapter, adapter_config),
            compute_dtype=compute_dtype_name(policy, autocast_dtype),
            scoring_version=SCORING_VERSION,
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that shapes the reference's answers; the kept ones only while exchanged."""
        forget_gathered(self._policy)
        tensors = base_tensors(self._policy.get_base_model())
        if not self._starts_at_zero:
            # Not only what trains: a frozen projection, or a second adapter, shapes the answers as well.
            tensors |= beside_base(self._policy, tensors)
        return tensors

    def changed_tensors(self) -> list[str]:
        with self._exchanged():
            now = digest_tensors(self._tensors())
        return [name for name, digest in self._digests.items() if now.get(name) != digest]

    def held_by_others(self) -> list[Slot]:
        """Of the base, and of what of an adapter is not copied because it did not train when this was made."""
        return self._shared

    def keep(self, names: Collection[str]) -> bool:
        slots = {id(slot.tensor): slot for slot in self._shared if slot.name in names}
        kept = {name: p for name, p in self._policy.named_parameters() if id(p) in slots}
        for name, parameter in kept.items():
            self._copies[name] = slots[id(parameter)].kept = local_shard(parameter).clone()
        return len(kept) == len(slots)

    @property
    def length_limit(self) -> int | None:
        return rotary_limit(self._policy)

    @property
    def reads(self) -> Reads | None:
        return reads_of(self._policy)

    @property
    def identity(self) -> ReferenceIdentity:
        return self._identity

    @property
    def num_passes(self) -> int:
        return self._num_passes

    @property
    def extra_bytes(self) -> int:
        return num_bytes(self._copies.values())

    @property
    def traits(self) -> Traits:
        return Traits(means_policy=True, is_collective=has_shards(self._policy), runs_in_policy=True)

    @contextmanager
    def in_policy(self) -> Iterator[None]:
        state = adapter_off if self._adapter_off else adapter_on
        if not self._adapter_off and list(self._policy.active_adapters) != self._active:
            raise DriftError(
                problem=f"Cannot use the implicit reference: it is the adapter {self._active}, and "
                f"{list(self._policy.active_adapters)} is active now.",
                instead=f"Make it active again, `model.set_adapter({self._active[0]!r})`, or build a new trainer with "
                "the other one.",
            )
        with state(self._policy), self._exchanged():
            yield

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        self._num_passes += 1
        with self.in_policy():
            return score_without_gradient(self._policy, batch, self._autocast_dtype)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        with _put_in(self._buffers), self._exchanged_parameters():
            yield

    @contextmanager
    def _exchanged_parameters(self) -> Iterator[None]:
        if not self._copies:
            yield
            return
        forget_gathered(self._policy)
        parameters = dict(self._policy.named_parameters())
        self._copies = {name: shard_like(values, parameters[name]) for name, values in self._copies.items()}
        with exchanged(self._policy, self._copies):
            yield

    def tensors(self) -> Tensors:
        refuse(refused_shards(self._policy))  # also one that was sharded after this was built
        return dict(self._copies)

    def write(self, name: str, tensor: Tensor) -> None:
        assert tensor.dtype == self._copies[name].dtype, "another dtype would cut the parameter off from its hooks"
        self._copies[name] = tensor.detach().to(self._copies[name].device).contiguous()

    def update_groups(self, policy: nn.Module, rule: UpdateRule) -> list[UpdateGroup]:
        """See `adapter_groups`."""
        if self._adapter_off:
            raise ConfigurationError(
                problem="Cannot synchronize a reference whose adapter is switched off: it has no adapter of its own to "
                "move.",
                instead="Build it with `ImplicitReference(policy, moves=True)`.",
            )
        refuse(refused_shards(self._policy))
        return adapter_groups(self._policy, rule)

    def export(self, folder: Path | None, *, merged: bool = False) -> None:
        if self._adapter_off:
            raise ReferenceModelError(
                problem="Cannot save the reference: it is the base model with the adapter off, so it has no adapter of "
                "its own.",
                instead="Use the model that you started from: it has the same weights.",
            )
        if has_shards(self._policy):
            raise ReferenceModelError(
                problem="Cannot save the implicit reference of a sharded policy (ZeRO-3 or FSDP2): it is a state of "
                "the policy's own tensors, and each process holds only a shard of each.",
                instead="Save it in a run that starts from the same weights without sharding, or with DDP or ZeRO-2.",
            )
        if folder is None:
            return
        with self._exchanged():
            export_adapter(self._policy, folder, merged=merged)


def _written_buffers(policy: PeftModel) -> list[tuple[Slot, Tensor]]:
    """Copies of the buffers that a training forward may write to, as running means are written, and their places.

    Those are small and saved with the model; what a quantized layer keeps as a buffer is large.
    """
    saved = policy.state_dict().keys()
    named = {name: tensor for name, tensor in policy.named_buffers() if name in saved}
    small = {name: tensor for name, tensor in named.items() if tensor.numel() <= _MOST_WRITTEN}
    return [(slot, slot.holder[slot.key].clone()) for slot in slots_of(policy, small)]


@contextmanager
def _put_in(buffers: list[tuple[Slot, Tensor]]) -> Iterator[None]:
    """While open, the places have these tensors."""
    before = [slot.holder[slot.key] for slot, _ in buffers]
    try:
        for slot, tensor in buffers:
            slot.holder[slot.key] = tensor.to(slot.holder[slot.key].device)
        yield
    finally:
        for (slot, _), tensor in zip(buffers, before, strict=True):
            slot.holder[slot.key] = tensor


def has_zero_delta(policy: PeftModel, without: Callable[[], Tensor]) -> bool:
    """Whether the adapter, as it is now, changes nothing: its logits equal the base's, bit for bit.

    Checked in two ways, because a probe may miss what it does not touch (an unrouted expert, a token's embedding, a
    vision tower): by the tensors, for types whose tensors show it, and by a forward with the adapter on against one
    with it off, for all others, which must be called in it.

    Args:
        policy: The policy.
        without: Gives the probe's logits with the adapter off.
    """
    if any(config.is_prompt_learning for config in policy.peft_config.values()):
        return False
    if has_shards(policy) and not _trains_only_what_is_switched_off(policy):
        return False
    if not all(map(_changes_nothing, modules_of(policy))):
        return False
    if has_shards(policy):
        return True
    untold = {
        module for module in modules_of(policy) if isinstance(module, BaseTunerLayer) and not _tensors_tell(module)
    }
    with _called(untold) as called:
        logits = _probed(policy).detach()
    return called == untold and torch.equal(logits, without())


@contextmanager
def _called(modules: Collection[nn.Module]) -> Iterator[set[nn.Module]]:
    """Those of the modules whose forward is called while open."""
    called: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(lambda module, _: called.add(module)).remove)
        yield called


def _tensors_tell(layer: nn.Module) -> bool:
    """Whether the tensors of an adapter's layer show if it changes anything (`_changes_nothing`)."""
    if isinstance(layer, TrainableTokensLayer):
        return True
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    return names - {"base_layer"} <= _FACTORS


def _changes_nothing(module: nn.Module) -> bool:
    """False where a module's adapter tensors by themselves show that it changes its base."""
    if isinstance(module, TrainableTokensLayer):
        rows: Any = module.get_base_layer().weight
        indices = module.token_indices
        return all(torch.equal(delta, rows[indices[name]]) for name, delta in module.trainable_tokens_delta.items())
    if isinstance(module, ModulesToSaveWrapper):
        original = module.original_module.state_dict(keep_vars=True)
        copies = [module.modules_to_save[name].state_dict(keep_vars=True) for name in module.active_adapters]
        return all(
            [torch.equal(gather(original[name]), gather(value)) for copy in copies for name, value in copy.items()]
        )
    return not isinstance(module, BaseTunerLayer) or _is_zero_pair(module)


def _trains_only_what_is_switched_off(policy: PeftModel) -> bool:
    """Whether only LoRA factors and `modules_to_save` train.

    These tensors alone show whether they change anything, and none reaches a forward with the adapter off. A sharded
    base can't be probed with a forward and a backward, so this is all there is to go by. Any other adapter is then
    kept as it was, which is also right and only costs its tensors.
    """
    known = _FACTORS | {"modules_to_save"}
    return all(known & set(name.split(".")) for name, parameter in policy.named_parameters() if parameter.requires_grad)


_FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


def _is_zero_pair(layer: BaseTunerLayer) -> bool:
    for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        for adapter in layer.active_adapters:
            factors = [getattr(layer, name, {}) for name in (first, second)]
            if all(adapter in factor for factor in factors):
                weights = [getattr(factor[adapter], "weight", factor[adapter]) for factor in factors]
                bias = getattr(factors[1][adapter], "bias", None)  # `lora_bias`
                if bias is not None and bool(gather(bias).any()):
                    return False
                if all(bool(gather(weight).any()) for weight in weights):
                    return False
    return True


def _reaching_forward(
    policy: PeftModel, trainable: Mapping[str, nn.Parameter], without: Callable[[], Tensor]
) -> dict[str, nn.Parameter]:
    """The trainable tensors that still change a forward with the adapter off.

    Those of the base do, whether the probe uses them (an expert, a vision tower) or not; a backward finds the others.
    """
    if has_shards(policy):
        return {}  # see `_trains_only_what_is_switched_off`
    with adapter_off(policy):  # which takes some adapters out of the model
        base = {id(tensor) for tensor in base_tensors(policy.get_base_model()).values()}
    logits, parameters = without(), list(trainable.values())
    grads: Any = [None] * len(parameters)
    if logits.requires_grad:
        grads = torch.autograd.grad(logits.float().sum(), parameters, allow_unused=True)
    each = zip(trainable.items(), grads, strict=True)
    return {name: p for (name, p), grad in each if grad is not None or id(p) in base}


def _probed_off(policy: PeftModel, trainable: Mapping[str, nn.Parameter]) -> Tensor:
    with adapter_off(policy):
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        return _probed(policy)


def _probed(policy: PeftModel) -> Tensor:
    """The logits of a few random tokens, with their graph: kernels may differ without one."""
    with torch.enable_grad(), evaluation_mode(policy):
        logits: Tensor = policy(input_ids=_probe_ids(policy), use_cache=False).logits
    return logits


def _probe_ids(policy: PeftModel) -> Tensor:
    embeddings: Any = policy.get_base_model().get_input_embeddings()  # type: ignore[operator]
    vocab_size = int(full_shape(embeddings.weight)[0])
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    ids = torch.randint(vocab_size, (2, 16), generator=generator)
    return ids.to(device_of(policy))
