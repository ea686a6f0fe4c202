"""The preference losses: pure functions from sequence log-probabilities to one loss per pair, and their weights.

Knows tensors and `PairScores`; nothing of models, references or training.

Notation: `h_w = log pi_theta(y_w|x) - log pi_ref(y_w|x)` (chosen) and `h_l` (rejected); `|y|` counts a response's
tokens; `sigma` is the logistic function. `g` is the derivative of the f-divergence that keeps the policy near the
reference (`divergence.py`): `g(h) = h` for the reverse KL of DPO. `z = beta (g(h_w) - g(h_l)) - m` is the reward
margin, minus the row's own `margin` m if it has one.
"""

from tether.losses.checks import check_loss_options
from tether.losses.divergence import DIVERGENCES
from tether.losses.objective import Objective
from tether.losses.options import DivergenceName, LossOptions, PreferenceLoss
from tether.losses.table import LOSSES, Loss, LossName

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "DivergenceName",
    "Loss",
    "LossName",
    "LossOptions",
    "Objective",
    "PreferenceLoss",
    "check_loss_options",
]
