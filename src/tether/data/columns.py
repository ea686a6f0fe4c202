"""Columns of the rows by the user's word: those under other names than ours, and further ones that a loss reads.

The latter have a number for each pair: checked as a set is read, and put in batches.

Knows rows and batches; knows no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from tether.data.collators import Collator
from tether.data.datasets import PairDataset, batch_of, column_names, truncation_of
from tether.data.names import SYSTEM_COLUMN
from tether.data.rounds import own_rows
from tether.data.rows import ROW_COLUMN, TOKEN_COLUMNS
from tether.data.tokenizing import arrow_tables
from tether.data.truncation import Truncation
from tether.errors import DataError


def named_as_ours(dataset: PairDataset, columns: Mapping[str, Any] | str | None, name: str) -> PairDataset:
    """The set with its columns under our names.

    Args:
        dataset: The set; one that is tokenized already is returned as it is.
        columns: Ours: theirs; several are texts, which are joined by a line break.
        name: The set's name, for messages.

    Raises:
        DataError: If it has no such column.
    """
    if not isinstance(columns, Mapping) or not columns:
        return dataset
    has = column_names(dataset)
    if set(TOKEN_COLUMNS) <= set(has):
        return dataset
    for theirs in (one for value in columns.values() for one in ([value] if isinstance(value, str) else value)):
        if theirs not in has:
            raise DataError(
                problem=f"Cannot use the {name} set: it has no column `{theirs}`, which `columns` names.",
                details=f"It has {', '.join(one for one in has if one != ROW_COLUMN)}.",
                instead="Write `columns={ours: theirs}`, with columns that the set has.",
            )
    internal = {SYSTEM_COLUMN if ours == "system" else ours: theirs for ours, theirs in columns.items()}
    joined = {ours: theirs for ours, theirs in internal.items() if not isinstance(theirs, str)}
    renamed = {theirs: ours for ours, theirs in internal.items() if isinstance(theirs, str)}
    in_the_way = [ours for ours in internal if ours in has and ours not in renamed]
    dataset = dataset.map(_joined, fn_kwargs={"columns": joined}) if joined else dataset
    in_the_way = [ours for ours in in_the_way if ours not in joined]
    dataset = dataset.remove_columns(in_the_way) if in_the_way else dataset
    return dataset.rename_columns(renamed) if renamed else dataset


def _joined(row: Mapping[str, Any], columns: Mapping[str, list[str]]) -> dict[str, str]:
    """Texts one below the other; an empty one is left out."""
    return {ours: "\n".join(row[one] for one in theirs if row[one]) for ours, theirs in columns.items()}


@dataclass(frozen=True)
class PairColumns:
    """Columns with a number for each pair.

    Attributes:
        names: The columns.
        positive: Those of them that must be positive.
    """

    names: tuple[str, ...] = ()
    positive: frozenset[str] = frozenset()

    def check(self, dataset: PairDataset, name: str) -> None:
        """Refuses a set that lacks a column, or has a row without a number in one; a stream's are read later.

        Raises:
            DataError: Names the column, and the row.
        """
        has = column_names(dataset)
        for column in self.names:
            if column not in has:
                raise DataError(
                    problem=f"Cannot use the {name} set: it has no column `{column}`, which the loss reads.",
                    details=f"It has {', '.join(one for one in has if one not in (ROW_COLUMN, *TOKEN_COLUMNS))}.",
                    instead=f"Add the column to every set, with a number in each row, or leave `{column}` out of the "
                    "options `loss_columns` and `beta_column`.",
                )
            if isinstance(dataset, Dataset):
                self._check_numbers(column, dataset, name)

    def _check_numbers(self, column: str, dataset: Dataset, name: str) -> None:
        start = 0
        for table in arrow_tables(dataset, (column,)):
            kind, values = table.schema.field(column).type, table[column]
            are_numbers = pa.types.is_floating(kind) or pa.types.is_integer(kind)
            numbers = values.to_numpy().astype(np.float64) if are_numbers else np.full(len(values), np.nan)
            bad = ~np.isfinite(numbers) | (numbers <= 0 if column in self.positive else False)
            if bad.any():
                row = int(bad.argmax())
                self._refuse(column, values[row].as_py(), f"Row {start + row} of the {name} set")
            start += len(values)

    def of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The numbers of some rows (fp32), by column."""
        return {column: torch.tensor([self._number(column, row) for row in rows]) for column in self.names}

    def _number(self, column: str, row: Mapping[str, Any]) -> float:
        try:
            value = float(row[column])
        except (KeyError, TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value) or (column in self.positive and value <= 0):
            self._refuse(column, row.get(column), "A row of a batch")
        return value

    def _refuse(self, column: str, value: Any, where: str) -> None:
        kind = "positive number" if column in self.positive else "finite number"
        raise DataError(
            problem=f"{where} has `{column}={value!r}`: the loss reads it, so it must be a {kind}.",
            instead="Give each row such a number, or drop the row.",
        )


@dataclass
class WithColumns:
    """A collator whose batches also have the columns, in `PairBatch.columns`."""

    collator: Collator
    columns: PairColumns

    @property
    def truncation(self) -> Truncation | None:
        return truncation_of(self.collator)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = self.collator(rows)
        own, _ = own_rows(rows)
        inputs["batch"] = replace(batch_of(inputs), columns=self.columns.of(own))
        return inputs
