"""What weighs tokens and pairs: LD-DPO, WPO, margins, BCO's running mean, lists of losses, a loss of your own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.loss_equations import Numbers, Pair, loss_by_hand
from support.trl_oracle import trl_loss_of_tokens
from tether.errors import ConfigurationError
from tether.losses import LOSSES, LossOptions, Objective
from tether.losses.weighting import RewardShift, pair_scores, policy_weights
from tether.types import PairBatch, PairScores, Response, ResponseLogProbs, TokenStatistics, offsets_of

pytestmark = pytest.mark.numerics

# Two prompts; the first has three responses in two pairs, of 5, 2 and 4 tokens, so one response has two partners.
A, B, C = (Response((1, 2), tuple(range(10, 10 + n))) for n in (5, 2, 4))
D, E = (Response((3,), tuple(range(20, 20 + n))) for n in (3, 3))
BATCH = PairBatch.of_pairs([(A, B), (C, A), (D, E)])
WIDTH = 5


def drawn(seed: int) -> ResponseLogProbs:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(BATCH.response_lengths)
    values = -3 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    expected = -3 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    statistics = TokenStatistics(values, values, values > -1, expected)
    return ResponseLogProbs(values, offsets_of(BATCH.response_lengths), statistics)


POLICY, REFERENCE = drawn(0), drawn(1)


def tokens_of(values: Tensor, side: tuple[int, ...]) -> list[list[float]]:
    responses = [part.tolist() for part in values.split(list(BATCH.response_lengths))]
    return [responses[index] for index in side]


def padded(values: Tensor) -> Tensor:
    """Chosen, then rejected responses, as TRL lays them out."""
    responses = values.split(list(BATCH.response_lengths))
    rows = [responses[index] for index in (*BATCH.chosen, *BATCH.rejected)]
    return torch.stack([torch.nn.functional.pad(row, (0, WIDTH - len(row))) for row in rows])


LENGTHS = torch.tensor([BATCH.response_lengths[index] for index in (*BATCH.chosen, *BATCH.rejected)])


# ------------------------------------------------------------------------------------------------------ LD-DPO


def ld_sums(values: Tensor, alpha: float) -> list[tuple[float, float]]:
    found = []
    for chosen, rejected in zip(tokens_of(values, BATCH.chosen), tokens_of(values, BATCH.rejected), strict=True):
        public = min(len(chosen), len(rejected))
        found.append(tuple(sum(side[:public]) + alpha * sum(side[public:]) for side in (chosen, rejected)))
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha_weighs_the_tokens_beyond_the_shared_length(alpha: float) -> None:
    scores = pair_scores(BATCH, POLICY, REFERENCE, alpha)
    for values, chosen, rejected in (
        (POLICY.values, scores.policy_chosen, scores.policy_rejected),
        (REFERENCE.values, scores.reference_chosen, scores.reference_rejected),
    ):
        expected = ld_sums(values, alpha)
        assert chosen.tolist() == pytest.approx([pair[0] for pair in expected], rel=1e-12)
        assert rejected.tolist() == pytest.approx([pair[1] for pair in expected], rel=1e-12)


def test_ld_alpha_of_1_and_none_are_plain_sums() -> None:
    plain = PairScores.of(BATCH, POLICY, REFERENCE)
    for alpha in (None, 1.0):
        found = pair_scores(BATCH, POLICY, REFERENCE, alpha)
        assert torch.equal(found.policy_chosen, plain.policy_chosen) and torch.equal(found.delta, plain.delta)
    assert not LossOptions(ld_alpha=1.0).needs_per_token and not LossOptions().needs_per_token
    assert LossOptions(ld_alpha=0.5).needs_per_token


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard", "aot", "sigmoid_norm", "bco_pair"])
def test_loss_with_ld_alpha_and_its_gradient_equal_those_of_trl(name: str) -> None:
    values = POLICY.values.clone().requires_grad_()
    policy = replace(POLICY, values=values)
    objective = Objective([name], options=LossOptions(ld_alpha=0.4), bco_reward_shift=False)
    _, losses = objective(BATCH, policy, REFERENCE)
    theirs = trl_loss_of_tokens(padded(values), padded(REFERENCE.values), LENGTHS, loss_type=name, ld_alpha=0.4)
    assert_same_with_gradient(losses.mean(), theirs, values)


def assert_same_with_gradient(ours: Tensor, theirs: Tensor, values: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (ours_gradient,), (their_gradient,) = (torch.autograd.grad(loss, values) for loss in (ours, theirs))
    torch.testing.assert_close(ours_gradient, their_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_ld_alpha_exactly_where_it_says_so(name: str) -> None:
    def losses(alpha: float | None) -> Tensor:
        return Objective([name], options=LossOptions(ld_alpha=alpha, label_smoothing=0.1))(BATCH, POLICY, REFERENCE)[1]

    assert torch.equal(losses(0.2), losses(None)) == ("ld_alpha" not in LOSSES[name].takes)


# --------------------------------------------------------------------------------------------------------- WPO


def test_wpo_weights_are_mean_likelihoods_over_those_that_the_policy_expects() -> None:
    assert POLICY.statistics is not None
    aligned = POLICY.values - POLICY.statistics.log_expected_prob
    expected = []
    for chosen, rejected in zip(tokens_of(aligned, BATCH.chosen), tokens_of(aligned, BATCH.rejected), strict=True):
        expected.append(math.exp(sum(chosen) / len(chosen)) * math.exp(sum(rejected) / len(rejected)))
    assert policy_weights(BATCH, POLICY).tolist() == pytest.approx(expected, rel=1e-12)


def test_wpo_weighs_nothing_where_the_policy_is_uniform() -> None:
    """Every token is as likely as the policy expects of a token."""
    values = torch.full_like(POLICY.values, -math.log(256))
    uniform = ResponseLogProbs(values, POLICY.offsets, TokenStatistics(values, values, values > 0, values))
    assert policy_weights(BATCH, uniform).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.couples_pairs])
def test_a_weighted_loss_is_the_loss_times_the_weight(name: str) -> None:
    options = LossOptions(label_smoothing=0.1)
    plain, weighted = (Objective([name], options=options, use_weighting=use) for use in (False, True))
    weights = policy_weights(BATCH, POLICY)
    expected = plain(BATCH, POLICY, REFERENCE)[1] * weights
    assert torch.equal(weighted(BATCH, POLICY, REFERENCE)[1], expected) and not weights.requires_grad


def test_trl_cannot_train_hinge_with_weights() -> None:
    """As docs/losses.md says; when this fails, the page and the list below can do without it."""
    values = POLICY.values.clone().requires_grad_()
    assert POLICY.statistics is not None
    expected = padded(POLICY.statistics.log_expected_prob)
    theirs = trl_loss_of_tokens(
        padded(values), padded(REFERENCE.values), LENGTHS, expected, loss_type="hinge", use_weighting=True
    )
    with pytest.raises(RuntimeError, match="inplace operation"):
        theirs.backward()


# TRL's `sft` is a mean over tokens, it has no `hypo`, and what sorts has no weights.
WEIGHTED = [name for name in LOSSES if name not in ("sft", "aot", "aot_unpaired", "hinge", "hypo")]


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_loss_and_its_gradient_equal_those_of_trl(name: str) -> None:
    """The weights have no gradient: only then are the gradients equal."""
    values = POLICY.values.clone().requires_grad_()
    assert POLICY.statistics is not None
    smoothing = {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
    objective = Objective([name], options=LossOptions(**smoothing), use_weighting=True, bco_reward_shift=False)
    _, losses = objective(BATCH, replace(POLICY, values=values), REFERENCE)
    theirs = trl_loss_of_tokens(
        padded(values),
        padded(REFERENCE.values),
        LENGTHS,
        padded(POLICY.statistics.log_expected_prob),
        loss_type=name,
        use_weighting=True,
        **smoothing,
    )
    assert_same_with_gradient(losses.mean(), theirs, values)


# ------------------------------------------------------------------------------------------- several losses, MPO


def test_several_losses_equal_those_of_trl() -> None:
    values = POLICY.values.clone().requires_grad_()
    names, weights = ["sigmoid", "bco_pair", "ipo", "nca_pair"], [0.8, 0.2, 1.0, -0.3]
    _, losses = Objective(names, weights, bco_reward_shift=False)(BATCH, replace(POLICY, values=values), REFERENCE)
    theirs = trl_loss_of_tokens(
        padded(values), padded(REFERENCE.values), LENGTHS, loss_type=names, loss_weights=weights
    )
    assert_same_with_gradient(losses.mean(), theirs, values)


def test_sft_in_a_list_counts_every_token_whatever_ld_alpha_is() -> None:
    _, losses = Objective(["sft"], options=LossOptions(ld_alpha=0.0))(BATCH, POLICY, REFERENCE)
    expected = [-sum(tokens) / len(tokens) for tokens in tokens_of(POLICY.values, BATCH.chosen)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------------ margins


def test_a_margin_shifts_what_the_reward_margin_must_reach() -> None:
    margins = [0.0, 0.5, -2.0]
    batch = replace(BATCH, margins=torch.tensor(margins))
    scores, losses = Objective(["sigmoid"])(batch, POLICY, REFERENCE)
    for margin, delta, loss in zip(margins, scores.delta.tolist(), losses.tolist(), strict=True):
        assert loss == pytest.approx(loss_by_hand("sigmoid", Pair(delta, 0, 0, 0), Numbers(margin=margin)), rel=1e-7)


def test_rows_with_a_margin_that_no_loss_reads_are_refused() -> None:
    batch = replace(BATCH, margins=torch.zeros(3))
    with pytest.raises(ConfigurationError, match="margin"):
        Objective(["ipo", "sft"])(batch, POLICY, REFERENCE)
    Objective(["ipo", "sigmoid"])(batch, POLICY, REFERENCE)


def test_margins_travel_with_their_batch() -> None:
    batch = PairBatch.of_pairs([(A, B), (D, E)], [0.5, 1.5])
    assert batch.to("cpu").margins is not None and batch.margins is not None
    assert batch.margins.tolist() == [0.5, 1.5] and batch.to("meta").margins.device.type == "meta"  # type: ignore[union-attr]
    assert BATCH.margins is None and BATCH.to("meta").margins is None


# ---------------------------------------------------------------------------------------------- BCO's running mean


def rewards_of(scores: PairScores, beta: float) -> list[float]:
    return [beta * value for value in (*scores.chosen_logratios.tolist(), *scores.rejected_logratios.tolist())]


def test_reward_shift_is_the_mean_of_all_rewards_so_far_and_is_in_the_loss() -> None:
    objective, beta = Objective(["bco_pair"], options=LossOptions(beta=0.5)), 0.5
    seen: list[float] = []
    for seed in range(4):
        policy = drawn(seed + 10)
        scores, losses = objective(BATCH, policy, REFERENCE)
        seen += rewards_of(scores, beta)
        shift = sum(seen) / len(seen)
        assert scores.reward_shift is not None and scores.reward_shift.item() == pytest.approx(shift, rel=1e-12)
        pairs = [
            Pair(*four)
            for four in zip(
                *(
                    getattr(scores, name).tolist()
                    for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
                ),
                strict=True,
            )
        ]
        expected = [loss_by_hand("bco_pair", pair, Numbers(beta=beta, shift=shift)) for pair in pairs]
        assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert abs(shift) > 0.1


def test_reward_shift_has_no_gradient() -> None:
    values = POLICY.values.clone().requires_grad_()
    scores, losses = Objective(["bco_pair"])(BATCH, replace(POLICY, values=values), REFERENCE)
    shift = scores.reward_shift
    assert shift is not None and not shift.requires_grad
    (found,) = torch.autograd.grad(losses.sum(), values, retain_graph=True)
    fixed = LOSSES["bco_pair"](replace(scores, reward_shift=shift.clone()), LossOptions())
    assert torch.equal(found, torch.autograd.grad(fixed.sum(), values)[0])


def test_evaluation_reads_the_shift_and_does_not_move_it() -> None:
    objective = Objective(["bco_pair"])
    objective(BATCH, POLICY, REFERENCE)
    assert objective.reward_shift is not None
    before = objective.reward_shift.state()
    scores, _ = objective(BATCH, drawn(5), REFERENCE, training=False)
    assert objective.reward_shift.state() == before
    assert before is not None and scores.reward_shift is not None
    assert scores.reward_shift.item() == pytest.approx(before[0] / before[1], rel=1e-12)


def test_reward_shift_counts_the_rewards_of_all_processes() -> None:
    shift, other = RewardShift(), torch.tensor([7.0, 3.0], dtype=torch.float64)
    scores = PairScores.of(BATCH, POLICY, REFERENCE)
    found = shift.update(scores, 0.5, lambda totals: totals + other)
    own = rewards_of(scores, 0.5)
    assert found.item() == pytest.approx((sum(own) + 7) / (len(own) + 3), rel=1e-12)


def test_reward_shift_comes_back_bit_for_bit() -> None:
    import json

    shift, again = RewardShift(), RewardShift()
    assert shift.state() is None and again.mean(POLICY.values).item() == 0
    for seed in range(3):
        shift.update(PairScores.of(BATCH, drawn(seed), REFERENCE), 0.1)
    again.load(json.loads(json.dumps(shift.state())))
    assert torch.equal(again.mean(POLICY.values), shift.mean(POLICY.values))
    scores = PairScores.of(BATCH, drawn(9), REFERENCE)
    assert torch.equal(again.update(scores, 0.1), shift.update(scores, 0.1))


# ----------------------------------------------------------------------------------------------- a loss of your own


def test_a_loss_of_ones_own_gets_scores_and_options() -> None:
    def squared(scores: PairScores, options: LossOptions) -> Tensor:
        return (options.beta * scores.delta - 1).square()

    scores, losses = Objective([squared, "sigmoid"], [2.0, 1.0], LossOptions(beta=0.3))(BATCH, POLICY, REFERENCE)
    expected = [
        2 * (0.3 * delta - 1) ** 2 + loss_by_hand("sigmoid", Pair(delta, 0, 0, 0), Numbers(beta=0.3))
        for delta in scores.delta.tolist()
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrong", [lambda s, o: s.delta.mean(), lambda s, o: 1.0, lambda s, o: s.delta[None]])
def test_a_loss_that_gives_no_value_per_pair_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="one value per pair"):
        Objective([wrong])(BATCH, POLICY, REFERENCE)
