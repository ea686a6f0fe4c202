"""Preference pairs from a file or the hub, and which of them are held out.

Knows files and rows; what is in a row is `tether.data`'s business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from tether.errors import DataError

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_pairs(name: str, option: str) -> Dataset:
    """The rows of a file, or of a dataset on the hub.

    Args:
        name: The path of a json, jsonl, csv or parquet file; or `owner/name` or `owner/name:split` on the hub
            (split `train` unless named).
        option: The option that says so, for messages.

    Raises:
        DataError: If there is no such file or dataset, or it cannot be read.
    """
    path = Path(name).expanduser()
    is_file = path.suffix in _FORMATS or path.exists()
    try:
        return _load_file(path, option) if is_file else _load_from_hub(name)
    except DataError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            asked=f"`{option}: {name}`.",
            why=f"It cannot be read: {_root_cause(error)}",
            instead="Every line of a .jsonl file is one row, all rows with the same fields of the same types: "
            '{"prompt": ..., "chosen": ..., "rejected": ...}.'
            if is_file
            else "Name a file (.json, .jsonl, .csv, .parquet), or a dataset on the hub as `owner/name` or "
            "`owner/name:split`.",
        ) from error


def hold_out(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Splits rows into those to train on and those held out.

    Rows of one prompt stay on one side, or the held-out pairs would not be new. Which prompts are held out depends
    on their text and the seed alone, not on the order of the rows.

    Args:
        pairs: The rows.
        fraction: The share of rows to hold out, in (0, 1).
        seed: Another seed holds out others.

    Raises:
        DataError: If nothing would be left to train on.
    """
    groups: dict[bytes, list[int]] = {}
    column = "prompt" if "prompt" in pairs.column_names else "chosen"
    for index, text in enumerate(pairs[column] if column in pairs.column_names else range(len(pairs))):
        groups.setdefault(_draw(text, seed), []).append(index)
    held_out: list[int] = []
    for draw in sorted(groups):
        if len(held_out) >= max(1, round(fraction * len(pairs))):
            break
        held_out += groups[draw]
    kept = sorted(set(range(len(pairs))) - set(held_out))
    if not kept:
        raise DataError(
            asked=f"`eval_fraction={fraction}` of {len(pairs)} pairs.",
            why="Pairs of one prompt are held out together, and none would be left to train on.",
            instead="Use more pairs, or name others with `eval_data`.",
        )
    return pairs.select(kept), pairs.select(sorted(held_out))


def take_shard(pairs: Dataset, number: int, total: int) -> Dataset:
    """Part `number` (from 1) of `total` of the rows: neighbours, so that rows of one prompt mostly stay together."""
    part: Dataset = pairs.select(range((number - 1) * len(pairs) // total, number * len(pairs) // total))
    return part


def _draw(text: Any, seed: int) -> bytes:
    return hashlib.blake2b(json.dumps([seed, text], sort_keys=True).encode(), digest_size=16).digest()


def _load_file(path: Path, option: str) -> Dataset:
    if not path.is_file():
        raise DataError(
            asked=f"`{option}: {path}`.",
            why=f"{'It is a folder' if path.is_dir() else 'There is no such file'}; paths start at the current "
            f"folder, {Path.cwd()}.",
            instead=f"Name a file: {', '.join(_FORMATS)}.",
        )
    if path.suffix not in _FORMATS:
        raise DataError(
            asked=f"`{option}: {path}`.",
            why=f"What is in a `{path.suffix}` file is not known.",
            instead=f"Name a file that ends in {', '.join(_FORMATS)}.",
        )
    rows: Dataset = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    return rows


def _load_from_hub(name: str) -> Dataset:
    repository, _, split = name.partition(":")
    rows: Dataset | Mapping[str, Any] = load_dataset(repository, split=split or "train")
    assert isinstance(rows, Dataset)
    return rows


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
