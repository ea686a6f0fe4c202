"""Where a model was loaded from, and can be loaded from again."""

from __future__ import annotations

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
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")
