"""Whether two scorings of the same tokens differ by rounding only. Knows numbers; knows no model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# In nats per token. What another context changes is the yardstick: a model with random weights hardly depends on its
# context, so absolute bounds alone would let a wrong mask pass.
SHARE = 1e-2
MEAN, LARGEST = 1e-4, 1e-3
ROUNDING = 2e-6  # of the log-softmax itself

# In half precision and under autocast.
ROUGH_SHARE = 0.1
ROUGH_MEAN, ROUGH_LARGEST = 3e-3, 0.05
ERRORS_OF_THE_MEAN = 2.5  # more would hide a shift; rounding alone would have to be as far off on three probes


class Difference(NamedTuple):
    """How far a scoring is from the plain one.

    Attributes:
        largest: In nats, of a token.
        is_rounding: Whether it is rounding only.
        is_certain: If not: whether other rows would differ as well. Rounding can choose another expert once in a while.
    """

    largest: float
    is_rounding: bool
    is_certain: bool


def exact_difference(found: Tensor, plain: Tensor, effect: float) -> Difference:
    """Compares in fp32, where the plain scoring is right.

    Args:
        found: Log-probs of the tokens in the way that is judged.
        plain: Their plain log-probs.
        effect: How much another context changes log-probs, on average.
    """
    gap, same = _gap(found, plain)
    allowed = max(ROUNDING, min(SHARE * effect, MEAN))
    is_small = same and float(gap.abs().mean()) <= allowed
    largest = float(gap.abs().max())
    return Difference(largest, is_small and largest <= LARGEST, is_certain=not is_small)


def rough_difference(found: Tensor, plain: Tensor, exact: Tensor | None, effect: float) -> Difference:
    """Compares in half precision, where plain scoring has errors too.

    The mean of the difference must be 0 within its own standard error. Errors against `exact` must be no larger than
    the plain ones: on average within their standard error, at most twice at the largest. Without `exact`, the
    difference must be small beside what another context changes.

    Two of 720 probes of sound families fell out, both of experts that were chosen otherwise: a failure is looked at
    again on other rows.

    Args:
        found: Log-probs of the tokens in the way that is judged.
        plain: Their plain log-probs, in the same precision.
        exact: Their plain log-probs in fp32, if they may be computed.
        effect: How much another context changes log-probs, on average.
    """
    gap, same = _gap(found, plain)
    is_rounding = same and abs(float(gap.mean())) <= ROUGH_MEAN + ERRORS_OF_THE_MEAN * _error_of_mean(gap)
    if exact is None:
        is_rounding &= float(gap.abs().mean()) <= max(ROUGH_SHARE * effect, ROUGH_MEAN)
        is_rounding &= float(gap.abs().max()) <= effect + ROUGH_LARGEST
    else:
        ours, theirs = (_gap(values, exact)[0].abs() for values in (found, plain))
        is_rounding &= float((ours - theirs).mean()) <= ROUGH_MEAN + ERRORS_OF_THE_MEAN * _error_of_mean(ours - theirs)
        is_rounding &= float(ours.max()) <= 2 * float(theirs.max()) + ROUGH_LARGEST
    return Difference(float(gap.abs().max()), is_rounding, is_certain=False)


def _gap(found: Tensor, plain: Tensor) -> tuple[Tensor, bool]:
    """The difference where both are finite, and whether they are so for the same tokens."""
    found, plain = found.double(), plain.double()
    finite = plain.isfinite()
    gap = torch.where(finite, found - plain, 0.0)
    return gap.nan_to_num(posinf=float("inf"), nan=float("inf")), bool((finite == found.isfinite()).all())


def _error_of_mean(values: Tensor) -> float:
    return float(values.std(correction=0) / max(1, values.numel() - 1) ** 0.5)
