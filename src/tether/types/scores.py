"""What a loss reads of each pair: the log-probabilities of both responses under policy and reference."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tether.types.batch import PairBatch
from tether.types.log_probs import ResponseLogProbs


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

    @classmethod
    def of(cls, batch: PairBatch, policy: ResponseLogProbs, reference: ResponseLogProbs) -> PairScores:
        """Sums per response and pairs them up."""
        return cls(
            *batch.of_responses(policy.sums()),
            *batch.of_responses(reference.sums()),
            *batch.of_responses(policy.lengths()),
            margins=batch.margins,
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
