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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

TruncationMode = Literal["keep_start", "keep_end"]
"""Which end of a sequence stays when it is longer than `max_length`."""


@dataclass(frozen=True, eq=False)
class PromptImages:
    """What a model reads with a prompt besides its token ids. Equal where the model is fed the same.

    Attributes:
        inputs: The images as a processor made them for this prompt alone, by the model's argument (`pixel_values`,
            `image_grid_thw`, ...); images, tiles or patches along the first dimension.
        token_inputs: One number for each prompt token, by the model's argument (`token_type_ids`, ...); 0 for the
            tokens of every response.
        digest: Of all of them.
    """

    inputs: Mapping[str, Tensor]
    token_inputs: Mapping[str, Int[Tensor, " prompt_tokens"]]
    digest: bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptImages) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def on_each(self, change: Callable[[Tensor], Tensor]) -> PromptImages:
        """The same with every tensor changed (moved, pinned)."""
        inputs, token_inputs = (
            {name: change(tensor) for name, tensor in tensors.items()} for tensors in (self.inputs, self.token_inputs)
        )
        return replace(self, inputs=inputs, token_inputs=token_inputs)


class Response(NamedTuple):
    """One response as it is fed to a model: the tokens before it, its own tokens, and its content key if any."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    key: bytes = b""
    reference_sum: float | None = None  # its log-prob under the reference, where its row says it
    images: PromptImages | None = None  # what its prompt shows

    @property
    def prompt(self) -> tuple[tuple[int, ...], PromptImages | None]:
        """What it follows: equal for the responses of a group."""
        return self.prompt_ids, self.images


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
        rows: Index of each pair in its set, for messages. Empty where nobody knows.
        reference_sums: Each response's log-prob under the reference, in nats, where the rows bring it.
        margins: By how much each pair's chosen response is better, in units of reward; None where the rows have no
            `margin`.
        images: What each prompt shows (groups entries, None for a prompt without images); empty where none does.
        counts: Whether its pairs count: in the loss, and in what is reported. False for pairs that come again only
            so that every process has as many batches.
    """

    prompt_ids: Int[Tensor, " prompt_tokens"]
    response_ids: Int[Tensor, " tokens"]
    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    response_group: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    keys: tuple[bytes, ...] = ()
    rows: tuple[int, ...] = ()
    reference_sums: tuple[float | None, ...] = ()
    margins: Float[Tensor, " pairs"] | None = None
    images: tuple[PromptImages | None, ...] = ()
    counts: bool = True

    @property
    def num_pairs(self) -> int:
        return len(self.chosen)

    @property
    def num_counted_pairs(self) -> int:
        """Pairs that count: all, or none."""
        return self.num_pairs if self.counts else 0

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
        """Tokens of the padded layout without its padding, of pairs that count: each has its prompt twice."""
        lengths = self.fed_lengths()
        pairs = list(zip(self.chosen, self.rejected, strict=True))[: self.num_counted_pairs]
        return sum(lengths[c] + lengths[r] for c, r in pairs)

    def fed_lengths(self) -> tuple[int, ...]:
        """Tokens of prompt and response together, for each response."""
        return tuple(
            self.prompt_lengths[g] + n for g, n in zip(self.response_group, self.response_lengths, strict=True)
        )

    def only(self, indices: Sequence[int]) -> PairBatch:
        """A batch of some of the responses, in their order here, each paired with itself."""
        responses = self.responses()
        return PairBatch.of_pairs([(responses[i], responses[i]) for i in sorted(indices)]).to(self.device)

    def num_row_tokens(self) -> int:
        """Tokens of the pairs one by one: each pair's prompt once, and both its responses."""
        return sum(
            self.prompt_lengths[self.response_group[c]] + self.response_lengths[c] + self.response_lengths[r]
            for c, r in zip(self.chosen, self.rejected, strict=True)
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch with its tensors on `device`."""
        return self._on_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked memory; called by `torch.utils.data.DataLoader`."""
        return self._on_each(Tensor.pin_memory)

    def _on_each(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        return replace(
            self,
            prompt_ids=change(self.prompt_ids),
            response_ids=change(self.response_ids),
            margins=None if self.margins is None else change(self.margins),
            images=tuple(shown and shown.on_each(change) for shown in self.images),
        )

    def of_responses(self, values: Shaped[Tensor, " responses"]) -> tuple[Tensor, Tensor]:
        """Per-response values as (chosen, rejected), one entry per pair each."""
        chosen, rejected = (torch.tensor(index, device=values.device) for index in (self.chosen, self.rejected))
        return values[chosen], values[rejected]

    def responses(self) -> list[Response]:
        """Every response with its prompt, as they were given to `of_pairs`."""
        prompts = [tuple(ids.tolist()) for ids in self.prompt_ids.split(list(self.prompt_lengths))]
        tokens = [tuple(ids.tolist()) for ids in self.response_ids.split(list(self.response_lengths))]
        keys = self.keys or (b"",) * self.num_responses
        sums = self.reference_sums or (None,) * self.num_responses
        images = self.images or (None,) * self.num_groups
        each = zip(self.response_group, tokens, keys, sums, strict=True)
        return [Response(prompts[group], ids, key, known, images[group]) for group, ids, key, known in each]

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
        groups: dict[tuple[tuple[int, ...], PromptImages | None], dict[Response, None]] = {}
        for number, pair in enumerate(pairs):
            for response in pair:
                if not (response.prompt_ids and response.token_ids):
                    raise ValueError(f"Pair {number} of the batch has an empty prompt or response.")
                groups.setdefault(response.prompt, {})[response] = None
        responses = [response for members in groups.values() for response in members]
        index = {response: number for number, response in enumerate(responses)}
        sums = tuple(response.reference_sum for response in responses)
        group_of = {prompt: number for number, prompt in enumerate(groups)}
        return cls(
            prompt_ids=_flatten([ids for ids, _ in groups]),
            response_ids=_flatten([response.token_ids for response in responses]),
            prompt_lengths=tuple(len(ids) for ids, _ in groups),
            response_lengths=tuple(len(response.token_ids) for response in responses),
            response_group=tuple(group_of[response.prompt] for response in responses),
            chosen=tuple(index[chosen] for chosen, _ in pairs),
            rejected=tuple(index[rejected] for _, rejected in pairs),
            keys=tuple(response.key for response in responses if response.key),
            reference_sums=sums if any(known is not None for known in sums) else (),
            margins=None if margins is None else torch.tensor(margins, dtype=torch.float32),
            images=tuple(shown for _, shown in groups) if any(shown for _, shown in groups) else (),
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


def join_log_probs(parts: Sequence[ResponseLogProbs], order: Sequence[int]) -> ResponseLogProbs:
    """Scores of parts of a batch as those of the whole batch.

    Args:
        parts: Scores of some responses each.
        order: For every response of the parts, one part behind the other, its index in the whole batch.

    Returns:
        All of them in the order of the whole batch; the auxiliary loss is the mean over the parts' responses.
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


def _flatten(rows: Sequence[Sequence[int]]) -> Int[Tensor, " total"]:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Int[Tensor, " rows_plus_1"]:
    """Where each of several runs of `lengths` elements starts; the last entry is the total."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int64, device=device)
