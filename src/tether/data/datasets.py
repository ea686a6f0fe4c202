"""From rows of text to batches of token ids: the trainer's sets, and its collator, which truncates.

Knows datasets; `rows` knows the formats, `tokenizing` which rows stay. Knows no model and no reference.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import torch
from datasets import (
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    Json,
    concatenate_datasets,
)
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.data.image_rows import PROMPT_COLUMNS, ImageRows
from tether.data.rounds import REPEATED, own_rows
from tether.data.rows import MARGIN_COLUMN as MARGIN_COLUMN
from tether.data.rows import REFERENCE_CHECKSUM as REFERENCE_CHECKSUM
from tether.data.rows import REFERENCE_COLUMNS as REFERENCE_COLUMNS
from tether.data.rows import RESPONSES, UNREADABLE_COLUMN, RowReader, TextRows, check_margin
from tether.data.rows import TOKEN_COLUMNS as TOKEN_COLUMNS
from tether.data.tokenizing import TokenizingPlan, tokenize_set, tokenize_stream
from tether.data.truncation import Truncation
from tether.errors import ArgumentTypeError, DataError, NotInBatchError
from tether.store import content_key
from tether.types import PairBatch, PromptImages, Response, TruncationMode

PairDataset: TypeAlias = Dataset | IterableDataset
Rows: TypeAlias = Dataset | IterableDataset | list[dict[str, Any]]


def as_dataset(rows: Rows | None, argument: str = "set of pairs") -> PairDataset:
    """The rows as a dataset. A list of dicts becomes one, with the columns of all its rows.

    What a `with_transform` makes of a set is stored. A row that cannot be stored is kept as one that is not a pair:
    tokenizing names it, or drops it.

    Args:
        rows: The rows.
        argument: What was given, for messages: "`train_dataset`".

    Raises:
        ArgumentTypeError: If they are neither a dataset nor a list of dicts.
    """
    if isinstance(rows, Dataset):
        return _readable(rows)
    if isinstance(rows, IterableDataset):
        return rows
    if isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows):
        return _dataset_of(rows)
    given = type(rows).__name__
    if isinstance(rows, list):
        given += f" of {next(type(row).__name__ for row in rows if not isinstance(row, Mapping))}"
    raise ArgumentTypeError(
        problem=f"Cannot use a {argument} of type {given}: pairs are rows with `prompt`, `chosen` and `rejected`.",
        instead=f"Pass a `datasets.Dataset`, an `IterableDataset` or a list of dicts{_how_to_make_one(rows)}.",
    )


def column_names(dataset: PairDataset) -> tuple[str, ...]:
    """The columns of a set; those of the first row if a stream does not declare them."""
    names = dataset.column_names
    if names is None:
        try:
            names = next(iter(dataset), {})
        except DataError:  # about the first row; raised again when training reads it, as for any other row
            names = ()
    return tuple(names)


def _dataset_of(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """A list of rows as a set; `Dataset.from_list` reads the columns of the first row only."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {str(name): [row.get(name) for row in rows] for name in names}
    try:
        return Dataset.from_dict(columns)
    except Exception:  # of a column with text in one row and messages in another, or a value that Arrow has no type for
        problems: dict[int, str] = {}
        sets = [_column(name, values, problems) for name, values in columns.items() if name != UNREADABLE_COLUMN]
        known = columns.get(UNREADABLE_COLUMN, [None] * len(rows))
        problems |= {index: problem for index, problem in enumerate(known) if problem is not None}
        if problems:
            sets.append(Dataset.from_dict({UNREADABLE_COLUMN: [problems.get(index) for index in range(len(rows))]}))
        return concatenate_datasets(sets, axis=1)


def _column(name: str, values: list[Any], problems: dict[int, str]) -> Dataset:
    """A set of one column, as JSON where Arrow has no type for all its values; adds what JSON cannot hold either."""
    try:
        return Dataset.from_dict({name: values})
    except Exception:
        texts: list[str | None] = []
        for index, value in enumerate(values):
            try:  # encoded here: `datasets` would take a text such as `4` for JSON already, and return a number
                text = None if value is None else json.dumps(value, ensure_ascii=False)
                (text or "").encode()
            except UnicodeEncodeError:  # `datasets` would leave such a character out
                text, problems[index] = None, f"has a `{name}` that is not Unicode: it has half of a surrogate pair"
            except (TypeError, ValueError, RecursionError):
                kind = type(value).__name__
                text, problems[index] = None, f"has a `{name}` of a kind that cannot be stored with the others: {kind}"
            texts.append(text)
        features = Features({name: Json()})
        storage = pa.array(texts, pa.string())
        encoded = pa.ExtensionArray.from_storage(features.arrow_schema.field(name).type, storage)
        return Dataset(pa.table({name: encoded}, schema=features.arrow_schema), info=DatasetInfo(features=features))


