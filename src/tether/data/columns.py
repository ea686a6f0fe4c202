"""Further columns of the rows that a loss reads, a number for each pair: checked as a set is read, and put in batches.

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
from tether.data.rounds import own_rows
from tether.data.tokenizing import arrow_tables
from tether.data.truncation import Truncation
from tether.errors import DataError


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
                    details=f"It has {', '.join(has)}.",
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
