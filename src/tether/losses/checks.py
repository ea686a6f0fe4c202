"""Which losses and options can be combined, and what is refused.

Knows the losses' table and their numeric options; knows no config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tether.losses.divergence import DIVERGENCES
from tether.losses.options import LossOptions
from tether.losses.table import LOSSES, Loss
from tether.refusals import Refusal, nearest_to, of_option, refuse, shown


def check_loss_options(
    losses: Sequence[str],
    weights: Sequence[float] | None,
    options: LossOptions,
    *,
    use_weighting: bool = False,
    bco_reward_shift: bool = True,
) -> None:
    """Refuses unknown losses, numbers out of range, and options that none of the losses reads.

    Raises:
        ConfigurationError: Names the options.
    """
    refuse(refused_losses(losses, weights, options, use_weighting=use_weighting, bco_reward_shift=bco_reward_shift))


def refused_losses(
    losses: Sequence[str],
    weights: Sequence[float] | None,
    options: LossOptions,
    *,
    use_weighting: bool,
    bco_reward_shift: bool,
) -> Iterator[Refusal]:
    """What `check_loss_options` refuses."""
    yield from _ranges(options)
    unknown = [name for name in losses if name not in LOSSES]
    if unknown or not losses:
        why = (
            f"there is no loss named {' or '.join(map(shown, unknown))}"
            if unknown
            else "a policy needs a loss to train"
        )
        nearest = nearest_to(unknown[0], LOSSES) if unknown else ""
        meant = f"Did you mean `{nearest}`? " if nearest else ""
        yield of_option("loss_type", list(losses), why, f"{meant}The losses are {', '.join(LOSSES)}.")
        return
    yield from _weights(losses, weights)
    yield from _contradictions(losses, options, use_weighting=use_weighting)
    plain = LossOptions()
    unread = {
        "label_smoothing": (options.label_smoothing, plain.label_smoothing, "0"),
        "discopop_tau": (options.discopop_tau, plain.discopop_tau, "0.05"),
        "f_divergence_type": (options.f_divergence_type, plain.f_divergence_type, "`reverse_kl`"),
        "ld_alpha": (options.ld_alpha, plain.ld_alpha, "None"),
        "bco_reward_shift": (bco_reward_shift, True, "True"),
    }
    for name, (value, default, written) in unread.items():
        if value != default and not any(name in LOSSES[loss].takes for loss in losses):
            why = f"no loss of {list(losses)} has it in its equation"
            yield of_option(name, value, why, f"Write {written}, or use one of {_takers(name)} as `loss_type`.")


def refused_margin(losses: Sequence[Loss]) -> Iterator[Refusal]:
    """A `margin` in the rows that no loss reads."""
    if not any("margin" in loss.takes for loss in losses):
        names = [loss.function.__name__ for loss in losses]
        yield Refusal(
            f"rows with a `margin` and `loss_type={names!r}`",
            "none of these losses has a margin in its equation",
            f"Drop the column (`dataset.remove_columns('margin')`), or use one of {_takers('margin')}.",
        )


def _weights(losses: Sequence[str], weights: Sequence[float] | None) -> Iterator[Refusal]:
    if weights is None:
        return
    count = len(losses)
    if len(weights) != count:
        why = "there is one loss" if count == 1 else f"there are {count} losses"
        needs = f"Write {count} weight{'s' * (count != 1)}, in the order of `loss_type`."
        yield of_option("loss_weights", weights, why, needs)
    if not all(math.isfinite(weight) for weight in weights):
        yield of_option("loss_weights", weights, "the losses are multiplied by them", "Write finite numbers.")


def _ranges(options: LossOptions) -> Iterator[Refusal]:
    if not 0 < options.beta < math.inf:
        why = "rewards are multiplied by it, so it must be positive"
        yield of_option("beta", options.beta, why, "Write a positive number, such as 0.1.")
    if not 0 <= options.label_smoothing < 0.5:
        why = "it is the probability that a label is flipped, and from 0.5 on labels are uninformative or inverted"
        yield of_option("label_smoothing", options.label_smoothing, why, "Write a value in [0, 0.5).")
    if not 0 < options.discopop_tau < math.inf:
        why = "log-ratios are divided by it, so it must be positive"
        yield of_option("discopop_tau", options.discopop_tau, why, "Write a positive number, such as 0.05.")
    if options.ld_alpha is not None and not 0 <= options.ld_alpha <= 1:
        why = "it is the weight of the tokens beyond the length that both responses have"
        yield of_option("ld_alpha", options.ld_alpha, why, "Write a value in [0, 1], or None.")
    if options.f_divergence_type not in DIVERGENCES:
        why = "there is no divergence of that name"
        yield of_option("f_divergence_type", options.f_divergence_type, why, f"Write one of {', '.join(DIVERGENCES)}.")
    if not math.isfinite(options.f_alpha_divergence_coef):
        why = "it is an exponent, so it must be finite"
        yield of_option("f_alpha_divergence_coef", options.f_alpha_divergence_coef, why, "Write a finite number.")


def _contradictions(losses: Sequence[str], options: LossOptions, *, use_weighting: bool) -> Iterator[Refusal]:
    if "exo_pair" in losses and options.label_smoothing == 0:
        why = "`exo_pair` needs some: it takes the logarithm of the rejected response's share of the label"
        instead = "Write `label_smoothing=1e-3`, as the EXO paper does, or leave `exo_pair` out of `loss_type`."
        yield of_option("label_smoothing", options.label_smoothing, why, instead)
    sorting = [name for name in losses if LOSSES[name].couples_pairs]
    if use_weighting and sorting:
        why = f"`{sorting[0]}` sorts the pairs of a batch, so its values belong to no single pair to weigh"
        instead = f"Write `use_weighting=False`, or leave `{sorting[0]}` out of `loss_type`."
        yield of_option("use_weighting", use_weighting, why, instead)
    others = [name for name in losses if "f_divergence_type" not in LOSSES[name].takes and name != "sft"]
    if others and options.f_divergence_type in DIVERGENCES and options.f_divergence_type != "reverse_kl":
        why = f"`{others[0]}` is not a function of the difference of two rewards"
        instead = f"Write `reverse_kl`, or losses among {_takers('f_divergence_type')} and sft."
        details = "Only in that difference does the unknown constant of a divergence cancel."
        yield of_option("f_divergence_type", options.f_divergence_type, why, instead, details=details)
    if options.f_alpha_divergence_coef != 0.5 and options.f_divergence_type != "alpha_divergence":
        why = f"the divergence is {options.f_divergence_type!r}, which has no coefficient"
        instead = "Leave it out, or write `f_divergence_type='alpha_divergence'`."
        yield of_option("f_alpha_divergence_coef", options.f_alpha_divergence_coef, why, instead)


def _takers(option: str) -> str:
    return ", ".join(name for name, loss in LOSSES.items() if option in loss.takes)
