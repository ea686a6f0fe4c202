"""Preference pairs from a file, a folder or the hub, and which of them are held out.

Knows files and rows; `tether.data.datasets` knows what is in a row.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.parquet as pq
from datasets import Dataset, Json, load_dataset
from datasets import logging as hf_logging

from tether.data.datasets import REFERENCE_COLUMNS, PairDataset, as_dataset
from tether.data.rows import MARGIN_COLUMN, RESPONSES, ROW_COLUMN, UNREADABLE_COLUMN
from tether.errors import DataError, said
from tether.refusals import Refusal, of_option

# Text is read as it is: pandas would take `NA` or `None` for a missing value, and `4` for a number.
_CSV: Mapping[str, Any] = {
    "path": "csv",
    "converters": {"prompt": lambda text: text or None} | dict.fromkeys(RESPONSES, str),
    "keep_default_na": False,
    "na_values": {name: [""] for name in (MARGIN_COLUMN, *REFERENCE_COLUMNS)},
}
# What `datasets` calls the format of a file, and its arguments for it.
_FORMATS: Mapping[str, dict[str, Any]] = {
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".ndjson": {"path": "json"},
    ".csv": {**_CSV},
    ".tsv": {**_CSV, "sep": "\t"},
    ".parquet": {"path": "parquet"},
    ".arrow": {"path": "arrow"},
}
# How compressed files begin; `datasets` unpacks them.
_COMPRESSED: Mapping[str, bytes] = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"(\xb5/\xfd"}
_OPEN: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_WRITE = {
    "json": 'Write one row on each line of a .jsonl file, in UTF-8: {"prompt": ..., "chosen": ..., "rejected": ...}.',
    "csv": "Write a first line with the names of the columns, `prompt,chosen,rejected`, and one row on each line after "
    "it, in UTF-8; text with commas, quotation marks or line breaks goes in double quotes.",
    "parquet": 'Write the file again, for example by `dataset.to_parquet("pairs.parquet")`.',
    "arrow": "Write the file again, or as a .jsonl file with one row on each line.",
}


def is_file(name: str) -> bool:
    """Whether a source is one file, whose only split is `train`."""
    path = Path(name).expanduser()
    return not path.is_dir() and (_format_of(path) is not None or path.exists())


def _format_of(path: Path) -> dict[str, Any] | None:
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return _FORMATS.get(plain.suffix.lower())


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
    rows = _read(name, option, source | further, streaming=streaming)
    if isinstance(rows, Dataset):
        where = name if source["split"] == "train" else f"{source['split']} of {name}"
        rows = without_row_numbers(rows).add_column(ROW_COLUMN, [f"{index} of {where}" for index in range(len(rows))])
    rows.info.description = rows.info.description or name  # a store notes it
    return rows


def _read(name: str, option: str, source: Mapping[str, Any], *, streaming: bool) -> PairDataset:
    """The rows as `datasets` reads them; or, of one whole JSON file, as `_json_rows` does where that cannot."""
    path, split = Path(name).expanduser(), source["split"]
    is_whole = is_file(name) and source["path"] == "json" and split == "train" and path.suffix.lower() != ".zst"
    reads_rows = is_whole and not streaming
    if is_whole and not _has_lines(path):
        whole = as_dataset(_json_rows(path, option))
        return whole.to_iterable_dataset() if streaming and isinstance(whole, Dataset) else whole
    try:
        rows = as_dataset(_load(source, streaming))
    except Exception as error:  # whatever `datasets` and the libraries below it make of a file
        if reads_rows:
            return as_dataset(_json_rows(path, option))
        cause, where = _root_cause(error), "" if split == "train" else f", split `{split}`"
        first, whole = said(cause, 100), said(cause, 500)
        if "corresponds to no data" in first or "No columns to parse" in first:
            first = whole = "it has no rows"
        raise DataError(
            problem=f"Cannot read `{option}: {name}`{where}: {first}.",
            details=f"The message is: {whole}." if whole != first else "",
            instead=_what_to_name(name, split, error),
        ) from error
    twice = [column for column in ("prompt", *RESPONSES) if f"{column}.1" in (rows.column_names or ())]
    if source["path"] == "csv" and twice:  # pandas renames the second
        raise DataError(
            problem=f"Cannot read `{option}: {name}`: it has two columns `{twice[0]}`.",
            instead="Remove or rename one of the two.",
        )
    if not any(isinstance((rows.features or {}).get(column), Json) for column in ("prompt", *RESPONSES)):
        return rows
    if reads_rows:
        return as_dataset(_json_rows(path, option))
    raise DataError(
        problem=f"Cannot read `{option}: {name}`: text in some rows and messages in others can only be read from a "
        "whole .json or .jsonl file.",
        details="From a streamed file, a folder or the hub, a text such as `4` would come back as a number.",
        instead="Write all rows to one such file, or keep text and messages in two sets.",
    )


def _load(source: Mapping[str, Any], streaming: bool) -> PairDataset:
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)  # it logs the errors that it raises
    try:
        rows: PairDataset = load_dataset(**source, streaming=streaming)
        return rows
    except Exception:
        if source["path"] != "parquet" or streaming or source["split"] != "train":
            raise
        # Notes under the name of `datasets` that are another program's, or another version's, describe no column.
        return Dataset(pq.read_table(source["data_files"]).replace_schema_metadata(None))
    finally:
        hf_logging.set_verbosity(verbosity)


def _has_lines(path: Path) -> bool:
    """Whether a JSON file begins as a row does.

    `datasets` dies of one that begins with `null`. A list it reads as a whole, also to stream it: of two values of one
    name it keeps the last, and streamed texts beside messages get quotation marks.
    """
    try:
        with _opened(path) as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    except Exception:  # of a compressed file; each format has its own
        return False


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, _OPEN.get(path.suffix.lower(), open)(path, "rb"))


def _json_rows(path: Path, option: str) -> list[dict[str, Any]]:
    """The rows of a JSON file, one by one: one that cannot be read says why, and is dropped or refused with the others.

    Text in a column that has messages in other rows stays as it is; `datasets` parses it if it is valid JSON (`4`, or
    text in quotation marks).
    """
    try:
        with _opened(path) as file:
            content = file.read().removeprefix(b"\xef\xbb\xbf")
    except Exception as error:  # of a compressed file; each format has its own
        raise DataError(
            problem=f"Cannot read `{option}: {path}`: it is not a whole {path.suffix} file ({said(error)}).",
            instead="Copy or compress the file again.",
        ) from error
    if suffix := next((suffix for suffix, begins in _COMPRESSED.items() if content.startswith(begins)), None):
        raise DataError(
            problem=f"Cannot read `{option}: {path}`: it is compressed, and its name does not end in {suffix}.",
            instead=f"Rename it to {path.name}{suffix}.",
        )
    try:
        whole = _parsed(content)
        rows = [_object(row) for row in (whole if isinstance(whole, list) else [whole])]
    except (ValueError, RecursionError):
        rows = [_json_row(line) for line in content.split(b"\n") if line.strip()]
    if not rows:
        raise DataError(problem=f"Cannot read `{option}: {path}`: it has no rows.", instead=_WRITE["json"])
    return rows


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        return _object(_parsed(line))
    except UnicodeDecodeError:
        return {UNREADABLE_COLUMN: "is not text in UTF-8"}
    except json.JSONDecodeError as error:
        why = error.msg.removesuffix(" at").removesuffix(" starting")  # the position would differ in each row
        return {UNREADABLE_COLUMN: f"is not JSON: {why[0].lower()}{why[1:]}"}
    except (ValueError, RecursionError) as error:
        return {UNREADABLE_COLUMN: f"is not JSON: {said(error, 100)}"}


def _parsed(text: bytes) -> Any:
    return json.loads(text.decode(), object_pairs_hook=_noting_repeats)


def _noting_repeats(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(entries)
    if len(found) < len(entries):
        names = [name for name, _ in entries]
        twice = next(name for name in names if names.count(name) > 1)
        return {UNREADABLE_COLUMN: f"is not JSON: `{twice}` comes twice in an object"}
    return found


def _fault_in(value: Any) -> str:
    """Why an object inside a row cannot be read; empty if all can."""
    if isinstance(value, dict):
        return value.get(UNREADABLE_COLUMN) or _fault_in(list(value.values()))
    return next(filter(None, map(_fault_in, value)), "") if isinstance(value, list) else ""


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        fault = _fault_in(value)
        return {UNREADABLE_COLUMN: fault} if fault else value
    kinds = {type(None): "null", list: "a list", str: "text", bool: "a truth value"}
    found = kinds.get(type(value), "a number")
    return {UNREADABLE_COLUMN: f"is {found}: a row is an object with `prompt`, `chosen` and `rejected`"}


def _what_to_name(name: str, split: str | None, error: Exception) -> str:
    if split is not None and "split" in str(error):
        return (
            "Hold pairs out with `eval_fraction`, or name another file with `eval_data`: a file has one split, `train`."
            if is_file(name)
            else "Name one of its splits."
        )
    if is_file(name):
        return _WRITE[str((_format_of(Path(name)) or {"path": "json"})["path"])]
    return (
        "Name a file (.json, .jsonl, .csv, .parquet), a folder of such files, or a dataset on the hub as "
        "`owner/name` or `owner/name:split`."
    )


def without_row_numbers(rows: Dataset) -> Dataset:
    """The pairs without the numbers that `load_pairs` gives them for messages."""
    return rows.remove_columns([ROW_COLUMN]) if ROW_COLUMN in rows.column_names else rows


def hold_out(pairs: Dataset, fraction: float, seed: int, named: PairDataset | None = None) -> tuple[Dataset, Dataset]:
    """Splits rows into those to train on and those held out.

    Rows of one prompt stay together, since otherwise the held-out pairs would not be new. Which prompts are held out
    depends only on their text and the seed, not on the order of the rows.

    Args:
        pairs: The rows.
        fraction: The share of rows to hold out, in (0, 1), or their number, from 2.
        seed: Decides which are held out.
        named: The same rows with their columns under our names, if theirs differ.

    Raises:
        DataError: If nothing would be left to train on.
    """
    groups: dict[bytes, list[int]] = {}
    read = pairs if named is None else named
    texts = [read[column] for column in ("prompt", "chosen") if column in read.column_names]
    for index, named in enumerate(zip(*texts, range(len(pairs)), strict=True)):
        text = next(text for text in named if text is not None)  # without a prompt, the response begins with it
        groups.setdefault(_draw(text, seed), []).append(index)
    held_out: list[int] = []
    wanted = max(1, round(fraction * len(pairs) if fraction < 1 else fraction))
    for draw in sorted(groups):
        if len(held_out) >= wanted:
            break
        held_out += groups[draw]
    kept = sorted(set(range(len(pairs))) - set(held_out))
    if not kept:
        raise DataError(
            problem=f"Cannot hold out {fraction:g} of {len(pairs)} pairs: none would be left to train on.",
            details="Pairs of one prompt are held out together.",
            instead="Use more pairs, a smaller `eval_fraction`, or name others with `eval_data`.",
        )
    return pairs.select(kept), pairs.select(sorted(held_out))


def take_shard(pairs: PairDataset, number: int, total: int) -> Dataset:
    """Part `number` (from 1) of `total` of the rows: consecutive, so that rows of one prompt mostly stay together."""
    assert isinstance(pairs, Dataset), "`tether precompute` refuses streams"
    part: Dataset = pairs.select(range((number - 1) * len(pairs) // total, number * len(pairs) // total))
    return part


def _draw(text: Any, seed: int) -> bytes:
    return hashlib.blake2b(json.dumps([seed, text], sort_keys=True, default=str).encode(), digest_size=16).digest()


def absent_file(option: str, name: str) -> Iterator[Refusal]:
    """A name that can only be a file's, where there is none."""
    if is_file(name) and not Path(name).expanduser().is_file():
        where = f"Paths start at the current folder, {Path.cwd()}."
        instead = f"Name a file that ends in {', '.join(_FORMATS)}."
        yield of_option(option, name, "there is no such file", instead, details=where)


def _file_source(path: Path, option: str) -> dict[str, Any]:
    """The arguments of `load_dataset` for a file."""
    for absent in absent_file(option, str(path)):
        raise DataError(f"Cannot read `{option}: {path}`: {absent.why}.", absent.instead, absent.details)
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


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
