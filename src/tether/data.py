"""From rows of text to batches of token ids: what the trainer asks for its sets, and its collator, which truncates.

Knows datasets; `rows` knows the formats, `tokenizing` which rows stay. Knows no model and no reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from datasets import (
    Dataset,
    IterableDataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.errors import ArgumentTypeError, DataError
from tether.image_rows import PROMPT_COLUMNS, ImageRows
from tether.rows import MARGIN_COLUMN as MARGIN_COLUMN
from tether.rows import REFERENCE_COLUMNS as REFERENCE_COLUMNS
from tether.rows import TOKEN_COLUMNS as TOKEN_COLUMNS
from tether.rows import RowReader, TextRows, check_margin
from tether.store import content_key
from tether.tokenizing import TokenizingPlan, tokenize_set, tokenize_stream
from tether.types import PairBatch, PromptImages, Response, TruncationMode

PairDataset: TypeAlias = Dataset | IterableDataset
Rows: TypeAlias = Dataset | IterableDataset | list[dict[str, Any]]


def as_dataset(rows: Rows | None) -> PairDataset:
    """The rows as a dataset; a list of dicts becomes one.

    Raises:
        ArgumentTypeError: If they are nothing of the kind.
    """
    if isinstance(rows, Dataset | IterableDataset):
        return rows
    if isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows):
        return Dataset.from_list(rows)
    given = type(rows).__name__
    if isinstance(rows, list):
        given += f" of {next(type(row).__name__ for row in rows if not isinstance(row, Mapping))}"
    raise ArgumentTypeError(
        asked=f"A set of pairs was given as {given}.",
        why="Pairs are rows with `prompt`, `chosen` and `rejected`.",
        instead=f"Pass a `datasets.Dataset`, an `IterableDataset` or a list of dicts{_how_to_make_one(rows)}.",
    )


def _how_to_make_one(rows: Any) -> str:
    """A set from what was given, as far as that can be told."""
    if isinstance(rows, Mapping) and set(rows) & {"chosen", "rejected"}:
        return ": `Dataset.from_dict(...)` makes one of columns"
    if isinstance(rows, Mapping) and rows:
        return f", for instance `dataset[{next(iter(rows))!r}]`"
    return ": `Dataset.from_pandas(...)` makes one" if hasattr(rows, "iloc") else ""


def tokenize_pairs(
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase | RowReader,
    *,
    max_length: int | None,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
    bad_rows: Literal["raise", "drop"] = "raise",
) -> PairDataset:
    """Adds the `TOKEN_COLUMNS` (untruncated), unless they are there, and drops rows whose prompt fills `max_length`.

    What was dropped is said in one message for each set, with reasons and row numbers; for a stream, as it is read.

    Args:
        dataset: Rows in any of the formats of `tether.rows.tokenize_row`; the formats may be mixed.
        tokenizer: With a chat template if rows are conversational; or what reads rows with images.
        max_length: Tokens of prompt and response together; None for no limit.
        truncation_mode: `keep_start` or `keep_end`.
        num_proc: Worker processes.
        name: The set's name, for messages.
        bad_rows: `raise`, or `drop`: what becomes of rows that are no pairs.

    Raises:
        DataError: For a row that is not a pair (names it, and counts the others), or when no row remains. Rows of a
            stream are looked at when they are read.
    """
    limit = max_length if truncation_mode == "keep_start" else None
    reader: RowReader = TextRows(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer
    plan = TokenizingPlan(reader, name, limit, drops=bad_rows == "drop")
    if isinstance(dataset, Dataset):
        return tokenize_set(dataset, plan, num_proc)
    return tokenize_stream(dataset, plan)


@contextmanager
def progress_bars_off(off: bool) -> Iterator[None]:
    """Keeps the bars of `datasets` away while open, if `off`; leaves the user's own setting as it was."""
    switches = off and not are_progress_bars_disabled()
    if switches:
        disable_progress_bars()
    try:
        yield
    finally:
        if switches:
            enable_progress_bars()


