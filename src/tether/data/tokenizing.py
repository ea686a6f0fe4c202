"""From a set of rows to a set of token ids: tokenizes every row, drops what cannot be used, and reports it.

Knows datasets, in memory and streamed; `rows` knows what is in a row.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)

from tether.data.rows import (
    MARGIN_COLUMN,
    REFERENCE_COLUMNS,
    TOKEN_COLUMNS,
    RowReader,
    check_margin,
    check_reference_sum,
)
from tether.data.truncation import Truncation
from tether.errors import DataError

logger = logging.getLogger("tether.data.datasets")

# Columns that exist only while a set is tokenized: why a row is not a pair, and which end of its prompt was lost.
_PROBLEM, _LOST = "tether_problem", "tether_lost_text"
_ROWS_AT_ONCE = 1000
_EXAMPLES = 5  # row numbers that a message gives for each reason
_NAMED_DROPS = 10  # rows of a stream that are named one by one


@dataclass(frozen=True)
class TokenizingPlan:
    """How the rows of a set are tokenized, and which of them stay.

    Attributes:
        reader: Tokenizes a row.
        name: The set's name, for messages.
        truncation: Where its rows will be cut; a row whose prompt leaves no room for a response is dropped.
        drops: Whether rows that are not pairs are dropped; otherwise they are refused.
    """

    reader: RowReader
    name: str
    truncation: Truncation
    drops: bool

    def name_of(self, index: int) -> str:
        return f"Row {index} of the {self.name} set"

    @property
    def full_prompt(self) -> str:
        return f"has a prompt that fills `max_length={self.truncation.max_length}` and leaves no room for a response"


# ---- sets in memory ----------------------------------------------------------------------------------------------


def tokenize_set(dataset: Dataset, plan: TokenizingPlan, num_proc: int | None) -> Dataset:
    """The set with its token ids, without the rows that cannot be used.

    Raises:
        DataError: For rows that are not pairs, unless they are dropped; or if no row remains.
    """
    if len(dataset) == 0:
        raise _no_rows(plan, "")
    if not _is_tokenized(dataset, len(plan.reader.tokenizer)):
        dataset = _with_findings(dataset, plan, num_proc)
    problems = _problems(dataset)
    if problems and not plan.drops:
        raise _refusal(problems, len(dataset), plan)
    reasons: dict[str, list[int]] = defaultdict(list)
    for index, error in problems.items():
        reasons[_reason(error, index, plan)].append(index)
    lengths = _prompt_lengths(dataset)
    reasons[plan.full_prompt] += np.flatnonzero((lengths > 0) & ~plan.truncation.leaves_room(lengths)).tolist()
    dropped = {index for indices in reasons.values() for index in indices}
    if len(dropped) == len(dataset):
        raise _no_rows(plan, _listed(reasons))
    if dropped:
        logger.warning(
            "%d of %d rows of the %s set were dropped:%s", len(dropped), len(dataset), plan.name, _listed(reasons)
        )
    return _without_findings(dataset, dropped, plan)


def _with_findings(dataset: Dataset, plan: TokenizingPlan, num_proc: int | None) -> Dataset:
    """The set with its token ids and what was found in each row."""
    ids = List(Value("int64"))  # declared, since `datasets` infers types from the first rows, which may have no ids
    types = dict.fromkeys(TOKEN_COLUMNS, ids) | dict.fromkeys((_PROBLEM, _LOST), Value("string"))
    found: Dataset = dataset.map(
        _tokenize_or_explain,
        with_indices=True,
        fn_kwargs={"reader": plan.reader, "name": plan.name},
        features=Features(types),
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc=f"Tokenizing {plan.name} set",
    )
    # The new columns are put beside the others, which are not rewritten: images are large, and `datasets` may write a
    # column of JSON differently from how it read it.
    others = dataset.remove_columns([column for column in dataset.column_names if column in types])
    with progress_bars_off(True):  # "Flattening the indices", of both
        return concatenate_datasets([others, found], axis=1) if others.column_names else found


@contextmanager
def progress_bars_off(off: bool) -> Iterator[None]:
    """Hides the progress bars of `datasets` while open, if `off`; then restores the user's setting."""
    switches = off and not are_progress_bars_disabled()
    if switches:
        disable_progress_bars()
    try:
        yield
    finally:
        if switches:
            enable_progress_bars()


def _tokenize_or_explain(row: Mapping[str, Any], index: int, reader: RowReader, name: str) -> dict[str, Any]:
    try:
        tokens = reader.tokens(row, f"Row {index} of the {name} set")
    except DataError as error:
        return {column: [] for column in TOKEN_COLUMNS} | {_PROBLEM: json.dumps(error.args), _LOST: None}
    lost = str(reader.tokenizer.decode(tokens.lost_ids)) if tokens.lost_ids else None
    return {column: getattr(tokens, column) for column in TOKEN_COLUMNS} | {_PROBLEM: None, _LOST: lost}


