"""From words and a YAML file to checked options: a recipe.

Knows how options are written; does not know what they do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.cli.checks import check_script
from tether.cli.launch import Launcher
from tether.cli.mixture import Part, check_streaming, read_parts
from tether.cli.options import RecipeParser, ScriptOptions, option_names
from tether.cli.quantization import check_quantization
from tether.cli.recipe_file import read_recipe_file
from tether.config import DPOConfig
from tether.errors import ConfigurationError, TetherError


@dataclass(frozen=True)
class Recipe:
    """A run as it was asked for.

    Attributes:
        script: Model, data, adapter.
        config: The trainer's options.
        given: The options that the recipe or a flag named, as they were read; all others have their defaults.
        parts: The sets of a mixture; empty where `train_data` is the one source.
    """

    script: ScriptOptions
    config: DPOConfig
    given: Mapping[str, Any]
    parts: tuple[Part, ...] = ()


def read_recipe(verb: str, about: str, argv: Sequence[str], *, beside: Sequence[str] = (), **forced: Any) -> Recipe:
    """Reads the recipe that `argv` names, and the flags, which win.

    Where they have options of `accelerate launch`, this process becomes the launcher.

    Args:
        verb: The command's verb, for its messages.
        about: What the verb does, for its --help.
        argv: The words after the verb.
        beside: Words that only the verb reads, which the processes of a launcher need too.
        forced: Options that the verb decides.

    Raises:
        ConfigurationError: For an option that does not exist (names the nearest), or a value that cannot be.
    """
    parser = RecipeParser(verb, about)
    launcher = Launcher(parser.options, parser.prog)
    of_launcher, words = launcher.split(argv)
    flags = parser.parse_given(words)
    path = _recipe_path(parser, flags.pop("recipe", None), flags.pop("config", None))
    in_file, launched_by_file = read_recipe_file(parser, launcher, path) if path is not None else ({}, {})
    given = in_file | flags
    script_values = {name: value for name, value in given.items() if name in option_names(ScriptOptions)}
    config_values = {name: value for name, value in given.items() if name not in script_values}
    script = check_script(ScriptOptions(**script_values), given, parser.prog)
    check_quantization(script)
    parts = tuple(read_parts(script.datasets or (), parser.prog))
    if script.dataset_streaming:
        check_streaming(parts)
    launch = launched_by_file | of_launcher
    launcher.check(launch)
    environment = dict(os.environ)  # before transformers writes its own into it
    if not sys.stderr.isatty():
        config_values.setdefault("disable_tqdm", True)  # bars are for terminals
    if config_values.get("report_to", "none") is None:
        config_values["report_to"] = "none"  # what an empty value says; transformers knows the word only
    if config_values.get("output_dir") is None:
        config_values["output_dir"] = f"{Path(script.model or 'model').name}-DPO"
    config = _make_config(config_values | forced, parser.prog)
    # Only now, so that a mistake is told once, and not by every process.
    launcher.start(launch, verb, [*words, *beside], [*argv, *beside], environment)
    _add_model_options(config, script)
    return Recipe(script, config, given, parts)


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


def _make_config(values: Mapping[str, Any], prog: str) -> DPOConfig:
    try:
        return DPOConfig(**values)
    except TetherError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:  # TrainingArguments' own checks
        raise ConfigurationError(
            asked="These options of transformers.TrainingArguments, together.",
            why=" ".join(str(error).split()),
            instead=f"Change the option it names; `{prog} --help` lists every one.",
        ) from error


def _add_model_options(config: DPOConfig, script: ScriptOptions) -> None:
    """The options that are arguments of `from_pretrained`, put to those of `model_init_kwargs`."""
    options = {
        "revision": script.model_revision,
        "dtype": script.dtype,
        "attn_implementation": script.attn_implementation,
    }
    given = {name: value for name, value in options.items() if value is not None}
    known = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    for name in given:
        if name in known:
            raise ConfigurationError(
                asked=f"`{name}` in `model_init_kwargs`, and as an option of the recipe.",
                why="They are the same argument of `from_pretrained`.",
                instead="Keep one of the two.",
            )
    if given:
        config.model_init_kwargs = {**known, **given}
