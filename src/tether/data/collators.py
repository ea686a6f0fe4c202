"""Collators other than the trainer's own: TRL's padded layout as a class, and padded batches turned back into pairs.

The trainer's own collator is `data.PairCollator`, which pads nothing. Knows rows of token ids; knows no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.data.data_collator import DataCollatorMixin

from tether.data.datasets import PairCollator, check_room, inputs_of, margins_of, uncounted
from tether.data.image_rows import ImageRows
from tether.data.rounds import own_rows
from tether.data.rows import REFERENCE_COLUMNS, check_reference_sum, is_number
from tether.data.truncation import Truncation
from tether.errors import ConfigurationError, DataError
from tether.store import content_key
from tether.types import PairBatch, PromptImages, Response, TruncationMode, image_inputs

_PADDED = ("input_ids", "attention_mask", "completion_mask")


@dataclass
class DataCollatorForPreference(DataCollatorMixin):
    """Makes one padded batch of tokenized pairs: all chosen sequences, then all rejected ones.

    With n rows, whose longest sequence has L tokens after truncation:

    ====================  ==========  =========================================================
    key                   shape       value
    ====================  ==========  =========================================================
    `input_ids`           `[2n, L]`   prompt + response, padded on the right with `pad_token_id`
    `attention_mask`      `[2n, L]`   1 at tokens, 0 at padding
    `completion_mask`     `[2n, L]`   1 at the response's tokens
    `ref_chosen_logps`    `[n]`       if the rows have it; the same for rejected
    ====================  ==========  =========================================================

    The trainer needs no such collator: it lays pairs out without padding. If this one is its `data_collator`, the
    `max_length` and `truncation_mode` given here are used.

    Args:
        pad_token_id: Id of the padding token.
        max_length: Maximum tokens of a sequence; None for no limit.
        truncation_mode: Which end of a longer sequence stays: `keep_start` or `keep_end`.
        pad_to_multiple_of: Rounds L up to a multiple of this number.
        return_tensors: Only `pt`.

    Raises:
        ConfigurationError: For another `truncation_mode` or `return_tensors`.

    Example:
        >>> collator = DataCollatorForPreference(pad_token_id=0)
        >>> batch = collator([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}])
        >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
        ([[5, 6, 7, 0], [5, 6, 8, 9]], [[0, 0, 1, 0], [0, 0, 1, 1]])
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: Literal["pt"] = "pt"

    def __post_init__(self) -> None:
        for name, known, why in (
            ("truncation_mode", ("keep_start", "keep_end"), "a longer sequence keeps either its start or its end"),
            ("return_tensors", ("pt",), "batches are always torch tensors"),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    problem=f"Cannot use `{name}={getattr(self, name)!r}` for DataCollatorForPreference: {why}.",
                    instead=f"Write {' or '.join(map(repr, known))}.",
                )

    def torch_call(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of these rows, as in the table above."""
        sequences = [
            (list(row["prompt_ids"]), list(row[side])) for side in ("chosen_ids", "rejected_ids") for row in examples
        ]
        masks = [([0] * len(prompt), [1] * len(response)) for prompt, response in sequences]
        batch = {
            "input_ids": self._padded(sequences, self.pad_token_id),
            "attention_mask": self._padded([([1] * len(prompt), response) for prompt, response in masks], 0),
            "completion_mask": self._padded(masks, 0),
        }
        return batch | {name: torch.tensor(sums) for name, sums in _reference_sums(examples).items()}

    def _padded(self, sequences: list[tuple[list[int], list[int]]], filling: int) -> Tensor:
        """Prompts with their responses, truncated and padded."""
        rows, truncation = [], Truncation(self.max_length, self.truncation_mode)
        for prompt, response in sequences:
            start, _, stop = truncation.span(len(prompt), len(response))
            rows.append((prompt + response)[start:stop])
        width, unit = max(map(len, rows)), self.pad_to_multiple_of or 1
        width += -width % unit
        return torch.tensor([row + [filling] * (width - len(row)) for row in rows])


def _reference_sums(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The columns of reference sums. If any row has a column, all must."""
    brought = [name for name in REFERENCE_COLUMNS if any(row.get(name) is not None for row in rows)]
    for name in brought:
        for number, row in enumerate(rows):
            if not is_number(row.get(name)):  # whether it can be a log-prob is checked as its set is read
                check_reference_sum(row.get(name), name, f"Row {number} of a batch")
    return {name: [row[name] for row in rows] for name in brought}


@dataclass
class DataCollatorForVisionPreference(DataCollatorMixin):
    """Makes one padded batch of rows with images, by a processor: all chosen sequences, then all rejected ones.

    With n rows, whose longest sequence has L tokens after truncation:

    ==================  ==========  =========================================================
    key                 shape       value
    ==================  ==========  =========================================================
    `input_ids`         `[2n, L]`   prompt + response, padded on the right
    `attention_mask`    `[2n, L]`   1 at tokens, 0 at padding
    `completion_mask`   `[2n, L]`   1 at the response's tokens
    `pixel_values`      by model    the images of every sequence, in order
    ==================  ==========  =========================================================

    and anything else the processor returns (`image_grid_thw`, `image_sizes`, `token_type_ids`, ...). The trainer needs
    no such collator. If this one is its `data_collator`, the `processor` and `max_length` given here are used.

    Args:
        processor: Of a vision-language model; its tokenizer has a padding token.
        max_length: Maximum tokens of a sequence; the response's end is cut. None for no limit.
        pad_to_multiple_of: Rounds L up to a multiple of this number.
        return_tensors: Only `pt`.

    Raises:
        ConfigurationError: For another `return_tensors`.
        DataError: For a row that is not a pair, or whose prompt leaves no room for a response.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: Literal["pt"] = "pt"

    def __post_init__(self) -> None:
        tokenizer: Any = ImageRows(self.processor).tokenizer
        filling = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._padding = DataCollatorForPreference(
            filling, self.max_length, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors=self.return_tensors
        )

    def torch_call(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of these rows, as in the table above."""
        reader = ImageRows(self.processor)
        names = [f"Row {number} of a batch" for number in range(len(examples))]
        rows = [{**row, **reader.tokens(row, name)._asdict()} for row, name in zip(examples, names, strict=True)]
        for row, name in zip(rows, names, strict=True):
            check_room(row["prompt_ids"], Truncation(self.max_length), name)
        batch: dict[str, Tensor] = self._padding(rows)
        shown = [reader.shown(row, name) for row, name in zip(rows, names, strict=True)] * 2
        return batch | image_inputs(shown, batch["input_ids"].shape[1])


Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


def pair_collator(
    given: Any, max_length: int | None, truncation_mode: TruncationMode, image_rows: ImageRows | None = None
) -> PairCollator | PairsOfPadded:
    """The collator that the trainer uses: its own, or the user's.

    Args:
        given: None, a collator of this package, or a callable that truncates and returns the padded layout of
            `DataCollatorForPreference`.
        max_length: For the trainer's own collator.
        truncation_mode: For the trainer's own collator.
        image_rows: For the trainer's own collator.

    Raises:
        ConfigurationError: If `given` is not a collator.
    """
    if given is None:
        return PairCollator(max_length, truncation_mode, image_rows)
    if isinstance(given, PairCollator | PairsOfPadded):
        return given
    if type(given) is DataCollatorForPreference:  # the same pairs, without the detour through padding
        return PairCollator(given.max_length, given.truncation_mode, image_rows)
    if type(given) is DataCollatorForVisionPreference:
        return PairCollator(given.max_length, image_rows=ImageRows(given.processor))
    if callable(given):
        return PairsOfPadded(
            given, ImageRows(given.processor) if isinstance(given, DataCollatorForVisionPreference) else None
        )
    raise ConfigurationError(
        problem=f"Cannot use a `data_collator` of type {type(given).__name__}: a collator is called with a list of "
        "rows and returns one batch.",
        instead="Leave `data_collator` out, or pass `DataCollatorForPreference(pad_token_id=...)` or a function that "
        "returns its keys.",
    )


@dataclass(frozen=True)
class PairsOfPadded:
    """Turns the padded batches of another collator into pairs, by removing the padding.

    Content keys are made from the fed tokens, since those that the collator truncated are not known. A response begins
    at the first token that `completion_mask` marks and ends with its sequence; those of its tokens that are not marked
    are scored, so that one record serves every mask, and do not count (`PairBatch.scored`).

    Args:
        collator: Returns `input_ids`, `attention_mask`, `completion_mask`, each `[2 * rows, length]`: all chosen
            sequences, then all rejected ones; and `ref_chosen_logps`, `ref_rejected_logps`, each `[rows]`, if the
            rows have them. Batches that are pairs already are passed through.
        image_rows: Reads the rows' images, for a subclass of `DataCollatorForVisionPreference`; what it returns of them
            must be the same.

    Raises:
        ConfigurationError: If it returns other keys or shapes, or other images.
        DataError: If a sequence has no response.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    image_rows: ImageRows | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows, counts = own_rows(rows)
        padded = self.collator(rows)
        if isinstance(padded, Mapping) and isinstance(padded.get("batch"), PairBatch):
            return dict(padded) if counts else uncounted(padded)
        # Sums that are not from the rows belong to a reference that this run does not use.
        optional = REFERENCE_COLUMNS if all(name in row for row in rows for name in REFERENCE_COLUMNS) else ()
        shown = [None if self.image_rows is None else self.image_rows.shown(row) for row in rows] * 2
        padded = _without_images(padded, shown)
        _check_layout(padded, len(rows), optional)
        sums = [total for name in REFERENCE_COLUMNS if name in padded for total in padded[name].tolist()]
        sequences = [
            _response(number, shown[number], *(tensor.tolist() for tensor in sequence))._replace(
                reference_sum=sums[number] if sums else None
            )
            for number, sequence in enumerate(zip(*(padded[name] for name in _PADDED), strict=True))
        ]
        pairs = list(zip(sequences[: len(rows)], sequences[len(rows) :], strict=True))
        return inputs_of(pairs, margins_of(rows), counts=counts)


def _without_images(padded: Any, shown: Sequence[PromptImages | None]) -> Any:
    """The batch without what shows the images of its rows, which is read from the rows."""
    if not any(shown) or not isinstance(padded, Mapping) or "input_ids" not in padded:
        return padded
    own = image_inputs(shown, padded["input_ids"].shape[1])
    for name in own.keys() & padded.keys():
        if not torch.equal(own[name], padded[name]):
            raise ConfigurationError(
                problem=f"Cannot use what `data_collator` made of `{name}`: the reference's answers are kept by the "
                "images of the rows, and these are others.",
                instead="Change the images in the rows (`dataset.map`), and leave them as they are in the collator.",
            )
    return {name: value for name, value in padded.items() if name not in own}


def _check_layout(padded: Any, num_rows: int, optional: tuple[str, ...]) -> None:
    keys = sorted(padded) if isinstance(padded, Mapping) else [f"a {type(padded).__name__}"]
    known = set(keys) in (set(_PADDED), {*_PADDED, *optional})
    shapes = {name: tuple(padded[name].shape) for name in _PADDED} if known else {}
    sums = {tuple(padded[name].shape) for name in REFERENCE_COLUMNS if name in keys} if known else set()
    if len(set(shapes.values())) == 1 and shapes["input_ids"][:1] == (2 * num_rows,) and sums <= {(num_rows,)}:
        return
    found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or ", ".join(keys)
    raise ConfigurationError(
        problem=f"Cannot use what `data_collator` returned for {num_rows} rows ({found}): it is not a padded batch of "
        "their pairs.",
        details="The loss would not see any other keys.",
        instead=f"Return {', '.join(_PADDED)}, each of shape [2 * rows, length], chosen sequences first; or leave "
        "`data_collator` out.",
    )


def _response(
    number: int, images: PromptImages | None, ids: list[int], attended: list[int], scored: list[int]
) -> Response:
    """The prompt and response of one padded sequence."""
    tokens = [(token, mark) for token, is_there, mark in zip(ids, attended, scored, strict=True) if is_there]
    marks = [int(mark) for _, mark in tokens]
    # A response that fills the sequence loses its first token, which nothing predicts.
    start = next((place for place, mark in enumerate(marks) if place and mark), 0)
    if not start:
        raise DataError(
            problem=f"The completion mask of sequence {number} of a batch from `data_collator` is {marks}: it marks no "
            "token of a response, with a token before it.",
            instead="Mark the response's tokens in `completion_mask`, and set the trainer's `max_length` to the length "
            "at which the collator cuts: rows without room for a response are then dropped.",
        )
    prompt, response = (tuple(token for token, _ in part) for part in (tokens[:start], tokens[start:]))
    whole = all(marks[start:])
    counts = None if whole else tuple(map(bool, marks[start:]))
    key = content_key(prompt, response, inputs={"images": images.digest} if images else None)
    return Response(prompt, response, key, images=images, scored=counts)
