"""A batch of preference pairs: each prompt once, each response once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tether.types.images import PromptImages
from tether.types.ragged import copies_later, flatten, on_device

TruncationMode = Literal["keep_start", "keep_end"]
"""Which end of a sequence stays when it is longer than `max_length`."""

# Fewer tokens save less than attending to them apart costs.
_WORTH_SHARING = 16


class Response(NamedTuple):
    """One response as it is fed to a model: the tokens before it, its own tokens, and its content key if any."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    key: bytes = b""
    reference_sum: float | None = None  # its log-prob under the reference, if its row gives one
    images: PromptImages | None = None  # of its prompt
    scored: tuple[bool, ...] | None = None  # which of its tokens count, where a completion mask leaves some out

    @property
    def prompt(self) -> tuple[tuple[int, ...], PromptImages | None]:
        """Its prompt and images: equal for all responses of a group."""
        return self.prompt_ids, self.images


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of preference pairs: each distinct prompt once, each distinct response once.

    A *group* is one prompt and its responses; a *pair* is two indices into the responses. The responses of a group
    are neighbours, so that `prompt_0 response_0 response_1 prompt_1 response_2 ...` is one row of tokens without
    padding. Token ids are tensors; the structure (lengths and indices) is plain integers, so that a layout is
    planned on the host without waiting for the device.

    Attributes:
        prompt_ids: Token ids of all prompts, concatenated.
        response_ids: Token ids of all responses, concatenated.
        prompt_lengths: Tokens of each prompt (groups entries, each at least 1).
        response_lengths: Tokens of each response (responses entries, each at least 1).
        response_group: The group of each response, ascending.
        chosen: Index of each pair's chosen response.
        rejected: Index of each pair's rejected response.
        prefixes: The groups in an order in which prompts that begin alike are neighbours, each with the number of its
            first tokens that are those of the prompt before it. Empty if too few are to be worth computing once.
        keys: Content key of each response (16 bytes), by which a store finds it; made from the untruncated token
            ids. Empty if no keys were requested.
        rows: Index of each pair in its set, for messages. Empty if unknown.
        reference_sums: Each response's log-prob under the reference, in nats, if the rows give it.
        margins: How much better each pair's chosen response is, in units of reward; None if the rows have no
            `margin`.
        columns: Further columns of the rows, a number for each pair.
        scored: Which response tokens count; None for all. All are scored, and stored; a loss sees those that count.
        scored_lengths: How many of each response do; empty for all.
        images: Images of each prompt (groups entries, None for a prompt without); empty if no prompt has any.
        counts: Whether the pairs count towards the loss and the metrics. False for pairs repeated only to give all
            processes the same number of batches.
    """

    prompt_ids: Int[Tensor, " prompt_tokens"]
    response_ids: Int[Tensor, " tokens"]
    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    response_group: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    prefixes: tuple[tuple[int, int], ...] = ()
    keys: tuple[bytes, ...] = ()
    rows: tuple[int, ...] = ()
    reference_sums: tuple[float | None, ...] = ()
    margins: Float[Tensor, " pairs"] | None = None
    columns: Mapping[str, Float[Tensor, " pairs"]] = field(default_factory=dict)
    scored: Bool[Tensor, " tokens"] | None = None
    scored_lengths: tuple[int, ...] = ()
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
        """Tokens of the counted pairs in the padded layout, without padding: each pair has its prompt twice."""
        lengths = self.fed_lengths()
        pairs = list(zip(self.chosen, self.rejected, strict=True))[: self.num_counted_pairs]
        return sum(lengths[c] + lengths[r] for c, r in pairs)

    def counted_lengths(self) -> tuple[int, ...]:
        """Tokens of each response that count."""
        return self.scored_lengths or self.response_lengths

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
        """Tokens of the pairs taken one by one: each pair's prompt once, and both its responses."""
        return sum(
            self.prompt_lengths[self.response_group[c]] + self.response_lengths[c] + self.response_lengths[r]
            for c, r in zip(self.chosen, self.rejected, strict=True)
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch with its tensors on `device`."""
        leaves_host = self.device.type == "cpu" and copies_later(device)  # what comes back to it is waited for
        return self._on_each(lambda tensor: tensor.to(device, non_blocking=non_blocking or leaves_host))

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked memory; called by `torch.utils.data.DataLoader`."""
        return self._on_each(Tensor.pin_memory)

    def _on_each(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        return replace(
            self,
            prompt_ids=change(self.prompt_ids),
            response_ids=change(self.response_ids),
            margins=None if self.margins is None else change(self.margins),
            columns={name: change(values) for name, values in self.columns.items()},
            scored=None if self.scored is None else change(self.scored),
            images=tuple(shown and shown.on_each(change) for shown in self.images),
        )

    def of_responses(self, values: Shaped[Tensor, " responses"]) -> tuple[Tensor, Tensor]:
        """Per-response values as (chosen, rejected), one entry per pair each."""
        chosen, rejected = self._sides.to(values.device)
        return values[chosen], values[rejected]

    @cached_property
    def _sides(self) -> Int[Tensor, "2 pairs"]:
        """`chosen` and `rejected` on the device; sent once, and read for every metric."""
        return on_device(torch.tensor([self.chosen, self.rejected]), self.device)

    def responses(self) -> list[Response]:
        """Every response with its prompt, as given to `of_pairs`."""
        prompts = [tuple(ids.tolist()) for ids in self.prompt_ids.split(list(self.prompt_lengths))]
        tokens = [tuple(ids.tolist()) for ids in self.response_ids.split(list(self.response_lengths))]
        keys = self.keys or (b"",) * self.num_responses
        sums = self.reference_sums or (None,) * self.num_responses
        images = self.images or (None,) * self.num_groups
        marks: list[tuple[bool, ...] | None] = [None] * self.num_responses
        if self.scored is not None:
            parts = [tuple(part.tolist()) for part in self.scored.split(list(self.response_lengths))]
            marks = [None if all(part) else part for part in parts]
        each = zip(self.response_group, tokens, keys, sums, marks, strict=True)
        return [Response(prompts[group], ids, key, known, images[group], mark) for group, ids, key, known, mark in each]

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[Response, Response]], margins: Sequence[float] | None = None) -> PairBatch:
        """Groups (chosen, rejected) pairs by prompt and keeps each distinct response once.

        Args:
            pairs: The (chosen, rejected) responses.
            margins: How much better each chosen response is, if the rows give it.

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
        masked = any(response.scored is not None for response in responses)
        marks = [response.scored or (True,) * len(response.token_ids) for response in responses] if masked else []
        group_of = {prompt: number for number, prompt in enumerate(groups)}
        return cls(
            prompt_ids=flatten([ids for ids, _ in groups]),
            response_ids=flatten([response.token_ids for response in responses]),
            prompt_lengths=tuple(len(ids) for ids, _ in groups),
            response_lengths=tuple(len(response.token_ids) for response in responses),
            scored=torch.tensor([mark for part in marks for mark in part]) if masked else None,
            scored_lengths=tuple(map(sum, marks)),
            response_group=tuple(group_of[response.prompt] for response in responses),
            chosen=tuple(index[chosen] for chosen, _ in pairs),
            rejected=tuple(index[rejected] for _, rejected in pairs),
            prefixes=() if any(shown for _, shown in groups) else _prefixes([ids for ids, _ in groups]),
            keys=tuple(response.key for response in responses if response.key),
            reference_sums=sums if any(known is not None for known in sums) else (),
            margins=None if margins is None else torch.tensor(margins, dtype=torch.float32),
            images=tuple(shown for _, shown in groups) if any(shown for _, shown in groups) else (),
        )


def _prefixes(prompts: Sequence[tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
    """`PairBatch.prefixes` of distinct prompts."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # the most in common is then with a neighbour
    common = (_num_common(prompts[one], prompts[other]) for one, other in pairwise(order))
    shared = [0, *(num if num >= _WORTH_SHARING else 0 for num in common)]
    return tuple(zip(order, shared, strict=True)) if any(shared) else ()


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first entries are the same."""
    different = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))
