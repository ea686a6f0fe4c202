"""The parts of a reference that follows the policy: tensors that move together, by which rule, and what they keep.

The contract, and the dense parts. Names and tensors only: knows no PEFT and no schedule. The arithmetic is in
`averaging`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tether.errors import ConfigurationError
from tether.reference.averaging import bema, soft_update, soft_update_with_residual
from tether.reference.base import Reference

Tensors = Mapping[str, Tensor]

RULES = ("soft", "hard", "bema", "factors")


@dataclass(frozen=True)
class UpdateRule:
    """How a reference follows the policy.

    Attributes:
        name: `soft`, the average of the weights; `hard`, the policy takes its place; `bema`, the bias-corrected
            average; `factors`, the average of LoRA's factors instead of the weights they make.
        alpha: Weight of the policy; 1 for `hard`, without meaning for `bema`.
        max_rank: Largest rank of an averaged LoRA update (for `bema` of its plain average); None for twice the
            policy's, layer by layer.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    name: str = "soft"
    alpha: float = 0.6
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            _refuse("ref_model_sync_rule", self.name, "There is no such rule.", f"One of {', '.join(RULES)}.")
        if not 0 <= self.alpha <= 1:
            _refuse("ref_model_mixup_alpha", self.alpha, "It is a weight in an average.", "A value in [0, 1].")
        if self.max_rank is not None and self.max_rank < 1:
            _refuse("ref_model_sync_rank", self.max_rank, "A matrix of rank 0 is zero.", "1 or more, or None.")

    @property
    def copies(self) -> bool:
        """Whether a sync simply copies the policy."""
        return self.name != "bema" and self.weight == 1

    @property
    def weight(self) -> float:
        """Weight of the policy in the average."""
        return 1.0 if self.name == "hard" else self.alpha


class Move(NamedTuple):
    """What a sync makes of a part: its tensors, and its state where that changed."""

    tensors: dict[str, Tensor]
    state: dict[str, Tensor]


class Part(ABC):
    """Tensors of the reference that move together.

    A part holds no tensors. What it needs beside the reference's (`state`) is handed in and out, so that one owner
    keeps, saves and restores it.
    """

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The tensors it moves."""

    @abstractmethod
    def start(self, policy: Tensors, reference: Tensors) -> dict[str, Tensor]:
        """The state before the first sync."""

    @abstractmethod
    def move(self, policy: Tensors, reference: Tensors, state: Tensors, num_syncs: int) -> Move:
        """One sync.

        Args:
            policy, reference: Their tensors by name.
            state: What `start`, or the last move, returned.
            num_syncs: Syncs before this one.
        """


class MovableReference(Reference):
    """A reference with weights of its own that can follow the policy."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """Its own tensors by name, as they are now; of sharded ones the parts that this process holds."""

    @abstractmethod
    def write(self, name: str, tensor: Tensor) -> None:
        """Replaces one of them, or this process's part of it."""

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What this process would hold of `tensor`, cut as its own tensor of that name is. Collective if one is cut."""
        return tensor.detach()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor of which `part` is what this process holds, cut as its own of that name. Collective so."""
        return part

    @abstractmethod
    def parts(self, policy: nn.Module, rule: UpdateRule) -> list[Part]:
        """All that the policy trains, in parts, each with its way to follow.

        Raises:
            ReferenceModelError: If policy and reference do not have the same tensors.
            ConfigurationError: If the rule has no meaning for something that trains; names it.
        """


@dataclass(frozen=True)
class DensePart(Part):
    """A tensor that is averaged element by element, in the reference's dtype.

    In low precision the rounding error is carried along in a residual, so that a small alpha is not lost.
    """

    name: str
    alpha: float

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def start(self, policy: Tensors, reference: Tensors) -> dict[str, Tensor]:
        tensor = reference[self.name]
        if tensor.dtype not in (torch.bfloat16, torch.float16) or self.alpha in (0, 1):
            return {}
        return {f"residual.{self.name}": torch.zeros_like(tensor, requires_grad=False)}

    def move(self, policy: Tensors, reference: Tensors, state: Tensors, num_syncs: int) -> Move:
        key = f"residual.{self.name}"
        old, new = reference[self.name], policy[self.name]
        if key not in state:
            return Move({self.name: soft_update(old, new, self.alpha)}, {})
        moved, residual = soft_update_with_residual(old, state[key], new, self.alpha)
        return Move({self.name: moved}, {key: residual})


def dense_part(name: str, rule: UpdateRule) -> Part:
    """A tensor that is averaged element by element, whatever the rule."""
    return BemaPart(name) if rule.name == "bema" else DensePart(name, rule.weight)


@dataclass(frozen=True)
class BemaPart(Part):
    """A tensor that becomes the bias-corrected average; the plain average and the start are kept beside it, in fp32."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def start(self, policy: Tensors, reference: Tensors) -> dict[str, Tensor]:
        initial = policy[self.name].detach()
        wide = torch.promote_types(initial.dtype, torch.float32)
        return {f"average.{self.name}": initial.to(wide, copy=True), f"initial.{self.name}": initial.clone()}

    def move(self, policy: Tensors, reference: Tensors, state: Tensors, num_syncs: int) -> Move:
        average, initial = state[f"average.{self.name}"], state[f"initial.{self.name}"]
        moved, corrected = bema(average, policy[self.name], initial, num_syncs)
        return Move({self.name: corrected.to(reference[self.name].dtype)}, {f"average.{self.name}": moved})


def _refuse(option: str, value: object, why: str, instead: str) -> None:
    raise ConfigurationError(asked=f"`{option}={value!r}`.", why=why, instead=f"Write: {instead}")
