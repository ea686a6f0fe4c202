"""`BemaReference`: a reference whose weights are set from outside, by an averaging callback.

Knows how to take weights and which of them belong in a checkpoint; knows no rule and no schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.errors import ReferenceModelError, ResumeError
from tether.reference.base import Kind, Traits
from tether.reference.identity import ReferenceIdentity
from tether.reference.updates.groups import MovableReference, check_movable
from tether.reference.wrapping import WrappingReference

_TENSORS = "bema_reference.safetensors"


class BemaReference(WrappingReference[MovableReference]):
    """`pi_ref` has the weights that `take` was last given; before that, the source's.

    Args:
        source: A reference with its own copy of every weight that will be set.
    """

    kind = Kind("bema", "weights that follow an average of the policy's (BEMA)", paper="2508.00180")

    def __init__(self, source: MovableReference) -> None:
        check_movable(source, "BemaReference")
        super().__init__(source)
        self._taken: set[str] = set()

    @property
    def identity(self) -> ReferenceIdentity:
        """The source's, as it was at the start; later weights are in the checkpoint."""
        return replace(self._source.identity, kind=self.kind.name)

    @property
    def traits(self) -> Traits:
        return replace(self._source.traits, moves=True)

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Sets some of the parameters, by their names in the policy, cast to the reference's dtype.

        Raises:
            ReferenceModelError: If the reference has no such parameter.
        """
        own = self._source.tensors()
        for name, weight in weights.items():
            if name not in own or own[name].shape != weight.shape:
                raise ReferenceModelError(
                    problem=f"Cannot update the reference with the policy's average: it has no parameter `{name}` of "
                    f"the shape {tuple(weight.shape)}, so its architecture is not the policy's.",
                    instead="Pass a `ref_model` of the policy's architecture and size, or leave `ref_model` out.",
                )
            self._source.write(name, weight.to(own[name].dtype))
        self._taken |= weights.keys()

    def save(self, folder: Path | None) -> None:
        if folder is None:  # never sharded, so this process has nothing to contribute
            return
        own = self._source.tensors()
        taken = {name: own[name].detach().cpu().contiguous() for name in sorted(self._taken)}
        save_file(taken, folder / _TENSORS)

    def load(self, folder: Path) -> None:
        if not (folder / _TENSORS).is_file():
            raise ResumeError(
                problem=f"Cannot resume from {folder.parent} with `BEMACallback(update_ref_model=True)`: the "
                "checkpoint does not hold the weights that its reference had reached.",
                instead="Resume from a checkpoint of a run with `BEMACallback(update_ref_model=True)`, or start a "
                "new run.",
            )
        self.take(load_file(folder / _TENSORS))

    def release(self) -> None:
        """Does nothing: no one else holds the weights it was given."""
