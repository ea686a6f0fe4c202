"""The mistakes of a recipe or of a command line, told together.

Knows how one is told; what is one, the readers of recipes and words know.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import yaml

from tether.cli.options import help_of
from tether.errors import ConfigurationError
from tether.refusals import Refusal, nearest_to


@dataclass(frozen=True)
class Mistake(Refusal):
    """One of them.

    Attributes:
        line: Where in the recipe; None for a flag, or where several options are one mistake.
        about: Another option to explain than those in `subject`: the nearest to one that does not exist.
    """

    line: int | None = None
    about: str = ""


def as_written(text: str, *, in_recipe: bool) -> str:
    """A message of the library with its options as a recipe, or a command line, has them.

    >>> as_written("Set `sync_ref_model=True`, or leave `beta` out.", in_recipe=True)
    'Set `sync_ref_model: true`, or leave `beta` out.'
    """

    def respelled(found: re.Match[str]) -> str:
        try:
            value = yaml.safe_dump(ast.literal_eval(found[2]), default_flow_style=True).split("\n")[0]
        except (ValueError, SyntaxError, yaml.YAMLError):
            return found[0]
        return f"`{found[1]}: {value}`" if in_recipe else f"`--{found[1]} {value}`"

    return re.sub(r"`(\w+)=([^`]+)`", respelled, text)


def unknown_option(subject: str, name: str, known: Iterable[str], line: int | None = None, dashes: str = "") -> Mistake:
    """An option that does not exist, with the nearest that does.

    Args:
        subject: The option as it was written.
        name: Its bare name.
        known: The bare names of all options.
        line: Where in the recipe.
        dashes: What stands before an option's name where this one was written.
    """
    nearest = nearest_to(name, known)
    instead = f"Did you mean `{dashes}{nearest}`?" if nearest else "Take it out."
    return Mistake(subject, f"there is no option `{name}`", instead, line=line, about=nearest)


def refuse(mistakes: Sequence[Mistake], prog: str, path: object = None) -> None:
    """Refuses what has mistakes; does nothing without any.

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