def _without_findings(dataset: Dataset, dropped: set[int], plan: TokenizingPlan) -> Dataset:
    if _LOST in dataset.column_names:
        texts = enumerate(_texts(dataset, _LOST))
        lost = {index: text for index, text in texts if text is not None and index not in dropped}
        _warn_of_lost_tokens(lost, len(dataset) - len(dropped), plan)
        dataset = dataset.remove_columns([_PROBLEM, _LOST])
    if not dropped:
        return dataset
    return dataset.select([index for index in range(len(dataset)) if index not in dropped])


def _problems(dataset: Dataset) -> dict[int, DataError]:
    """The rows that are not pairs; none for a set that came tokenized, which is checked as a whole."""
    if _PROBLEM not in dataset.column_names:
        return {}
    found = enumerate(_texts(dataset, _PROBLEM))
    return {index: DataError(*json.loads(problem)) for index, problem in found if problem is not None}


def _is_tokenized(dataset: Dataset, vocabulary: int) -> bool:
    """Whether every row has ids of the tokenizer in every column; looks at whole columns, which is fast."""
    if not set(TOKEN_COLUMNS) <= set(dataset.column_names):
        return False
    for table in arrow_tables(dataset, TOKEN_COLUMNS):
        for column in (table[name] for name in TOKEN_COLUMNS):
            kind = column.type
            if not (hasattr(kind, "value_type") and str(kind.value_type).lstrip("u").startswith("int")):
                return False
            bounds = pc.min_max(pc.list_flatten(column)).as_py()
            if column.null_count or not pc.all(pc.greater(pc.list_value_length(column), 0)).as_py():
                return False
            if bounds["min"] < 0 or bounds["max"] >= vocabulary:
                return False
    return True


def _prompt_lengths(dataset: Dataset) -> Any:
    tables = arrow_tables(dataset, TOKEN_COLUMNS[:1])
    return np.concatenate([pc.list_value_length(table[TOKEN_COLUMNS[0]]).to_numpy() for table in tables])


def largest_id(dataset: Dataset) -> tuple[int, int]:
    """The largest token id of a tokenized set, and the number of a row that has it."""
    largest, found, start = -1, 0, 0
    for table in arrow_tables(dataset, TOKEN_COLUMNS):
        ids = [column.combine_chunks() for column in (table[name] for name in TOKEN_COLUMNS)]
        here = max(pc.max(pc.list_flatten(column)).as_py() for column in ids)
        if here > largest:
            rows = (row for column in ids for row, values in enumerate(column.to_pylist()) if here in values)
            largest, found = here, start + min(rows)
        start += table.num_rows
    return largest, found


def _texts(dataset: Dataset, column: str) -> Iterator[str | None]:
    return (text for table in arrow_tables(dataset, (column,)) for text in table[column].to_pylist())


def arrow_tables(dataset: Dataset, columns: tuple[str, ...]) -> Iterator[Any]:
    """The columns as Arrow tables, in the order of the rows."""
    return dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)  # type: ignore[no-any-return]


# ---- streams -----------------------------------------------------------------------------------------------------


def tokenize_stream(dataset: IterableDataset, plan: TokenizingPlan) -> IterableDataset:
    """The stream with the token ids of each row, without rows that cannot be used; nothing is read yet."""
    log = _StreamLog(plan)
    known = {"plan": plan, "log": log, "brought": _number_columns(dataset)}
    tokenized = dataset.map(_tokenize_next, with_indices=True, fn_kwargs=known)
    return tokenized.filter(_is_usable, with_indices=True, fn_kwargs={"plan": plan, "log": log})


@dataclass
class _StreamLog:
    """Logs which rows of a stream are dropped: the first ones individually, then their number at every power of ten,
    since the end of a stream is not known."""

    plan: TokenizingPlan
    reasons: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    has_lost: bool = False

    def drop(self, index: int, reason: str) -> None:
        self.reasons[reason].append(index)
        num_dropped = sum(map(len, self.reasons.values()))
        if num_dropped <= _NAMED_DROPS:
            logger.warning("%s was dropped because it %s.", self.plan.name_of(index), reason)
        elif num_dropped in (10**power for power in range(2, 12)):
            listed = _listed(self.reasons)
            logger.warning("%d rows of the %s set were dropped so far:%s", num_dropped, self.plan.name, listed)

    def lose(self, index: int, text: str) -> None:
        if not self.has_lost:
            _warn_of_lost_tokens({index: text}, None, self.plan)
        self.has_lost = True


