"""The losses equal their equations, have the properties the papers name, and agree with TRL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tether.losses import LOSSES, LossOptions
from tether.types import PairScores
from trl_oracle import trl_loss

Quadruple = tuple[float, float, float, float]

# Sequence log-probs in nats: (policy chosen, policy rejected, reference chosen, reference rejected).
PAIRS = ((-12.5, -30.25, -14.0, -28.0), (-3.0, -2.0, -1.0, -4.5), (-100.0, -90.0, -100.0, -90.0), (-7.0, -9.0, -5, -9))
LENGTHS = ((11, 23), (1, 2), (40, 37), (5, 5))

log_probs = st.floats(-200, 0)
quadruples = st.tuples(log_probs, log_probs, log_probs, log_probs)
betas = st.floats(0.01, 2)


def scores_of(*quadruples: Quadruple, lengths: tuple[tuple[int, int], ...] = ()) -> PairScores:
    columns = torch.tensor(quadruples, dtype=torch.float64).T
    chosen, rejected = torch.tensor(lengths or [(1, 1)] * len(quadruples)).T
    return PairScores(columns[0], columns[1], columns[2], columns[3], chosen, rejected)


def loss_of(name: str, *quadruples: Quadruple, **options: float) -> list[float]:
    losses: list[float] = LOSSES[name](scores_of(*quadruples), LossOptions(**options)).tolist()
    return losses


def swapped(quadruple: Quadruple) -> Quadruple:
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = quadruple
    return policy_rejected, policy_chosen, reference_rejected, reference_chosen


# ------------------------------------------------------------------------- the equations, in python floats


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def by_hand(name: str, pair: Sequence[float], lengths: tuple[int, int], beta: float, smoothing: float) -> float:
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = pair
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    if name == "sigmoid":
        logits = beta * (chosen - rejected)
        return -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)
    if name == "hinge":
        return max(0.0, 1 - beta * (chosen - rejected))
    assert name == "ipo"
    return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_its_equation(name: str, beta: float, smoothing: float) -> None:
    options = LossOptions(beta=beta, label_smoothing=smoothing)
    expected = [by_hand(name, pair, lengths, beta, smoothing) for pair, lengths in zip(PAIRS, LENGTHS, strict=True)]
    assert LOSSES[name](scores_of(*PAIRS, lengths=LENGTHS), options).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_is_that_of_its_equation(name: str) -> None:
    scores = scores_of(*PAIRS, lengths=LENGTHS)
    policy = [scores.policy_chosen.requires_grad_(), scores.policy_rejected.requires_grad_()]
    loss = LOSSES[name](scores, LossOptions(beta=0.1, label_smoothing=0.1)).sum()
    step = 1e-5
    for side, grads in enumerate(torch.autograd.grad(loss, policy)):
        for pair, lengths, grad in zip(PAIRS, LENGTHS, grads.tolist(), strict=True):
            up, down = list(pair), list(pair)
            up[side], down[side] = pair[side] + step, pair[side] - step
            rise = by_hand(name, up, lengths, 0.1, 0.1) - by_hand(name, down, lengths, 0.1, 0.1)
            assert grad == pytest.approx(rise / (2 * step), abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_has_one_value_per_pair_and_pairs_do_not_mix(name: str) -> None:
    together = LOSSES[name](scores_of(*PAIRS), LossOptions())
    alone = [LOSSES[name](scores_of(pair), LossOptions()).item() for pair in PAIRS]
    assert together.tolist() == alone


# ------------------------------------------------------------------------------------------------------ TRL


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_the_value_of_trl(name: str, beta: float) -> None:
    scores = scores_of(*PAIRS, lengths=LENGTHS)
    expected = trl_loss(
        (scores.policy_chosen, scores.policy_rejected),
        (scores.reference_chosen, scores.reference_rejected),
        (scores.chosen_lengths, scores.rejected_lengths),
        loss_type=name,
        beta=beta,
    )
    assert LOSSES[name](scores, LossOptions(beta=beta)).mean().item() == pytest.approx(expected.item(), rel=1e-12)


# ----------------------------------------------------------------------------------------------- properties


@given(quadruples, betas)
def test_sigmoid_is_log_2_where_policy_and_reference_are_equal(pair: Quadruple, beta: float) -> None:
    equal = (pair[0], pair[1], pair[0], pair[1])
    assert loss_of("sigmoid", equal, beta=beta)[0] == pytest.approx(math.log(2), rel=1e-12)
    assert loss_of("sigmoid", equal, beta=beta, label_smoothing=0.3)[0] == pytest.approx(math.log(2), rel=1e-12)


@given(quadruples, betas)
def test_hinge_is_1_and_ipo_is_the_squared_target_where_policy_and_reference_are_equal(
    pair: Quadruple, beta: float
) -> None:
    equal = (pair[0], pair[1], pair[0], pair[1])
    assert loss_of("hinge", equal, beta=beta)[0] == 1.0
    assert loss_of("ipo", equal, beta=beta)[0] == pytest.approx((1 / (2 * beta)) ** 2, rel=1e-12)


@given(quadruples, betas)
def test_sigmoid_of_swapped_responses_has_the_complementary_probability(pair: Quadruple, beta: float) -> None:
    one, other = loss_of("sigmoid", pair, swapped(pair), beta=beta)
    assert math.exp(-one) + math.exp(-other) == pytest.approx(1, abs=1e-12)


@given(quadruples, betas, st.floats(0, 0.49))
def test_label_smoothing_mixes_the_loss_with_that_of_the_flipped_label(
    pair: Quadruple, beta: float, smoothing: float
) -> None:
    as_labelled, flipped = loss_of("sigmoid", pair, swapped(pair), beta=beta)
    (smoothed,) = loss_of("sigmoid", pair, beta=beta, label_smoothing=smoothing)
    assert smoothed == pytest.approx((1 - smoothing) * as_labelled + smoothing * flipped, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
@given(pair=quadruples, beta=betas, more=st.floats(0.01, 50))
def test_loss_falls_as_the_margin_grows(name: str, pair: Quadruple, beta: float, more: float) -> None:
    better = (pair[0] + more, *pair[1:])
    before, after = loss_of(name, pair, better, beta=beta)
    assert after < before or before == after == 0 or before < 1e-12  # hinge is flat at 0, sigmoid runs into it


@given(quadruples, betas, st.integers(1, 50), st.integers(1, 50))
def test_ipo_has_its_minimum_where_the_margin_per_token_is_half_the_inverse_beta(
    pair: Quadruple, beta: float, num_chosen: int, num_rejected: int
) -> None:
    _, policy_rejected, reference_chosen, reference_rejected = pair
    target = 1 / (2 * beta)
    best = reference_chosen + num_chosen * ((policy_rejected - reference_rejected) / num_rejected + target)
    at = [(best + shift, policy_rejected, reference_chosen, reference_rejected) for shift in (0.0, -1.0, 1.0)]
    scores = scores_of(*at, lengths=((num_chosen, num_rejected),) * 3)
    minimum, below, above = LOSSES["ipo"](scores, LossOptions(beta=beta)).tolist()
    assert minimum == pytest.approx(0, abs=1e-18 * (1 + best**2) + 1e-20)
    assert below == pytest.approx(above, rel=1e-6) and below == pytest.approx(1 / num_chosen**2, rel=1e-6)


@given(quadruples, st.floats(-50, 50), st.sampled_from(["sigmoid", "hinge"]))
def test_loss_depends_on_log_ratios_alone(pair: Quadruple, shift: float, name: str) -> None:
    """A prompt-dependent constant, such as the partition function of the reward, cancels."""
    shifted = (pair[0] + shift, pair[1] + shift, pair[2], pair[3])
    before, after = loss_of(name, pair, shifted)
    assert before == pytest.approx(after, abs=1e-9)


@pytest.mark.parametrize("margin", [-1e18, -1e8, -1e4, 1e4, 1e8, 1e18])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_stay_finite_at_large_margins(name: str, margin: float) -> None:
    policy = torch.tensor([margin], dtype=torch.float32, requires_grad=True)
    zero, length = torch.zeros(1), torch.tensor([10])
    scores = PairScores(policy, zero, zero, zero, length, length)
    loss = LOSSES[name](scores, LossOptions(beta=0.5, label_smoothing=0.1))
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    assert bool(loss.isfinite().all()) and bool(grad.isfinite().all())
