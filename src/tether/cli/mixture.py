"""Combines several sets of pairs: the `datasets` of a recipe, as in TRL's recipes.

Knows sources and their shares; reads each through `pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import concatenate_datasets

from tether.cli.options import Part
from tether.cli.pairs import is_file, load_pairs
from tether.data.datasets import PairDataset
from tether.data.rows import ROW_COLUMN
from tether.errors import DataError, said


def load_mixture(parts: Sequence[Part], streaming: bool) -> PairDataset:
    """The rows of all parts, concatenated.

    Raises:
        DataError: If a part cannot be read, or its columns have other types than another's.
    """
    sets = [_load_part(part, number, streaming) for number, part in enumerate(parts)]
    if parts[0].fraction is not None:
        shares = [part.fraction or 0.0 for part in parts]
        sets = [rows.select(range(num)) for rows, num in zip(sets, rows_of_shares(sets, shares), strict=True)]
    try:
        mixture: PairDataset = concatenate_datasets(sets)
    except (ValueError, TypeError) as error:
        raise DataError(
            problem=f"Cannot join `datasets` {', '.join(part.path for part in parts)}: their columns differ.",
            details=f"{said(error)}.",
            instead="Keep the columns that they share (`columns: [prompt, chosen, rejected]`), and use either text or "
            "messages in all of them.",
        ) from error
    return mixture


def rows_of_shares(sets: Sequence[Any], shares: Sequence[float]) -> list[int]:
    """Number of rows from each set in the largest mixture of these shares that repeats no row.

    Example:
        >>> rows_of_shares([range(100), range(10)], [3, 1])
        [30, 10]
    """
    weights = [share / sum(shares) for share in shares]
    total = min(len(rows) / weight for rows, weight in zip(sets, weights, strict=True) if weight > 0)
    return [round(weight * total) for weight in weights]


def _load_part(part: Part, number: int, streaming: bool) -> Any:
    further = {"data_dir": part.data_dir, "data_files": part.data_files}
    given = {name: value for name, value in further.items() if value is not None}
    option = f"datasets[{number}].path"
    if given and is_file(part.path):
        raise DataError(
            problem=f"Cannot use `{option}: {part.path}` together with `{next(iter(given))}`: the path is a file.",
            details="`data_dir` and `data_files` choose files of a folder, a dataset on the hub, or a format.",
            instead="Keep only the path, or write the name of a format as the path: `path: json`.",
        )
    rows = load_pairs(part.path, option, config=part.name, split=part.split, streaming=streaming, **given)
    return _with_columns(rows, part) if part.columns is not None else rows


def _with_columns(rows: PairDataset, part: Part) -> PairDataset:
    assert part.columns is not None
    absent = [name for name in part.columns if rows.column_names and name not in rows.column_names]
    if absent:
        raise DataError(
            problem=f"Cannot keep `columns: {part.columns}` of {part.path}: it has no column `{absent[0]}`.",
            details=f"It has {', '.join(name for name in rows.column_names if name != ROW_COLUMN)}.",
            instead="Name some of these.",
        )
    ours = [ROW_COLUMN] if ROW_COLUMN in (rows.column_names or ()) else []
    chosen: PairDataset = rows.select_columns([*part.columns, *ours])
    return chosen
