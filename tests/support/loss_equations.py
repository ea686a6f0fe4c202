"""The equations of the losses, written out in Python floats as the papers have them: the oracle of the loss tests.

Knows nothing of `tether` and of tensors. A pair is its four sequence log-probs and the tokens of its two responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Pair(NamedTuple):
    """Log-probs in nats; lengths in tokens."""

    policy_chosen: float
    policy_rejected: float
    reference_chosen: float
    reference_rejected: float
    num_chosen: int = 1
    num_rejected: int = 1

    @property
    def h_w(self) -> float:
        return self.policy_chosen - self.reference_chosen

    @property
    def h_l(self) -> float:
        return self.policy_rejected - self.reference_rejected


class Numbers(NamedTuple):
    """What else the equations have in them."""

    beta: float = 0.1
    smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    tau: float = 0.05
    margin: float = 0.0
    shift: float = 0.0


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


# f of each divergence, by u = pi_theta / pi_ref; the losses need its derivative, less that at 1.
F: dict[str, Callable[[float, float], float]] = {
    "reverse_kl": lambda u, a: u * math.log(u),
    "forward_kl": lambda u, a: -math.log(u),
    "js_divergence": lambda u, a: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
    "alpha_divergence": lambda u, a: (u**a - a * u - (1 - a)) / (a * (a - 1)),
}


def worth(h: float, numbers: Numbers) -> float:
    u = math.exp(h)
    if numbers.divergence == "forward_kl":
        return 1 - 1 / u
    if numbers.divergence == "js_divergence":
        return math.log(2 * u / (1 + u))
    if numbers.divergence == "alpha_divergence":
        return (u ** (numbers.alpha - 1) - 1) / (numbers.alpha - 1)
    return h


def loss_by_hand(name: str, pair: Pair, numbers: Numbers) -> float:  # noqa: C901  # one branch for each loss
    """The loss of one pair; of the AOT losses, in a batch of this pair alone."""
    beta, eps = numbers.beta, numbers.smoothing
    g_w, g_l = worth(pair.h_w, numbers), worth(pair.h_l, numbers)
    z = beta * (g_w - g_l) - numbers.margin
    r_w, r_l = beta * pair.h_w, beta * pair.h_l
    per_token = g_w / pair.num_chosen - g_l / pair.num_rejected
    match name:
        case "sigmoid":
            return -(1 - eps) * log_sigma(z) - eps * log_sigma(-z)
        case "sigmoid_norm":
            z = beta * per_token - numbers.margin
            return -(1 - eps) * log_sigma(z) - eps * log_sigma(-z)
        case "hinge":
            return max(0.0, 1 - z)
        case "ipo":
            return (per_token - 1 / (2 * beta)) ** 2
        case "robust":
            return ((1 - eps) * -log_sigma(z) - eps * -log_sigma(-z)) / (1 - 2 * eps)
        case "exo_pair":
            policy, label = (sigma(z), sigma(-z)), (1 - eps, eps)
            return sum(p * math.log(p / q) for p, q in zip(policy, label, strict=True))
        case "discopop":
            share = sigma(z / numbers.tau)
            return (1 - share) * -log_sigma(z) + share * math.exp(-z)
        case "nca_pair":
            return -log_sigma(r_w) - 0.5 * (log_sigma(-r_w) + log_sigma(-r_l))
        case "bco_pair":
            return -log_sigma(r_w - numbers.shift) - log_sigma(-(r_l - numbers.shift))
        case "sppo_hard":
            return (pair.h_w - 1 / (2 * beta)) ** 2 + (pair.h_l + 1 / (2 * beta)) ** 2
        case "apo_zero":
            return 1 - sigma(r_w) + sigma(r_l)
        case "apo_down":
            return sigma(r_w) + 1 - sigma(r_w - r_l)
        case "sft":
            return -pair.policy_chosen / pair.num_chosen
        case "hypo":
            reference = max(0.0, pair.reference_chosen - pair.reference_rejected)
            return -log_sigma(beta * (pair.policy_chosen - pair.policy_rejected - reference))
        case "aot" | "aot_unpaired":
            return aot_by_hand(name, [pair], numbers)
    raise AssertionError(name)


def aot_by_hand(name: str, pairs: list[Pair], numbers: Numbers) -> float:
    """The mean over the ranks of a batch."""
    if name == "aot":
        upper = sorted(pair.policy_chosen - pair.policy_rejected for pair in pairs)
        lower = sorted(pair.reference_chosen - pair.reference_rejected for pair in pairs)
    else:
        upper, lower = sorted(pair.h_w for pair in pairs), sorted(pair.h_l for pair in pairs)
    gaps = [numbers.beta * (u - v) for u, v in zip(upper, lower, strict=True)]
    eps = numbers.smoothing
    return sum(-(1 - eps) * log_sigma(gap) - eps * log_sigma(-gap) for gap in gaps) / len(gaps)


def mean_by_hand(name: str, pairs: list[Pair], numbers: Numbers) -> float:
    """The mean over a batch."""
    if name.startswith("aot"):
        return aot_by_hand(name, pairs, numbers)
    return sum(loss_by_hand(name, pair, numbers) for pair in pairs) / len(pairs)
