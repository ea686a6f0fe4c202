"""Keeps tokens and passwords out of what is shown, logged or saved.

Knows how they are called and written; knows no option of a run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = (
    r"(?:(?:(?:(?:hf|ms|om)[_-])?hub|hf|use_auth|auth|access|api|secret|push_to_hub)[_-])?token|(?:wandb[_-])?api[_-]?key|secret[_-](?:access[_-])?key|"
    "client[_-]secret|password"
)
_NAME = re.compile(_SECRET, re.IGNORECASE)
# As `--hub_token x`, `hub_token=x`, `"token": "x"`, `{token: x}` and "`hub_token: x`"; no sentence has one of these.
_WRITTEN = re.compile(
    rf"""(--(?:{_SECRET})[ =]\s*|\b(?:{_SECRET})=|["'](?:{_SECRET})["']:\s*|"""
    rf"""(?:`|\{{[^{{}}`]*?\b)(?:{_SECRET}):\s+)"""
    r"""("[^"]*"|'[^']*'|\[[^\]]*\]|[^\s,;`'"(){}\[\]]+)""",
    re.IGNORECASE,
)
_OF_HUB = re.compile(r"\bhf_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{8,}")
_NO_SECRETS = ("None", "null", "True", "true", "False", "false")


def without_secrets(text: str) -> str:
    """A text without the values of tokens and passwords in it."""

    def hidden(found: re.Match[str]) -> str:
        return found[0] if found[2] in _NO_SECRETS else f"{found[1]}<hidden>"

    return _OF_HUB.sub("<hidden>", _WRITTEN.sub(hidden, text))


def is_secret(name: str) -> bool:
    """Whether something of that name is a token or a password."""
    return _NAME.fullmatch(name) is not None


def masked(value: Any, name: str = "", *, leave_out: bool = False) -> Any:
    """A value with tokens and passwords masked by name, as `<HUB_TOKEN>`, in mappings and lists at any depth.

    Args:
        value: The value; it is not changed.
        name: Its name.
        leave_out: Have None in their place.
    """
    if isinstance(value, Mapping):
        return {key: masked(one, str(key), leave_out=leave_out) for key, one in value.items()}
    if isinstance(value, list):
        return [masked(one, name, leave_out=leave_out) for one in value]
    if isinstance(value, str) and is_secret(name):
        return None if leave_out else f"<{name.upper()}>"
    return without_secrets(value) if isinstance(value, str) else value
