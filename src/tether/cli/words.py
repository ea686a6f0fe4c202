"""Reads options as written: the words of a command line, and the lines of a recipe.

Knows how both are written; `options` knows what an option is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tether.cli.mistakes import Mistake
from tether.cli.options import ALIASES, LAUNCHER, OPTIONS
from tether.cli.trl_options import REFUSED
from tether.errors import ConfigurationError, said

_ONE_PER_LINE = "Write one `option: value` on each line, each option once."
RECIPE_FIRST = "Write the recipe first, then `--option value`."


class Written(NamedTuple):
    """An option as it was written.

    Attributes:
        key: Its name, in one of its spellings.
        value: Text; None; a list; or a mapping.
        subject: The whole option as written, for messages.
        line: Line in the recipe; None for a flag.
        words: The words of a flag.
    """

    key: str
    value: Any
    subject: str
    line: int | None = None
    words: tuple[str, ...] = ()


def read_words(words: Sequence[str]) -> tuple[str | None, list[Written], list[Mistake]]:
    """The words after a verb: the recipe, the flags, and mistakes for anything else.

    A true-or-false flag may stand alone, and `--no_x` is `--x false`; a list takes all words up to the next flag.
    """
    rest, flags, mistakes = list(words), [], []
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    while rest:
        spelled, equals, value = rest.pop(0).partition("=")
        if not spelled.startswith("--"):
            mistakes.append(Mistake(f"`{spelled}{equals}{value}`", "it belongs to no option", RECIPE_FIRST))
            continue
        key, follows = spelled[2:].replace("-", "_"), list(takewhile(lambda word: not word.startswith("--"), rest))
        kinds = _kinds_of(key)
        if key.startswith("no_") and not kinds and "boolean" in _kinds_of(key[3:]):
            key, kinds, value, follows = key[3:], ["boolean"], "false", []
        elif equals:
            follows = []
        elif kinds and "array" not in kinds:
            follows = follows[:1]
        del rest[: len(follows)]
        own = (f"{spelled}{equals}{value}" if equals else spelled, *follows)
        if not (value or equals or follows) and kinds and "boolean" not in kinds:
            mistakes.append(Mistake(f"`{spelled}`", "it needs a value", RECIPE_FIRST, about=key))
            continue
        one = value or (follows[0] if follows else "" if equals else "true")
        is_list = len(follows) > 1 or ("array" in kinds and "string" not in kinds[:1])
        flags.append(Written(key, [*follows] or [one] if is_list else one, f"`{_shortened(' '.join(own))}`", None, own))
    return recipe, flags, mistakes


def _shortened(text: str, most: int = 100) -> str:
    """A value on one line, cut where it is long; also one without spaces."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def _kinds_of(key: str) -> list[str]:
    """The types of an option by any of its names; empty for an unknown name."""
    if key in REFUSED:
        return ["string", "boolean"]
    option = OPTIONS.get(ALIASES.get(key, key)) or LAUNCHER.get(key) or {"type": ["string"] if key == "config" else []}
    # A launcher's option that takes a value may also take `true`, but it must be written.
    kinds: list[str] = option["type"]
    return kinds if key not in LAUNCHER or kinds == ["boolean"] else ["string"]


def read_lines(path: Path) -> tuple[list[Written], list[Mistake]]:
    """The options in a recipe file, and mistakes for those written twice.

    A plain value is kept as text, so that the option's type decides its meaning and not YAML: `no` is a word for
    `save_strategy` and false for `bf16`. Inside lists and mappings YAML 1.2 decides.

    Raises:
        ConfigurationError: If it is not YAML, or not a mapping.
    """
    text = _text_of(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(None, None, "options with names are expected", node.start_mark)
        pairs = [] if node is None else [(key, _value_of(loader, key.value, value)) for key, value in _entries_of(node)]
    except RecursionError:
        raise ConfigurationError(
            problem=f"Cannot read {path}: its lists or mappings are nested too deeply.", instead=_ONE_PER_LINE
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigurationError(
            problem=f"Cannot read {path}{place}: {getattr(error, 'problem', None) or said(error)}.",
            details=_context_of(error),
            instead=_ONE_PER_LINE,
        ) from None
    written: list[Written] = []
    mistakes: list[Mistake] = []
    for key, value in pairs:
        name, line = str(key.value), key.start_mark.line + 1
        shown = _shortened("" if value is None else str(value))
        if any(name == earlier.key for earlier in written):
            mistakes.append(
                Mistake(f"`{name}: {shown}`", f"`{name}` comes twice", "Write each option once.", line=line)
            )
            continue
        written.append(Written(name, value, f"`{name}: {shown}`".replace(": `", ":`"), line))
    return written, mistakes


def _context_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "context_mark", None)
    context = str(getattr(error, "context", None))
    if mark is None or not context.startswith("while "):
        return ""
    return f"The YAML parser stopped {context} that begins in line {mark.line + 1}."


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            problem=f"Cannot read {path}: it is not text in UTF-8 ({error}).",
            instead="Save the file as UTF-8.",
        ) from None


def _entries_of(node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(None, None, "a name is expected, not a list or a mapping", key.start_mark)
    entries: list[tuple[yaml.ScalarNode, yaml.Node]] = node.value
    return entries


def _value_of(loader: yaml.SafeLoader, key: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if key == "env" and isinstance(node, yaml.MappingNode):  # environment variables are always text
        return {
            name.value: inner.value if isinstance(inner, yaml.ScalarNode) else loader.construct_object(inner, deep=True)
            for name, inner in _entries_of(node)
        }
    return loader.construct_object(node, deep=True)


def plain_value(written: Any) -> Any:
    """What the text of a value means by itself, where no option's type decides it."""
    try:
        return yaml.load(written, _Loader) if isinstance(written, str) else written
    except yaml.YAMLError:
        return written


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and booleans of version 1.2, which people expect, and without duplicate keys.

    PyYAML reads version 1.1, where `[no]` is a list of False and `{rope_theta: 1e6}` holds text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` comes twice", key.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)
