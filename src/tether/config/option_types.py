"""Checks the types of options by pydantic, and describes what is wrong with those that do not fit.

Knows types, but not which options there are. Loads no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from tether.refusals import Refusal, nearest_to, of_option


def faults(error: ValidationError) -> dict[str, str]:
    """What is wrong with each option, as the second half of a sentence."""
    found: dict[str, list[str]] = {}
    for one in error.errors():
        name, *inside = one["loc"]
        text = one["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        is_entry = bool(inside) and isinstance(inside[0], int)
        if is_entry and len(inside) == 1 and text.startswith("it should"):
            text = f"{text}, not {one['input']!r}"
        elif is_entry:  # an entry with options of its own
            where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in inside)
            text = f"`{name}{where}`: {text}"
        text = textwrap.shorten(text[0].lower() + text[1:], 240, placeholder=" and others")
        found.setdefault(str(name), []).append(text)
    return {name: ", or ".join(dict.fromkeys(texts)) for name, texts in found.items()}


def refused_types(options: Any, declared: type, also: Mapping[str, Any]) -> Iterator[Refusal]:
    """Values of the wrong type, such as text where a number belongs.

    Args:
        options: Has the values as attributes. Tuples count as lists.
        declared: The dataclass that declares the options, its own and those of the class it extends.
        also: Types that an option takes besides the declared ones.
    """
    texts = {entry.name: entry.metadata.get("help", "") for entry in dataclasses.fields(declared)}
    model = _model_of(declared, tuple(also.items()))
    try:
        model.model_validate({name: _plain(getattr(options, name)) for name in model.model_fields})
    except ValidationError as error:
        for name, why in faults(error).items():
            value = getattr(options, name)
            details = f"`{name}`: {texts[name]}" if texts[name] else ""
            yield of_option(name, value, why, _instead(name, value, why), details=details)


def _instead(name: str, value: Any, why: str) -> str:
    if not isinstance(value, str):
        return f"Write a value of that kind for `{name}`, or leave it out."
    if nearest := nearest_to(value, re.findall(r"'([^']+)'", why)):
        return f"Did you mean {nearest!r}?"
    try:
        number = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return f"Write a value of that kind for `{name}`, or leave it out."
    note = " YAML 1.1 reads `1e-6` as text: in such a file, write `1.0e-6`." if "e" in value.lower() else ""
    return f"Write {number!r}, without quotes.{note}"


@cache
def _model_of(declared: type, also: tuple[tuple[str, Any], ...]) -> type[BaseModel]:
    hints, further = typing.get_type_hints(declared), dict(also)
    names = [entry.name for entry in dataclasses.fields(declared)]
    kinds: dict[str, Any] = {
        name: (_words(hints[name]) | further.get(name, _words(hints[name])), ...) for name in names
    }
    config = ConfigDict(strict=True, protected_namespaces=(), arbitrary_types_allowed=True)
    return create_model(declared.__name__, __config__=config, **kinds)


def _words(hint: Any) -> Any:
    """The values of an enumeration, where the option takes them as text too."""
    enums = [kind for kind in typing.get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    literal: Any = typing.Literal
    return (
        literal[tuple(word.value for kind in enums for word in kind)]
        if enums and str in typing.get_args(hint)
        else hint
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value
