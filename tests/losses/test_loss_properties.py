"""What the papers say of their losses, over inputs that Hypothesis draws."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.loss_equations import Pair
from tether.losses import DIVERGENCES, LOSSES, LossOptions
from tether.types import PairScores

log_probs = st.floats(-200, 0)
lengths = st.integers(1, 50)
pairs = st.builds(Pair, log_probs, log_probs, log_probs, log_probs, lengths, lengths)
betas = st.floats(0.01, 2)

ON_DIFFERENCES = [name for name, loss in LOSSES.items() if "f_divergence_type" in loss.takes]


def losses_of(name: str, *drawn: Pair, **options: float) -> list[float]:
    columns = torch.tensor([pair[:4] for pair in drawn], dtype=torch.float64).T
    chosen, rejected = torch.tensor([pair[4:] for pair in drawn]).T
    scores = PairScores(columns[0], columns[1], columns[2], columns[3], chosen, rejected)
    smoothing = {"label_smoothing": 0.01} if name == "exo_pair" else {}
    values: list[float] = LOSSES[name](scores, LossOptions(**smoothing | options)).tolist()
    return values


def loss_of(name: str, pair: Pair, **options: float) -> float:
    return losses_of(name, pair, **options)[0]


def swapped(pair: Pair) -> Pair:
    return Pair(*(pair[index] for index in (1, 0, 3, 2, 5, 4)))


def where_policy_is_reference(pair: Pair) -> Pair:
    return pair._replace(reference_chosen=pair.policy_chosen, reference_rejected=pair.policy_rejected)


# ------------------------------------------------------------------------------------- where training starts

LOG_2 = math.log(2)
AT_THE_START = {
    "sigmoid": lambda beta: LOG_2,
    "sigmoid_norm": lambda beta: LOG_2,
    "robust": lambda beta: LOG_2,
    "aot": lambda beta: LOG_2,
    "aot_unpaired": lambda beta: LOG_2,
    "nca_pair": lambda beta: 2 * LOG_2,
    "bco_pair": lambda beta: 2 * LOG_2,
    "hinge": lambda beta: 1.0,
    "apo_zero": lambda beta: 1.0,
    "apo_down": lambda beta: 1.0,
    "ipo": lambda beta: (1 / (2 * beta)) ** 2,
    "sppo_hard": lambda beta: 2 * (1 / (2 * beta)) ** 2,
    "discopop": lambda beta: (LOG_2 + 1) / 2,
    "exo_pair": lambda beta: -LOG_2 - (math.log(0.01) + math.log(0.99)) / 2,
}


def test_every_loss_but_two_has_a_value_where_training_starts() -> None:
    assert AT_THE_START.keys() == LOSSES.keys() - {"sft", "hypo"}  # which depend on the policy itself


@pytest.mark.parametrize("name", AT_THE_START)
@given(pair=pairs, beta=betas)
def test_loss_where_policy_and_reference_are_equal(name: str, pair: Pair, beta: float) -> None:
    start = where_policy_is_reference(pair)
    expected = AT_THE_START[name](beta)
    assert loss_of(name, start, beta=beta) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "kind"), list(product(ON_DIFFERENCES, DIVERGENCES)))
@given(pair=pairs)
def test_every_divergence_starts_where_the_reverse_kl_starts(name: str, kind: str, pair: Pair) -> None:
    start = where_policy_is_reference(pair)
    assert loss_of(name, start, f_divergence_type=kind) == pytest.approx(loss_of(name, start), rel=1e-12)  # type: ignore[arg-type]


@given(pairs, betas, st.floats(0, 0.49))
def test_label_smoothing_does_not_move_the_start(pair: Pair, beta: float, smoothing: float) -> None:
    start = where_policy_is_reference(pair)
    for name in ("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"):
        assert loss_of(name, start, beta=beta, label_smoothing=smoothing) == pytest.approx(LOG_2, rel=1e-9)


@given(pair=pairs, beta=betas)
def test_hypo_is_dpo_where_the_reference_is_right_and_has_no_reference_where_it_is_wrong(
    pair: Pair, beta: float
) -> None:
    right = pair.reference_chosen >= pair.reference_rejected
    as_dpo = pair if right else pair._replace(reference_chosen=0.0, reference_rejected=0.0)
    assert loss_of("hypo", pair, beta=beta) == pytest.approx(loss_of("sigmoid", as_dpo, beta=beta), rel=1e-12)


ON_SUMS = [name for name in ON_DIFFERENCES if name not in ("ipo", "sigmoid_norm")]  # not on means over tokens


@pytest.mark.parametrize(("name", "kind"), list(product(["sigmoid", "robust"], DIVERGENCES)))
@given(pair=pairs, gain=st.floats(-5, 5), beta=betas)
def test_loss_is_log_2_where_both_responses_gained_alike(
    name: str, kind: str, pair: Pair, gain: float, beta: float
) -> None:
    """A margin of 0 away from the start: what the reference says of either response does not matter."""
    alike = where_policy_is_reference(pair)
    alike = alike._replace(
        policy_chosen=alike.policy_chosen + gain,
        policy_rejected=alike.policy_rejected + gain,
    )
    slope = 2 * math.exp(abs(gain)) * beta  # of the exponentials in some divergences: what rounding is multiplied by
    found = loss_of(name, alike, beta=beta, f_divergence_type=kind)  # type: ignore[arg-type]
    assert found == pytest.approx(LOG_2, rel=1e-12, abs=1e-13 * slope)


# ------------------------------------------------------------------------------------------------- symmetries


def margin_of(pair: Pair) -> float:
    return pair.h_w - pair.h_l


def margin_per_token(pair: Pair) -> float:
    return pair.h_w / pair.num_chosen - pair.h_l / pair.num_rejected


ODDS = math.log(0.99 / 0.01)  # of the smoothed label that `loss_of` gives EXO
COST_OF_A_SWAP = {
    "sigmoid": lambda pair, beta: beta * margin_of(pair),
    "robust": lambda pair, beta: beta * margin_of(pair),
    "aot": lambda pair, beta: beta * margin_of(pair),  # of a batch of one pair
    "aot_unpaired": lambda pair, beta: beta * margin_of(pair),
    "bco_pair": lambda pair, beta: beta * margin_of(pair),
    "sigmoid_norm": lambda pair, beta: beta * margin_per_token(pair),
    "ipo": lambda pair, beta: 2 * margin_per_token(pair) / beta,
    "sppo_hard": lambda pair, beta: 2 * margin_of(pair) / beta,
    "exo_pair": lambda pair, beta: ODDS * math.tanh(beta * margin_of(pair) / 2),
}


@pytest.mark.parametrize("name", COST_OF_A_SWAP)
@given(pair=pairs, beta=betas)
def test_calling_the_other_response_chosen_costs_the_margin(name: str, pair: Pair, beta: float) -> None:
    as_labelled, other = (loss_of(name, labelled, beta=beta) for labelled in (pair, swapped(pair)))
    expected = COST_OF_A_SWAP[name](pair, beta)
    assert other - as_labelled == pytest.approx(expected, rel=1e-9, abs=1e-11 * max(1, as_labelled, other))


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
@given(pair=pairs, beta=betas)
def test_swapped_responses_have_the_complementary_probability(name: str, pair: Pair, beta: float) -> None:
    one, other = losses_of(name, pair, swapped(pair), beta=beta)
    assert math.exp(-one) + math.exp(-other) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
@given(pair=pairs, beta=betas, smoothing=st.floats(0, 0.49))
def test_label_smoothing_mixes_in_the_flipped_label(name: str, pair: Pair, beta: float, smoothing: float) -> None:
    as_labelled, flipped = losses_of(name, pair, swapped(pair), beta=beta)
    smoothed = loss_of(name, pair, beta=beta, label_smoothing=smoothing)
    assert smoothed == pytest.approx((1 - smoothing) * as_labelled + smoothing * flipped, rel=1e-9, abs=1e-12)


@given(pairs, betas, st.floats(0, 0.45))
def test_robust_is_unbiased_under_flipped_labels(pair: Pair, beta: float, smoothing: float) -> None:
    """The mean over labels flipped with that probability is DPO's loss of the clean label (the paper's lemma)."""
    kept, flipped = losses_of("robust", pair, swapped(pair), beta=beta, label_smoothing=smoothing)
    size = max(abs(kept), abs(flipped), 1)
    assert (1 - smoothing) * kept + smoothing * flipped == pytest.approx(
        loss_of("sigmoid", pair, beta=beta), abs=1e-12 * size / (1 - 2 * smoothing)
    )


@given(pairs, betas)
def test_apo_zero_of_swapped_responses_sums_to_2(pair: Pair, beta: float) -> None:
    assert sum(losses_of("apo_zero", pair, swapped(pair), beta=beta)) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("name", ["bco_pair", "sppo_hard", "apo_zero"])
@given(pair=pairs, beta=betas)
def test_raising_the_chosen_is_as_good_as_lowering_the_rejected(name: str, pair: Pair, beta: float) -> None:
    """The losses that push both responses alike: `(h_w, h_l) -> (-h_l, -h_w)` changes nothing."""
    mirrored = pair._replace(
        policy_chosen=-pair.h_l, policy_rejected=-pair.h_w, reference_chosen=0, reference_rejected=0
    )
    assert loss_of(name, mirrored, beta=beta) == pytest.approx(loss_of(name, pair, beta=beta), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", [*ON_SUMS, "aot"])
@given(pair=pairs, shift=st.floats(-50, 50))
def test_a_constant_of_the_prompt_cancels(name: str, pair: Pair, shift: float) -> None:
    """Such as the partition function of the reward."""
    moved = pair._replace(policy_chosen=pair.policy_chosen + shift, policy_rejected=pair.policy_rejected + shift)
    assert loss_of(name, moved) == pytest.approx(loss_of(name, pair), rel=1e-9, abs=1e-9)


# --------------------------------------------------------------------------------- slopes and where they end

FALLING = ("sigmoid", "sigmoid_norm", "hinge", "robust", "bco_pair", "apo_zero", "aot", "aot_unpaired", "sft")


@pytest.mark.parametrize("name", FALLING)
@given(pair=pairs, beta=betas, more=st.floats(0.01, 50))
def test_loss_falls_as_the_chosen_response_becomes_likelier(name: str, pair: Pair, beta: float, more: float) -> None:
    better = pair._replace(policy_chosen=pair.policy_chosen + more)
    before, after = loss_of(name, pair, beta=beta), loss_of(name, better, beta=beta)
    assert after < before or before - after == pytest.approx(0, abs=1e-12)  # flat where they run into a bound


RISING = (*(name for name in FALLING if name != "sft"), "apo_down", "nca_pair")


@pytest.mark.parametrize("name", RISING)
@given(pair=pairs, beta=betas, more=st.floats(0.01, 50))
def test_loss_rises_as_the_rejected_response_becomes_likelier(name: str, pair: Pair, beta: float, more: float) -> None:
    worse = pair._replace(policy_rejected=pair.policy_rejected + more)
    before, after = loss_of(name, pair, beta=beta), loss_of(name, worse, beta=beta)
    assert after > before or after - before == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(pair=pairs, more=st.floats(0.01, 50))
def test_loss_falls_under_every_divergence(kind: str, pair: Pair, more: float) -> None:
    better = pair._replace(policy_chosen=pair.policy_chosen + more)
    before, after = (loss_of("sigmoid", p, f_divergence_type=kind) for p in (pair, better))  # type: ignore[arg-type]
    assert after <= before


@given(pairs, betas)
def test_ipo_is_least_where_the_margin_per_token_is_half_the_inverse_beta(pair: Pair, beta: float) -> None:
    target = 1 / (2 * beta)
    best = pair.reference_chosen + pair.num_chosen * (pair.h_l / pair.num_rejected + target)
    at = [pair._replace(policy_chosen=best + shift) for shift in (0.0, -1.0, 1.0)]
    minimum, below, above = losses_of("ipo", *at, beta=beta)
    assert minimum == pytest.approx(0, abs=1e-18 * (1 + best**2) + 1e-20)
    assert below == pytest.approx(above, rel=1e-6) and below == pytest.approx(1 / pair.num_chosen**2, rel=1e-6)


@given(pairs, betas)
def test_sppo_is_least_at_its_two_targets(pair: Pair, beta: float) -> None:
    target = 1 / (2 * beta)
    best = pair._replace(policy_chosen=pair.reference_chosen + target, policy_rejected=pair.reference_rejected - target)
    assert loss_of("sppo_hard", best, beta=beta) == pytest.approx(0, abs=1e-20 * (1 + target**2) + 1e-22)


@given(pairs, betas, st.floats(0.001, 0.49))
def test_exo_is_least_where_the_policy_chooses_as_the_smoothed_label_does(
    pair: Pair, beta: float, smoothing: float
) -> None:
    assert loss_of("exo_pair", pair, beta=beta, label_smoothing=smoothing) >= -1e-12
    margin = math.log((1 - smoothing) / smoothing) / beta
    best = pair._replace(policy_chosen=pair.reference_chosen + pair.h_l + margin)
    assert loss_of("exo_pair", best, beta=beta, label_smoothing=smoothing) == pytest.approx(0, abs=1e-9)


@given(pairs, betas)
def test_apo_losses_stay_between_0_and_2(pair: Pair, beta: float) -> None:
    for name in ("apo_zero", "apo_down"):
        assert 0 <= loss_of(name, pair, beta=beta) <= 2


# ------------------------------------------------------------------------------------------------- extremes

WITH_DIVERGENCES = [(name, kind) for name, kind in product(LOSSES, DIVERGENCES) if name in ON_DIFFERENCES] + [
    (name, "reverse_kl") for name in LOSSES if name not in ON_DIFFERENCES
]
margins = st.floats(-1e4, 1e4, width=32)
EXTREMES = [(-1e4, 1e4, 2.0), (1e4, -1e4, 2.0), (1e4, 1e4, 0.5), (-1e4, -1e4, 0.5)]  # tried whatever is drawn


@pytest.mark.parametrize(("name", "kind"), WITH_DIVERGENCES)
@given(drawn=st.lists(st.tuples(margins, margins, betas), min_size=1, max_size=4), num_tokens=lengths)
def test_large_margins_overflow_neither_loss_nor_gradient_in_fp32(
    name: str, kind: str, drawn: list[tuple[float, float, float]], num_tokens: int
) -> None:
    for h_w, h_l, beta in (*drawn, *EXTREMES):
        chosen, rejected = (torch.tensor([h], requires_grad=True) for h in (h_w, h_l))
        scores = PairScores(chosen, rejected, torch.zeros(1), torch.zeros(1), *[torch.tensor([num_tokens])] * 2)
        losses = LOSSES[name](scores, LossOptions(beta=beta, label_smoothing=0.1, f_divergence_type=kind))
        gradients = torch.autograd.grad(losses.sum(), [chosen, rejected], allow_unused=True)
        assert losses.dtype == torch.float32 and bool(losses.isfinite().all())
        assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("margin", [-1e18, -1e8, 1e8, 1e18])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_stay_finite_at_absurd_margins(name: str, margin: float) -> None:
    policy = torch.tensor([margin], dtype=torch.float32, requires_grad=True)
    zero, length = torch.zeros(1), torch.tensor([10])
    loss = LOSSES[name](PairScores(policy, zero, zero, zero, length, length), LossOptions(0.5, 0.1))
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())


def test_a_divergence_keeps_its_gradient_where_its_exponential_is_continued() -> None:
    """TRL clamps the exponent: a pair beyond would have no gradient at all."""
    h = torch.tensor([-100.0, -1e4], requires_grad=True)
    (gradient,) = torch.autograd.grad(DIVERGENCES["forward_kl"](h, 0.5).sum(), h)
    assert bool((gradient > 0).all()) and bool(gradient.isfinite().all())
