"""From rows of text to pairs of token ids: the only place that tokenizes, keys and truncates.

Knows tokenizers and datasets; knows no model and no reference.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from tether.store import content_key
from tether.types import PairBatch, Response

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

PairDataset: TypeAlias = Dataset | IterableDataset
Rows: TypeAlias = Dataset | IterableDataset | list[dict[str, Any]]


def as_dataset(rows: Rows | None) -> PairDataset:
    """The rows as a dataset; a list of dicts becomes one.

    Raises:
        ArgumentTypeError: If they are nothing of the kind.
    """
    if isinstance(rows, Dataset | IterableDataset):
        return rows
    if isinstance(rows, list):
        return Dataset.from_list(rows)
    raise ArgumentTypeError(
        asked=f"A set of pairs was given as {type(rows).__name__}.",
        why="Pairs are rows with `prompt`, `chosen` and `rejected`.",
        instead="Pass a `datasets.Dataset`, an `IterableDataset` or a list of dicts as `train_dataset`.",
    )


def tokenize_pairs(
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
) -> PairDataset:
    """Adds the `TOKEN_COLUMNS` (untruncated), unless they are there, and drops rows that cannot be used.

    Args:
        dataset: Rows with `prompt`, `chosen`, `rejected`: strings, or lists of messages. Without `prompt`, it is the
            common start of the two responses.
        tokenizer: With a chat template if the rows are conversational.
        max_length: Tokens of prompt and response together; None for no limit.
        truncation_mode: `keep_start` or `keep_end`.
        num_proc: Worker processes.
        name: The set's name, for messages.

    Raises:
        DataError: For a row that is not a pair (names it), or when no row remains. Rows of a stream are checked
            when they are read.
    """
    options: dict[str, Any] = {"fn_kwargs": {"tokenizer": tokenizer, "name": name}, "with_indices": True}
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise _no_rows(name, 0, max_length)
        options |= {"num_proc": num_proc, "desc": f"Tokenizing {name} set"}
    if not set(TOKEN_COLUMNS) <= set(dataset.column_names or ()):
        dataset = dataset.map(tokenize_row, **options)
    if max_length is None or truncation_mode == "keep_end":
        return dataset
    return _drop_full_prompts(dataset, max_length, name)


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


def tokenize_row(row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """Token ids of one row: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Prompt and response are tokenized together. The response starts where the tokens of prompt + response leave
    those of the prompt alone, for the chosen or the rejected response, whichever comes first: tokens that merge
    across the boundary belong to the response.
    """
    row = _with_prompt(row, index, name)
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        chosen, rejected = (text if text.endswith(end) else text + end for text in (chosen, rejected))
        prompt_ids, full_chosen, full_rejected = (
            list(tokenizer(text)["input_ids"]) for text in (prompt, prompt + chosen, prompt + rejected)
        )
    elif tokenizer.chat_template is None:
        raise DataError(
            asked=f"Row {index} of the {name} set is made of messages, and the tokenizer has no chat template.",
            why="The template is what turns messages into the text that the model reads.",
            instead="Set `tokenizer.chat_template`, use the tokenizer of a chat model, or write the row as text.",
        )
    else:
        prompt_ids = _render(tokenizer, prompt, row, add_generation_prompt=True)
        full_chosen, full_rejected = (_render(tokenizer, prompt + part, row) for part in (chosen, rejected))
    start = min(_common_prefix(prompt_ids, full) for full in (full_chosen, full_rejected))
    tokens = {
        "prompt_ids": list(prompt_ids[:start]),
        "chosen_ids": list(full_chosen[start:]),
        "rejected_ids": list(full_rejected[start:]),
    }
    for column, ids in tokens.items():
        if not ids:
            raise DataError(
                asked=f"Row {index} of the {name} set has no tokens in `{column.removesuffix('_ids')}`.",
                why="A response is scored token by token, each predicted from what stands before it.",
                instead="Give the row a prompt and two responses (a tokenizer with a BOS token allows an empty "
                "prompt), or drop the row.",
            )
    return tokens


@dataclass
class PairCollator:
    """Makes one `PairBatch` of tokenized rows: truncates, finds shared prompts, computes content keys.

    The key is made from the untruncated ids where the start is kept, because a per-token record then serves every
    `max_length`; with `keep_end` it is made from what is fed.

    Returns a dict, as `transformers.Trainer` expects; its first tensor counts the pairs.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = []
        for row in rows:
            prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
            pairs.append((self._response(prompt, chosen), self._response(prompt, rejected)))
        return {"pairs": torch.ones(len(rows), dtype=torch.int64), "batch": PairBatch.of_pairs(pairs)}

    def _response(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Response:
        limit = self.max_length
        if limit is None or len(prompt_ids) + len(response_ids) <= limit:
            return Response(tuple(prompt_ids), tuple(response_ids), content_key(prompt_ids, response_ids))
        if self.truncation_mode == "keep_start":
            key = content_key(prompt_ids, response_ids)
            return Response(tuple(prompt_ids), tuple(response_ids[: limit - len(prompt_ids)]), key)
        # Keep the end: a response that fills the row gives up its first token as the context of its second.
        sequence = [*prompt_ids, *response_ids][-limit:]
        start = max(1, limit - len(response_ids))
        fed = tuple(sequence[:start]), tuple(sequence[start:])
        return Response(*fed, content_key(*fed))


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


def _with_prompt(row: Mapping[str, Any], index: int, name: str) -> dict[str, Any]:
    """Checks a row's fields and takes the prompt from the common start where it has none."""
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            raise DataError(
                asked=f"Row {index} of the {name} set has no `{field}`.",
                why="A preference pair is a chosen and a rejected response to one prompt.",
                instead=f"Add `{field}`, or drop the row. Found the columns: {', '.join(sorted(row))}.",
            )
    given = [field for field in ("prompt", "chosen", "rejected") if row.get(field) is not None]
    kinds = {field: _kind(row[field]) for field in given}
    if set(kinds.values()) not in ({"text"}, {"messages"}):
        raise DataError(
            asked=f"Row {index} of the {name} set is neither all text nor all messages: "
            + ", ".join(f"`{field}` is {kind}" for field, kind in kinds.items())
            + ".",
            why="The responses continue the prompt, so all are of one kind.",
            instead='Write {"prompt": "...", "chosen": "...", "rejected": "..."} or a list of '
            '{"role": ..., "content": ...} for each.',
        )
    for field in ("chosen", "rejected"):
        if _is_empty(row[field]):
            raise DataError(
                asked=f"Row {index} of the {name} set has an empty `{field}` response.",
                why="An empty response has no token to score, so the pair says nothing.",
                instead="Drop the row, or give the response its text.",
            )
    if "prompt" in given:
        return dict(row)
    return dict(row) | _split_common_start(row["chosen"], row["rejected"])


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(message, Mapping) and "role" in message for message in value):
        return "messages"
    return f"`{type(value).__name__}`"


