"""A recipe's YAML file: each of its keys an option, each value of the option's type.

Knows how a file is written; what the options are, the parser knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tether.cli.launch import Launcher
from tether.cli.options import RecipeParser
from tether.cli.refusing_parser import refuse_unknown
from tether.cli.trl_options import REFUSED, refuse_former_option, refuse_trl_option
from tether.errors import ConfigurationError


def read_recipe_file(parser: RecipeParser, launcher: Launcher, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that the file gives, as their types read them; sets the environment variables of its `env`.

    Returns:
        The run's own options, and the launcher's as they are written.

    Raises:
        ConfigurationError: If it is no YAML, or for an option that does not exist or a value that cannot be.
    """
    content = _read_yaml(path)
    _set_environment(content.pop("env", None), path)
    values: dict[str, Any] = {}
    of_launcher: dict[str, Any] = {}
    for key, value in content.items():
        if key in launcher.options:
            of_launcher[key] = value
            continue
        if key in REFUSED:
            refuse_trl_option(key, value, f"`{key}: {value}` in {path}")
            continue
        if key not in parser.options:
            refuse_former_option(str(key), f"`{key}: {value}` in {path}")
            refuse_unknown(f"`{key}: {value}` in {path}", str(key), parser.options, parser.prog)
        name = parser.options[key].dest
        if name in values:
            raise ConfigurationError(
                asked=f"`{key}` in {path}.",
                why=f"The recipe also has `{name}`, which is the same option.",
                instead="Keep one of the two.",
            )
        values[name] = _read_value(parser, key, value, path)
    return values, of_launcher


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)  # a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            asked=f"The recipe {path}.",
            why=f"It cannot be read as YAML: {' '.join(str(error).split())}.",
            instead="Write one `option: value` on each line, each option once.",
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(
            asked=f"The recipe {path}.",
            why=f"It holds a {type(content).__name__} where options with names are expected.",
            instead="Write one `option: value` on each line.",
        )
    return content


def _read_value(parser: RecipeParser, key: str, value: Any, path: Path) -> Any:
    try:
        return parser.read_value(key, value)
    except ValueError as error:
        raise ConfigurationError(
            asked=f"`{key}: {value}` in {path}.",
            why=f"{error}.",
            instead=f"`{parser.prog} --help` says what it takes.",
        ) from None


def _set_environment(variables: Any, path: Path) -> None:
    if variables is None:
        return
    if not isinstance(variables, Mapping) or any(isinstance(value, dict | list) for value in variables.values()):
        raise ConfigurationError(
            asked=f"`env` in {path}.",
            why="It holds environment variables, each with one value.",
            instead="Write `env:`, and below it one indented `NAME: value` on each line.",
        )
    os.environ.update({str(name): str(value) for name, value in variables.items()})


class _RecipeLoader(yaml.SafeLoader):
    """YAML with the numbers and truth values of version 1.2, as people expect them, and every key once.

    PyYAML reads version 1.1, where `eval_strategy: no` is False and `learning_rate: 1e-6` is text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` comes twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_RecipeLoader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)
