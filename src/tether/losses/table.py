"""Every loss by name, and what each reads.

A loss is documented in its docstring; this is only what the checks of options need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tether.losses import pairwise, pointwise, transport
from tether.losses.options import LossOptions, PreferenceLoss
from tether.types import PairScores

_DIFFERENCE = frozenset({"f_divergence_type", "margin", "ld_alpha"})
_SMOOTHED = _DIFFERENCE | {"label_smoothing"}


@dataclass(frozen=True)
class Loss:
    """A loss and what it reads.

    Attributes:
        function: The loss itself.
        takes: Which of `label_smoothing`, `f_divergence_type`, `discopop_tau`, `bco_reward_shift`, `ld_alpha`
            and the rows' `margin` reach its value.
        couples_pairs: A pair's value depends on the other pairs of its micro-batch.
        needs_tokens: It reads single tokens whatever the options (for these see `LossOptions.needs_per_token`);
            otherwise the reference's sum per response is enough.
    """

    function: PreferenceLoss
    takes: frozenset[str]
    couples_pairs: bool = False
    needs_tokens: bool = False

    def __call__(self, scores: PairScores, options: LossOptions) -> Float[Tensor, " pairs"]:
        return self.function(scores, options)


_SUMS = frozenset({"ld_alpha"})

LossName = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "hypo",
]  # fmt: skip
"""The names in `LOSSES`."""

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(pairwise.sigmoid, _SMOOTHED),
    "hinge": Loss(pairwise.hinge, _DIFFERENCE),
    "ipo": Loss(pairwise.ipo, _DIFFERENCE - {"margin"}),  # its target is in nats per token, a margin in units of reward
    "exo_pair": Loss(pairwise.exo_pair, _SMOOTHED),
    "nca_pair": Loss(pointwise.nca_pair, _SUMS),
    "robust": Loss(pairwise.robust, _SMOOTHED),
    "bco_pair": Loss(pointwise.bco_pair, _SUMS | {"bco_reward_shift"}),
    "sppo_hard": Loss(pointwise.sppo_hard, _SUMS),
    "aot": Loss(transport.aot, _SUMS | {"label_smoothing"}, couples_pairs=True),
    "aot_unpaired": Loss(transport.aot_unpaired, _SUMS | {"label_smoothing"}, couples_pairs=True),
    "apo_zero": Loss(pointwise.apo_zero, _SUMS),
    "apo_down": Loss(pointwise.apo_down, _SUMS),
    "discopop": Loss(pairwise.discopop, _DIFFERENCE | {"discopop_tau"}),
    "sft": Loss(pointwise.sft, frozenset()),
    "sigmoid_norm": Loss(pairwise.sigmoid_norm, _SMOOTHED),
    "hypo": Loss(pairwise.hypo, _SUMS),
}
