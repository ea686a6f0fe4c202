"""How far rounding moves log-probs: measured on the run's own rows, and what it explains of a difference.

Two scorings of the same tokens with the same weights differ where the rows around them do: kernels then add in another
order. Knows batches and a function that scores them; knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tether.types import PairBatch, Response, ResponseLogProbs

# Reduces a tensor over the processes by `"sum"` or `"max"`, so that all reach the same verdict.
Reduce = Callable[[Tensor, str], Tensor]

# Where a mean rests on few tokens, this many standard errors; 100 runs of 1000 tokens came to 3 at most.
_ERRORS = 4.0
_ERRORS_LEFT = 3.5  # between what is allowed and a shift that is to be seen each time
_SHIFT = 1e-3  # allowed in any case, in nats per token, if the dtype's mean is not less
# Differences have heavy tails: of 2733 tokens the largest was 14 times the spread, their mean is 0.6 of it.
_LARGEST_IN_SPREADS = 20.0
_MEAN_IN_SPREADS = 1.5


class Tolerance(NamedTuple):
    """What is allowed of a `Gap`, in nats per token."""

    mean: float
    largest: float
    shift: float = float("inf")


# Scored alike: same dtype, batch, layout and kernels, which mostly gives the same bits. Allowed in any case.
ALIKE: dict[str, Tolerance] = {
    "float64": Tolerance(1e-6, 1e-5),
    "float32": Tolerance(1e-4, 1e-3),
    "tf32": Tolerance(1e-3, 2e-2),
    "float16": Tolerance(1e-3, 2e-2),
    "bfloat16": Tolerance(5e-3, 1e-1),
}


def unreduced(tensor: Tensor, how: str) -> Tensor:
    """What a process reduces alone."""
    return tensor


def coarser(one: str, other: str) -> str:
    """The dtype with fewer digits, of two names as `compute_dtype_name` gives them."""
    order = list(ALIKE)
    return max(one, other, key=order.index)


def rounds_coarsely(dtype: str) -> bool:
    """Whether rounding in that dtype can hide a shift worth seeing; in float32 it cannot."""
    return ALIKE[dtype] > ALIKE["float32"]


@dataclass(frozen=True)
class Gap:
    """The difference of two scorings of the same tokens.

    Rounding hardly moves the log-prob of a token that the model is sure of (`ResponseLogProbs.rounding_scales`). So
    the shift divides each difference by its token's scale: `sum(d / s) / sum(1 / s)`, which is `d` where all are off by
    the same `d`, and finds a small one under large scatter.

    Attributes:
        mean: Of the absolute differences, in nats.
        largest: Absolute difference, in nats.
        shift: Signed mean of the differences, tokens weighted by `1 / s`, in nats.
        spread: Root mean square of `d / s`.
        num: Values compared: tokens, or responses where only sums are known.
        scale_sums: Sums over the values of `s`, `s**2` and `1 / s`.
        largest_scale: The largest `s`.
    """

    mean: float
    largest: float
    shift: float
    spread: float
    num: float
    scale_sums: tuple[float, float, float]
    largest_scale: float

    @classmethod
    def between(cls, one: ResponseLogProbs, other: ResponseLogProbs, reduce: Reduce, knows_tokens: bool = True) -> Gap:
        """Over the tokens of all processes, so that each reaches the same verdict.

        Args:
            one, other: Log-probs of the same responses; the scales are those of `one`.
            reduce: Reduces over the processes.
            knows_tokens: False if `other` only knows sums: compares the means of the responses.
        """
        if knows_tokens:
            return cls.of(one.values - other.values, one.rounding_scales(), reduce)
        return cls.of(one.means() - other.means(), one.rounding_scales_of_sums() / one.lengths(), reduce)

    @classmethod
    def of(cls, difference: Tensor, scales: Tensor, reduce: Reduce) -> Gap:
        """Of differences and the scales of their rounding."""
        # NaN would compare as no gap at all; it counts as the largest.
        difference, s = torch.where(difference.isnan(), torch.inf, difference).double(), scales.double()
        scaled = difference / s
        sums = [torch.ones_like(s), difference.abs(), scaled, scaled**2, s, s**2, 1 / s]
        num, total, signed, squared, *scale_sums = reduce(torch.stack([each.sum() for each in sums]), "sum").tolist()
        largest, largest_scale = reduce(torch.stack([difference.abs().max(), s.max()]), "max").tolist()
        linear, squares, inverse = scale_sums
        spread = (squared / num) ** 0.5
        return cls(total / num, largest, signed / inverse, spread, num, (linear, squares, inverse), largest_scale)

    def within(self, allowed: Tolerance) -> bool:
        """Whether rounding explains it; never for NaN."""
        return self.mean <= allowed.mean and self.largest <= allowed.largest and abs(self.shift) <= allowed.shift


@dataclass(frozen=True)
class Noise:
    """How far two scorings of the same tokens by the same weights were apart; its fields are plain numbers, for JSON.

    Attributes:
        mean: Of the absolute differences, in nats per token.
        shift: Their signed mean, weighted as `Gap.shift`, in nats per token.
        shift_error: Its standard error.
        spread: Root mean square of `d / s` over the tokens.
        spread_of_responses: The same of `sum(d / s) / sqrt(length)` over the responses: larger, if the differences
            within a response go together.
        num_tokens: Tokens it was measured on.
    """

    mean: float
    shift: float
    shift_error: float
    spread: float
    spread_of_responses: float
    num_tokens: float

    @classmethod
    def between(cls, one: ResponseLogProbs, other: ResponseLogProbs, reduce: Reduce) -> Noise:
        """Of two scorings of the same responses, on all processes together."""
        difference = (one.values - other.values).double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        scales = one.rounding_scales().double()
        scaled = difference / scales
        of_responses = torch.segment_reduce(scaled, "sum", offsets=one.offsets) / one.lengths().double().sqrt()
        sums = [torch.ones_like(scaled), difference.abs(), scaled, 1 / scales, scaled**2]
        sums += [of_responses**2, torch.ones_like(of_responses)]
        num, total, signed, inverse, squares, response_squares, num_responses = reduce(
            torch.stack([each.sum() for each in sums]), "sum"
        ).tolist()
        return cls(
            mean=total / num,
            shift=signed / inverse,
            shift_error=squares**0.5 / inverse,
            spread=(squares / num) ** 0.5,
            spread_of_responses=(response_squares / num_responses) ** 0.5,
            num_tokens=num,
        )

    def __add__(self, other: Noise) -> Noise:
        """That of a difference between two machines: each measured the difference of two scorings, and adds one."""

        def together(one: float, two: float) -> float:
            return float(((one**2 + two**2) / 2) ** 0.5)

        return Noise(
            mean=together(self.mean, other.mean),
            shift=max(self.shift, other.shift, key=abs),
            shift_error=max(self.shift_error, other.shift_error),
            spread=together(self.spread, other.spread),
            spread_of_responses=together(self.spread_of_responses, other.spread_of_responses),
            num_tokens=min(self.num_tokens, other.num_tokens),
        )

    def allowed(self, gap: Gap, dtype: str) -> Tolerance:
        """What the noise explains of a gap, by the number of its tokens and their scales.

        Args:
            gap: What was found; its size plays no part.
            dtype: The coarser dtype of the two; even without noise, `ALIKE` of it is allowed.
        """
        floor = ALIKE[dtype]
        linear, squares, inverse = gap.scale_sums
        spread, of_means = (_not_less(each, self.num_tokens) for each in (self.spread, self._spread_of_means))
        mean = floor.mean + (_MEAN_IN_SPREADS * linear + _ERRORS * squares**0.5) * spread / gap.num
        largest = floor.largest + _LARGEST_IN_SPREADS * spread * gap.largest_scale
        if gap.num > self.num_tokens:  # its own scatter is known better, unless a fault makes it larger
            of_means = min(of_means, _not_less(gap.spread, gap.num))
        systematic = max(0.0, abs(self.shift) - 2 * self.shift_error)
        shift = min(floor.mean, _SHIFT) + systematic + _ERRORS * of_means * gap.num**0.5 / inverse
        return Tolerance(mean, largest, shift)

    @property
    def _spread_of_means(self) -> float:
        return max(self.spread, self.spread_of_responses)

    def share_needed(self, gap: Gap, shift: float) -> float:
        """How many times as many tokens as those of a gap it takes to refuse such a shift each time."""
        error = _not_less(self._spread_of_means, self.num_tokens) * math.sqrt(gap.num) / gap.scale_sums[2]
        return ((_ERRORS + _ERRORS_LEFT) * error / (shift - _SHIFT)) ** 2


def _not_less(spread: float, num: float) -> float:
    """A spread that was estimated from some tokens, with what it may be too low by."""
    return spread * (1 + 2 / math.sqrt(num))


MEASURED_IN = 2  # forward passes


def measured(
    score: Callable[[PairBatch], ResponseLogProbs], batch: PairBatch, answer: ResponseLogProbs, reduce: Reduce
) -> Noise:
    """The noise of a model: scores the responses again in other company, in `MEASURED_IN` forward passes.

    Each half of the pairs by itself, the rejected response before the chosen one: that shows what depends on the size
    of a batch, and what on a response's place beside its prompt. Of a single pair, each response by itself.

    Args:
        score: Scores a batch.
        batch: Some pairs.
        answer: Their log-probs, scored together.
        reduce: Reduces over the processes.
    """
    responses = batch.responses()
    pairs = [(responses[r], responses[c]) for c, r in zip(batch.chosen, batch.rejected, strict=True)]
    if len(pairs) == 1:
        pairs = [(response, response) for response in pairs[0]]
    middle = (len(pairs) + 1) // 2
    again: dict[Response, Tensor] = {}
    for half in (pairs[:middle], pairs[middle:]):
        part = PairBatch.of_pairs(half).to(batch.device)
        again |= dict(zip(part.responses(), score(part).split(), strict=True))
    values = torch.cat([again[response] for response in responses])
    return Noise.between(answer, ResponseLogProbs(values, answer.offsets), reduce)
