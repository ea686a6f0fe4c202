"""Where a model can be loaded from again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Origin(NamedTuple):
    """Where a model can be loaded from again, and its name for messages."""

    name: str
    load: Callable[[], nn.Module]