@dataclass
class PairCollator:
    """Makes one `PairBatch` of tokenized rows: truncates, finds shared prompts, computes content keys.

    The key is made from the untruncated ids where the start is kept, because a per-token record then serves every
    `max_length`; with `keep_end` it is made from what is fed.

    Returns a dict, as `transformers.Trainer` expects; its first tensor counts the pairs.

    Args:
        max_length: Tokens of prompt and response together; None for no limit.
        truncation_mode: Which end of a longer sequence stays: `keep_start` or `keep_end`.
        image_rows: What reads the images of rows that have some.
    """

    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    image_rows: ImageRows | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [self._pair(row) for row in rows]
        batch = PairBatch.of_pairs(pairs, margins_of(rows))
        return {"pairs": torch.ones(len(rows), dtype=torch.int64), "batch": batch}

    def _pair(self, row: Mapping[str, Any]) -> tuple[Response, Response]:
        images = self.image_rows.shown(row) if self.image_rows is not None else None
        prompt, *sides = (_as_python(row[column]) for column in TOKEN_COLUMNS)
        known = (_as_python(row.get(column)) for column in REFERENCE_COLUMNS)
        chosen, rejected = (
            self._response(prompt, ids, images)._replace(reference_sum=value)
            for ids, value in zip(sides, known, strict=True)
        )
        return chosen, rejected

    def _response(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], images: PromptImages | None
    ) -> Response:
        fed = self._fed(prompt_ids, response_ids)
        named = fed if self.truncation_mode == "keep_end" else (prompt_ids, response_ids)
        inputs = {"images": images.digest} if images else None
        return Response(*fed, content_key(*named, inputs=inputs), images=images)

    def _fed(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and response within `max_length`."""
        limit = self.max_length
        if limit is None or len(prompt_ids) + len(response_ids) <= limit:
            return tuple(prompt_ids), tuple(response_ids)
        if self.truncation_mode == "keep_start":
            check_room(prompt_ids, limit, "A row of a batch")
            return tuple(prompt_ids), tuple(response_ids[: limit - len(prompt_ids)])
        # Keep the end: a response that fills the row gives up its first token as the context of its second.
        sequence = [*prompt_ids, *response_ids][-limit:]
        start = max(1, limit - len(response_ids))
        return tuple(sequence[:start]), tuple(sequence[start:])


def check_room(prompt_ids: Sequence[int], max_length: int | None, where: str) -> None:
    """Refuses a row whose prompt leaves no room for a response.

    Raises:
        DataError: Names it.
    """
    if max_length is not None and len(prompt_ids) >= max_length:
        raise DataError(
            asked=f"{where} has a prompt of {len(prompt_ids)} tokens, where `max_length={max_length}`.",
            why="No token of its response would be scored.",
            instead="Give the trainer's options the `max_length` of its collator: such rows are then dropped.",
        )


def batch_columns(*, with_images: bool) -> list[str]:
    """The columns that a batch may need of a tokenized set."""
    return [*TOKEN_COLUMNS, MARGIN_COLUMN, *REFERENCE_COLUMNS, *(PROMPT_COLUMNS if with_images else ())]


def _as_python(value: Any) -> Any:
    """Plain numbers, also of a set `with_format("torch")` or `"numpy"`: tensors would not be told to be equal."""
    return value.tolist() if hasattr(value, "tolist") else value


def margins_of(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The rows' margins; None where no row has one.

    Raises:
        DataError: If only some have one, or one is no finite number.
    """
    if not any(MARGIN_COLUMN in row for row in rows):
        return None
    for row in rows:  # a set that came tokenized was looked at by nobody
        check_margin({MARGIN_COLUMN: row.get(MARGIN_COLUMN)}, "A row of a batch")
    return [float(row[MARGIN_COLUMN]) for row in rows]


def batch_of(inputs: Mapping[str, Any]) -> PairBatch:
    """The `PairBatch` in what the collator returned."""
    batch = inputs["batch"]
    assert isinstance(batch, PairBatch)
    return batch


def num_pairs_tensor(inputs: Mapping[str, Any]) -> Tensor:
    """Number of pairs in what the collator returned, as a tensor."""
    pairs = inputs["pairs"]
    assert isinstance(pairs, Tensor)
    return pairs.sum()
