"""The losses equal their equations, in value and gradient, and agree with TRL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.loss_equations import F, Numbers, Pair, aot_by_hand, loss_by_hand, mean_by_hand, worth
from support.trl_oracle import trl_loss
from tether.losses import DIVERGENCES, LOSSES, LossOptions
from tether.types import PairScores

pytestmark = pytest.mark.numerics

PAIRS = [
    Pair(-12.5, -30.25, -14.0, -28.0, 11, 23),
    Pair(-3.0, -2.0, -1.0, -4.5, 1, 2),
    Pair(-100.0, -90.0, -100.5, -90.25, 40, 37),
    Pair(-7.0, -9.0, -5.5, -9.0, 5, 5),
]
ON_DIFFERENCES = [name for name, loss in LOSSES.items() if "f_divergence_type" in loss.takes]
SMOOTHED = [name for name, loss in LOSSES.items() if "label_smoothing" in loss.takes]
COUPLED = [name for name, loss in LOSSES.items() if loss.couples_pairs]
GENERALISED = [
    (name, divergence) for name in ON_DIFFERENCES for divergence in DIVERGENCES if divergence != "reverse_kl"
]


def scores_of(pairs: list[Pair], numbers: Numbers | None = None) -> PairScores:
    columns = torch.tensor([pair[:4] for pair in pairs], dtype=torch.float64).T.clone()
    chosen, rejected = torch.tensor([pair[4:] for pair in pairs]).T
    scores = PairScores(columns[0], columns[1], columns[2], columns[3], chosen, rejected)
    if numbers is not None and numbers.margin:
        scores = replace(scores, margins=torch.full((len(pairs),), numbers.margin, dtype=torch.float64))
    if numbers is not None and numbers.shift:
        scores = replace(scores, reward_shift=torch.tensor(numbers.shift, dtype=torch.float64))
    return scores


def options_of(numbers: Numbers) -> LossOptions:
    return LossOptions(
        beta=numbers.beta,
        label_smoothing=numbers.smoothing,
        f_divergence_type=numbers.divergence,
        f_alpha_divergence_coef=numbers.alpha,
        discopop_tau=numbers.tau,
    )


def cases() -> list[Any]:
    """Every loss, and every number that its equation has."""
    found = []
    for name in LOSSES:
        smoothing = 0.01 if name == "exo_pair" else 0.0
        found += [(name, Numbers(beta=beta, smoothing=smoothing)) for beta in (0.05, 0.5)]
    found += [(name, Numbers(smoothing=0.2)) for name in SMOOTHED]
    found += [(name, Numbers(0.2, 0.1 if name in SMOOTHED else 0.0, kind, 0.3)) for name, kind in GENERALISED]
    found += [
        (name, Numbers(smoothing=0.1 if name in SMOOTHED else 0.0, margin=0.7))
        for name, loss in LOSSES.items()
        if "margin" in loss.takes
    ]
    found += [("bco_pair", Numbers(shift=0.4)), ("discopop", Numbers(tau=0.7))]
    return [pytest.param(*case, id=f"{case[0]}, {case[1]}") for case in found]


def test_there_are_the_fifteen_losses_of_trl_one_more_and_four_divergences() -> None:
    names = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop"
    assert list(LOSSES) == [*names.split(), "sft", "sigmoid_norm", "hypo"]
    assert list(DIVERGENCES) == ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


# ---------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize(("name", "numbers"), cases())
def test_loss_equals_its_equation(name: str, numbers: Numbers) -> None:
    losses = LOSSES[name](scores_of(PAIRS, numbers), options_of(numbers))
    assert losses.shape == (len(PAIRS),) and losses.dtype == torch.float64
    assert losses.mean().item() == pytest.approx(mean_by_hand(name, PAIRS, numbers), rel=1e-12)
    if name not in COUPLED:
        assert losses.tolist() == pytest.approx([loss_by_hand(name, pair, numbers) for pair in PAIRS], rel=1e-12)


@pytest.mark.parametrize(("name", "numbers"), cases())
def test_loss_gradient_is_the_slope_of_its_equation(name: str, numbers: Numbers) -> None:
    """Finite differences of the equation by hand, not of the function itself."""
    scores = scores_of(PAIRS, numbers)
    policy = [scores.policy_chosen.requires_grad_(), scores.policy_rejected.requires_grad_()]
    loss = LOSSES[name](scores, options_of(numbers)).mean()
    gradients = torch.autograd.grad(loss, policy, allow_unused=True)
    step = 1e-6
    for side, gradient in zip(("policy_chosen", "policy_rejected"), gradients, strict=True):
        for index, pair in enumerate(PAIRS):
            moved = [
                mean_by_hand(name, [*PAIRS[:index], nearby, *PAIRS[index + 1 :]], numbers)
                for nearby in (pair._replace(**{side: getattr(pair, side) + sign * step}) for sign in (1, -1))
            ]
            slope = (moved[0] - moved[1]) / (2 * step)
            found = 0.0 if gradient is None else gradient[index].item()
            assert found == pytest.approx(slope, rel=1e-6, abs=1e-7), (side, index)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("h", [-1.5, -0.1, 0.0, 0.4, 2.0])
def test_divergence_is_the_derivative_of_its_f_less_that_at_1(kind: str, h: float) -> None:
    coefficient, step = 0.3, 1e-6

    def slope(u: float) -> float:
        return (F[kind](u + step, coefficient) - F[kind](u - step, coefficient)) / (2 * step)

    (found,) = DIVERGENCES[kind](torch.tensor([h], dtype=torch.float64), coefficient).tolist()
    assert found == pytest.approx(slope(torch.tensor(h).double().exp().item()) - slope(1.0), abs=1e-7)
    assert found == pytest.approx(worth(h, Numbers(divergence=kind, alpha=coefficient)), abs=1e-12)


def test_alpha_divergence_has_both_kullback_leibler_divergences_as_its_ends() -> None:
    h = torch.linspace(-3, 3, 13, dtype=torch.float64)
    assert torch.equal(DIVERGENCES["alpha_divergence"](h, 1.0), DIVERGENCES["reverse_kl"](h, 0.5))
    near = DIVERGENCES["alpha_divergence"](h, 1 + 1e-5)
    torch.testing.assert_close(near, DIVERGENCES["reverse_kl"](h, 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(DIVERGENCES["alpha_divergence"](h, 0.0), DIVERGENCES["forward_kl"](h, 0.5))


# ------------------------------------------------------------------------------------------------- the metadata


@pytest.mark.parametrize("name", LOSSES)
def test_loss_couples_pairs_exactly_where_it_says_so(name: str) -> None:
    options = LossOptions(label_smoothing=0.1)
    together = LOSSES[name](scores_of(PAIRS), options)
    alone = [LOSSES[name](scores_of([pair]), options).item() for pair in PAIRS]
    assert (together.tolist() != alone) == LOSSES[name].couples_pairs


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in COUPLED])
def test_loss_with_a_beta_for_each_pair_is_its_equation_with_that_beta(name: str) -> None:
    many = [
        Numbers(beta=0.05 + 0.1 * place, smoothing=0.1 if name == "exo_pair" else 0.0) for place in range(len(PAIRS))
    ]
    betas = torch.tensor([numbers.beta for numbers in many], dtype=torch.float64)
    losses = LOSSES[name](scores_of(PAIRS), replace(options_of(many[0]), beta=betas))
    expected = [loss_by_hand(name, pair, numbers) for pair, numbers in zip(PAIRS, many, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_reads_exactly_the_options_that_it_takes(name: str) -> None:
    base = Numbers(smoothing=0.05)
    changes = {
        "label_smoothing": base._replace(smoothing=0.2),
        "f_divergence_type": base._replace(divergence="js_divergence"),
        "discopop_tau": base._replace(tau=0.5),
        "margin": base._replace(margin=0.3),
        "bco_reward_shift": base._replace(shift=0.3),
    }

    def losses(numbers: Numbers) -> Tensor:
        return LOSSES[name](scores_of(PAIRS, numbers), options_of(numbers))

    read = {option for option, numbers in changes.items() if not torch.equal(losses(numbers), losses(base))}
    assert read == LOSSES[name].takes - {"ld_alpha"}


# --------------------------------------------------------------------------------------------------------- TRL


def loss_and_gradients(scores: PairScores, loss: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, [scores.policy_chosen, scores.policy_rejected], allow_unused=True)
    return [loss.detach(), *(torch.zeros(len(PAIRS)).to(loss) if g is None else g for g in gradients)]


def trl_cases() -> list[Any]:
    found = []
    for name in (name for name in LOSSES if name != "hypo"):
        smoothing = {"label_smoothing": 0.01} if name == "exo_pair" else {}
        found += [(name, smoothing | {"beta": beta}) for beta in (0.1, 0.7)]
    # TRL ignores it where it is not in this list.
    found += [(name, {"label_smoothing": 0.2}) for name in ("robust", "exo_pair", "aot", "aot_unpaired")]
    for name, kind in GENERALISED:
        smoothing = {"label_smoothing": 0.01} if name == "exo_pair" else {}
        found += [(name, smoothing | {"f_divergence_type": kind, "f_alpha_divergence_coef": 0.3})]
    return [pytest.param(*case, id=f"{case[0]}, {case[1]}") for case in found]


@pytest.mark.parametrize(("name", "options"), trl_cases())
def test_loss_and_gradient_equal_those_of_trl(name: str, options: dict[str, Any]) -> None:
    in_single = options.get("f_divergence_type") == "alpha_divergence"  # TRL's knows no float64
    # TRL's `sft` averages over the tokens of the batch: equal where the chosen responses are equally long.
    pairs = [pair._replace(num_chosen=9) for pair in PAIRS] if name == "sft" else PAIRS
    scores = scores_of(pairs)
    if in_single:
        scores = in_fp32(scores)
    for leaf in (scores.policy_chosen, scores.policy_rejected):
        leaf.requires_grad_()
    ours = LOSSES[name](scores, LossOptions(**options)).mean()
    theirs = trl_loss(
        (scores.policy_chosen, scores.policy_rejected),
        (scores.reference_chosen, scores.reference_rejected),
        (scores.chosen_lengths, scores.rejected_lengths),
        loss_type=name,
        **options,
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if in_single else {"rtol": 1e-12, "atol": 1e-14}
    for found, expected in zip(loss_and_gradients(scores, ours), loss_and_gradients(scores, theirs), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def in_fp32(scores: PairScores) -> PairScores:
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return replace(scores, **{name: getattr(scores, name).float() for name in names})


def test_sft_equals_trl_pair_by_pair_and_differs_over_a_ragged_batch() -> None:
    """The documented difference, measured: TRL's value is the mean over tokens, ours over responses."""

    def trl(pairs: list[Pair]) -> float:
        scores = scores_of(pairs)
        return trl_loss(
            (scores.policy_chosen, scores.policy_rejected),
            (scores.reference_chosen, scores.reference_rejected),
            (scores.chosen_lengths, scores.rejected_lengths),
            loss_type="sft",
        ).item()

    ours = LOSSES["sft"](scores_of(PAIRS), LossOptions())
    assert ours.tolist() == pytest.approx([trl([pair]) for pair in PAIRS], rel=1e-12)
    tokens = sum(pair.num_chosen for pair in PAIRS)
    assert trl(PAIRS) == pytest.approx(sum(-pair.policy_chosen for pair in PAIRS) / tokens, rel=1e-12)
    assert abs(trl(PAIRS) - ours.mean().item()) > 0.1


