"""The newest versions of the libraries below that the tests ran with."""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import version

from packaging.version import Version

logger = logging.getLogger(__name__)

TESTED_UP_TO = {"torch": "2.15", "transformers": "5.24", "peft": "0.21", "accelerate": "1.15"}


@cache
def note_untested() -> None:
    """Logs one line, once, if a library is newer than any that the tests ran with."""
    newer = [
        f"{name} {version(name)} (tests: up to {tested})"
        for name, tested in TESTED_UP_TO.items()
        if Version(version(name)).release[:2] > Version(tested).release
    ]
    if newer:
        logger.warning("Newer than what Tether was tested with: %s.", ", ".join(newer))