def _readable(dataset: Dataset) -> Dataset:
    """The set as it is, unless a transform makes its rows, or some have text that is not UTF-8."""
    if dataset.format["type"] == "custom":
        made = dataset.map(dict, remove_columns=dataset.column_names, desc="Applying the transform")
        dataset = made.with_format(None)
    texts = [name for name in ("prompt", *RESPONSES) if name in dataset.column_names]
    try:
        dataset.data.table.select(texts).validate(full=True)
        return dataset
    except pa.ArrowInvalid:
        return _dataset_of([_decoded(dataset, index) for index in range(len(dataset))])


def _decoded(dataset: Dataset, index: int) -> Mapping[str, Any]:
    try:
        row: Mapping[str, Any] = dataset[index]
        return row
    except UnicodeDecodeError:
        return {UNREADABLE_COLUMN: "is not text in UTF-8"}


def _how_to_make_one(rows: Any) -> str:
    """A hint on how to make a set from what was given, where there is one."""
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
    max_positions: int | None = None,
) -> PairDataset:
    """Adds the `TOKEN_COLUMNS` (untruncated) if missing, and drops rows whose prompt fills `max_length`.

    Dropped rows are logged in one message per set, with reasons and row numbers; for a stream, as it is read.

    Args:
        dataset: Rows in any of the formats of `tether.data.rows.tokenize_row`; the formats may be mixed.
        tokenizer: With a chat template if rows are conversational; or a reader of rows with images.
        max_length: Tokens of prompt and response together; None for no limit.
        truncation_mode: `keep_start` or `keep_end`.
        num_proc: Worker processes.
        name: The set's name, for messages.
        bad_rows: What happens to rows that are not pairs: `raise` or `drop`.
        max_positions: Tokens of the longest row, as it is cut, that the models have positions for; a longer one is
            treated as one that is not a pair. None for no limit.

    Raises:
        DataError: For a row that is not a pair (names it, and counts the others), or if no row remains. Rows of a
            stream are checked when they are read.
    """
    reader: RowReader = TextRows(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer
    truncation = Truncation(max_length, truncation_mode)
    plan = TokenizingPlan(reader, name, truncation, drops=bad_rows == "drop", max_positions=max_positions)
    if isinstance(dataset, Dataset):
        return tokenize_set(dataset, plan, num_proc)
    return tokenize_stream(dataset, plan)


@dataclass
class PairCollator:
    """Makes one `PairBatch` of tokenized rows: truncates, finds shared prompts, computes content keys.

    If the start of a sequence is kept, its key is made from the untruncated ids, so that one per-token record serves
    every `max_length`. With `keep_end` it is made from the fed ids.

    Returns a dict, as `transformers.Trainer` expects; its first tensor counts the pairs.

    Args:
        max_length: Tokens of prompt and response together; None for no limit.
        truncation_mode: Which end of a longer sequence stays: `keep_start` or `keep_end`.
        image_rows: Reads the images of rows that have some.
    """

    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    image_rows: ImageRows | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        own, counts = own_rows(rows)
        return inputs_of([self._pair(row) for row in own], margins_of(own), counts=counts)

    def _pair(self, row: Mapping[str, Any]) -> tuple[Response, Response]:
        images = self.image_rows.shown(row) if self.image_rows is not None else None
        prompt, *sides = (_as_python(row[column]) for column in TOKEN_COLUMNS)
        known = (_as_python(row.get(column)) for column in REFERENCE_COLUMNS)
        chosen, rejected = (
            self._response(prompt, ids, images)._replace(reference_sum=value)
            for ids, value in zip(sides, known, strict=True)
        )
        check_reference(row, chosen, rejected)
        return chosen, rejected

    @property
    def truncation(self) -> Truncation:
        """Where this collator cuts a row."""
        return Truncation(self.max_length, self.truncation_mode)

    def _response(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], images: PromptImages | None
    ) -> Response:
        check_room(prompt_ids, self.truncation, "A row of a batch")
        start, begin, stop = self.truncation.span(len(prompt_ids), len(response_ids))
        if images and start:
            raise cut_images("A row of a batch", self.truncation)
        sequence = (*prompt_ids, *response_ids)
        fed = sequence[start:begin], sequence[begin:stop]
        named = fed if self.truncation_mode == "keep_end" else (prompt_ids, response_ids)
        inputs = {"images": images.digest} if images else None
        return Response(*fed, content_key(*named, inputs=inputs), images=images)


def reference_checksum(*pair: Response) -> str:
    """A checksum over what is fed of two responses and their reference sums: 16 hexadecimal digits."""
    digest = blake2b(digest_size=8, person=b"tether row v1")
    for response in pair:
        digest.update(response.key + struct.pack("<qf", len(response.token_ids), response.reference_sum))
    return digest.hexdigest()


