"""From a set of rows to a set of token ids: tokenizes every row, drops what cannot be used, and reports it.

Knows datasets, in memory and streamed; `rows` knows what is in a row.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from transformers import PreTrainedTokenizerBase

from tether.data.names import MAPPED, columns_meant, how_to_map
from tether.data.rows import (
    MARGIN_COLUMN,
    REFERENCE_COLUMNS,
    ROW_COLUMN,
    TOKEN_COLUMNS,
    UNREADABLE_COLUMN,
    RowReader,
    RowTokens,
    check_margin,
    check_reference_sum,
    is_known,
    row_name,
)
from tether.data.truncation import Truncation
from tether.distributed import is_main_process
from tether.errors import DataError, TetherError, said
from tether.refusals import listed

logger = logging.getLogger("tether.data.datasets")

# Columns that exist only while a set is tokenized: why a row is not a pair, and which end of its prompt was lost.
_PROBLEM, _LOST = "tether_problem", "tether_lost_text"
_ROWS_AT_ONCE = 1000
_REASONS = 10  # that a message lists
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
        max_positions: Tokens of the longest row that the models have positions for; a longer one is not a pair either.
    """

    reader: RowReader
    name: str
    truncation: Truncation
    drops: bool
    max_positions: int | None = None

    @property
    def full_prompt(self) -> str:
        return f"has a prompt that fills `max_length={self.truncation.max_length}` and leaves no room for a response"

    def too_long(self, where: str) -> DataError:
        return DataError(
            problem=f"{where} has more tokens than the {self.max_positions} that the model learned positions for.",
            instead=f"Set `max_length={self.max_positions}`, or use a model with more positions.",
        )

    def lacks_positions(self, num_prompt: Any, *num_responses: Any) -> Any:
        """Whether a model has no positions for a row of so many tokens, as it is cut."""
        if self.max_positions is None:
            return np.zeros_like(num_prompt, dtype=bool)
        spans = [self.truncation.span(num_prompt, number) for number in num_responses]
        return np.max([stop - start for start, _, stop in spans], axis=0) > self.max_positions


# ---- sets in memory ----------------------------------------------------------------------------------------------


def tokenize_set(dataset: Dataset, plan: TokenizingPlan, num_proc: int | None) -> Dataset:
    """The set with its token ids, without the rows that cannot be used.

    Raises:
        DataError: For rows that are not pairs, unless they are dropped; or if no row remains.
    """
    if len(dataset) == 0:
        raise _no_rows(plan, "")
    _check_columns(dataset.column_names, plan.name)
    if not _is_tokenized(dataset, plan.reader.tokenizer):
        dataset = _with_findings(dataset, plan, num_proc)
    problems = _problems(dataset, plan)
    if problems and not plan.drops:
        raise _refusal(problems, dataset, plan)
    reasons = _by_reason(problems)
    prompts, *_ = token_lengths(dataset)
    reasons[plan.full_prompt] += np.flatnonzero((prompts > 0) & ~plan.truncation.leaves_room(prompts)).tolist()
    dropped = {index for indices in reasons.values() for index in indices}
    if len(dropped) == len(dataset):
        raise _no_rows(plan, _listed(reasons, dataset))
    if dropped:
        _warn(f"{len(dropped)} of {len(dataset)} rows of the {plan.name} set were dropped:{_listed(reasons, dataset)}")
    kept = _without_findings(dataset, dropped, plan)
    _warn_of_cuts(kept, plan)
    return kept


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
    where = row_name(row, index, name)
    try:
        tokens = _tokens(reader, row, where)
    except DataError as error:
        problem = json.dumps([_reason(error, where), *error.args])
        return {column: [] for column in TOKEN_COLUMNS} | {_PROBLEM: problem, _LOST: None}
    lost = str(reader.tokenizer.decode(tokens.lost_ids)) if tokens.lost_ids else None
    return {column: getattr(tokens, column) for column in TOKEN_COLUMNS} | {_PROBLEM: None, _LOST: lost}


