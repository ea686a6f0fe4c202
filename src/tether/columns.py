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

from tether.config import DPOConfig
from tether.data import REFERENCE_COLUMNS, PairCollator, PairDataset, batch_columns, batch_of
from tether.errors import ConfigurationError, DataError
from tether.losses import LOSSES
from tether.reference import Reference
from tether.rows import check_reference_sum, has_image_column

_ROWS_AT_ONCE = 32


def find_given(sets: Mapping[str, PairDataset], args: DPOConfig, *, has_ref_model: bool) -> str | None:
    """Whether the rows bring their own reference log-probs: a digest of them, or None if they do not.

    Args:
        sets: The tokenized sets by name, the training set first.
        args: The run's options.
        has_ref_model: Whether a reference model is named.

    Raises:
        ConfigurationError: If another reference is asked for besides, or a loss that needs more than sums.
        DataError: If only some sets, rows or columns have them, or a number is not finite; names it.
    """
    columns = {name: _given_columns(dataset) for name, dataset in sets.items()}
    if not any(columns.values()):
        return None
    for name, found in columns.items():
        if len(found) < len(REFERENCE_COLUMNS):
            raise DataError(
                problem=f"The {name} set has {' and '.join(f'`{c}`' for c in found) or 'no reference columns'}, and "
                f"another set has {' and '.join(f'`{c}`' for c in next(filter(None, columns.values())))}.",
                details="Rewards of sets are only comparable against one reference, and one column alone is half of it.",
                instead="Give every set both columns, or take them out everywhere (`dataset.remove_columns`).",
            )
    _refuse_two_references(args, has_ref_model)
    digest = blake2b(digest_size=16)
    for name, dataset in sets.items():
        if isinstance(dataset, Dataset):
            _read_numbers(name, dataset, digest)
    return digest.hexdigest()


def with_reference_columns(dataset: Dataset, reference: Reference, collator: PairCollator) -> Dataset:
    """A tokenized set with the reference's sums as columns, as TRL reads them; replaces those it may have.

    Args:
        dataset: A tokenized set (`trainer.train_dataset`).
        reference: Whose log-probs to write.
        collator: Truncates as the run does.
    """
    sums: tuple[list[float], list[float]] = ([], [])
    needed = batch_columns(with_images=has_image_column(dataset.column_names))
    rows: Any = dataset.select_columns(
        [name for name in needed if name in dataset.column_names and name not in REFERENCE_COLUMNS]
    )
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = batch_of(collator(rows.__getitems__(list(range(start, min(start + _ROWS_AT_ONCE, len(rows)))))))
        for side, values in zip(sums, batch.of_responses(reference.log_probs(batch).sums()), strict=True):
            side += values.tolist()
    dataset = dataset.remove_columns(_given_columns(dataset))
    for name, side in zip(REFERENCE_COLUMNS, sums, strict=True):
        dataset = dataset.add_column(name, np.array(side, dtype=np.float32))
    return dataset


def _given_columns(dataset: PairDataset) -> list[str]:
    names = dataset.column_names
    if names is None:  # a stream that does not say: its first row does
        try:
            names = next(iter(dataset), {})
        except DataError:  # of its first row; said when training reads it, as for any other row
            names = ()
    return [name for name in REFERENCE_COLUMNS if name in names]


def _refuse_two_references(args: DPOConfig, has_ref_model: bool) -> None:
    others = {
        "ref_model=...": has_ref_model,
        "precompute_ref_log_probs=True": args.precompute_ref_log_probs,
        "sync_ref_model=True": args.sync_ref_model,
        "reference_free=True": args.reference_free,
        f"ref_dtype={args.ref_dtype!r}": args.ref_dtype is not None,
    }
    for option, is_set in others.items():
        if is_set:
            raise ConfigurationError(
                problem=f"`{option}`, and rows that bring `ref_chosen_logps` and `ref_rejected_logps`.",
                details="These are two answers to what the reference is: the option's, and the one that the rows give.",
                instead="Leave the option out to use the columns, or take them out "
                "(`dataset.remove_columns(['ref_chosen_logps', 'ref_rejected_logps'])`) to use the option.",
            )
    readers = {f"loss_type={name!r}": LOSSES[name].needs_per_token for name in args.loss_type}
    readers |= {f"ld_alpha={args.ld_alpha!r}": args.loss_options.needs_per_token}
    for option, needs_tokens in readers.items():
        if needs_tokens:
            raise ConfigurationError(
                problem=f"`{option}`, and rows that bring `ref_chosen_logps` and `ref_rejected_logps`.",
                details="It weighs single tokens, and the columns are sums over a response: what the reference says of "
                "each token is not known.",
                instead=f"Leave `{option.split('=')[0]}` out, or take the columns out (`dataset.remove_columns`) and "
                "set `precompute_ref_log_probs=True`: its store keeps every token.",
            )


def _read_numbers(name: str, dataset: Dataset, digest: Any) -> None:
    """Adds a set's numbers to a digest, and refuses what is no number."""
    for column in REFERENCE_COLUMNS:
        values = list(dataset.with_format(None)[column])
        for row, value in enumerate(values):
            check_reference_sum(value, column, f"Row {row} of the {name} set")
        numbers = np.array(values, dtype=np.float64)
        digest.update(f"{name}:{column}".encode() + numbers.tobytes())
