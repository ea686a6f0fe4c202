"""The columns `ref_chosen_logps` and `ref_rejected_logps`: rows that bring them, and rows that are given them.

Each holds the sum, in nats, of the reference's log-probs of that response's tokens as they are fed. They are the
columns that TRL writes and reads. `ref_checksum` proves that they belong to what is fed.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from datasets import Dataset

from tether.data.collators import Collator
from tether.data.columns import WithColumns
from tether.data.datasets import (
    REFERENCE_CHECKSUM,
    REFERENCE_COLUMNS,
    PairDataset,
    batch_of,
    column_names,
    reference_checksum,
)
from tether.data.rows import check_reference_sum, is_log_prob
from tether.data.tokenizing import name_of_row
from tether.errors import DataError
from tether.reference import Reference
from tether.trainer.batches import token_columns
from tether.trainer.sets import refusing_damaged_text
from tether.types import scored_tokens

_ROWS_AT_ONCE = 32


def digest_given(sets: Mapping[str, PairDataset], collator: Collator) -> str:
    """A digest of the reference log-probs that the rows bring.

    Args:
        sets: The tokenized sets by name, the training set first.
        collator: Truncates as the run does.

    Raises:
        DataError: If only some sets, rows or columns have them, a number is not that of a log-prob, or a row's checksum
            is not of its sums and tokens; names it.
    """
    columns = {name: _given_columns(dataset) for name, dataset in sets.items()}
    for name, found in columns.items():
        if len(found) < len(REFERENCE_COLUMNS):
            raise DataError(
                problem=f"The {name} set has {f'only `{found[0]}`' if found else 'no reference columns'}: if one set "
                "has reference columns, every set needs both `ref_chosen_logps` and `ref_rejected_logps`.",
                details="The rewards of two sets are comparable only against the same reference.",
                instead="Give every set both columns, or remove them everywhere (`dataset.remove_columns`).",
            )
    digest = blake2b(digest_size=16)
    for name, dataset in sets.items():
        if isinstance(dataset, Dataset):
            _read_numbers(name, dataset, digest)
            if REFERENCE_CHECKSUM in dataset.column_names:
                _check_sums(name, dataset, collator)
    return digest.hexdigest()


def with_reference_columns(dataset: Dataset, reference: Reference, collator: Collator) -> Dataset:
    """A tokenized set with the reference's sums as columns, as TRL reads them, and a checksum of each row's; replaces
    those it may have.

    Args:
        dataset: A tokenized set (`trainer.train_dataset`).
        reference: Whose log-probs to write.
        collator: Truncates as the run does.
    """
    sums: tuple[list[float], list[float]] = ([], [])
    checksums: list[str] = []
    dataset = dataset.remove_columns([*_given_columns(dataset), *({REFERENCE_CHECKSUM} & {*dataset.column_names})])
    rows = _fed(dataset, collator)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = batch_of(collator(rows.__getitems__(list(range(start, min(start + _ROWS_AT_ONCE, len(rows)))))))
        values = scored_tokens(batch, reference.log_probs(batch)).sums().tolist()
        responses = [
            response._replace(reference_sum=value) for response, value in zip(batch.responses(), values, strict=True)
        ]
        for chosen, rejected in zip(batch.chosen, batch.rejected, strict=True):
            checksums.append(reference_checksum(responses[chosen], responses[rejected]))
        for side, places in zip(sums, (batch.chosen, batch.rejected), strict=True):
            side += [values[place] for place in places]
    for name, side in zip(REFERENCE_COLUMNS, sums, strict=True):
        dataset = dataset.add_column(name, np.array(side, dtype=np.float32))
    return dataset.add_column(REFERENCE_CHECKSUM, checksums)


def _fed(dataset: Dataset, collator: Collator) -> Any:
    return token_columns(dataset, collator.columns.names if isinstance(collator, WithColumns) else ())


def _given_columns(dataset: PairDataset) -> list[str]:
    return [name for name in REFERENCE_COLUMNS if name in column_names(dataset)]


def _read_numbers(name: str, dataset: Dataset, digest: Any) -> None:
    """Adds a set's numbers to a digest, and refuses what is no number."""
    for column in REFERENCE_COLUMNS:
        values = list(dataset.with_format(None)[column])
        for row, value in enumerate(values):
            if not is_log_prob(value):
                check_reference_sum(value, column, name_of_row(dataset, row, name))
        numbers = np.array(values, dtype=np.float64)
        digest.update(f"{name}:{column}".encode() + numbers.tobytes())


def _check_sums(name: str, dataset: Dataset, collator: Collator) -> None:
    """Collates each row, which compares its checksum, so that a wrong one is found before training and is named."""
    rows = _fed(dataset, collator)
    for number in range(len(rows)):
        try:
            with refusing_damaged_text(name):
                collator(rows.__getitems__([number]))
        except DataError as error:
            problem = error.problem.replace("A row of a batch", name_of_row(dataset, number, name), 1)
            raise DataError(problem, error.instead, error.details) from None