def _tokens(reader: RowReader, row: Mapping[str, Any], where: str) -> RowTokens:
    """The row's token ids, or a `DataError` that names it, whatever a tokenizer or a template makes of it."""
    if row.get(UNREADABLE_COLUMN) is not None:
        raise DataError(problem=f"{where} {row[UNREADABLE_COLUMN]}.", instead="Correct the row, or drop it.")
    try:
        return reader.tokens(row, where)
    except (TetherError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            problem=f"{where} cannot be tokenized: {type(error).__name__}: {said(error)}.",
            instead="Correct its text, or drop the row.",
        ) from error


def _without_findings(dataset: Dataset, dropped: set[int], plan: TokenizingPlan) -> Dataset:
    if _LOST in dataset.column_names:
        texts = enumerate(_texts(dataset, _LOST))
        lost = {index: text for index, text in texts if text is not None and index not in dropped}
        if lost:
            index, text = next(iter(lost.items()))
            rows = f"{len(lost)} of {len(dataset) - len(dropped)} rows of the {plan.name} set"
            _warn_of_lost_tokens(rows, _rows([index], dataset), text)
        ours = {_PROBLEM, _LOST, UNREADABLE_COLUMN} & set(dataset.column_names)
        dataset = dataset.remove_columns(sorted(ours))
    if not dropped:
        return dataset
    if ROW_COLUMN not in dataset.column_names:
        dataset = dataset.add_column(ROW_COLUMN, [f"{index} of the {plan.name} set" for index in range(len(dataset))])
    return dataset.select([index for index in range(len(dataset)) if index not in dropped])


def _problems(dataset: Dataset, plan: TokenizingPlan) -> dict[int, tuple[str, DataError]]:
    """What is wrong with each row that is not a pair; the ids of a set that came tokenized are checked as a whole."""
    problems: dict[int, tuple[str, DataError]] = {}
    if _PROBLEM in dataset.column_names:
        found = enumerate(_texts(dataset, _PROBLEM))
        read = {index: json.loads(problem) for index, problem in found if problem is not None}
        problems = {index: (reason, DataError(*args)) for index, (reason, *args) in read.items()}
    for index in np.flatnonzero(plan.lacks_positions(*token_lengths(dataset))).tolist():
        where = name_of_row(dataset, index, plan.name)
        error = plan.too_long(where)
        problems[index] = _reason(error, where), error
    return dict(sorted(problems.items()))


