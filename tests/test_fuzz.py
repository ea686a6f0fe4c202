"""Odd rows, files, recipes and Python values: each is used, or refused by name; nothing ends raw.

Every case is drawn from a seed. `make test` draws a few, `make test-all` many.
"""

from __future__ import annotations

import gzip
import json
import logging
import random
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.tiny import tiny_pairs, tiny_tokenizer
from tether import DPOConfig
from tether.cli.options import ALIASES, LAUNCHER, OPTIONS
from tether.cli.pairs import hold_out, load_pairs
from tether.cli.recipe import read_recipe
from tether.data.datasets import as_dataset, tokenize_pairs
from tether.errors import ConfigurationError, DataError, TetherError

Row = dict[str, Any]
LONGEST = 2500  # characters of a message


def seeds(few: int, many: int) -> Any:
    """A number of cases from one seed for `make test`, and more from another."""
    return pytest.mark.parametrize(("seed", "count"), [(0, few), pytest.param(1, many, marks=pytest.mark.slow)])


def check_told(error: TetherError, *names: str) -> None:
    text = str(error)
    assert len(text) < LONGEST and error.instead, text[:300]
    assert any(name in text for name in names), text


# ------------------------------------------------------------------------------------------------------ rows


def said(content: Any, role: Any = "assistant") -> Row:
    return {"role": role, "content": content}


ODD: list[Any] = [
    None, "", " ", "\0", "a\ud800", "é" * 2000, 0, -1, 10**400, 1.5, float("nan"), float("inf"), True, b"x", {1},
    object(), [], [None], [1], ["a"], [[]], {}, {"role": "user"}, [said("a")], [said(None)], [said("")], [said(5)],
    [said(["a"])], [said([{"type": "text", "text": "a"}])], [said("a", None)], [said("a", 5)], [said("a\udfff")],
    [{"content": "a"}], [said("a"), None], [said("a") | {"tool_calls": 5}], np.float32(1), np.array([1, 2]), 1j,
    {"a": {"b": [{}]}},
]  # fmt: skip
COLUMNS = (
    "prompt", "chosen", "rejected", "margin", "tools", "chat_template_kwargs", "prompt_ids", "chosen_ids",
    "rejected_ids", "ref_chosen_logps", "source",
)  # fmt: skip


def odd_rows(draw: random.Random) -> list[Row]:
    rows: list[Row] = tiny_pairs(draw.randint(1, 5), seed=draw.randint(0, 9), conversational=draw.random() < 0.4)
    for _ in range(draw.randint(1, 3)):
        row, column = draw.choice(rows), draw.choice(COLUMNS)
        if draw.random() < 0.15:
            row.pop(column, None)
        else:
            row[column] = draw.choice(ODD)
    return rows


