"""Weights of tokens and pairs before and after a loss: LD-DPO, WPO, and BCO's running mean of rewards.

Knows batches and log-probabilities; knows no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from tether.types import (
    PairBatch,
    PairScores,
    PairTokens,
    ResponseLogProbs,
    TokenScores,
    offsets_of,
    on_device,
    places_of,
)


def pair_scores(
    batch: PairBatch, policy: ResponseLogProbs, reference: ResponseLogProbs, ld_alpha: float | None = None
) -> PairScores:
    """The summed log-probs of each pair; with `ld_alpha`, weighted as in LD-DPO.

    `sum_{t <= n} log pi(y_t) + alpha sum_{t > n} log pi(y_t)`, with `n = min(|y_w|, |y_l|)`, for policy and reference

    Liu et al. 2024 (LD-DPO), arXiv 2409.06411. `alpha = 1` is DPO, `alpha = 0` cuts the longer response.
    """
    scores = PairScores.of(batch, policy, reference)
    if ld_alpha is None or ld_alpha == 1:
        return scores
    policy_chosen, policy_rejected = _desensitized(batch, policy, ld_alpha)
    reference_chosen, reference_rejected = _desensitized(batch, reference, ld_alpha)
    return replace(
        scores,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        whole_policy_chosen=scores.policy_chosen,
    )


def pair_tokens(batch: PairBatch, policy: ResponseLogProbs, reference: ResponseLogProbs) -> PairTokens:
    """Every token of the pairs' responses; those of a response in several pairs once for each."""
    device = policy.values.device
    ids = (
        batch.response_ids
        if batch.scored is None
        else batch.response_ids[places_of(batch.scored, batch.scored_lengths)]
    )

    def tokens(side: tuple[int, ...]) -> TokenScores:
        places = on_device(_places(batch, side), device)
        offsets = offsets_of([batch.counted_lengths()[r] for r in side], device)
        return TokenScores(policy.values[places], reference.values[places], ids[places], offsets)

    return PairTokens(tokens(batch.chosen), tokens(batch.rejected))


def _places(batch: PairBatch, side: tuple[int, ...]) -> Tensor:
    """Where the tokens of these responses are among those of the batch that count."""
    starts = list(accumulate(batch.counted_lengths(), initial=0))
    return torch.cat([torch.arange(starts[r], starts[r + 1]) for r in side])


def _desensitized(batch: PairBatch, log_probs: ResponseLogProbs, alpha: float) -> tuple[Tensor, Tensor]:
    lengths = batch.counted_lengths()
    public = [min(lengths[c], lengths[r]) for c, r in zip(batch.chosen, batch.rejected, strict=True)]
    device = log_probs.values.device

    def weighted(side: tuple[int, ...]) -> Tensor:
        # A response in several pairs is gathered once per pair, since the length shared with its partner differs.
        beyond = torch.cat([torch.arange(lengths[r]) >= n for r, n in zip(side, public, strict=True)])
        weights = torch.ones(len(beyond), dtype=log_probs.values.dtype).masked_fill(beyond, alpha)
        values = log_probs.values[on_device(_places(batch, side), device)] * on_device(weights, device)
        return torch.segment_reduce(values, "sum", offsets=offsets_of([lengths[r] for r in side], device))

    return weighted(batch.chosen), weighted(batch.rejected)


def policy_weights(batch: PairBatch, policy: ResponseLogProbs) -> Float[Tensor, " pairs"]:
    """WPO's weight of each pair: how likely the policy is to generate its responses; no gradient.

    `w(y_w) w(y_l)`, with `w(y) = exp(mean_t (log pi(y_t) - log sum_v pi(v)^2))`

    Zhou et al. 2024 (WPO), arXiv 2406.11827, with its sampled alignment.

    Args:
        batch: The pairs.
        policy: The policy's log-probs, with statistics.
    """
    assert policy.statistics is not None
    aligned = policy.values.detach() - policy.statistics.log_expected_prob
    means = torch.segment_reduce(aligned, "sum", offsets=policy.offsets) / policy.lengths()
    chosen, rejected = batch.of_responses(means)
    return (chosen + rejected).exp()


class RewardShift:
    """BCO's running mean of the rewards of all responses, chosen and rejected, seen in training.

    State of a run: saved in checkpoints and restored from them.
    """

    def __init__(self) -> None:
        self._totals: Tensor | None = None  # sum and count over all processes, in double precision

    def update(
        self,
        scores: PairScores,
        beta: float | Tensor,
        reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
        *,
        counts: bool = True,
    ) -> Float[Tensor, ""]:
        """Adds a micro-batch and returns the mean so far, including it.

        Args:
            scores: Its pairs.
            beta: Turns log-ratios into rewards.
            reduce: Sums a tensor over the processes.
            counts: Whether this process's pairs count.
        """
        rewards = torch.cat([beta * scores.chosen_logratios, beta * scores.rejected_logratios]).detach().double()
        totals = reduce(torch.stack([rewards.sum(), rewards.new_full((), rewards.numel())]) * counts)
        self._totals = totals if self._totals is None else self._totals.to(totals) + totals
        return self.mean(scores.policy_chosen)

    def mean(self, like: Tensor) -> Float[Tensor, ""]:
        """The mean so far, 0 before the first update; of the dtype and device of `like`."""
        if self._totals is None:
            return like.new_zeros(())
        return (self._totals[0] / self._totals[1]).to(like)

    def state(self) -> list[float] | None:
        """Sum and count, for a checkpoint; None before the first update."""
        return None if self._totals is None else self._totals.tolist()

    def load(self, state: list[float] | None) -> None:
        """Restores what `state` returned."""
        self._totals = None if state is None else torch.tensor(state, dtype=torch.float64)
