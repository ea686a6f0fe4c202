"""Preference pairs from a file, a folder or the hub, and which of them are held out.

Knows files and rows; `tether.data.datasets` knows what is in a row.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Json, load_dataset
from datasets.exceptions import DatasetsError

from tether.data.datasets import PairDataset, as_dataset
from tether.errors import DataError

# What `datasets` calls the format of a file, and its arguments for it.
_FORMATS: Mapping[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".ndjson": {"path": "json"},
    ".csv": {"path": "csv"},
    ".tsv": {"path": "csv", "sep": "\t"},
    ".parquet": {"path": "parquet"},
    ".arrow": {"path": "arrow"},
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # `datasets` unpacks them


def is_file(name: str) -> bool:
    """Whether a source is one file, whose only split is `train`."""
    path = Path(name).expanduser()
    return not path.is_dir() and (_format_of(path) is not None or path.exists())


def _format_of(path: Path) -> dict[str, Any] | None:
    plain = path.with_suffix("") if path.suffix in _COMPRESSED else path
    return _FORMATS.get(plain.suffix)


def load_pairs(
    name: str,
    option: str,
    *,
    config: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    **further: Any,
) -> PairDataset:
    """The rows of a file, of a folder, or of a dataset on the hub.

    Args:
        name: The path of a json, jsonl, csv or parquet file; a folder, as `datasets.load_dataset` reads it; or
            `owner/name` or `owner/name:split` on the hub.
        option: The option that named it, for messages.
        config: A configuration of a dataset that has several.
        split: One of its splits, by default `train`; or a slice such as `train[:10%]`.
        streaming: Read the rows as they are needed.
        further: Other arguments of `load_dataset`.

    Raises:
        DataError: If there is no such file or dataset, or it cannot be read.
    """
    source = _file_source(Path(name).expanduser(), option) if is_file(name) else _named_source(name, option, split)
    if config is not None:
        source["name"] = config
    source["split"] = split or source.get("split", "train")
    try:
        rows: PairDataset = load_dataset(**source | further, streaming=streaming)
    except (DatasetsError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # of a damaged file
        cause = _root_cause(error).rstrip(".")
        shortened = textwrap.shorten(cause, 100, placeholder="...").rstrip(".")
        raise DataError(
            problem=f"Cannot read `{option}: {name}`{f', split `{split}`' if split else ''}: {shortened}.",
            details=f"The message is: {cause}." if cause != shortened else "",
            instead=_what_to_name(name, split, error),
        ) from error
    if any(isinstance((rows.features or {}).get(column), Json) for column in ("prompt", "chosen", "rejected")):
        is_whole = is_file(name) and Path(name).suffix not in _COMPRESSED and source["split"] == "train"
        rows = _read_mixed(name, option, is_whole=is_whole and not streaming)
    rows.info.description = rows.info.description or name  # a store notes it
    return rows


def _read_mixed(name: str, option: str, *, is_whole: bool) -> PairDataset:
    """The rows of a file that has text in some rows and messages in others.

    `datasets` parses text in such a column if it is valid JSON (`4`, or text in quotation marks).
    """
    if not is_whole:
        raise DataError(
            problem=f"Cannot read `{option}: {name}`: text in some rows and messages in others can only be read from a "
            "whole .json or .jsonl file.",
            details="From a compressed or streamed file, a folder or the hub, a text such as `4` would come back as a "
            "number.",
            instead="Write all rows to one such file, or keep text and messages in two sets.",
        )
    text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    return as_dataset(json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()])


def _what_to_name(name: str, split: str | None, error: Exception) -> str:
    if split is not None and "split" in str(error):
        return (
            "Hold pairs out with `eval_fraction`, or name another file with `eval_data`: a file has one split, `train`."
            if is_file(name)
            else "Name one of its splits."
        )
    if is_file(name):
        return (
            "Write one row on each line of a .jsonl file, and the same fields of the same types in all rows: "
            '{"prompt": ..., "chosen": ..., "rejected": ...}.'
        )
    return (
        "Name a file (.json, .jsonl, .csv, .parquet), a folder of such files, or a dataset on the hub as "
        "`owner/name` or `owner/name:split`."
    )


def hold_out(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Splits rows into those to train on and those held out.

    Rows of one prompt stay together, since otherwise the held-out pairs would not be new. Which prompts are held out
    depends only on their text and the seed, not on the order of the rows.

    Args:
        pairs: The rows.
        fraction: The share of rows to hold out, in (0, 1).
        seed: Decides which are held out.

    Raises:
        DataError: If nothing would be left to train on.
    """
    groups: dict[bytes, list[int]] = {}
    texts = [pairs[column] for column in ("prompt", "chosen") if column in pairs.column_names]
    for index, named in enumerate(zip(*texts, range(len(pairs)), strict=True)):
        text = next(text for text in named if text is not None)  # a row without a prompt begins with it
        groups.setdefault(_draw(text, seed), []).append(index)
    held_out: list[int] = []
    for draw in sorted(groups):
        if len(held_out) >= max(1, round(fraction * len(pairs))):
            break
        held_out += groups[draw]
    kept = sorted(set(range(len(pairs))) - set(held_out))
    if not kept:
        raise DataError(
            problem=f"Cannot hold out `eval_fraction={fraction}` of {len(pairs)} pairs: none would be left to "
            "train on.",
            details="Pairs of one prompt are held out together.",
            instead="Use more pairs, or name others with `eval_data`.",
        )
    return pairs.select(kept), pairs.select(sorted(held_out))


def take_shard(pairs: PairDataset, number: int, total: int) -> Dataset:
    """Part `number` (from 1) of `total` of the rows: consecutive, so that rows of one prompt mostly stay together."""
    assert isinstance(pairs, Dataset), "`tether precompute` refuses streams"
    part: Dataset = pairs.select(range((number - 1) * len(pairs) // total, number * len(pairs) // total))
    return part


def _draw(text: Any, seed: int) -> bytes:
    return hashlib.blake2b(json.dumps([seed, text], sort_keys=True).encode(), digest_size=16).digest()


def _file_source(path: Path, option: str) -> dict[str, Any]:
    """The arguments of `load_dataset` for a file."""
    if not path.is_file():
        raise DataError(
            problem=f"Cannot read `{option}: {path}`: there is no such file.",
            details=f"Paths start at the current folder, {Path.cwd()}.",
            instead=f"Name a file that ends in {', '.join(_FORMATS)}.",
        )
    known = _format_of(path)
    if known is None:
        raise DataError(
            problem=f"Cannot read `{option}: {path}`: its name does not end in a known format.",
            instead=f"Name a file that ends in {', '.join(_FORMATS)}, or one of these with {', '.join(_COMPRESSED)}.",
        )
    return {**known, "data_files": str(path)}


def _named_source(name: str, option: str, split: str | None) -> dict[str, Any]:
    """The arguments of `load_dataset` for a folder, or for a name on the hub with an optional split."""
    if Path(name).expanduser().is_dir():
        return {"path": str(Path(name).expanduser())}
    repository, _, named = name.partition(":")
    if named and split:
        raise DataError(
            problem=f"Cannot use `{option}: {name}` together with the split `{split}`: both name a split.",
            instead=f"Write `{option}: {repository}`.",
        )
    return {"path": repository} | ({"split": named} if named else {})


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(" ".join(str(error).split()), 500)  # some list the schema of every file