def check_reference(row: Mapping[str, Any], *pair: Response) -> None:
    """Raises a `DataError` if a row's reference sums have a checksum that is of other sums or other tokens."""
    kept = row.get(REFERENCE_CHECKSUM)
    if kept is None or any(response.reference_sum is None for response in pair) or kept == reference_checksum(*pair):
        return
    raise DataError(
        problem=f"A row of a batch has reference log-probs that do not belong to it: its `{REFERENCE_CHECKSUM}` is of "
        "other sums, or of other tokens.",
        details="The sums are of the tokens that were fed when they were computed: another `max_length`, "
        "`truncation_mode`, tokenizer or template feeds others. Or a number was changed since.",
        instead="Use the `max_length` of the run that exported the rows, or export them again (`tether store export "
        f"--rows`). If you changed the sums on purpose, remove the column `{REFERENCE_CHECKSUM}`.",
    )


def inputs_of(
    pairs: Sequence[tuple[Response, Response]], margins: Sequence[float] | None, *, counts: bool
) -> dict[str, Any]:
    """The output of a collator for these pairs: their batch, and a tensor with a 1 for each pair that counts."""
    batch = replace(PairBatch.of_pairs(pairs, margins), counts=counts)
    return PairInputs({"pairs": torch.full((batch.num_pairs,), int(counts)), "batch": batch})


class PairInputs(dict[str, Any]):
    """What a collator returns: a dict without the padded tensors of other collators, which says so."""

    def __missing__(self, key: str) -> Any:
        raise NotInBatchError(
            problem=f"Cannot read `{key}` of a batch: it holds pairs without padding, in `batch`, and `pairs`.",
            instead="Write `padded_ids(inputs['batch'], pad_token_id)` of `tether.trainer.evaluation` for padded token "
            "ids, `compute_loss(model, inputs, return_outputs=True)` for logits, and "
            "`tether.DataCollatorForPreference(pad_token_id)(rows)` for a padded batch of rows.",
        )


def uncounted(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, as pairs that do not count."""
    batch = replace(batch_of(inputs), counts=False)
    return PairInputs({**inputs, "pairs": torch.zeros_like(inputs["pairs"]), "batch": batch})


def truncation_of(collator: Any) -> Truncation | None:
    """Where a collator cuts a row; None if it is not ours, since others do not tell."""
    found = getattr(collator, "truncation", None)
    return found if isinstance(found, Truncation) else None


def check_room(prompt_ids: Sequence[int], truncation: Truncation, where: str) -> None:
    """Refuses a row whose prompt leaves no room for a response.

    Raises:
        DataError: If it leaves none.
    """
    if not truncation.leaves_room(len(prompt_ids)):
        raise DataError(
            problem=f"{where} has a prompt of {len(prompt_ids)} tokens, which leaves no room for a response in "
            f"`max_length={truncation.max_length}`.",
            instead="Set the trainer's `max_length` to that of its collator: such rows are then dropped.",
        )


def cut_images(where: str, truncation: Truncation) -> DataError:
    """The error for truncating the start of a row with images."""
    return DataError(
        problem=f"{where} has images and more than `max_length={truncation.max_length}` tokens: "
        "`truncation_mode='keep_end'` would cut the start of its prompt, and the image tokens with it.",
        instead="Set `truncation_mode='keep_start'`, or `max_length=None`.",
    )


def batch_columns(*, with_images: bool, further: Sequence[str] = ()) -> list[str]:
    """The columns of a tokenized set that a batch may need, and further ones that the loss reads."""
    of_rows = MARGIN_COLUMN, *REFERENCE_COLUMNS, REFERENCE_CHECKSUM, REPEATED
    of_images = PROMPT_COLUMNS if with_images else ()
    return [*dict.fromkeys((*TOKEN_COLUMNS, *of_rows, *of_images, *further))]


def _as_python(value: Any) -> Any:
    """Plain numbers, also from a set `with_format("torch")` or `"numpy"`: tensors do not compare as one value."""
    return value.tolist() if hasattr(value, "tolist") else value


def margins_of(rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The rows' margins; None if no row has one.

    Raises:
        DataError: If only some have one, or one is not a finite number.
    """
    if not any(MARGIN_COLUMN in row for row in rows):
        return None
    for row in rows:  # the margins of a set that came tokenized have not been checked yet
        check_margin({MARGIN_COLUMN: row.get(MARGIN_COLUMN)}, "A row of a batch")
    return [float(row[MARGIN_COLUMN]) for row in rows]


def batch_of(inputs: Mapping[str, Any]) -> PairBatch:
    """The `PairBatch` in the output of a `PairCollator`."""
    batch = inputs["batch"]
    assert isinstance(batch, PairBatch)
    return batch


def num_pairs_tensor(inputs: Mapping[str, Any]) -> Tensor:
    """Number of counted pairs in a collator's output, as a tensor."""
    pairs = inputs["pairs"]
    assert isinstance(pairs, Tensor)
    return pairs.sum()
