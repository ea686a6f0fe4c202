"""The help of the verbs that take a recipe, and their shell completion, from the list of options.

Knows texts; loads no torch.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from tether.cli.options import OPTIONS

REFERENCE_TABLE = """\
Which reference? The policy is pulled back towards it. By default it is the
policy as it was at the start; ref_model names another model.

  options                   reference                 extra work, memory
  (none)                    explicit: a frozen copy   a forward pass per step,
                            of the policy             a copy of what trains
  ref_model                 explicit: that model      the same, that model
  lora_r, or a model with   implicit: the policy      a forward pass per step
  an adapter                with its adapter off
  precompute_ref_log_probs  precomputed: one of the   a forward pass per pair,
                            above, scored once and    once; later runs find
                            kept on disk              it
  sync_ref_model            synchronized (TR-DPO): a  a forward pass per step,
                            copy that moves towards   a copy of what trains
                            the policy
  reference_free            reference-free: log-prob  none
                            0 for every response
"""
_NAMES = {"boolean": "[BOOL]", "object": "JSON", "integer": "INT", "number": "FLOAT"}
_WIDTH, _COLUMN, _MOST_CHOICES = 79, 28, 7


# Click settings of a verb, and of one that also takes a recipe's options.
HELP_NAMES: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
WORDS: dict[str, Any] = {**HELP_NAMES, "ignore_unknown_options": True, "allow_extra_args": True}


class FixedHelpGroup(TyperGroup):
    """A group of verbs whose help is a given text."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(self.help)


class RecipeCommand(TyperCommand):
    """A verb that takes a recipe and all its options as flags, and parses them itself."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        options: Any = [param for param in self.params if param.name != "help"]
        own = [(f"{param.opts[0]} {param.metavar or ''}", param.help) for param in options]
        own += [("--config RECIPE.yaml", "The recipe, as a flag."), ("--traceback", "Show where an error was raised.")]
        usage = f"Usage: {ctx.command_path} [RECIPE.yaml] [--option value ...]\n\n{self.help}\n\n"
        formatter.write(usage + "\n".join([*_rows(own), *_headings()]))

    def get_params(self, ctx: Any) -> Any:
        """Its own options and, to complete words, those of a recipe."""
        return [*super().get_params(ctx), *(_completed() if ctx.resilient_parsing else ())]


def _headings() -> Iterator[str]:
    for group in dict.fromkeys(option["group"] for option in OPTIONS.values()):
        yield f"\n{group}:"
        if group == "the reference":
            yield textwrap.indent(REFERENCE_TABLE, "  ")
        named = {name: option for name, option in OPTIONS.items() if option["group"] == group}
        yield from _rows([(f"--{name} {_value_of(option)}", _text_of(option)) for name, option in named.items()])


def _rows(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    for head, text in rows:
        start = f"  {head}"
        if len(start) >= _COLUMN:
            yield start
            start = ""
        start = start.ljust(_COLUMN)
        yield textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=" " * _COLUMN)


def _value_of(option: Mapping[str, Any]) -> str:
    choices = [str(choice) for choice in option.get("enum", ()) if choice is not None]
    if 0 < len(choices) <= _MOST_CHOICES:
        return f"{{{','.join(choices)}}}"
    kind = option["type"][0]
    name = next((_NAMES[other] for other in option["type"] if other in _NAMES), "TEXT")
    return f"{name} ..." if kind == "array" else name


def _text_of(option: Mapping[str, Any]) -> str:
    default, text = option["default"], str(option["description"])
    if default in (None, False, "", []) or "Default:" in text:
        return text
    return f"{text} [{' '.join(map(str, default)) if isinstance(default, list) else default}]"


def _completed() -> Any:
    """The options of a recipe as typer's parameters."""

    def words(**values: Any) -> None: ...

    literal: Any = Literal
    flags: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        choices = option.get("enum") or option.get("items", {}).get("enum") or ()
        names = tuple(str(choice) for choice in choices if choice is not None)
        kind = bool if option["type"] == ["boolean"] else literal[names] if names else str
        flags[name] = Annotated[kind, typer.Option(f"--{name}", help=option["description"])]
    only = inspect.Parameter.KEYWORD_ONLY
    by_name = [inspect.Parameter(name, only, default=None, annotation=flag) for name, flag in flags.items()]
    words.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    words.__annotations__ = flags
    app = typer.Typer(add_completion=False)
    app.command()(words)
    return typer.main.get_command(app).params
