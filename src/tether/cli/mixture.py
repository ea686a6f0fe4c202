"""Several sets of pairs as one: the `datasets` of a recipe, as TRL's recipes write them.

Knows sources and their shares; reads each through `pairs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from datasets import concatenate_datasets

from tether.cli.pairs import is_file, load_pairs
from tether.cli.refusing_parser import refuse_unknown
from tether.data import PairDataset
from tether.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class Part:
    """One set of a mixture.

    Attributes:
        path: A file, a folder, a name on the hub, or the name of a format (`json`, with `data_files`).
        name: A configuration of a dataset that has several.
        data_dir: The folder of its data, as `datasets.load_dataset` takes it.
        data_files: Its files, likewise.
        split: Which split, or a slice of one.
        columns: The columns to keep; by default all.
        fraction: Its share of the mixture. Shares are relative to each other, and every part has one or none has: the
            first rows of each, as many as fit without taking a row twice.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    split: str | None = None
    columns: list[str] | None = None
    fraction: float | None = None


def read_parts(entries: Sequence[Any], prog: str) -> list[Part]:
    """The parts as a recipe writes them: each a path, or options with names.

    Raises:
        ConfigurationError: For an option that no part has, a part without a path, or shares that are no shares.
    """
    parts = []
    for number, entry in enumerate(entries):
        options = {"path": entry} if isinstance(entry, str) else entry
        where = f"Part {number} of `datasets`"
        if not isinstance(options, Mapping) or not isinstance(options.get("path"), str):
            raise ConfigurationError(
                asked=f"{where} is {entry!r}.",
                why="A part of a mixture is a set of pairs, which has a path.",
                instead="Write `- path: pairs.jsonl`, or `- path: owner/name` for a dataset on the hub.",
            )
        known = [option.name for option in fields(Part)]
        for name in options:
            if name not in known:
                refuse_unknown(f"`{name}: {options[name]}` in {where.lower()}", str(name), known, prog)
        parts.append(Part(**options))
    _check_fractions(parts)
    return parts


def load_mixture(parts: Sequence[Part], streaming: bool) -> PairDataset:
    """The rows of all parts, one part behind the other.

    Raises:
        DataError: If a part cannot be read, or has other types in its columns than another.
    """
    sets = [_load_part(part, number, streaming) for number, part in enumerate(parts)]
    if parts[0].fraction is not None:
        shares = [part.fraction or 0.0 for part in parts]
        sets = [rows.select(range(num)) for rows, num in zip(sets, rows_of_shares(sets, shares), strict=True)]
    try:
        mixture: PairDataset = concatenate_datasets(sets)
    except (ValueError, TypeError) as error:
        raise DataError(
            asked=f"`datasets` with the parts {', '.join(part.path for part in parts)}.",
            why=f"Their columns do not fit together: {' '.join(str(error).split())}",
            instead="Keep the columns that they share (`columns: [prompt, chosen, rejected]`), and write text beside "
            "text, messages beside messages.",
        ) from error
    return mixture


def rows_of_shares(sets: Sequence[Any], shares: Sequence[float]) -> list[int]:
    """How many rows of each set make the largest mixture of these shares that takes no row twice.

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
            asked=f"`{option}: {part.path}` together with `{next(iter(given))}`.",
            why="The path is a file, which is all there is to read.",
            instead="Keep the path, or write the name of a format as the path: `path: json`.",
        )
    rows = load_pairs(part.path, option, config=part.name, split=part.split, streaming=streaming, **given)
    return _with_columns(rows, part) if part.columns is not None else rows


def _with_columns(rows: PairDataset, part: Part) -> PairDataset:
    assert part.columns is not None
    absent = [name for name in part.columns if rows.column_names and name not in rows.column_names]
    if absent:
        raise DataError(
            asked=f"`columns: {part.columns}` of {part.path}.",
            why=f"It has no column `{absent[0]}`; it has {', '.join(rows.column_names)}.",
            instead="Name columns that it has.",
        )
    chosen: PairDataset = rows.select_columns(part.columns)
    return chosen


def _check_fractions(parts: Sequence[Part]) -> None:
    given = [part.fraction for part in parts if part.fraction is not None]
    if not given:
        return
    numbers = all(isinstance(share, int | float) and share >= 0 for share in given)
    if len(given) < len(parts) or not numbers or not sum(given) > 0:
        raise ConfigurationError(
            asked=f"`datasets` with the fractions {', '.join(str(part.fraction) for part in parts)}.",
            why="A fraction is a part's share of the mixture beside the others', so each has one, at least 0.",
            instead="Give every part a fraction, or none.",
        )


def check_streaming(parts: Sequence[Part]) -> None:
    """Refuses shares of streams.

    Raises:
        ConfigurationError: If a part has a fraction.
    """
    if any(part.fraction is not None for part in parts):
        raise ConfigurationError(
            asked="`fraction` of a part of `datasets`, with streaming.",
            why="A share of a stream is not known before its end.",
            instead="Leave the fractions out, or set `dataset_streaming: false`.",
        )
