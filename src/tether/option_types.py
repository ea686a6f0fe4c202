"""What kind of value an option takes: as a JSON schema, in words, and whether Python's values are of it.

Knows types; which options there are, others know. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from tether.errors import ArgumentTypeError

_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "object": 'a mapping such as {"name": 1}',
    "null": "none",
}
_LISTS = {"number": "a list of numbers", "string": "a list of words"}
_MOST_CHOICES = 8  # more would fill the line


def flat_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint, with all that a union allows in one `type`.

    Example:
        >>> flat_schema(list[float] | None)
        {'type': ['array', 'null'], 'items': {'type': ['number']}}
    """
    schema = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    definitions = schema.pop("$defs", {})

    def flatten(part: Mapping[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {"type": []}
        for kind in part.get("anyOf", [part]):
            kind = definitions[kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
            flat["type"] += [kind["type"]] if kind["type"] not in flat["type"] else []
            flat |= {"items": flatten(kind["items"])} if "items" in kind else {}
            flat |= {"enum": kind["enum"]} if "enum" in kind else {}
        return flat

    return flatten(schema)


def words_of(schema: Mapping[str, Any]) -> str:
    """What an option takes, in words, from its flat schema."""
    items = schema.get("items", {})
    one = items.get("type", []) if schema["type"][0] == "array" else []  # beside a list of the same
    kinds = [kind for kind in schema["type"] if kind not in one and (kind != "string" or "enum" not in schema)]
    words = [_one_of(schema["enum"])] if "enum" in schema else []
    for kind in kinds:
        of_items = (
            _one_of(items["enum"]) if "enum" in items else _LISTS.get(items.get("type", [""])[0], "a list of sets")
        )
        words.append(of_items if kind == "array" else _WORDS[kind])
    return " or ".join(words)


def _one_of(choices: Sequence[Any]) -> str:
    names = [str(choice) for choice in choices if choice is not None]
    return f"one of {', '.join(names)}" if len(names) <= _MOST_CHOICES else f"one of {len(names)} names"


def nearest_to(name: str, known: Iterable[str]) -> str:
    """The name that was probably meant; empty if none is near."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), "")


def check_types(options: Any, declared: type, base: type) -> None:
    """Refuses values of another kind than an option's, such as text where a number belongs; all of them at once.

    Args:
        options: Has the values as attributes. Numbers of numpy are numbers, tuples lists, and paths text.
        declared: The dataclass that declares the options.
        base: The one it extends, whose options are not looked at.

    Raises:
        ArgumentTypeError: Names the options.
    """
    texts = {entry.name: entry.metadata.get("help", "") for entry in dataclasses.fields(declared)}
    model = _model_of(declared, base)
    try:
        model.model_validate({name: _plain(getattr(options, name)) for name in model.model_fields})
    except ValidationError as error:
        wrong = list(dict.fromkeys(str(found["loc"][0]) for found in error.errors()))
        hints = {name: model.model_fields[name].annotation for name in wrong}
        takes = {name: words_of(flat_schema(hint)).replace("none", "None") for name, hint in hints.items()}
        asked = ", ".join(f"`{name}={getattr(options, name)!r}`" for name in wrong)
        raise ArgumentTypeError(
            asked=f"Cannot use {asked}: {'; '.join(f'`{name}` takes {words}' for name, words in takes.items())}.",
            why=" ".join(f"`{name}`: {texts[name]}" for name in wrong),
            instead=f"Write {'; '.join(f'{words} as `{name}`' for name, words in takes.items())}. A recipe of YAML's "
            "version 1.1 reads `1e-6` as text; there, write `1.0e-6`.",
        ) from None


@cache
def _model_of(declared: type, base: type) -> type[BaseModel]:
    names = {entry.name for entry in dataclasses.fields(declared)} - {entry.name for entry in dataclasses.fields(base)}
    own: dict[str, Any] = {name: (hint, ...) for name, hint in typing.get_type_hints(declared).items() if name in names}
    return create_model(declared.__name__, __config__=ConfigDict(strict=True, protected_namespaces=()), **own)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value.item() if hasattr(value, "item") else value
