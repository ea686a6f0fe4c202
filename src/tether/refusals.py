"""One form for everything that is refused: a refusal, and the error that reports all of them.

Knows no option. Loads no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import ConfigurationError


@dataclass(frozen=True)
class Refusal:
    """Something that cannot be used: `Cannot use {subject}: {why}.`

    Attributes:
        subject: What was written, in backticks.
        why: The reason, without a full stop.
        instead: What to write, in sentences; may be empty if `why` already says it.
        details: Further explanation, in sentences.
        option: Name of the option, if it is about one.
    """

    subject: str
    why: str
    instead: str = ""
    details: str = ""
    option: str = ""

    @property
    def problem(self) -> str:
        return f"Cannot use {self.subject}: {self.why}."


def of_option(name: str, value: Any, why: str, instead: str, beside: str = "", details: str = "") -> Refusal:
    """An option's value that is refused.

    Args:
        name: The option.
        value: Its value; an enumeration member is shown as its plain value.
        why: The reason, without a full stop.
        instead: What to write, in sentences.
        beside: What it cannot be combined with, after the option: "with `other=True`".
        details: Further explanation, in sentences.
    """
    subject = f"`{name}={shown(value)}`"
    return Refusal(f"{subject} {beside}".rstrip(), why, instead, details, name)


def shown(value: Any, most: int = 80) -> str:
    """A value in a message, shortened; an enumeration member as its plain value."""
    text = repr(getattr(value, "value", value))
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def refuse(
    found: Iterable[Refusal], error: type[ConfigurationError] = ConfigurationError, cause: Exception | None = None
) -> None:
    """Raises one error for everything that was found, once for each option; does nothing if there is nothing.

    Args:
        found: The refusals.
        error: The class of the error.
        cause: A library's error that was refused.

    Raises:
        ConfigurationError: With the refusals in `refusals`.
    """
    first: dict[str, Refusal] = {}
    for refusal in found:
        first.setdefault(refusal.option or refusal.subject, refusal)
    refusals = tuple(first.values())
    if not refusals:
        return
    if len(refusals) == 1:
        (one,) = refusals
        raised = error(one.problem, one.instead, one.details)
    else:
        raised = error(
            f"Cannot use {listed([one.subject for one in refusals])}, each for the reason below.",
            "Change each of them; nothing was done yet.",
            "\n  ".join(f"{one.subject}: {one.why}. {one.instead}" for one in refusals),
        )
    raised.refusals = refusals
    if cause is not None:
        raise raised from cause
    raise raised


def listed(names: Sequence[str], most: int = 4) -> str:
    """Lists names in words: "a, b and c", or "a, b and 5 more"."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


_ALSO_CALLED = {"dpo": "sigmoid"}  # by other tools


def nearest_to(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant: one that others call so, one with the same start, or a misspelt one;
    empty if there is none.

    Every word of a misspelt name is similar to one, at its place: `max_samples` is not `max_steps`, with half its
    letters.
    """
    names = list(known)
    if (called := _ALSO_CALLED.get(name)) in names:
        return str(called)
    begins = [other for other in names if other.startswith(name)]
    similar = [other for other in difflib.get_close_matches(name, names, n=10) if _is_misspelt(name, other)]
    return next(iter(begins or similar), "")


def _is_misspelt(name: str, other: str) -> bool:
    words, others = (re.split(r"[\W_]", text.lower()) for text in (name, other))
    if len(words) != len(others):  # one that is missing an underscore
        words, others = ["".join(words)], ["".join(others)]
    return _likeness(name, other) > 0.9 or all(_likeness(*pair) > 0.7 for pair in zip(words, others, strict=True))


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
