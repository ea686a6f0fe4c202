"""docs/options.md lists the options of `DPOConfig` with the help text, type and default that the command shows.

`TETHER_WRITE_DOCS=1` writes the page anew.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tether.cli.options import OPTIONS, SCRIPT_NAMES
from tether.config.dpo_config import DPOConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"

HEAD = """\
# Options

The options of `DPOConfig`, made from their help texts by `tests/config/test_options_page.py`. Each is an argument in
Python, a line in a recipe and a flag of `tether train`. The [API page](api/trainer.md) says more about each, and
[recipes](recipes.md) has those that only the command takes (model, data, adapter).

Every option of `transformers.TrainingArguments` works too; only those whose default differs are listed. No option is
accepted and ignored: a combination that cannot work is an error before training.
"""


_TABLE = ["| option | what it does | values | default |", "| --- | --- | --- | --- |"]
_KINDS = {
    "array": "list",
    "boolean": "bool",
    "integer": "int",
    "number": "float",
    "object": "dict",
    "string": "str",
}


def _default(config: type, name: str) -> Any:
    return next(field.default for field in fields(config) if field.name == name)


def _names() -> list[str]:
    """Those of our own, and those of transformers with another default; in the order of `--help`."""
    theirs = {field.name for field in fields(TrainingArguments)}
    changed = {name for name in theirs if _default(DPOConfig, name) != _default(TrainingArguments, name)}
    ours = {field.name for field in fields(DPOConfig) if field.init} - theirs
    return [name for name in OPTIONS if name in (ours | changed) - SCRIPT_NAMES]


def _row(name: str) -> str:
    option = OPTIONS[name]
    choices = [choice for choice in option.get("enum", ()) if choice is not None]
    kinds = [_KINDS[kind] for kind in option["type"] if kind != "null"]
    values = ", ".join(f"`{value}`" for value in choices or kinds)
    return f"| `{name}` | {option['description']} | {values} | `{option['default']}` |"


def _page() -> str:
    parts = [HEAD]
    names = _names()
    for group in dict.fromkeys(option["group"] for option in OPTIONS.values()):
        rows = [_row(name) for name in names if OPTIONS[name]["group"] == group]
        if rows:
            parts.append("\n".join([f"## {group[0].upper()}{group[1:]}", "", *_TABLE, *rows, ""]))
    return "\n".join(parts)


def test_the_page_lists_every_option_of_ours() -> None:
    if os.environ.get("TETHER_WRITE_DOCS"):
        PAGE.write_text(_page())
    assert PAGE.read_text() == _page(), "write it anew with TETHER_WRITE_DOCS=1"