@seeds(120, 1200)
def test_odd_rows_are_used_or_named(seed: int, count: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    for _ in range(count):
        rows = odd_rows(draw)
        dataset = as_dataset(rows)
        try:
            tokenize_pairs(dataset, tokenizer, max_length=64)
        except DataError as error:
            check_told(error, "Row ", "has no column", "has no usable row")
        try:
            kept = tokenize_pairs(dataset, tokenizer, max_length=64, bad_rows="drop")
            assert 0 < len(kept) <= len(rows)  # type: ignore[arg-type]
        except DataError as error:
            check_told(error, "has no column", "has no usable row")


# ----------------------------------------------------------------------------------------------------- files


def jsonl(draw: random.Random) -> bytes:
    rows = [row for row in odd_rows(draw) if not any(map(is_no_json, row.values()))] or tiny_pairs(2)
    lines = [json.dumps(row).encode() for row in rows]
    return draw.choice([b"\n", b"\r\n", b"\n\n"]).join(lines) if draw.random() < 0.7 else b"[" + b",".join(lines) + b"]"


def is_no_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return True
    return False


def csv(draw: random.Random) -> bytes:
    mark = draw.choice(",,,;\t")
    cells = [
        ["prompt", "chosen", "rejected"],
        *([f"a{n}", draw.choice(["b", "", "NA", '"', "é", "4"]), "c"] for n in range(3)),
    ]
    return "\n".join(mark.join(row) for row in cells).encode(draw.choice(["utf-8", "utf-8", "latin-1", "utf-16"]))


def parquet(draw: random.Random) -> bytes:
    columns = {
        name: draw.choice([["a", "b"], [1, 2], [b"x", None], [[], []]]) for name in ("prompt", "chosen", "rejected")
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": draw.choice(["{}", "5", "{", '{"info": 1}'])})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def damaged(content: bytes, draw: random.Random) -> bytes:
    place, other = draw.randint(0, len(content)), draw.randint(0, len(content))
    kinds = [
        content,
        content[:place],
        content[:place] + bytes([draw.randint(0, 255)]) + content[place + 1 :],
        content[:place] + content[other:],
        draw.choice([b"", b"null", b"5", b"[]", b"\0" * 9, b"\xef\xbb\xbf" + content, b'"a"\n' + content]),
    ]
    return draw.choice(kinds)


@seeds(60, 600)
def test_odd_files_are_read_or_named(seed: int, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    kinds = {".jsonl": jsonl, ".json": jsonl, ".csv": csv, ".tsv": csv, ".parquet": parquet}
    for number in range(count):
        suffix = draw.choice([*kinds])
        content, name = damaged(kinds[suffix](draw), draw), f"{number}{suffix}"
        if suffix != ".parquet" and draw.random() < 0.2:
            content, name = damaged(gzip.compress(content, mtime=0), draw), f"{name}.gz"
        (tmp_path / name).write_bytes(content)
        try:
            pairs: Any = load_pairs(str(tmp_path / name), "train_data")
            for part in hold_out(pairs, 0.3, seed=0) if len(pairs) > 1 and draw.random() < 0.5 else (pairs,):
                tokenize_pairs(part, tokenizer, max_length=64, bad_rows=draw.choice(["raise", "drop"]))  # type: ignore[arg-type]
        except DataError as error:
            check_told(error, name, "has no column", "has no usable row", "eval_fraction")


# ---------------------------------------------------------------------------------------- recipes and Python values

WORDS = [
    "", "0", "-1", "2", "1e-5", "x", "true", "no", "null", "[]", "{}", "[1, 2]", "{a: 1}", ".nan", ".inf",
    "1" + "0" * 400, "'é'", '"\\0"', "- x", "|\n  text", "~/x", "1_000", "0x1F", "2026-01-01",
    "!!python/object:os.system x", "*a", "{", "%",
]  # fmt: skip
VALUES: list[Any] = [
    None, "", "x", "2", "1e-5", "true", -1, 0, 1, 2, 3.5, -0.5, float("nan"), float("inf"), 10**400, True, False, [],
    ["x"], [1], [None], {}, {"a": 1}, object(), b"x", Path("/nowhere"), (), ("x",), {1}, np.float32(0.5), np.int64(-1),
    "é" * 3000, len, int,
]  # fmt: skip


@seeds(200, 2500)
def test_odd_recipes_are_read_or_named(
    seed: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)
    names = [name for name in (*OPTIONS, *ALIASES) if name not in LAUNCHER]
    for _ in range(count):
        picked = {name: draw.choice(WORDS) for name in draw.sample(names, draw.choice([1, 1, 2, 3]))}
        text = "".join(
            f"{name}: {value}\n" for name, value in ({"model": "m", "train_data": "p.jsonl"} | picked).items()
        )
        is_damaged = draw.random() < 0.1
        if is_damaged:
            place = draw.randint(0, len(text))
            text = text[:place] + draw.choice("\t:{['\0%&*") + text[place:]
        Path("recipe.yaml").write_text(text)
        try:
            read_recipe("train", ["recipe.yaml"])
        except ConfigurationError as error:
            spelled = [ALIASES.get(name, name) for name in picked]
            damaged = ("`model`", "`train_data`") if is_damaged else ()
            check_told(error, "recipe.yaml", *picked, *spelled, *damaged)


@seeds(400, 8000)
def test_odd_values_of_an_option_are_taken_or_named(
    seed: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)
    names = [entry.name for entry in fields(DPOConfig)]
    for _ in range(count):
        name, value = draw.choice(names), draw.choice(VALUES)
        try:
            DPOConfig(**{"output_dir": "out"} | {name: value})
        except ConfigurationError as error:
            check_told(error, re.sub("^activation_checkpointing", "", name))


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": "2"},
        {"loss_type": 5},
        {"learning_rate": "1e-5"},
        {"ref_store": ["a.sqlite"]},
        {"gradient_accumulation_steps": 0},
        {"seed": -1},
        {"deepspeed": 5},
        {"report_to": 5},
        {"optim": "adam"},
        {"adam_beta1": 1.0},
        {"train_sampling_strategy": "sorted"},
        {"model_init_kwargs": "dtype"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_wrong_value_is_refused_at_construction_by_the_name_of_its_option(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=f"^Cannot use `{name}=") as caught:
        DPOConfig("out", **options)
    assert [refusal.option for refusal in caught.value.refusals] == [name]
