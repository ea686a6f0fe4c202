"""From words and a YAML file to checked options: a recipe.

Knows how options are written; does not know what they do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tether.cli.options import RecipeParser, ScriptOptions, option_names
from tether.cli.refusing_parser import refuse_unknown
from tether.config import DPOConfig
from tether.errors import ConfigurationError, TetherError


@dataclass(frozen=True)
class Recipe:
    """A run as it was asked for.

    Attributes:
        script: Model, data, adapter.
        config: The trainer's options.
        given: The options that the recipe or a flag named, as they were read; all others have their defaults.
    """

    script: ScriptOptions
    config: DPOConfig
    given: Mapping[str, Any]


def read_recipe(verb: str, about: str, argv: Sequence[str], **forced: Any) -> Recipe:
    """Reads the recipe that `argv` names, and the flags, which win.

    Args:
        verb: The command's verb, for its messages.
        about: What the verb does, for its --help.
        argv: The words after the verb.
        forced: Options that the verb decides.

    Raises:
        ConfigurationError: For an option that does not exist (names the nearest), or a value that cannot be.
    """
    parser = RecipeParser(verb, about)
    flags = parser.parse_given(argv)
    path = _recipe_path(parser, flags.pop("recipe", None), flags.pop("config", None))
    given = (_read_file(parser, path) if path is not None else {}) | flags
    script_values = {name: value for name, value in given.items() if name in option_names(ScriptOptions)}
    config_values = {name: value for name, value in given.items() if name not in script_values}
    script = _check_script(ScriptOptions(**script_values), given, parser.prog)
    if not sys.stderr.isatty():
        config_values.setdefault("disable_tqdm", True)  # bars are for terminals
    if config_values.get("output_dir") is None:
        config_values["output_dir"] = f"{Path(script.model or 'model').name}-DPO"
    return Recipe(script, _make_config(config_values | forced, parser.prog), given)


def _recipe_path(parser: RecipeParser, positional: str | None, flag: str | None) -> Path | None:
    if positional is not None and flag is not None:
        parser.error(f"two recipes are named, {positional} and {flag}")
    name = positional or flag
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            asked=f"The recipe {name}.",
            why=f"There is no such file; paths start at the current folder, {Path.cwd()}.",
            instead="Name a YAML file (examples/real_pairs/recipe.yaml is one), or give every option as a flag.",
        )
    return path


def _read_file(parser: RecipeParser, path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)  # a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            asked=f"The recipe {path}.",
            why=f"It cannot be read as YAML: {' '.join(str(error).split())}.",
            instead="Write one `option: value` on each line, each option once.",
        ) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigurationError(
            asked=f"The recipe {path}.",
            why=f"It holds a {type(content).__name__} where options with names are expected.",
            instead="Write one `option: value` on each line.",
        )
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in parser.options:
            refuse_unknown(f"`{key}: {value}` in {path}", str(key), parser.options, parser.prog)
        name = parser.options[key].dest
        if name in values:
            raise ConfigurationError(
                asked=f"`{key}` in {path}.",
                why=f"The recipe also has `{name}`, which is the same option.",
                instead="Keep one of the two.",
            )
        try:
            values[name] = parser.read_value(key, value)
        except ValueError as error:
            raise ConfigurationError(
                asked=f"`{key}: {value}` in {path}.",
                why=f"{error}.",
                instead=f"`{parser.prog} --help` says what it takes.",
            ) from None
    return values


def _check_script(script: ScriptOptions, given: Mapping[str, Any], prog: str) -> ScriptOptions:
    for name, example in (("model", "Qwen/Qwen2.5-0.5B-Instruct"), ("train_data", "pairs.jsonl")):
        if getattr(script, name) is None:
            raise ConfigurationError(
                asked=f"`{prog}` without `{name}`.",
                why="A run needs a model to start from and pairs to learn from.",
                instead=f"Write `{name}: {example}` in the recipe, or `--{name} {example}`.",
            )
    if script.eval_data is not None and script.eval_fraction is not None:
        raise ConfigurationError(
            asked="`eval_data` together with `eval_fraction`.",
            why="Both say which pairs are held out.",
            instead="Keep one of the two.",
        )
    if script.eval_fraction is not None and not 0 < script.eval_fraction < 1:
        raise ConfigurationError(
            asked=f"`eval_fraction={script.eval_fraction}`.",
            why="It is the share of the pairs to hold out, and some must be left to train on.",
            instead="A value between 0 and 1, such as 0.1.",
        )
    _check_lora(script, given)
    checkpoint = given.get("resume_from_checkpoint")
    if checkpoint is not None and script.resume is not None:
        raise ConfigurationError(
            asked="`resume` together with `resume_from_checkpoint`.",
            why="They are the same option.",
            instead="Keep `resume`.",
        )
    resume = script.resume or checkpoint
    return replace(script, resume=None if resume is None or resume.lower() == "false" else resume)


def _check_lora(script: ScriptOptions, given: Mapping[str, Any]) -> None:
    details = [name for name in ("lora_alpha", "lora_dropout", "lora_target_modules") if given.get(name) is not None]
    if details and script.lora_r is None:
        raise ConfigurationError(
            asked=f"`{details[0]}` without `lora_r`.",
            why="Without a rank no adapter is made, so there is nothing for it to shape.",
            instead="Add `lora_r: 16`, or take it out.",
        )
    if script.lora_r is not None and script.lora_r < 1:
        raise ConfigurationError(
            asked=f"`lora_r={script.lora_r}`.",
            why="It is the rank of the adapter's matrices.",
            instead="1 or more; leave it out to train the model's own weights.",
        )
    if script.lora_dropout and given.get("disable_dropout", True):
        raise ConfigurationError(
            asked=f"`lora_dropout={script.lora_dropout}` while `disable_dropout` is on (its default).",
            why="All dropout is set to 0, the adapter's too.",
            instead="Set `disable_dropout: false`, or take `lora_dropout` out.",
        )


def _make_config(values: Mapping[str, Any], prog: str) -> DPOConfig:
    try:
        return DPOConfig(**values)
    except TetherError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # TrainingArguments' own checks
        raise ConfigurationError(
            asked="These options of transformers.TrainingArguments, together.",
            why=" ".join(str(error).split()),
            instead=f"Change the option it names; `{prog} --help` lists every one.",
        ) from error


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
