"""The columns `ref_chosen_logps` and `ref_rejected_logps`: rows that bring them, and rows that are given them.

Each holds the sum, in nats, of the reference's log-probs of that response's tokens as they are fed. They are the
columns that TRL writes and reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from datasets import Dataset

from tether.data.collators import Collator
from tether.data.columns import WithColumns
from tether.data.datasets import REFERENCE_COLUMNS, PairDataset, batch_columns, batch_of, column_names
from tether.data.rows import check_reference_sum, has_image_column
from tether.errors import DataError
from tether.reference import Reference
from tether.types import scored_tokens

_ROWS_AT_ONCE = 32


def digest_given(sets: Mapping[str, PairDataset]) -> str:
    """A digest of the reference log-probs that the rows bring.

    Args:
        sets: The tokenized sets by name, the training set first.

    Raises:
        DataError: If only some sets, rows or columns have them, or a number is not finite; names it.
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
    return digest.hexdigest()


def with_reference_columns(dataset: Dataset, reference: Reference, collator: Collator) -> Dataset:
    """A tokenized set with the reference's sums as columns, as TRL reads them; replaces those it may have.

    Args:
        dataset: A tokenized set (`trainer.train_dataset`).
        reference: Whose log-probs to write.
        collator: Truncates as the run does.
    """
    sums: tuple[list[float], list[float]] = ([], [])
    further = collator.columns.names if isinstance(collator, WithColumns) else ()
    needed = batch_columns(with_images=has_image_column(dataset.column_names), further=further)
    rows: Any = dataset.select_columns(
        [name for name in needed if name in dataset.column_names and name not in REFERENCE_COLUMNS]
    )
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = batch_of(collator(rows.__getitems__(list(range(start, min(start + _ROWS_AT_ONCE, len(rows)))))))
        for side, values in zip(
            sums, batch.of_responses(scored_tokens(batch, reference.log_probs(batch)).sums()), strict=True
        ):
            side += values.tolist()
    dataset = dataset.remove_columns(_given_columns(dataset))
    for name, side in zip(REFERENCE_COLUMNS, sums, strict=True):
        dataset = dataset.add_column(name, np.array(side, dtype=np.float32))
    return dataset


def _given_columns(dataset: PairDataset) -> list[str]:
    return [name for name in REFERENCE_COLUMNS if name in column_names(dataset)]


def _read_numbers(name: str, dataset: Dataset, digest: Any) -> None:
    """Adds a set's numbers to a digest, and refuses what is no number."""
    for column in REFERENCE_COLUMNS:
        values = list(dataset.with_format(None)[column])
        for row, value in enumerate(values):
            check_reference_sum(value, column, f"Row {row} of the {name} set")
        numbers = np.array(values, dtype=np.float64)
        digest.update(f"{name}:{column}".encode() + numbers.tobytes())