def test_sigmoid_with_label_smoothing_is_where_trl_ignores_it() -> None:
    """TRL's plain value is ours at 0; ours with smoothing is the mixture with the flipped label."""
    swapped = [Pair(p.policy_rejected, p.policy_chosen, p.reference_rejected, p.reference_chosen) for p in PAIRS]
    plain, flipped = (LOSSES["sigmoid"](scores_of(pairs), LossOptions()) for pairs in (PAIRS, swapped))
    smoothed = LOSSES["sigmoid"](scores_of(PAIRS), LossOptions(label_smoothing=0.3))
    torch.testing.assert_close(smoothed, 0.7 * plain + 0.3 * flipped, rtol=1e-12, atol=0)


def test_aot_sorts_policy_and_reference_apart() -> None:
    scores = scores_of(PAIRS)
    for name in ("aot", "aot_unpaired"):
        values = LOSSES[name](scores, LossOptions(label_smoothing=0.2))
        assert values.mean().item() == pytest.approx(aot_by_hand(name, PAIRS, Numbers(smoothing=0.2)), rel=1e-12)
        order = torch.tensor([2, 0, 3, 1])
        shuffled = scores_of([PAIRS[i] for i in order])
        torch.testing.assert_close(LOSSES[name](shuffled, LossOptions(label_smoothing=0.2)), values)
