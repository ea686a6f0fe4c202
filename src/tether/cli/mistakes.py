"""The mistakes in a recipe or on a command line, reported together.

Knows how to report them; the readers of recipes and words find them.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import yaml

from tether.cli.options import help_of
from tether.errors import ConfigurationError
from tether.masking import is_secret
from tether.refusals import Refusal, nearest_to


@dataclass(frozen=True)
class Mistake(Refusal):
    """A mistake in a recipe or on a command line.

    Attributes:
        line: Line in the recipe; None for a flag, or if the mistake involves several options.
        about: An option to explain besides those in `subject`: the nearest to one that does not exist.
    """

    line: int | None = None
    about: str = ""


def as_written(text: str, *, in_recipe: bool) -> str:
    """A message of the library, with its options spelled as in a recipe or on a command line.

    >>> as_written("Set `sync_ref_model=True`, or leave `beta` out.", in_recipe=True)
    'Set `sync_ref_model: true`, or leave `beta` out.'
    """

    def respelled(found: re.Match[str]) -> str:
        try:
            meant = ast.literal_eval(found[2])
            value = yaml.safe_dump(meant, default_flow_style=True).split("\n")[0]
        except (ValueError, SyntaxError, yaml.YAMLError):
            return found[0]
        if in_recipe:
            return f"`{found[1]}: {value}`"
        return f"`--{found[1]} {shlex.quote(json.dumps(meant)) if isinstance(meant, dict) else value}`"

    return re.sub(r"`(\w+)=([^`]+)`", respelled, text)


def unknown_option(subject: str, name: str, known: Iterable[str], line: int | None = None, dashes: str = "") -> Mistake:
    """An option that does not exist, with the nearest one that does.

    Args:
        subject: The option as it was written.
        name: Its bare name.
        known: The bare names of all options.
        line: Line in the recipe.
        dashes: Prefix of option names where this one was written.
    """
    nearest = nearest_to(name, known)
    instead = f"Did you mean `{dashes}{nearest}`?" if nearest else "Remove it."
    if is_secret(nearest):  # then its value is none to show
        subject = f"`{dashes}{name}`"
    return Mistake(subject, f"there is no option `{name}`", instead, line=line, about=nearest)


def refuse(mistakes: Sequence[Mistake], prog: str, path: object = None) -> None:
    """Raises an error for all mistakes; does nothing if there are none.

    Args:
        mistakes: All that were found.
        prog: The command.
        path: The recipe, if there is one.

    Raises:
        ConfigurationError: One sentence for one mistake; for several their number, and a line for each.
    """
    if not mistakes:
        return
    help_line = f"`{prog} --help` explains every option."
    if len(mistakes) > 1:
        lines = [f"{f'line {m.line}, ' if m.line else ''}{m.subject}: {m.why}. {m.instead}".rstrip() for m in mistakes]
        where = f"{path}" if path and any(m.line for m in mistakes) else f"the options of `{prog}`"
        raise ConfigurationError(
            problem=f"Cannot read {where}: {len(mistakes)} options are wrong.",
            details="\n  ".join(lines),
            instead=help_line,
        )
    mistake = mistakes[0]
    place = f" in line {mistake.line} of {path}" if mistake.line else ""
    names = [*re.findall(r"`(?:--)?(\w+)", f"{mistake.subject} {mistake.instead}"), mistake.about]
    texts = {name: help_of(name) for name in names if help_of(name)}
    explained = " ".join(f"`{name}`: {text}" for name, text in texts.items())
    raise ConfigurationError(
        problem=replace(mistake, subject=mistake.subject + place).problem,
        details=mistake.details
        or explained
        or "The options are those of the command, DPOConfig and TrainingArguments.",
        instead=mistake.instead if mistake.instead and not mistake.about else f"{mistake.instead} {help_line}".strip(),
    )
