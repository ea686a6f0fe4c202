"""Where a model was loaded from, and can be loaded from again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Origin(NamedTuple):
    """Where a model can be had from again.

    Attributes:
        name: For messages.
        load: Gives the model.
        is_live: It is somebody's model in memory, which may change at any time.
    """

    name: str
    load: Callable[[], nn.Module]
    is_live: bool = False


def name_of(model: Any) -> str:
    """The path or name that a model was loaded by, or that names one; empty for a model created in memory."""
    return absolute(model) if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")


def absolute(name: str) -> str:
    """A folder by its whole path, since what is saved names it and is read from elsewhere; other names as they are."""
    return os.path.abspath(name) if os.path.isdir(name) else name