def _is_empty(response: str | list[dict[str, Any]]) -> bool:
    if isinstance(response, str):
        return not response
    return not response or not any(message.get("content") or message.get("tool_calls") for message in response)


def _split_common_start(chosen: Any, rejected: Any) -> dict[str, Any]:
    """The longest common start as prompt; for text, a space before the difference belongs to the responses."""
    length = _common_prefix(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        length = max(0, length - 1)  # the end is the response, also where one begins the other or both are alike
    elif isinstance(chosen, str) and chosen[:length].endswith(" "):
        length -= 1
    return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], row: Mapping[str, Any], **options: Any
) -> list[int]:
    tools = row.get("tools")
    options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options |= row.get("chat_template_kwargs") or {}
    rendered: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(rendered["input_ids"])


def _drop_full_prompts(dataset: PairDataset, max_length: int, name: str) -> PairDataset:
    if not isinstance(dataset, Dataset):
        return dataset.filter(lambda row: len(row["prompt_ids"]) < max_length)
    prompts: Any = dataset.select_columns("prompt_ids")
    keep = [index for index, row in enumerate(prompts) if len(row["prompt_ids"]) < max_length]
    dropped = len(dataset) - len(keep)
    if not keep:
        raise _no_rows(name, dropped, max_length)
    if dropped:
        logger.warning(
            "%d of %d rows of the %s set were dropped: their prompt alone fills max_length=%d.",
            dropped,
            len(dataset),
            name,
            max_length,
        )
        dataset = dataset.select(keep)
    return dataset


def _no_rows(name: str, dropped: int, max_length: int | None) -> DataError:
    return DataError(
        asked=f"The {name} set has no row to use" + (f" ({dropped} were dropped)." if dropped else "."),
        why=f"Each prompt alone fills `max_length={max_length}`, so no response token would be scored."
        if dropped
        else "It is empty.",
        instead="Raise `max_length`, shorten the prompts, or set `max_length=None`."
        if dropped
        else "Pass a set with at least one pair.",
    )
