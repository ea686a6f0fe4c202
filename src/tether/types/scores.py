"""What a loss reads of each pair: the log-probabilities of both responses under policy and reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tether.errors import NotInBatchError
from tether.types.batch import PairBatch
from tether.types.log_probs import ResponseLogProbs


def scored_tokens(batch: PairBatch, log_probs: ResponseLogProbs) -> ResponseLogProbs:
    """The log-probs of the tokens that count, where a completion mask leaves some of a response out.

    Those of these tokens alone are returned as they are.
    """
    if batch.scored is None or log_probs.values.shape != batch.scored.shape:
        return log_probs
    return log_probs.where(batch.scored, batch.scored_lengths)


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of every token of some responses, one for each pair: one response after another.

    Attributes:
        policy: `log pi_theta(y_t | x, y_<t)`, in nats.
        reference: `log pi_ref(y_t | x, y_<t)`; no gradient.
        ids: The tokens' ids.
        offsets: Where each pair's response starts; the last entry is the total.
    """

    policy: Float[Tensor, " tokens"]
    reference: Float[Tensor, " tokens"]
    ids: Int[Tensor, " tokens"]
    offsets: Int[Tensor, " pairs_plus_1"]

    @property
    def logratios(self) -> Float[Tensor, " tokens"]:
        """`log pi_theta(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)`."""
        return self.policy - self.reference

    def sums(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " pairs"]:
        """The sum of a value per token over each response."""
        return torch.segment_reduce(values, "sum", offsets=self.offsets)

    def split(self, values: Shaped[Tensor, " tokens"]) -> list[Tensor]:
        """A value per token as one tensor for each response."""
        return list(values.split(self.offsets.diff().tolist()))


class PairTokens(NamedTuple):
    """The tokens of both responses of each pair."""

    chosen: TokenScores
    rejected: TokenScores


class _Columns(dict[str, Tensor]):
    """The named columns of the rows; says how to name one that is not among them."""

    def __missing__(self, name: str) -> Tensor:
        raise NotInBatchError(
            problem=f"Cannot read `scores.columns[{name!r}]`: `loss_columns` does not name this column.",
            instead=f"Write `DPOConfig(loss_columns={[*self, name]!r})`, and give each row a number in it.",
        )


@dataclass(frozen=True)
class PairScores:
    """All a preference loss may look at: sequence log-probabilities of each pair, in nats.

    Attributes:
        policy_chosen: `log pi_theta(y_w | x)`, summed over the response's tokens.
        policy_rejected: `log pi_theta(y_l | x)`.
        reference_chosen: `log pi_ref(y_w | x)`; no gradient.
        reference_rejected: `log pi_ref(y_l | x)`; no gradient.
        chosen_lengths: Tokens of each chosen response.
        rejected_lengths: Tokens of each rejected response.
        margins: How much better the chosen response is, in units of reward (`beta` times nats); None for no margin.
        whole_policy_chosen: `log pi_theta(y_w | x)` with every token at full weight, if the sums above are weighted by
            LD-DPO; otherwise None.
        reward_shift: BCO's running mean of rewards, if it is used.
        tokens: Every token of the responses, for a loss with `needs_tokens`; otherwise None.
        columns: The rows' columns that `loss_columns` and `beta_column` name.
    """

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_lengths: Int[Tensor, " pairs"]
    rejected_lengths: Int[Tensor, " pairs"]
    margins: Float[Tensor, " pairs"] | None = None
    whole_policy_chosen: Float[Tensor, " pairs"] | None = None
    reward_shift: Float[Tensor, ""] | None = None
    tokens: PairTokens | None = None
    columns: Mapping[str, Float[Tensor, " pairs"]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: PairBatch, policy: ResponseLogProbs, reference: ResponseLogProbs) -> PairScores:
        """Sums the tokens that count per response, and pairs the sums up."""
        policy, reference = scored_tokens(batch, policy), scored_tokens(batch, reference)
        return cls(
            *batch.of_responses(policy.sums()),
            *batch.of_responses(reference.sums()),
            *batch.of_responses(policy.lengths()),
            margins=batch.margins,
            columns=_Columns(batch.columns),
        )

    @property
    def chosen_logratios(self) -> Float[Tensor, " pairs"]:
        """`log pi_theta(y_w | x) - log pi_ref(y_w | x)`."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratios(self) -> Float[Tensor, " pairs"]:
        """`log pi_theta(y_l | x) - log pi_ref(y_l | x)`."""
        return self.policy_rejected - self.reference_rejected

    @property
    def delta(self) -> Float[Tensor, " pairs"]:
        """Chosen minus rejected log-ratio: the reward margin before beta."""
        return self.chosen_logratios - self.rejected_logratios
