"""Turns what a library refuses during setup into errors of Tether.

A wrong option of transformers or PEFT is a mistake like any other. Once training has begun, an error keeps its
traceback: repeating the run to see it would be too expensive.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from tether.errors import ConfigurationError, TetherError, said

_LIBRARIES = ("transformers", "peft", "accelerate", "huggingface_hub", "tokenizers", "bitsandbytes")
_REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, OSError)


@contextmanager
def report_library_errors(prog: str, applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """While open, turns an error raised by a library into a `ConfigurationError`.

    Args:
        prog: The command, for the message.
        applies: Whether the run is still being set up.

    Raises:
        ConfigurationError: With the library's message.
    """
    try:
        yield
    except TetherError:
        raise
    except _REFUSALS as error:
        library = _raised_in(error.__traceback__)
        is_refusal = library in _LIBRARIES or (library == "torch" and isinstance(error, ValueError))
        if not is_refusal or not applies():
            raise
        first, _, rest = said(error, 1000).partition(". ")
        raise ConfigurationError(
            problem=f"Cannot set up the run: {library} refuses an option ({first}).",
            details=rest and f"{rest}.",
            instead=f"Change the option that this is about: `{prog} --help` lists them, and --traceback shows where it "
            "was raised.",
        ) from error


def _raised_in(trace: TracebackType | None) -> str | None:
    """The package of the innermost frame outside the standard library."""
    package = None
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        package = package if name in sys.stdlib_module_names else name
        trace = trace.tb_next
    return package
