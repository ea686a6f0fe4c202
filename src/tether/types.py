"""The two values everything else speaks in: a batch of pairs, and log-probabilities of responses.

Knows tensors only: no model, no file, no trainer.

Legend of shapes (used in every annotation of the package):

    pairs       preference pairs of a micro-batch
    groups      distinct prompts of a micro-batch
    responses   distinct (prompt, response) combinations of a micro-batch; at most 2 * pairs
    tokens      response tokens of a micro-batch, one response behind the other

Log-probabilities are natural logarithms (nats), in fp32 unless a caller asks for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Response(NamedTuple):
    """One response as it is fed to a model: the tokens before it, its own tokens, and its content key if any."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    key: bytes = b""


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of preference pairs: each distinct prompt once, each distinct response once.

    A *group* is one prompt and its responses; a *pair* is two indices into the responses. The responses of a group
    are neighbours, so that `prompt_0 response_0 response_1 prompt_1 response_2 ...` is one row of tokens without
    padding. Token ids are tensors; the structure (lengths and indices) is plain integers, so that a layout is
    planned on the host without waiting for the device.

    Attributes:
        prompt_ids: Token ids of all prompts, one behind the other.
        response_ids: Token ids of all responses, one behind the other.
        prompt_lengths: Tokens of each prompt (groups entries, each at least 1).
        response_lengths: Tokens of each response (responses entries, each at least 1).
        response_group: The group of each response, ascending.
        chosen: Index of each pair's chosen response.
        rejected: Index of each pair's rejected response.
        keys: Content key of each response (16 bytes), by which a store finds it; made from the untruncated token
            ids. Empty where nobody asked for keys.
        margins: By how much each pair's chosen response is better, in units of reward; None where the rows have no
            `margin`.
    """

    prompt_ids: Int[Tensor, " prompt_tokens"]
    response_ids: Int[Tensor, " tokens"]
    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    response_group: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    keys: tuple[bytes, ...] = ()
    margins: Float[Tensor, " pairs"] | None = None

    @property
    def num_pairs(self) -> int:
        return len(self.chosen)

    @property
    def num_groups(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_responses(self) -> int:
        return len(self.response_lengths)

    @property
    def device(self) -> torch.device:
        return self.response_ids.device

    def num_sequence_tokens(self) -> int:
        """Tokens of the padded layout without its padding: each pair counts its prompt twice."""
        lengths = [self.prompt_lengths[g] + n for g, n in zip(self.response_group, self.response_lengths, strict=True)]
        return sum(lengths[c] + lengths[r] for c, r in zip(self.chosen, self.rejected, strict=True))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch with its tensors on `device`."""
        margins = self.margins
        return replace(
            self,
            prompt_ids=self.prompt_ids.to(device, non_blocking=non_blocking),
            response_ids=self.response_ids.to(device, non_blocking=non_blocking),
            margins=None if margins is None else margins.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked memory; called by `torch.utils.data.DataLoader`."""
        margins = self.margins
        return replace(
            self,
            prompt_ids=self.prompt_ids.pin_memory(),
            response_ids=self.response_ids.pin_memory(),
            margins=None if margins is None else margins.pin_memory(),
        )

    def of_responses(self, values: Shaped[Tensor, " responses"]) -> tuple[Tensor, Tensor]:
        """Per-response values as (chosen, rejected), one entry per pair each."""
        chosen, rejected = (torch.tensor(index, device=values.device) for index in (self.chosen, self.rejected))
        return values[chosen], values[rejected]

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[Response, Response]], margins: Sequence[float] | None = None) -> PairBatch:
        """Groups (chosen, rejected) pairs by prompt and keeps each distinct response once.

        Args:
            pairs: The (chosen, rejected) responses.
            margins: By how much each chosen one is better, if the rows say so.

        Raises:
            ValueError: If a prompt or a response has no tokens.

        Example:
            >>> a, b, c = Response((1, 2), (3,)), Response((1, 2), (4,)), Response((1, 2), (5, 6))
            >>> batch = PairBatch.of_pairs([(a, b), (a, c)])
            >>> batch.num_pairs, batch.num_groups, batch.num_responses
            (2, 1, 3)
        """
        groups: dict[tuple[int, ...], dict[Response, None]] = {}
        for number, pair in enumerate(pairs):
            for response in pair:
                if not (response.prompt_ids and response.token_ids):
                    raise ValueError(f"pair {number} of the batch has an empty prompt or response")
                groups.setdefault(response.prompt_ids, {})[response] = None
        responses = [response for members in groups.values() for response in members]
        index = {response: number for number, response in enumerate(responses)}
        group_of = {prompt: number for number, prompt in enumerate(groups)}
        return cls(
            prompt_ids=_flatten(list(groups)),
            response_ids=_flatten([response.token_ids for response in responses]),
            prompt_lengths=tuple(len(prompt) for prompt in groups),
            response_lengths=tuple(len(response.token_ids) for response in responses),
            response_group=tuple(group_of[response.prompt_ids] for response in responses),
            chosen=tuple(index[chosen] for chosen, _ in pairs),
            rejected=tuple(index[rejected] for _, rejected in pairs),
            keys=tuple(response.key for response in responses if response.key),
            margins=None if margins is None else torch.tensor(margins, dtype=torch.float32),
        )


@dataclass(frozen=True)
class TokenStatistics:
    """What the log, and WPO's weights, need of each response token; detached.

    Attributes:
        entropy: Entropy of the next-token distribution, in nats.
        mean_logit: Mean over the vocabulary of the logits.
        is_top1: Whether the token was the most likely one.
        log_expected_prob: `log sum_v pi(v)^2`: the log of the probability that a token drawn from the policy has
            in the mean.
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
        statistics: What only logging needs, when it was asked for.
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

    def detach(self) -> ResponseLogProbs:
        return replace(self, values=self.values.detach(), auxiliary_loss=None)

    def split(self) -> list[Float[Tensor, " length"]]:
        """One tensor per response."""
        return list(self.values.split(self.lengths().tolist()))


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
        margins: By how much the chosen response is better, in units of reward (`beta` times nats); None for no margin.
        whole_policy_chosen: `log pi_theta(y_w | x)` with every token at full weight, where the sums above have LD-DPO's
            weights in them; None where they have none.
        reward_shift: BCO's running mean of rewards; None for none.
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


def _flatten(rows: Sequence[Sequence[int]]) -> Int[Tensor, " total"]:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Int[Tensor, " rows_plus_1"]:
    """Where each of several runs of `lengths` elements starts; the last entry is the total."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int64, device=device)
