"""How the text of an option becomes its value: by the option's type, the same for a flag and for a recipe.

Knows types and words; which options there are, the parser knows.
"""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Callable
from typing import Any

# Mappings that transformers also takes as the path of a JSON file.
_MAY_BE_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a type hint allows, one by one."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def reader(name: str, read: Any, hint: Any) -> Callable[[str], Any]:
    """How the text of an option is read: `read`, but JSON for a mapping, and `none` where None is a value.

    Where a word is a value too, `none` is one, except for a mapping.
    """
    kinds = kinds_of(hint)
    is_mapping = any(typing.get_origin(kind) is dict or kind is dict for kind in kinds)
    if is_mapping and name not in _MAY_BE_FILES:
        read = read_mapping
    elif str in kinds:
        return read  # type: ignore[no-any-return]
    if types.NoneType not in kinds:
        return read  # type: ignore[no-any-return]

    def read_or_none(text: str) -> Any:
        return None if text.lower() in ("none", "null") else read(text)

    read_or_none.__name__ = getattr(read, "__name__", "value")
    return read_or_none


def read_mapping(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        argparse.ArgumentTypeError: For any other text, which transformers would pass on as it is.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not {_DESCRIPTIONS['read_mapping']}")
    return value


def read_scalar(action: argparse.Action, value: Any) -> Any:
    """A single value of a recipe, as its option reads it.

    Raises:
        ValueError: If it cannot be read; says why.
    """
    read = action.type
    assert callable(read)
    if isinstance(value, dict | list):
        raise ValueError(f"{value!r} is not a single value")
    is_whole = isinstance(value, float) and value.is_integer() and getattr(read, "__name__", "") == "int"
    try:
        result = read(str(int(value) if is_whole else value))  # `1e3` is a float of YAML's
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise ValueError(f"{value!r} is not {describe(read)}") from None
    if action.choices is not None and result not in action.choices:
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, action.choices))}")
    return result


def read_list(value: Any) -> list[Any]:
    """The entries of `datasets`, which are read elsewhere.

    Raises:
        ValueError: If it is no list.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("It takes a list of sets")
    return value


_DESCRIPTIONS = {
    "int": "a whole number",
    "float": "a number",
    "string_to_bool": "true or false",
    "read_mapping": 'a JSON object, such as {"name": 1}',
}


def describe(read: Any) -> str:
    """What a reader takes, in words."""
    return _DESCRIPTIONS.get(getattr(read, "__name__", ""), "a value of its kind")
