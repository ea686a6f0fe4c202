"""From words and a YAML file to checked options: a recipe.

Knows how options are combined, not what they do. No torch is loaded before `make_recipe`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tether.cli.checks import completed, contradictions
from tether.cli.mistakes import Mistake, as_written, refuse, unknown_option
from tether.cli.options import ALIASES, LAUNCHER, OPTIONS, SCRIPT_NAMES, ScriptOptions, read_values
from tether.cli.trl_options import REFUSED, why_refused
from tether.cli.words import RECIPE_FIRST, Written, plain_value, read_lines, read_words
from tether.config.former_options import written_today
from tether.errors import ConfigurationError
from tether.refusals import nearest_to

if TYPE_CHECKING:
    from tether.config.dpo_config import DPOConfig


@dataclass(frozen=True)
class Request:
    """A run as it was written, read and free of contradictions, before `DPOConfig` checks it.

    Attributes:
        verb: The command's verb.
        script: Model, data, adapter.
        given: The options set by the recipe or a flag, as read; all others have their defaults.
        launch: Options of the launcher, as text.
        words: The words after the verb that are not the launcher's.
        typed: All words after the verb.
        forced: Options set by the verb.
        path: The recipe, if there is one.
        written: Where and how each option was written.
    """

    verb: str
    script: ScriptOptions
    given: Mapping[str, Any]
    launch: Mapping[str, Any]
    words: Sequence[str]
    typed: Sequence[str]
    forced: Mapping[str, Any]
    path: Path | None
    written: Mapping[str, Written]


@dataclass(frozen=True)
class Recipe:
    """A run as it was requested.

    Attributes:
        script: Model, data, adapter.
        config: The trainer's options.
        given: The options that the recipe or a flag named, as they were read; all others have their defaults.
        request: How it was written.
    """

    script: ScriptOptions
    config: DPOConfig
    given: Mapping[str, Any]
    request: Request


def read_recipe(verb: str, argv: Sequence[str], *, beside: Sequence[str] = (), **forced: Any) -> Recipe:
    """Reads a recipe and the flags, which override it; see `read_request` and `make_recipe`."""
    return make_recipe(read_request(verb, argv, beside=beside, **forced))


def read_request(verb: str, argv: Sequence[str], *, beside: Sequence[str] = (), **forced: Any) -> Request:
    """Reads the recipe named by the words and the flags, which override it; sets the variables of the recipe's `env`.

    Args:
        verb: The command's verb, for its messages.
        argv: The words after the verb.
        beside: Words that only the verb reads, but the processes of a launcher need too.
        forced: Options set by the verb.

    Raises:
        ConfigurationError: Names every option that does not exist (with the nearest), has a value that cannot be
            read, or contradicts another.
    """
    prog = f"tether {verb}"
    recipe, flags, mistakes = read_words(argv)
    named = [*([recipe] if recipe is not None else []), *(str(flag.value) for flag in flags if flag.key == "config")]
    path = Path(named[0]).expanduser() if named else None
    not_there = _not_one_recipe(path, named)
    lines, twice = read_lines(path) if path is not None and not not_there else ([], [])
    reading = _Reading([*not_there, *twice, *mistakes])
    for written in (lines, [flag for flag in flags if flag.key != "config"]):
        reading.read(written)
    refuse(reading.mistakes, prog, path)
    given = reading.given
    script = completed(ScriptOptions(**{name: given[name] for name in given if name in SCRIPT_NAMES}), given)
    found = list(contradictions(script, given, prog))
    if found:  # and the others with them, so that all are told at once
        others = _of_config({**_config_values(script, given), **forced}, reading.written, path)
        refuse([*found, *(other for other in others if other.option not in forced)], prog, path)
    os.environ.update(reading.environment)
    own = [word for flag in flags if flag.key not in LAUNCHER for word in flag.words]
    words = own if recipe is None else [recipe, *own]
    return Request(
        verb, script, given, reading.launch, [*words, *beside], [*argv, *beside], forced, path, reading.written
    )


@dataclass
class _Reading:
    """The options read so far, and the mistakes found in them."""

    mistakes: list[Mistake]
    given: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def read(self, written: Sequence[Written]) -> None:
        """Reads the options of one source; later sources override earlier ones."""
        options: dict[str, Written] = {}
        for one in written:
            name = ALIASES.get(one.key, one.key)
            if name in OPTIONS:
                if one.line and name in options:
                    self._refuse(one, f"`{options[name].key}` is the same option", "Keep one of the two.")
                options[name] = self.written[name] = one
            else:
                self._read_other(one)
        values, wrong = read_values({name: one.value for name, one in options.items()})
        self.given |= values
        for name, why in wrong.items():
            choices = OPTIONS[name].get("enum") or OPTIONS[name].get("items", {}).get("enum") or ()
            words = options[name].value if isinstance(options[name].value, list) else [options[name].value]
            found = (nearest_to(str(word), filter(None, choices)) for word in words if word not in choices)
            nearest = next(found, "")
            took_recipe = not options[name].line and "boolean" in OPTIONS[name]["type"]
            instead = f"Did you mean `{nearest}`?" if nearest else RECIPE_FIRST if took_recipe else ""
            self._refuse(options[name], why, instead, about=name)

    def _read_other(self, one: Written) -> None:
        if one.key == "env" and one.line:
            self._read_environment(one)
        elif one.key in REFUSED:
            if found := why_refused(one.key, one.value):
                self._refuse(one, *found)
        elif today := written_today(one.key, plain_value(one.value)):
            self._refuse(one, today[0], as_written(today[1], in_recipe=one.line is not None))
        elif one.key in LAUNCHER:
            self.launch[one.key] = one.value
        else:
            known = [*OPTIONS, *ALIASES, *LAUNCHER]
            self.mistakes.append(unknown_option(one.subject, one.key, known, one.line, "" if one.line else "--"))

    def _read_environment(self, one: Written) -> None:
        variables = {} if one.value is None else one.value
        if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
            instead = "Write `env:`, and below it one indented `NAME: value` on each line."
            self._refuse(one, "it holds environment variables, each with one value", instead)
        else:
            self.environment |= variables

    def _refuse(self, one: Written, why: str, instead: str, about: str = "") -> None:
        self.mistakes.append(Mistake(one.subject, why, instead, line=one.line, about=about))


def make_recipe(request: Request) -> Recipe:
    """The recipe, with the trainer's actual options.

    If it has options of `accelerate launch`, this process becomes the launcher.

    Raises:
        ConfigurationError: For options that `DPOConfig` refuses.
    """
    from tether.config.dpo_config import DPOConfig  # here, because it loads torch

    environment = dict(os.environ)  # before transformers adds variables of its own
    prog, script = f"tether {request.verb}", request.script
    if request.launch:
        from tether.cli.launch import check_no_launcher

        check_no_launcher(request.launch, prog)
    values = {**_config_values(script, request.given), **request.forced}
    try:
        config = DPOConfig(**values)
    except ConfigurationError as error:
        refuse_as_written(error, request)
        raise
    if request.launch:
        from tether.cli.launch import launch

        # Only now, so that a mistake is reported once, and not by every process.
        launch(request.launch, prog, request.words, request.typed, environment)
    _add_model_options(config, script)
    return Recipe(script, config, request.given, request)


def _config_values(script: ScriptOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DPOConfig`."""
    values = {name: value for name, value in given.items() if name not in SCRIPT_NAMES}
    if not sys.stderr.isatty():
        values.setdefault("disable_tqdm", True)  # bars are for terminals
    if values.get("report_to", "none") is None:
        values["report_to"] = "none"  # meant by an empty value, which transformers does not accept
    if values.get("output_dir") is None:
        values["output_dir"] = f"{Path(script.model or 'model').name}-DPO"
    return values


