"""One pass over a set of rows that scores what a store lacks: each response once, a budget of tokens at a time.

Knows batches and two functions, one that names what is missing and one that scores; knows no store and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from tqdm import tqdm

from tether.errors import ConfigurationError
from tether.types import PairBatch, Response

# The indices of the responses in a batch that have to be scored.
Lacking = Callable[[PairBatch], Sequence[int]]
# Scores a batch and stores the results; the second argument names a response by its index, for messages.
Scoring = Callable[[PairBatch, Callable[[int], str]], object]


@runtime_checkable
class RowSet(Protocol):
    """Batches of a set whose size is known, the longest rows first.

    Attributes:
        num_rows: Rows that this process is to see.
        num_tokens: Tokens of them: each row's prompt once, and both its responses.
        max_tokens: Tokens to score at once; a row longer than this stands alone.
        source: Where the rows come from, for people; empty if nothing says.
    """

    num_rows: int
    num_tokens: int
    max_tokens: int
    source: str

    def __iter__(self) -> Iterator[PairBatch]: ...


# What a process scores that needs no answer itself, while others need its shards of the weights.
IDLE = PairBatch.of_pairs([(Response((0,), (0,)), Response((0,), (0,)))])


def few_rows(batches: Iterable[PairBatch], count: int) -> PairBatch | None:
    """About so many rows from all over a set, if it can give them, or else its first batch; None if it is empty."""
    some = getattr(batches, "some", None)
    return some(count) if some is not None else next(iter(batches), None)


class StorePass:
    """Scores what is missing of one set, longest first, and reports its progress.

    Missing responses wait until together they fill the budget, so that a few new rows among many old ones need few
    forwards. A response that already waits is not added twice, and a prompt counts once. A batch that does not fit
    into an accelerator's memory is halved, and so is the budget from then on.

    Args:
        name: The set's name.
        batches: Its batches: a `RowSet`, or any iterable (each batch is then scored as it comes).
        lacking: Which responses of a batch have to be scored.
        score: Scores a batch of them and stores the results.
        halves: Halve what does not fit into memory. False if other processes make the same forward at the same time,
            each with a shard of the weights: one alone cannot start again.
        show_progress: Show a bar with tokens a second and the time left, where standard error is a terminal.

    Attributes:
        num_found: Responses that were stored already.
        num_computed: Responses scored.
    """

    def __init__(
        self,
        name: str,
        batches: Iterable[PairBatch],
        lacking: Lacking,
        score: Scoring,
        *,
        halves: bool = True,
        show_progress: bool = False,
    ) -> None:
        self._name, self._batches, self._lacking, self._score = name, batches, lacking, score
        self._halves = halves
        known = batches if isinstance(batches, RowSet) else None
        self._num_rows = known.num_rows if known else None
        self._max_tokens = known.max_tokens if known else None
        self.num_found = self.num_computed = 0
        self._num_kept = self._num_seen = 0
        self._waiting: dict[Response, str] = {}  # what waits to be scored, and its name
        self._rows: list[tuple[Response, Response]] = []  # rows that wait for a response
        self._bar = tqdm(
            total=known.num_tokens if known else None,
            desc=f"Reference log-probs ({name})",
            unit=" tokens",
            unit_scale=True,
            disable=None if show_progress else True,  # None: on only where standard error is a terminal
        )

    def run(self) -> None:
        """Makes the pass.

        Raises:
            KeyboardInterrupt: After Ctrl-C, with the number of rows kept; a batch in flight is lost.
        """
        try:
            for batch in self._batches:
                self._take(batch)
                self._score_waiting(keep_rest=self._max_tokens is not None)
            self._score_waiting()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._progress()) from None
        finally:
            self._end_bar()

    def _end_bar(self) -> None:
        if not self.num_computed:
            self._bar.bar_format = f"{{desc}}: complete, {self.num_found} responses found"
        elif self._bar.total is not None and not self._waiting:
            self._bar.total = self._bar.n  # it was an estimate
        self._bar.refresh()
        self._bar.close()

    def _progress(self) -> str:
        total = self._num_seen if self._num_rows is None else self._num_rows
        return f"{self._num_kept} of {total} rows of the {self._name} set are kept"

    def _take(self, batch: PairBatch) -> None:
        """Adds the missing responses of a batch to those that wait."""
        responses, lacking, names = batch.responses(), self._lacking(batch), names_of(batch, self._name)
        self._num_seen += batch.num_pairs
        self.num_found += batch.num_responses - len(lacking)
        self._rows += [(responses[c], responses[r]) for c, r in zip(batch.chosen, batch.rejected, strict=True)]
        new = {responses[index]: names(index) for index in lacking if responses[index] not in self._waiting}
        self._waiting |= new
        self._count_kept()
        # Tokens that need no scoring are not counted as done: they would flatter the speed and the time left.
        if self._bar.total is not None:
            self._bar.total = max(self._bar.total - batch.num_row_tokens() + _num_tokens(new), self._bar.n)

    def _score_waiting(self, keep_rest: bool = False) -> None:
        """Scores the waiting responses, one budget at a time; `keep_rest` leaves the last, unfilled one."""
        batches = list(_cut(self._waiting, self._max_tokens))
        for responses in batches[:-1] if keep_rest else batches:
            self._score_once(responses)
            for response in responses:
                del self._waiting[response]
            self.num_computed += len(responses)
            self._count_kept()
            if self._bar.total is not None:  # a prompt whose responses did not fit together is fed twice
                self._bar.total = max(self._bar.total, self._bar.n + _num_tokens(responses))
            self._bar.update(_num_tokens(responses))

    def _score_once(self, responses: Sequence[Response]) -> None:
        batch = PairBatch.of_pairs([(response, response) for response in responses])
        members, names = batch.responses(), dict(self._waiting)  # the batch has an order of its own
        try:
            self._score(batch, lambda index: names[members[index]])
            return
        except torch.OutOfMemoryError as error:
            if not self._halves:
                raise _too_much(self._name, responses) from error
            if len(responses) == 1:
                raise
        # Not in the handler: while the error lives, so do the tensors of the pass that failed.
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        self._max_tokens = _num_tokens(responses) // 2
        middle = len(responses) // 2
        self._score_once(responses[:middle])
        self._score_once(responses[middle:])

    def _count_kept(self) -> None:
        waiting = [pair for pair in self._rows if pair[0] in self._waiting or pair[1] in self._waiting]
        self._num_kept += len(self._rows) - len(waiting)
        self._rows = waiting


def _cut(responses: Iterable[Response], max_tokens: int | None) -> Iterator[list[Response]]:
    """Consecutive responses within a budget of tokens; a single one may exceed it."""
    taken: list[Response] = []
    tokens, prompts = 0, set[object]()
    for response in responses:
        added = len(response.token_ids) + (0 if response.prompt in prompts else len(response.prompt_ids))
        if taken and max_tokens is not None and tokens + added > max_tokens:
            yield taken
            taken, tokens, prompts = [], 0, set()
            added = len(response.token_ids) + len(response.prompt_ids)
        taken.append(response)
        prompts.add(response.prompt)
        tokens += added
    if taken:
        yield taken


def _too_much(name: str, responses: Sequence[Response]) -> ConfigurationError:
    return ConfigurationError(
        problem=f"Cannot score {len(responses)} responses of the {name} set at once ({_num_tokens(responses)} tokens): "
        "they do not fit into the accelerator's memory.",
        details="The reference is sharded, so all processes make this forward together, and none can split it alone.",
        instead="Set a smaller `precompute_ref_batch_size` (it counts longest pairs; the least is 1) or `max_length`.",
    )


def _num_tokens(responses: Iterable[Response]) -> int:
    """Tokens of a packed row of them: each prompt once."""
    responses = list(responses)
    prompts = {response.prompt for response in responses}
    return sum(len(ids) for ids, _ in prompts) + sum(len(response.token_ids) for response in responses)


def names_of(batch: PairBatch, name: str = "") -> Callable[[int], str]:
    """Names the responses of a batch, by row and side if the batch knows its rows."""

    def name_of(index: int) -> str:
        for pair, (chosen, rejected) in enumerate(zip(batch.chosen, batch.rejected, strict=True)):
            if index in (chosen, rejected):
                side = "chosen" if index == chosen else "rejected"
                where = f"row {batch.rows[pair]}" if batch.rows else f"pair {pair} of a batch"
                return f"the {side} response of {where}" + (f" of the {name} set" if name else "")
        return f"response {index} of a batch"

    return name_of