def _is_tokenized(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> bool:
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
            if bounds["min"] < 0 or not is_known(bounds["max"], tokenizer):
                return False
    return True


def token_lengths(dataset: Dataset) -> Any:
    """Tokens of prompt, chosen and rejected: three rows of numbers."""
    tables = arrow_tables(dataset, TOKEN_COLUMNS)
    return np.concatenate(
        [[pc.list_value_length(table[name]).to_numpy() for name in TOKEN_COLUMNS] for table in tables], axis=1
    )


def name_of_row(dataset: Dataset, index: int, name: str) -> str:
    """A row of a set in messages; see `rows.row_name`."""
    labels = _labels(dataset, [index])
    return row_name({ROW_COLUMN: labels[0]} if labels else {}, index, name)


def _labels(dataset: Dataset, indices: Sequence[int]) -> list[str]:
    """The rows' own numbers; none if they have none."""
    if ROW_COLUMN not in dataset.column_names:
        return []
    labels: list[str] = dataset.with_format(None).select_columns([ROW_COLUMN])[list(indices)][ROW_COLUMN]
    return labels


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
    has_cut: bool = False

    def drop(self, index: int, reason: str) -> None:
        self.reasons[reason].append(index)
        num_dropped = sum(map(len, self.reasons.values()))
        if num_dropped <= _NAMED_DROPS:
            _warn(f"{row_name({}, index, self.plan.name)} was dropped because it {reason}.")
        elif num_dropped in (10**power for power in range(2, 12)):
            _warn(f"{num_dropped} rows of the {self.plan.name} set were dropped so far:{_listed(self.reasons)}")

    def lose(self, index: int, text: str) -> None:
        if not self.has_lost:
            _warn_of_lost_tokens(f"rows of the {self.plan.name} set", _rows([index]), text)
        self.has_lost = True

    def cut(self, index: int, lengths: Sequence[int]) -> None:
        if not self.has_cut and (lost := _num_cut(self.plan.truncation, *lengths).max()) > 0:
            where, part = row_name({}, index, self.plan.name), _lost_part(self.plan.truncation)
            limit = self.plan.truncation.max_length
            _warn(f"{where} loses {part} to `max_length={limit}` ({lost} of its tokens), and rows after it may too.")
            self.has_cut = True


def _number_columns(dataset: IterableDataset) -> frozenset[str]:
    """The columns of numbers in a stream's rows, by its column names or, if it has none, its first row."""
    names = dataset.column_names
    if names is None:
        names = [name for name, value in next(iter(dataset), {}).items() if value is not None]
    return frozenset(names) & {MARGIN_COLUMN, *REFERENCE_COLUMNS}


def _tokenize_next(
    row: Mapping[str, Any], index: int, plan: TokenizingPlan, log: _StreamLog, brought: frozenset[str]
) -> dict[str, Any]:
    where = row_name(row, index, plan.name)
    try:
        tokens = _tokens(plan.reader, row, where)
        _check_numbers(row, where, brought)
    except DataError as error:
        if not plan.drops:
            raise
        log.drop(index, _reason(error, where))
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
    lengths = [len(row[column]) for column in TOKEN_COLUMNS]
    if plan.lacks_positions(*lengths):
        where = row_name(row, index, plan.name)
        error = plan.too_long(where)
        if not plan.drops:
            raise error
        log.drop(index, _reason(error, where))
        return False
    log.cut(index, lengths)
    return True


# ---- words -------------------------------------------------------------------------------------------------------


def _warn(text: str) -> None:
    if is_main_process():
        logger.warning(text)


def _reason(error: DataError, where: str) -> str:
    """What is wrong with a row, in words shared by all rows with the same fault."""
    return error.problem.removeprefix(where).strip().rstrip(".")


def _by_reason(problems: Mapping[int, tuple[str, DataError]]) -> dict[str, list[int]]:
    reasons: dict[str, list[int]] = defaultdict(list)
    for index, (reason, _) in problems.items():
        reasons[reason].append(index)
    return reasons


def _listed(reasons: Mapping[str, Sequence[int]], dataset: Dataset | None = None) -> str:
    found = [(reason, indices) for reason, indices in reasons.items() if indices]
    lines = [f"\n  {len(indices)}: {reason} ({_rows(indices, dataset)})" for reason, indices in found[:_REASONS]]
    others = sum(len(indices) for _, indices in found[_REASONS:])
    return "".join([*lines, *([f"\n  {others}: for other reasons"] if others else [])])


def _rows(indices: Sequence[int], dataset: Dataset | None = None) -> str:
    """The first rows by number: "rows 3, 5, 8, ..."; with their file, if they are of several."""
    first = indices[:_EXAMPLES]
    names = (dataset and _labels(dataset, first)) or list(map(str, first))
    if len({name.partition(" ")[2] for name in names}) == 1:
        names = [name.partition(" ")[0] for name in names]
    more = ", ..." if len(indices) > _EXAMPLES else ""
    return f"{'row' if len(indices) == 1 else 'rows'} {', '.join(names)}{more}"


def _warn_of_cuts(dataset: Dataset, plan: TokenizingPlan) -> None:
    """Says in one line how many pairs lose a part to the limit, and how much."""
    cut = _num_cut(plan.truncation, *token_lengths(dataset))
    rows = np.flatnonzero(cut.max(axis=0))
    if len(rows) == 0:
        return
    chosen, rejected = (cut > 0).sum(axis=1)
    lost, whole = cut[cut > 0], int((token_lengths(dataset)[0] + token_lengths(dataset)[1:]).max())
    has_positions = plan.max_positions is None or whole <= plan.max_positions
    keeps = (
        f"`max_length={whole}` would keep all."
        if has_positions
        else f"The longest has {whole:,} tokens, and the model positions for {plan.max_positions:,}."
    )
    _warn(
        f"{len(rows)} of {len(dataset)} pairs of the {plan.name} set lose {_lost_part(plan.truncation)} to "
        f"`max_length={plan.truncation.max_length}`, {chosen} of the chosen and {rejected} of the rejected: "
        f"{lost.mean():,.0f} tokens on average, {lost.max():,} at most ({_rows(rows.tolist(), dataset)}). {keeps}"
    )


def _num_cut(truncation: Truncation, num_prompt: Any, *num_responses: Any) -> Any:
    """Tokens that each response loses or, where the start of a row is cut, its prompt."""
    spans = ((truncation.span(num_prompt, number), number) for number in num_responses)
    return np.stack([num_prompt + number - (stop - start) for (start, _, stop), number in spans])


def _lost_part(truncation: Truncation) -> str:
    return "the end of a response" if truncation.mode == "keep_start" else "the start of the prompt"


def _counted(listed: str) -> str:
    return "The reasons, with the number of rows for each:" + listed.replace("\n", "\n  ")


def _refusal(problems: Mapping[int, tuple[str, DataError]], dataset: Dataset, plan: TokenizingPlan) -> DataError:
    """The first row's error, with a count of the others."""
    _, first = next(iter(problems.values()))
    if len(problems) == 1:
        return first
    return DataError(
        problem=f"{first.problem} In all, {len(problems)} of {len(dataset)} rows cannot be used.",
        details="\n  ".join(filter(None, (first.details, _counted(_listed(_by_reason(problems), dataset))))),
        instead=f'{first.instead} `bad_rows="drop"` leaves such rows out.',
    )


def _warn_of_lost_tokens(rows: str, first: str, text: str) -> None:
    """Warns that responses do not begin where their prompts end."""
    _warn(
        f"In {rows}, the prompt ends differently before its response than on its own ({first}: {text!r}): tokens "
        "merge across the boundary, or the chat template renders an open answer differently. The response is taken to "
        "start where the two differ, so the model is not trained to continue exactly what it is given when it answers. "
        "End the prompt at the end of a token, or use a template that renders it the same way in both cases."
    )


def _check_columns(names: Sequence[str], name: str) -> None:
    """Refuses a set of which no row can be a pair; a stream's rows are looked at one by one."""
    own = [column for column in names if column != ROW_COLUMN]
    missing = [column for column in ("chosen", "rejected") if column not in own]
    if not missing or UNREADABLE_COLUMN in own or any(column in own for column in TOKEN_COLUMNS):
        return
    instead = "Name the columns `prompt`, `chosen` and `rejected`."
    if meant := columns_meant(own):
        whole = dict.fromkeys(missing, "...") | meant
        instead = how_to_map({ours: whole[ours] for ours in MAPPED if ours in whole})
    if len(own) == 1 and (mark := next((mark for mark in ";,\t|" if mark in own[0]), None)):
        instead = f"Its columns seem to be separated by {mark!r}: a .csv file has commas, a .tsv file tabs."
    raise DataError(
        problem=f"The {name} set has no column {' and no column '.join(f'`{column}`' for column in missing)}: a pair "
        "needs two responses to one prompt.",
        details=f"Its columns are {listed([f'`{column}`' for column in own], most=20)}.",
        instead=instead,
    )


def _no_rows(plan: TokenizingPlan, listed: str) -> DataError:
    return DataError(
        problem=f"The {plan.name} set has no usable row: {'all rows were dropped' if listed else 'it is empty'}.",
        details=_counted(listed) if listed else "",
        instead="Raise `max_length`, shorten the prompts, or set `max_length=None`."
        if plan.full_prompt in listed
        else "Pass a set with at least one pair.",
    )