def _number_columns(dataset: IterableDataset) -> frozenset[str]:
    """The columns of numbers in a stream's rows, by its column names or, if it has none, its first row."""
    names = dataset.column_names
    if names is None:
        names = [name for name, value in next(iter(dataset), {}).items() if value is not None]
    return frozenset(names) & {MARGIN_COLUMN, *REFERENCE_COLUMNS}


def _tokenize_next(
    row: Mapping[str, Any], index: int, plan: TokenizingPlan, log: _StreamLog, brought: frozenset[str]
) -> dict[str, Any]:
    try:
        tokens = plan.reader.tokens(row, plan.name_of(index))
        _check_numbers(row, plan.name_of(index), brought)
    except DataError as error:
        if not plan.drops:
            raise
        log.drop(index, _reason(error, index, plan))
        return {column: [] for column in TOKEN_COLUMNS}
    if tokens.lost_ids:
        log.lose(index, str(plan.reader.tokenizer.decode(tokens.lost_ids)))
    return {column: getattr(tokens, column) for column in TOKEN_COLUMNS}


def _check_numbers(row: Mapping[str, Any], where: str, brought: frozenset[str]) -> None:
    """Checks a stream's row; the columns of a set in memory are checked as a whole (`trainer.reference_columns`)."""
    if MARGIN_COLUMN in brought:
        check_margin({MARGIN_COLUMN: row.get(MARGIN_COLUMN)}, where)
    if not brought.isdisjoint(REFERENCE_COLUMNS):
        for column in REFERENCE_COLUMNS:
            check_reference_sum(row.get(column), column, where)
    for column in (MARGIN_COLUMN, *REFERENCE_COLUMNS):
        if column not in brought and row.get(column) is not None:
            raise DataError(
                problem=f"{where} has a `{column}`, but the first row of its set has none: the first row of a stream "
                "decides which columns count, before the others are read.",
                instead="Give the column to every row of the stream, or to none.",
            )


def _is_usable(row: Mapping[str, Any], index: int, plan: TokenizingPlan, log: _StreamLog) -> bool:
    if not row["prompt_ids"]:
        return False
    if not plan.truncation.leaves_room(len(row["prompt_ids"])):
        log.drop(index, plan.full_prompt)
        return False
    return True


# ---- words -------------------------------------------------------------------------------------------------------


def _reason(error: DataError, index: int, plan: TokenizingPlan) -> str:
    """What is wrong with a row, in words shared by all rows with the same fault."""
    return error.problem.removeprefix(plan.name_of(index)).strip().rstrip(".")


def _listed(reasons: Mapping[str, list[int]]) -> str:
    lines = []
    for reason, indices in reasons.items():
        if indices:
            numbers = ", ".join(map(str, indices[:_EXAMPLES])) + (", ..." if len(indices) > _EXAMPLES else "")
            lines.append(f"\n  {len(indices)}: {reason} ({'row' if len(indices) == 1 else 'rows'} {numbers})")
    return "".join(lines)


def _counted(listed: str) -> str:
    return "The reasons, with the number of rows for each:" + listed.replace("\n", "\n  ")


def _refusal(problems: Mapping[int, DataError], num_rows: int, plan: TokenizingPlan) -> DataError:
    """The first row's error, with a count of the others."""
    first = next(iter(problems.values()))
    if len(problems) == 1:
        return first
    reasons: dict[str, list[int]] = defaultdict(list)
    for number, error in problems.items():
        reasons[_reason(error, number, plan)].append(number)
    return DataError(
        problem=f"{first.problem} In all, {len(problems)} of {num_rows} rows cannot be used.",
        details="\n  ".join(filter(None, (first.details, _counted(_listed(reasons))))),
        instead=f'{first.instead} `bad_rows="drop"` leaves such rows out.',
    )


def _warn_of_lost_tokens(lost: Mapping[int, str], num_rows: int | None, plan: TokenizingPlan) -> None:
    """Warns that responses do not begin where their prompts end."""
    if not lost:
        return
    index, text = next(iter(lost.items()))
    logger.warning(
        "In %s of the %s set, the prompt ends differently before its response than on its own (row %d: %r): tokens "
        "merge across the boundary, or the chat template renders an open answer differently. The response is taken to "
        "start where the two differ, so the model is not trained to continue exactly what it is given when it answers. "
        "End the prompt at the end of a token, or use a template that renders it the same way in both cases.",
        f"{len(lost)} of {num_rows} rows" if num_rows is not None else "rows",
        plan.name,
        index,
        text,
    )


def _no_rows(plan: TokenizingPlan, listed: str) -> DataError:
    return DataError(
        problem=f"The {plan.name} set has no usable row: {'all rows were dropped' if listed else 'it is empty'}.",
        details=_counted(listed) if listed else "",
        instead="Raise `max_length`, shorten the prompts, or set `max_length=None`."
        if plan.full_prompt in listed
        else "Pass a set with at least one pair.",
    )
