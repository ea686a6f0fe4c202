"""The update groups of a reference that follows the policy: tensors that move together, by which rule.

The contract, and the dense groups. Names and tensors only: knows no PEFT and no schedule. The arithmetic is in
`averaging`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tether.errors import ArgumentTypeError
from tether.reference.base import Reference
from tether.reference.updates.averaging import soft_update, soft_update_with_residual
from tether.refusals import Refusal, of_option, refuse

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class UpdateRule:
    """How a reference follows the policy: `pi_ref <- alpha * pi_theta + (1 - alpha) * pi_ref`.

    Attributes:
        alpha: Weight of the policy; 1 puts it in the reference's place.
        max_rank: Largest rank of an averaged LoRA update; None for twice the policy's, layer by layer.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    alpha: float = 0.6
    max_rank: int | None = None

    def __post_init__(self) -> None:
        refuse(refused_rule(self.alpha, self.max_rank))


def refused_rule(alpha: float, max_rank: int | None) -> Iterator[Refusal]:
    """Values out of range."""
    if not 0 <= alpha <= 1:
        why = "it is the policy's weight in an average with the reference"
        yield of_option("ref_model_mixup_alpha", alpha, why, "Write a value in [0, 1].")
    if max_rank is not None and max_rank < 1:
        why = "it is the rank of an averaged LoRA update, and a matrix of rank 0 is zero"
        yield of_option("ref_model_sync_rank", max_rank, why, "Write 1 or more, or None.")
    elif max_rank is not None and alpha == 1:
        why = "a copy has the policy's own rank"
        instead = "Leave `ref_model_sync_rank` out, or write an alpha below 1."
        yield of_option("ref_model_sync_rank", max_rank, why, instead, "with `ref_model_mixup_alpha=1`")


class Move(NamedTuple):
    """The result of one sync of a group: its new tensors, and its state where that changed."""

    tensors: dict[str, Tensor]
    state: dict[str, Tensor]


class UpdateGroup(ABC):
    """Tensors of the reference that move together.

    A group holds no tensors. What it keeps beside the reference's (`state`) is passed in and returned, so that one
    owner keeps, saves and restores it.
    """

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of its tensors."""

    @abstractmethod
    def start(self, reference: Tensors) -> dict[str, Tensor]:
        """The state before the first sync."""

    @abstractmethod
    def move(self, policy: Tensors, reference: Tensors, state: Tensors) -> Move:
        """One sync.

        Args:
            policy, reference: Their tensors by name.
            state: What `start`, or the last move, returned.
        """


def check_movable(source: Reference, wrapper: str) -> None:
    """Refuses a source that cannot move.

    Raises:
        ArgumentTypeError: Names both.
    """
    if not isinstance(source, MovableReference):
        raise ArgumentTypeError(
            problem=f"Cannot make a {wrapper} of a {type(source).__name__}: only a reference with its own weights can "
            "move.",
            instead=f"Pass an `ExplicitReference` or an `ImplicitReference(policy, moves=True)`; put other wrappers "
            f"around the {wrapper}.",
        )


class MovableReference(Reference):
    """A reference with weights of its own, which can follow the policy."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """Its own tensors by name, as they are now; of sharded ones this process's shards."""

    @abstractmethod
    def write(self, name: str, tensor: Tensor) -> None:
        """Replaces one of them, or this process's shard of it."""

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """This process's shard of `tensor`, sharded as its own of that name. Collective if either is sharded."""
        return tensor.detach()

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """The full tensor of a shard, sharded as its own of that name. Collective if that is sharded."""
        return shard

    @abstractmethod
    def update_groups(self, policy: nn.Module, rule: UpdateRule) -> list[UpdateGroup]:
        """Everything that the policy trains, in groups, each with its own update.

        Raises:
            ReferenceModelError: If policy and reference do not have the same tensors.
            ConfigurationError: If the rule does not apply to something that trains; names it.
        """


@dataclass(frozen=True)
class DenseGroup(UpdateGroup):
    """A tensor that is averaged element by element, in the reference's dtype.

    In low precision the rounding error is carried along in a residual, so that a small alpha is not lost.
    """

    name: str
    alpha: float

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def start(self, reference: Tensors) -> dict[str, Tensor]:
        tensor = reference[self.name]
        if tensor.dtype not in (torch.bfloat16, torch.float16) or self.alpha in (0, 1):
            return {}
        return {f"residual.{self.name}": torch.zeros_like(tensor, requires_grad=False)}

    def move(self, policy: Tensors, reference: Tensors, state: Tensors) -> Move:
        key = f"residual.{self.name}"
        old, new = reference[self.name], policy[self.name]
        if key not in state:
            return Move({self.name: soft_update(old, new, self.alpha)}, {})
        moved, residual = soft_update_with_residual(old, state[key], new, self.alpha)
        return Move({self.name: moved}, {key: residual})
