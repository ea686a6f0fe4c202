"""Which losses and options go together; refused at construction where they do not.

Knows the losses' table and the numbers of the options; knows no config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tether.errors import ConfigurationError
from tether.losses.divergence import DIVERGENCES
from tether.losses.options import LossOptions
from tether.losses.table import LOSSES, Loss


def check_loss_options(
    losses: Sequence[str],
    weights: Sequence[float] | None,
    options: LossOptions,
    *,
    use_weighting: bool = False,
    bco_reward_shift: bool = True,
) -> None:
    """Refuses unknown losses, numbers out of range, and options that no chosen loss would read.

    Raises:
        ConfigurationError: Names the option.
    """
    _check_names(losses, weights)
    _check_ranges(options)
    _check_combinations(losses, options, use_weighting)
    plain, smoothing = LossOptions(), options.label_smoothing
    asked = {
        "label_smoothing": (smoothing, smoothing != 0, "0"),
        "discopop_tau": (options.discopop_tau, options.discopop_tau != plain.discopop_tau, "0.05"),
        "f_divergence_type": (options.f_divergence_type, options.f_divergence_type != "reverse_kl", "`reverse_kl`"),
        "ld_alpha": (options.ld_alpha, options.ld_alpha is not None, "None"),
        "bco_reward_shift": (bco_reward_shift, not bco_reward_shift, "True"),
    }
    for option, (value, is_set, default) in asked.items():
        if is_set:
            _check_read(option, value, losses, default)


def check_margin(losses: Sequence[Loss]) -> None:
    """Refuses rows with a `margin` where no loss reads it.

    Raises:
        ConfigurationError: Names the losses that do.
    """
    if any("margin" in loss.takes for loss in losses):
        return
    names = [loss.function.__name__ for loss in losses]
    raise ConfigurationError(
        problem=f"The rows have a `margin`, and `loss_type={names!r}`.",
        details="None of these losses has a margin in its equation.",
        instead=f"Drop the column (`dataset.remove_columns('margin')`), or take one of {_takers('margin')}.",
    )


def _check_names(losses: Sequence[str], weights: Sequence[float] | None) -> None:
    unknown = [name for name in losses if name not in LOSSES]
    if unknown or not losses:
        why = f"there is no loss named {unknown[0]!r}" if unknown else "a policy needs a loss to train"
        _refuse("loss_type", list(losses), why, f"one or more of {', '.join(LOSSES)}")
    if weights is not None and len(weights) != len(losses):
        count = len(losses)
        are = "there is one loss" if count == 1 else f"there are {count} losses"
        _refuse("loss_weights", weights, are, f"{count} weight{'s' * (count != 1)}, in the order of `loss_type`")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        _refuse("loss_weights", weights, "the loss is multiplied by them", "finite numbers")


def _check_ranges(options: LossOptions) -> None:
    if not 0 < options.beta < math.inf:
        _refuse("beta", options.beta, "rewards are scaled by it, so it must be positive", "`beta=0.1`, say")
    if not 0 <= options.label_smoothing < 0.5:
        _refuse(
            "label_smoothing",
            options.label_smoothing,
            "it is the probability that a label is flipped; from 0.5 on, labels say nothing or the opposite",
            "a value in [0, 0.5)",
        )
    if not 0 < options.discopop_tau < math.inf:
        _refuse("discopop_tau", options.discopop_tau, "log-ratios are divided by it", "a positive number, such as 0.05")
    if options.ld_alpha is not None and not 0 <= options.ld_alpha <= 1:
        _refuse(
            "ld_alpha",
            options.ld_alpha,
            "it is the weight of the tokens beyond the shared length",
            "a value in [0, 1], or None",
        )
    if options.f_divergence_type not in DIVERGENCES:
        _refuse(
            "f_divergence_type",
            options.f_divergence_type,
            "there is no divergence of that name",
            f"one of {', '.join(DIVERGENCES)}",
        )
    if not math.isfinite(options.f_alpha_divergence_coef):
        _refuse("f_alpha_divergence_coef", options.f_alpha_divergence_coef, "it is an exponent", "a finite number")


def _check_combinations(losses: Sequence[str], options: LossOptions, use_weighting: bool) -> None:
    if "exo_pair" in losses and options.label_smoothing == 0:
        _refuse(
            "label_smoothing",
            options.label_smoothing,
            "`exo_pair` divides by it: its label must leave the rejected response some probability",
            "`label_smoothing=1e-3`, as the EXO paper does, or leave `exo_pair` out of `loss_type`",
        )
    sorting = [name for name in losses if LOSSES[name].couples_pairs]
    if use_weighting and sorting:
        _refuse(
            "use_weighting",
            use_weighting,
            f"`{sorting[0]}` sorts the pairs of a batch, so its values belong to no pair that a weight could be for",
            f"`use_weighting=False`, or leave `{sorting[0]}` out of `loss_type`",
        )
    if options.f_divergence_type != "reverse_kl":
        others = [name for name in losses if "f_divergence_type" not in LOSSES[name].takes and name != "sft"]
        if others:
            _refuse(
                "f_divergence_type",
                options.f_divergence_type,
                f"`{others[0]}` is no function of the difference of two rewards, in which alone the divergence's "
                "unknown constant cancels",
                f"`reverse_kl`, or losses among {_takers('f_divergence_type')} and sft",
            )
    if options.f_alpha_divergence_coef != 0.5 and options.f_divergence_type != "alpha_divergence":
        _refuse(
            "f_alpha_divergence_coef",
            options.f_alpha_divergence_coef,
            f"the divergence is {options.f_divergence_type!r}, which has no coefficient",
            "0.5, the default, or `f_divergence_type='alpha_divergence'`",
        )


def _check_read(option: str, value: Any, losses: Sequence[str], default: str) -> None:
    if not any(option in LOSSES[name].takes for name in losses):
        _refuse(
            option,
            value,
            f"no loss of {list(losses)} has it in its equation",
            f"{default}, or take one of {_takers(option)} as `loss_type`",
        )


def _takers(option: str) -> str:
    return ", ".join(name for name, loss in LOSSES.items() if option in loss.takes)


def _refuse(option: str, value: Any, why: str, instead: str) -> None:
    raise ConfigurationError(
        problem=f"`{option}={value!r}`.", details=f"{why[0].upper()}{why[1:]}.", instead=f"Write {instead}."
    )
