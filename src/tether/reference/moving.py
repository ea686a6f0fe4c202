"""`MovingReference`: TR-DPO, a reference that follows the policy.

Wraps a source that owns its weights; knows the schedule and what of it belongs into a checkpoint, leaves the
arithmetic to `averaging`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tether.distributed import forget_gathered, local_part, part_like, whole, whole_of_part, whole_shape
from tether.errors import ReferenceModelError, ResumeError
from tether.reference.averaging import soft_update, soft_update_with_residual
from tether.reference.base import Reference
from tether.reference.frozen import FrozenReference
from tether.reference.identity import ReferenceIdentity, num_bytes
from tether.types import PairBatch, ResponseLogProbs

_TENSORS, _SCHEDULE = "moving_reference.safetensors", "moving_reference.json"


class MovingReference(Reference):
    """`pi_ref <- alpha * pi_theta + (1 - alpha) * pi_ref` every `every` optimizer steps.

    Gorbatovski et al. 2024 (TR-DPO), arXiv 2404.09656. The step counted is the optimizer's, and the update comes
    after it. Tensors are matched by name; what the policy does not train is shared with it and needs no update.

    Args:
        source: A reference that owns a copy of every weight the policy trains.
        policy: Gives the unwrapped policy when a sync is due.
        alpha: Weight of the policy in each sync, in [0, 1]; 1 is the hard update.
        every: Optimizer steps between syncs.

    Raises:
        ReferenceModelError: If the source's parameters do not match the policy's, by name and shape.
    """

    def __init__(self, source: FrozenReference, policy: Callable[[], nn.Module], *, alpha: float, every: int) -> None:
        module = source.module
        assert module is not None
        self._source, self._policy, self._module = source, policy, module
        self._alpha, self._every = alpha, every
        _check_same_parameters(policy(), module)
        trained = {name for name, parameter in policy().named_parameters() if parameter.requires_grad}
        forget_gathered(module)
        self._names = [name for name, _ in module.named_parameters() if name in trained]
        self._names += [name for name, buffer in module.named_buffers() if buffer.is_floating_point()]
        self._residuals = {
            name: torch.zeros_like(local_part(tensor))
            for name, tensor in self._tensors().items()
            if tensor.dtype in (torch.bfloat16, torch.float16) and alpha not in (0.0, 1.0)
        }
        self._num_syncs = 0

    def _tensors(self) -> dict[str, Tensor]:
        """What moves, of the reference; sharded tensors are averaged part by part, as both sides are cut alike."""
        forget_gathered(self._module)
        every = _named_tensors(self._module)
        return {name: every[name] for name in self._names}

    @property
    def identity(self) -> ReferenceIdentity:
        """The source's, as it was at the start: what has moved since is in the checkpoint."""
        return replace(self._source.identity, kind="moving")

    @property
    def num_passes(self) -> int:
        return self._source.num_passes

    @property
    def num_syncs(self) -> int:
        """How often the reference has moved."""
        return self._num_syncs

    @property
    def means_policy(self) -> bool:
        """At the start, before the first sync."""
        return self._source.means_policy

    @property
    def moves(self) -> bool:
        return True

    @property
    def extra_bytes(self) -> int:
        return self._source.extra_bytes + num_bytes(self._residuals.values())

    @property
    def module(self) -> nn.Module | None:
        return self._source.module

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        return self._source.log_probs(batch)

    def advance(self, step: int) -> bool:
        if step % self._every:
            return False
        policy = self._policy()
        forget_gathered(policy)
        current = _named_tensors(policy)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                self._sync(name, local_part(tensor), part_like(current[name], tensor))
        self._num_syncs += 1
        return True

    def _sync(self, name: str, reference: Tensor, policy: Tensor) -> None:
        residual = self._residuals.get(name)
        if residual is None:
            reference.copy_(soft_update(reference, policy, self._alpha))
        else:
            moved, carried = soft_update_with_residual(reference, residual, policy, self._alpha)
            reference.copy_(moved)
            residual.copy_(carried)

    @property
    def is_collective(self) -> bool:
        return self._source.is_collective

    def save(self, folder: Path | None) -> None:
        state: dict[str, Tensor] = {}
        for name, tensor in self._tensors().items():  # gathered one at a time, and kept by the process that writes
            values = {f"weight.{name}": whole(tensor)}
            if name in self._residuals:
                values[f"residual.{name}"] = whole_of_part(self._residuals[name], self._module, name)
            if folder is not None:
                state |= {key: value.cpu().contiguous() for key, value in values.items()}
        if folder is None:
            return
        save_file(state, folder / _TENSORS)
        (folder / _SCHEDULE).write_text(json.dumps(self._schedule() | {"num_syncs": self._num_syncs}))

    def load(self, folder: Path) -> None:
        if not (folder / _SCHEDULE).is_file():
            raise ResumeError(
                asked=f"Resuming with `sync_ref_model=True` from {folder.parent}.",
                why="That checkpoint holds no moving reference, so the average reached there is lost.",
                instead="Resume from a checkpoint of a run with `sync_ref_model=True` (and without "
                "`save_only_model=True`), or start a new run from its weights.",
            )
        saved = json.loads((folder / _SCHEDULE).read_text())
        if {key: saved[key] for key in self._schedule()} != self._schedule():
            raise ResumeError(
                asked=f"Resuming with the sync schedule {self._schedule()}.",
                why=f"The checkpoint {folder.parent} was made with another one: {saved}.",
                instead="Use the checkpoint's `ref_model_mixup_alpha` and `ref_model_sync_steps`, or start a new run.",
            )
        tensors = load_file(folder / _TENSORS)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                local_part(tensor).copy_(part_like(tensors[f"weight.{name}"], tensor))
                if name in self._residuals:
                    self._residuals[name].copy_(part_like(tensors[f"residual.{name}"], tensor))
        self._num_syncs = int(saved["num_syncs"])

    def _schedule(self) -> dict[str, float]:
        return {"alpha": self._alpha, "every": self._every}

    def release(self) -> None:
        """Nothing: a moving reference is needed to the end."""


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_same_parameters(policy: nn.Module, reference: nn.Module) -> None:
    own, other = ({name: whole_shape(p) for name, p in model.named_parameters()} for model in (policy, reference))
    differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if differing:
        raise ReferenceModelError(
            asked="`sync_ref_model=True` with a `ref_model` of other parameters than the policy's.",
            why=f"An average of weights needs the same tensors on both sides; {len(differing)} differ, "
            f"{differing[0]!r} among them.",
            instead="Pass a `ref_model` of the policy's architecture and size, or set `sync_ref_model=False`.",
        )