def _of_config(values: Mapping[str, Any], written: Mapping[str, Written], path: Path | None) -> list[Mistake]:
    """What `DPOConfig` would refuse of options that were written."""
    if not written.keys() - SCRIPT_NAMES:
        return []
    from tether.config.dpo_config import DPOConfig

    try:
        DPOConfig(**values)
    except ConfigurationError as error:
        return _as_mistakes(error, written, path)
    return []


def refuse_as_written(error: ConfigurationError, request: Request) -> None:
    """Raises the refusals of an error again, each with its line, and with options spelled as they were written."""
    refuse(_as_mistakes(error, request.written, request.path), f"tether {request.verb}", request.path)


def _as_mistakes(error: ConfigurationError, written: Mapping[str, Written], path: Path | None) -> list[Mistake]:
    """The refusals of `DPOConfig`, each with its line, and with options spelled as they were."""
    found = []
    for refusal in error.refusals:
        one = written.get(refusal.option)
        line = one.line if one else None
        in_recipe = path is not None if one is None else line is not None
        subject, instead = (as_written(text, in_recipe=in_recipe) for text in (refusal.subject, refusal.instead))
        if one and (own := re.match(r"`[^`]*`", subject)):
            subject = one.subject + subject[own.end() :]
        found.append(Mistake(subject, refusal.why, instead, refusal.details, refusal.option, line))
    return found


def _not_one_recipe(path: Path | None, names: Sequence[str]) -> list[Mistake]:
    """Mistakes for a recipe that does not exist, or more than one."""
    if len(names) > 1:
        return [Mistake(f"two recipes, {' and '.join(names)}", "a run has one", "Name one of them.")]
    if path is not None and path.is_dir():
        return [Mistake(f"the recipe {names[0]}", "it is a folder", "Name a YAML file.")]
    if path is None or path.is_file():
        return []
    instead = "Name a YAML file (examples/real_pairs/recipe.yaml is one), or give every option as a flag."
    details = f"Paths start at the current folder, {Path.cwd()}."
    return [Mistake(f"the recipe {names[0]}", "there is no such file", instead, details)]


def _add_model_options(config: DPOConfig, script: ScriptOptions) -> None:
    """Adds the options that are arguments of `from_pretrained` to `model_init_kwargs`."""
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
                problem=f"Cannot use `{name}` in `model_init_kwargs` and as an option of the recipe: "
                "both set the same argument of `from_pretrained`.",
                details=f"The recipe says {given[name]!r}, and `model_init_kwargs` {known[name]!r}.",
                instead="Keep one of the two.",
            )
    if given:
        config.model_init_kwargs = {**known, **given}
