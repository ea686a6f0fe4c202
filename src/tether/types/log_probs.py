"""The log-probabilities that a model assigns to the response tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tether.types.ragged import offsets_of, places_of

# What remains of a token's rounding scale where the model is sure of it.
_LEAST_SCALE = 0.03


@dataclass(frozen=True)
class TokenStatistics:
    """What metrics and WPO's weights need of each response token; detached.

    Attributes:
        entropy: Entropy of the next-token distribution, in nats.
        mean_logit: Mean logit over the vocabulary.
        is_top1: Whether the token was the most likely one.
        log_expected_prob: `log sum_v pi(v)^2`: the log of the expected probability of a token drawn from the policy.
    """

    entropy: Float[Tensor, " tokens"]
    mean_logit: Float[Tensor, " tokens"]
    is_top1: Bool[Tensor, " tokens"]
    log_expected_prob: Float[Tensor, " tokens"]


@dataclass(frozen=True)
class ResponseLogProbs:
    """Per-token log-probabilities of the responses of a batch, ragged.

    Attributes:
        values: `log pi(y_t | x, y_<t)` of every response token, in nats, fp32.
        offsets: Where each response starts; last entry is the total.
        statistics: Per-token statistics, if requested.
        auxiliary_loss: The model's own auxiliary loss (router load balancing), when it has one.
    """

    values: Float[Tensor, " tokens"]
    offsets: Int[Tensor, " responses_plus_1"]
    statistics: TokenStatistics | None = None
    auxiliary_loss: Float[Tensor, ""] | None = None

    @property
    def num_responses(self) -> int:
        return self.offsets.shape[0] - 1

    def lengths(self) -> Int[Tensor, " responses"]:
        return self.offsets.diff()

    def sums(self) -> Float[Tensor, " responses"]:
        """`log pi(y | x)`: the sum over each response's tokens, in nats."""
        return torch.segment_reduce(self.values, "sum", offsets=self.offsets)

    def means(self) -> Float[Tensor, " responses"]:
        """The mean log-probability per token of each response, in nats."""
        return self.sums() / self.lengths()

    def rounding_scales(self) -> Float[Tensor, " tokens"]:
        """How far rounding moves each token's log-prob, relative to one that the model gives no chance.

        `1 - p`, and 0.03 in quadrature: where every logit is off by a small error of its own, with standard deviation
        `e`, `log p_y` is off by `e sqrt((1 - p_y)^2 + sum of p_v^2 over all others)`, between 1 and 1.4 times
        `e (1 - p_y)`.
        """
        return (-torch.expm1(self.values.detach())).hypot(self.values.new_full((), _LEAST_SCALE))

    def rounding_scales_of_sums(self) -> Float[Tensor, " responses"]:
        """The same of `sums`, in which the errors of tokens add up as independent ones do."""
        return torch.segment_reduce(self.rounding_scales().square(), "sum", offsets=self.offsets).sqrt()

    def where(self, mask: Bool[Tensor, " tokens"], lengths: Sequence[int]) -> ResponseLogProbs:
        """Those of some tokens.

        Args:
            mask: Which.
            lengths: How many they are of each response; on the host, not to wait for the device.
        """
        places = places_of(mask, lengths)
        names = [field.name for field in fields(TokenStatistics)]
        return replace(
            self,
            values=self.values[places],
            offsets=offsets_of(lengths, self.values.device),
            statistics=self.statistics and TokenStatistics(*(getattr(self.statistics, name)[places] for name in names)),
        )

    def detach(self) -> ResponseLogProbs:
        return replace(self, values=self.values.detach(), auxiliary_loss=None)

    def split(self) -> list[Float[Tensor, " length"]]:
        """One tensor per response."""
        return list(self.values.split(self.lengths().tolist()))


def join_log_probs(parts: Sequence[ResponseLogProbs], order: Sequence[int]) -> ResponseLogProbs:
    """Joins the scores of parts of a batch into scores of the whole batch.

    Args:
        parts: Scores of some responses each.
        order: The index in the whole batch of each response of the parts, in the order of the parts.

    Returns:
        Scores in the order of the whole batch; the auxiliary loss is the mean over the parts' responses.
    """
    place = {index: position for position, index in enumerate(order)}
    arranged = [place[index] for index in range(len(order))]
    lengths = torch.cat([part.lengths() for part in parts])

    def rearranged(values: Sequence[Tensor]) -> Tensor:
        pieces = torch.cat(list(values)).split(lengths.tolist())
        return torch.cat([pieces[position] for position in arranged])

    statistics = [part.statistics for part in parts if part.statistics is not None]
    losses = [part.auxiliary_loss * part.num_responses for part in parts if part.auxiliary_loss is not None]
    names = [field.name for field in fields(TokenStatistics)]
    return ResponseLogProbs(
        values=rearranged([part.values for part in parts]),
        offsets=offsets_of([int(lengths[position]) for position in arranged], parts[0].values.device),
        statistics=TokenStatistics(*(rearranged([getattr(each, name) for each in statistics]) for name in names))
        if statistics
        else None,
        auxiliary_loss=torch.stack(losses).sum() / len(order) if losses else None,
    )
