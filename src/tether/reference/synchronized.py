"""`SynchronizedReference`: TR-DPO, a reference that follows the policy.

Wraps a source that owns its weights; knows the schedule and what belongs in a checkpoint. The source's
`update_groups` define what moves, and how.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tether.distributed import forget_gathered
from tether.errors import ConfigurationError, ResumeError
from tether.models.finite import check_weights
from tether.reference.base import Kind, Traits
from tether.reference.identity import ReferenceIdentity, num_bytes
from tether.reference.updates.groups import MovableReference, Tensors, UpdateRule, check_movable
from tether.reference.updates.low_rank import truncation_error
from tether.reference.wrapping import WrappingReference

_TENSORS, _SCHEDULE = "synchronized_reference.safetensors", "synchronized_reference.json"


class SynchronizedReference(WrappingReference[MovableReference]):
    """`pi_ref <- alpha * pi_theta + (1 - alpha) * pi_ref` every `every` optimizer steps.

    Gorbatovski et al. 2024 (TR-DPO), arXiv 2404.09656. Steps are the optimizer's, and the update comes after the
    step. Tensors are matched by name; those that the policy does not train are shared with it and need no update.

    Args:
        source: A reference with its own copy of every weight that the policy trains.
        policy: Returns the unwrapped policy when a sync is due.
        alpha: Weight of the policy in each sync, in [0, 1]; 1 is the hard update.
        every: Optimizer steps between syncs.
        max_rank: Largest rank of an averaged LoRA update; by default twice the policy's, layer by layer.

    Raises:
        ReferenceModelError: If the source's tensors do not match the policy's, by name and shape.
        ConfigurationError: If something that the policy trains has no average, or no rank to limit; names it.
    """

    kind = Kind("synchronized", "weights that follow the policy (TR-DPO)", paper="2404.09656")

    def __init__(
        self,
        source: MovableReference,
        policy: Callable[[], nn.Module],
        *,
        alpha: float = 0.6,
        every: int,
        max_rank: int | None = None,
    ) -> None:
        check_movable(source, "SynchronizedReference")
        if every < 1:
            raise ConfigurationError(
                problem=f"Cannot use `SynchronizedReference(every={every})`: it is the number of optimizer steps "
                "between syncs, so it must be at least 1.",
                instead="Write a whole number of at least 1.",
            )
        super().__init__(source)
        self._policy = policy
        self._rule, self._every = UpdateRule(alpha, max_rank), every
        self._groups = source.update_groups(policy(), self._rule)
        self._state: dict[str, Tensor] = {}
        own = source.tensors()
        for group in self._groups:
            self._state |= group.start(own)
        self._num_syncs = 0

    @property
    def follows(self) -> nn.Module:
        """The policy it follows."""
        return self._policy()

    @property
    def identity(self) -> ReferenceIdentity:
        """The source's, as it was at the start; later weights are in the checkpoint."""
        return replace(self._source.identity, kind=self.kind.name)

    @property
    def num_syncs(self) -> int:
        """How often the reference has moved."""
        return self._num_syncs

    @property
    def traits(self) -> Traits:
        return replace(self._source.traits, moves=True)

    @property
    def extra_bytes(self) -> int:
        return super().extra_bytes + num_bytes(self._state.values())

    def figures(self) -> dict[str, float]:
        """`reference/syncs`, and `reference/truncation` where low-rank updates are averaged."""
        error = truncation_error(self._state)
        return {"reference/syncs": float(self._num_syncs)} | ({} if error is None else {"reference/truncation": error})

    def advance(self, step: int) -> bool:
        if step % self._every:
            return False
        check_weights(self._policy(), "let the reference follow the policy", step)
        policy = _tensors_of(self._policy())
        own = self._source.tensors()
        with torch.no_grad():
            for group in self._groups:  # one at a time, so that no second set of weights is ever held
                moved = group.move(self._shards(group.names, policy), own, self._state)
                self._state |= moved.state
                for name, tensor in moved.tensors.items():
                    self._source.write(name, tensor)
        self._num_syncs += 1
        return True

    def _shards(self, names: Iterable[str], tensors: Tensors) -> dict[str, Tensor]:
        """This process's shards of some tensors, sharded as the reference's own."""
        return {name: self._source.shard(name, tensors[name]) for name in names}

    def save(self, folder: Path | None) -> None:
        own = self._source.tensors()
        held = {f"weight.{name}": own[name] for group in self._groups for name in group.names} | self._state
        state: dict[str, Tensor] = {}
        for key, shard in held.items():  # gathered one at a time, and kept by the process that writes
            tensor = self._source.gather(_name(key), shard)
            if folder is not None:
                state[key] = tensor.detach().cpu().contiguous()
        if folder is None:
            return
        save_file(state, folder / _TENSORS)
        (folder / _SCHEDULE).write_text(json.dumps(self._schedule() | {"num_syncs": self._num_syncs}))

    def load(self, folder: Path) -> None:
        if not (folder / _SCHEDULE).is_file():
            raise ResumeError(
                problem=f"Cannot resume from {folder.parent} with `sync_ref_model=True`: the checkpoint holds no "
                "synchronized reference, so the average that its run had reached is lost.",
                instead="Resume from a checkpoint of a run with `sync_ref_model=True` (and without "
                "`save_only_model=True`), or start a new run from its weights.",
            )
        saved = json.loads((folder / _SCHEDULE).read_text())
        if {key: saved.get(key) for key in self._schedule()} != self._schedule():
            raise ResumeError(
                problem=f"Cannot resume from {folder.parent} with the sync schedule {self._schedule()}: the checkpoint "
                f"was saved with {saved}.",
                instead="Use the checkpoint's `ref_model_mixup_alpha`, `ref_model_sync_rank` and "
                "`ref_model_sync_steps`, or start a new run.",
            )
        tensors = load_file(folder / _TENSORS)
        with torch.no_grad():
            for group in self._groups:
                for name in group.names:
                    self._source.write(name, self._source.shard(name, tensors[f"weight.{name}"]))
            self._state = {
                key: self._source.shard(_name(key), tensors[key]).to(tensor.device)
                for key, tensor in self._state.items()
            }
        self._num_syncs = int(saved["num_syncs"])

    def _schedule(self) -> dict[str, Any]:
        return {"alpha": self._rule.alpha, "rank": self._rule.max_rank, "every": self._every}

    def release(self) -> None:
        """Does nothing: a synchronized reference is needed to the end."""


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    forget_gathered(model)  # before names are looked up: FSDP2 puts other objects there while they are gathered
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _name(key: str) -> str:
    """The tensor that an entry of the state belongs to: `lm_head.weight` for `residual.lm_head.weight`."""
    return key.partition(".")[2]
