"""What cannot be, said in one form: a refusal, and the error that tells all of them.

Knows no option. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tether.errors import ConfigurationError


@dataclass(frozen=True)
class Refusal:
    """One thing that cannot be: `Cannot use {subject}: {why}.`

    Attributes:
        subject: What was written, in backticks.
        why: Why it cannot be, without a stop.
        instead: What to write, in sentences.
        details: What else helps to see why, in sentences.
        option: The option's name, where it is about one.
    """

    subject: str
    why: str
    instead: str
    details: str = ""
    option: str = ""

    @property
    def problem(self) -> str:
        return f"Cannot use {self.subject}: {self.why}."


def of_option(name: str, value: Any, why: str, instead: str, beside: str = "", details: str = "") -> Refusal:
    """An option's value that cannot be.

    Args:
        name: The option.
        value: Its value; of an enumeration, the plain value is shown.
        why: Why it cannot be, without a stop.
        instead: What to write, in sentences.
        beside: What it cannot stand beside, after the option: "with `other=True`".
        details: What else helps to see why, in sentences.
    """
    subject = f"`{name}={getattr(value, 'value', value)!r}`"
    return Refusal(f"{subject} {beside}".rstrip(), why, instead, details, name)


def refuse(found: Iterable[Refusal], error: type[ConfigurationError] = ConfigurationError) -> None:
    """Raises one error for everything that was found, once for each subject; does nothing if there is nothing.

    Raises:
        ConfigurationError: Its `refusals` are what was found.
    """
    first: dict[str, Refusal] = {}
    for refusal in found:
        first.setdefault(refusal.subject, refusal)
    refusals = tuple(first.values())
    if not refusals:
        return
    if len(refusals) == 1:
        (one,) = refusals
        raised = error(one.problem, one.instead, one.details)
    else:
        raised = error(
            f"Cannot use {len(refusals)} of the options and arguments: each line says why, and what to write.",
            "Change them all; nothing was done yet.",
            "".join(f"\n    {one.subject}: {one.why}. {one.instead}" for one in refusals).lstrip(),
        )
    raised.refusals = refusals
    raise raised
