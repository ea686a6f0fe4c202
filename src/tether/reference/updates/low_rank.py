"""Update groups of low rank: LoRA's and DoRA's updates, averaged as the weights they make.

Names and tensors only: knows no PEFT. The arithmetic is in `averaging`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tether.reference.updates.averaging import (
    LowRank,
    average_dora,
    average_low_rank,
    low_rank_norm,
    soft_update,
)
from tether.reference.updates.groups import Move, Tensors, UpdateGroup


class Layout(NamedTuple):
    """How a layer keeps the factors of its update: from two tensors to matrices, and back at any rank."""

    read: Callable[[Tensor, Tensor], LowRank]
    write: Callable[[LowRank], tuple[Tensor, Tensor]]


MATRIX = Layout(LowRank, lambda pair: (pair.B, pair.A))


def convolution(kernel: tuple[int, ...]) -> Layout:
    """`B` `[out, rank, 1, ...]` and `A` `[rank, in, *kernel]`, the kernel without the channels."""
    ones = (1,) * len(kernel)
    return Layout(
        lambda b, a: LowRank(b.flatten(1), a.flatten(1)),
        lambda pair: (pair.B.reshape(*pair.B.shape, *ones), pair.A.reshape(pair.A.shape[0], -1, *kernel)),
    )


def experts(num: int) -> Layout:
    """`B` `[out, rank * experts]`, expert by expert the innermost, and `A` `[experts * rank, in]`."""
    return Layout(
        lambda b, a: LowRank(b.reshape(b.shape[0], -1, num).permute(2, 0, 1), a.reshape(num, -1, a.shape[-1])),
        lambda pair: (
            pair.B.permute(1, 2, 0).reshape(pair.B.shape[1], -1).contiguous(),
            pair.A.reshape(-1, pair.A.shape[-1]).contiguous(),
        ),
    )


@dataclass(frozen=True)
class LowRankGroup(UpdateGroup):
    """A LoRA update `s B A`, averaged as the matrix it is, at up to `max_rank`.

    `truncation` in the state is a bound on how far the update is from the exact average, and the update's norm (both
    Frobenius): errors of earlier syncs fade with the average, `e <- (1 - alpha) e + new`. Factors in low precision
    have a `master` in fp32 there.

    Attributes:
        b, a: Names of the factors.
        scaling: `s`, the same for policy and reference.
        alpha: Weight of the policy.
        max_rank: Largest rank of the average.
        layout: How the layer keeps its factors.
        bias: Name of the bias that belongs to `B`, if it has one.
    """

    b: str
    a: str
    scaling: float
    alpha: float
    max_rank: int
    layout: Layout = MATRIX
    bias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.b, self.a) if self.bias is None else (self.b, self.a, self.bias)

    def start(self, reference: Tensors) -> dict[str, Tensor]:
        return {} if self.alpha in (0, 1) else _started(self.a, self.names, reference)

    def move(self, policy: Tensors, reference: Tensors, state: Tensors) -> Move:
        if self.alpha in (0, 1):
            return _copied(self.names, policy if self.alpha else reference)
        old, new = _masters(self.names, reference, state), policy
        averaged, error = average_low_rank(self._factors(old), self._factors(new), self.alpha, self.max_rank)
        b, a = self.layout.write(averaged)
        moved = {self.b: b, self.a: a}
        if self.bias is not None:
            moved[self.bias] = soft_update(_wide(old[self.bias]), new[self.bias], self.alpha)
        size = abs(self.scaling)
        truncation = _truncation(self.a, state, self.alpha, size * error, size * low_rank_norm(averaged))
        return _rounded(moved, reference, truncation)

    def _factors(self, side: Tensors) -> LowRank:
        return self.layout.read(_wide(side[self.b]), _wide(side[self.a]))


@dataclass(frozen=True)
class DoraGroup(UpdateGroup):
    """A DoRA update, averaged as the weight it makes: `m (W + s B A) / ||W + s B A||`, row by row.

    Attributes:
        b, a, magnitude: Names of the factors and of `m`.
        weight: Gives the frozen base `W`, `[rows, columns]`.
        scaling: `s`.
        alpha: Weight of the policy.
        max_rank: Largest rank of the average.
    """

    b: str
    a: str
    magnitude: str
    weight: Callable[[], Tensor]
    scaling: float
    alpha: float
    max_rank: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.b, self.a, self.magnitude)

    def start(self, reference: Tensors) -> dict[str, Tensor]:
        return {} if self.alpha in (0, 1) else _started(self.a, self.names, reference)

    def move(self, policy: Tensors, reference: Tensors, state: Tensors) -> Move:
        if self.alpha in (0, 1):
            return _copied(self.names, policy if self.alpha else reference)
        old, new = (
            (LowRank(_wide(side[self.b]), _wide(side[self.a])), _wide(side[self.magnitude]))
            for side in (_masters(self.names, reference, state), policy)
        )
        averaged, magnitude, error = average_dora(self.weight(), old, new, self.alpha, self.scaling, self.max_rank)
        moved = {self.b: averaged.B, self.a: averaged.A, self.magnitude: magnitude}
        norm = abs(self.scaling) * low_rank_norm(averaged)
        return _rounded(moved, reference, _truncation(self.a, state, self.alpha, error, norm))


def truncation_error(state: Tensors) -> float | None:
    """How far all low-rank updates together are from their exact average, relative to their norm; None without any.

    A bound: the triangle inequality over the syncs.
    """
    found = [value for key, value in state.items() if key.startswith("truncation.")]
    if not found:
        return None
    error, norm = torch.stack(found).square().sum(0).sqrt().tolist()
    return error / norm if norm else 0.0


def _started(key: str, names: tuple[str, ...], reference: Tensors) -> dict[str, Tensor]:
    """The state of a low-rank group before its first sync: no error yet, and masters where less than fp32 is held."""
    masters = {f"master.{n}": _wide(reference[n]) for n in names if _wide(reference[n]).dtype != reference[n].dtype}
    return {f"truncation.{key}": torch.zeros(2, dtype=torch.float64)} | masters


def _masters(names: tuple[str, ...], reference: Tensors, state: Tensors) -> dict[str, Tensor]:
    return {name: state.get(f"master.{name}", reference[name]) for name in names}


def _rounded(moved: dict[str, Tensor], reference: Tensors, state: dict[str, Tensor]) -> Move:
    """In the dtype the reference is held in; what that rounds away stays in the master."""
    masters = {f"master.{name}": tensor for name, tensor in moved.items() if tensor.dtype != reference[name].dtype}
    return Move({name: tensor.to(reference[name].dtype) for name, tensor in moved.items()}, state | masters)


def _truncation(name: str, state: Tensors, alpha: float, error: float, norm: float) -> dict[str, Tensor]:
    before = float(state[f"truncation.{name}"][0])
    return {f"truncation.{name}": torch.tensor([(1 - alpha) * before + error, norm], dtype=torch.float64)}


def _copied(names: tuple[str, ...], side: Tensors) -> Move:
    return Move({name: side[name].detach().clone() for name in names}, {})


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32: factors are rebuilt at every sync, and would collect the rounding errors of a lower precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
