"""`Objective`: what a run minimises, from its losses, their weights, and the weights of pairs and tokens.

Knows losses and log-probabilities; knows no trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tether.errors import ConfigurationError, NotHereError
from tether.losses.checks import refused_margin
from tether.losses.options import LossOptions, PreferenceLoss
from tether.losses.table import LOSSES, Loss
from tether.losses.weighting import RewardShift, pair_scores, pair_tokens, policy_weights
from tether.refusals import Refusal, refuse
from tether.types import PairBatch, PairScores, PairTokens, ResponseLogProbs, scored_tokens


class Objective:
    """The weighted sum of a run's losses: `w(pair) sum_k weight_k loss_k(pair)`.

    Several losses make MPO (Wang et al. 2024, arXiv 2411.10442). `w` is WPO's weight, or 1.

    Args:
        losses: Names from `LOSSES`, or functions of `PairScores` and `LossOptions` that return one value per pair.
        weights: One per loss; by default 1.
        options: The numbers in the losses' equations, or a function that returns them for each batch.
        use_weighting: Weight pairs by their likelihood under the policy (WPO).
        bco_reward_shift: Keep BCO's running mean of rewards, if `bco_pair` is one of the losses.
        beta_column: A column of the rows that is each pair's `beta`.

    Attributes:
        needs_tokens: A loss reads single tokens, whatever the options.
    """

    def __init__(
        self,
        losses: Sequence[str | PreferenceLoss],
        weights: Sequence[float] | None = None,
        options: LossOptions | Callable[[], LossOptions] = LossOptions(),  # noqa: B008  # frozen
        *,
        use_weighting: bool = False,
        bco_reward_shift: bool = True,
        beta_column: str | None = None,
    ) -> None:
        functions = [LOSSES[loss] if isinstance(loss, str) else loss for loss in losses]
        self._terms = list(zip(weights or [1.0] * len(functions), functions, strict=True))
        self._options = options if callable(options) else lambda: options
        self.use_weighting, self._beta_column = use_weighting, beta_column
        self.needs_tokens = any(getattr(loss, "needs_tokens", False) for loss in functions)
        self.names = [loss if isinstance(loss, str) else getattr(loss, "__qualname__", repr(loss)) for loss in losses]
        self.reward_shift = RewardShift() if bco_reward_shift and "bco_pair" in losses else None

    def __call__(
        self,
        batch: PairBatch,
        policy: ResponseLogProbs,
        reference: ResponseLogProbs,
        *,
        training: bool = True,
        reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
    ) -> tuple[PairScores, Float[Tensor, " pairs"]]:
        """The scores of the pairs, and one loss per pair.

        Args:
            batch: The pairs.
            policy: The policy's log-probs; with statistics if pairs are weighted.
            reference: The reference's.
            training: Whether to update BCO's running mean with the batch; evaluation only reads it.
            reduce: Sums a tensor over the processes.

        Raises:
            ConfigurationError: If a loss returns anything but one value per pair, or the rows have a margin that no
                loss reads.
        """
        if batch.margins is not None:
            refuse(self.refused_margin())
        policy, reference = scored_tokens(batch, policy), scored_tokens(batch, reference)
        options = self.options_of(batch)
        scores = pair_scores(batch, policy, reference, options.ld_alpha)
        if self.needs_tokens:
            scores = replace(scores, tokens=pair_tokens(batch, policy, reference))
        if self.reward_shift is not None:
            shift = self.reward_shift.update(scores, options.beta, reduce, counts=batch.counts) if training else None
            scores = replace(
                scores, reward_shift=self.reward_shift.mean(scores.policy_chosen) if shift is None else shift
            )
        values = [weight * _checked(_called(loss, scores, options), loss, batch) for weight, loss in self._terms]
        losses = torch.stack(values).sum(0)
        return scores, losses * policy_weights(batch, policy) if self.use_weighting else losses

    def options_of(self, batch: PairBatch) -> LossOptions:
        """The numbers in the losses' equations for a batch."""
        options = self._options()
        return options if self._beta_column is None else replace(options, beta=batch.columns[self._beta_column])

    @property
    def functions(self) -> dict[str, PreferenceLoss]:
        """The losses by name, as documented functions."""
        plain = [loss.function if isinstance(loss, Loss) else loss for _, loss in self._terms]
        return {getattr(function, "__name__", type(function).__name__): function for function in plain}

    @property
    def own_loss(self) -> PreferenceLoss | None:
        """The user's own loss, if there is one."""
        return next((loss for _, loss in self._terms if not isinstance(loss, Loss)), None)

    def refused_margin(self) -> Iterator[Refusal]:
        """A `margin` in the rows that no loss reads."""
        named = [loss for _, loss in self._terms if isinstance(loss, Loss)]
        if len(named) == len(self._terms):
            yield from refused_margin(named)


def _called(loss: Loss | PreferenceLoss, scores: PairScores, options: LossOptions) -> Any:
    try:
        return loss(scores, options)
    except AttributeError as error:
        if error.obj is not None or scores.tokens is not None or error.name not in PairTokens._fields:
            raise
        name = getattr(loss, "__name__", type(loss).__name__)
        raise NotHereError(
            problem=f"Cannot read `scores.tokens.{error.name}` in the loss {name!r}: it did not ask for single tokens.",
            instead=f"Write `{name}.needs_tokens = True` after the function.",
        ) from error


def _checked(losses: Any, loss: PreferenceLoss, batch: PairBatch) -> Tensor:
    if isinstance(losses, Tensor) and losses.shape == (batch.num_pairs,):
        return losses
    found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"`{type(losses).__name__}`"
    raise ConfigurationError(
        problem=f"Cannot use the loss {getattr(loss, '__name__', loss)!r}: it returned {found} for {batch.num_pairs} "
        "pairs, not one value per pair.",
        details="The trainer itself takes the mean over the pairs of an optimizer step.",
        instead="Return a tensor with one entry per pair, without `.mean()` or `.sum()`.",
    )
