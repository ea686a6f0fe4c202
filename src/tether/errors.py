"""The exceptions of Tether.

Each states what is wrong and why, then what to do instead, and is also the builtin that a caller would expect
(`ValueError` for bad input, `RuntimeError` for a broken state). None shows a token or a password.
"""

import re
import textwrap
from typing import Any

from tether.masking import without_secrets


class TetherError(Exception):
    """An error that explains what to do about it.

    Args:
        problem: What is wrong and why, in one sentence that stands alone.
        instead: What to write or do instead.
        details: Further explanation: numbers, rows, a library's message.
    """

    def __init__(self, problem: str, instead: str = "", details: str = "") -> None:
        # torch makes the error of a DataLoader's worker anew, from its traceback alone: its last lines are the error.
        told = re.search(r"\ntether\.errors\.\w+: (.*)", problem, re.DOTALL) if problem.startswith("Caught ") else None
        if told is not None:
            problem, *further, instead = told[1].rstrip().split("\n  ")
            details = "\n  ".join(further)
        problem, instead, details = map(without_secrets, (problem, instead, details))
        super().__init__(problem, instead, details)
        self.problem = problem
        self.instead = instead
        self.details = details

    def __str__(self) -> str:
        return "\n  ".join(filter(None, (self.problem, self.details, self.instead)))


def said(error: BaseException, most: int = 300) -> str:
    """What a library's error says, in one line without a full stop; some list every file, or a whole text."""
    words = textwrap.shorten(str(error), most, placeholder=" ...").rstrip(".! ") or type(error).__name__
    return words if len(words) <= most else f"{words[:most]} ..."  # one long word is not shortened


class ConfigurationError(TetherError, ValueError):
    """Options or arguments that cannot be used, alone or together. Raised at construction.

    Attributes:
        refusals: Each option or argument that is refused (`tether.refusals.Refusal`), if known individually.
    """

    refusals: tuple[Any, ...] = ()


class ArgumentTypeError(ConfigurationError, TypeError):
    """An argument of the wrong type."""


class NotHereError(TetherError, AttributeError):
    """Something that is not under this name: TRL's trainer has it, or it was not asked for."""


class NotInBatchError(TetherError, KeyError):
    """A tensor of a padded batch, or a column of the rows, which a batch does not have."""


class DataError(TetherError, ValueError):
    """A row that cannot be trained on. Names the row."""


class ReferenceModelError(TetherError, ValueError):
    """A reference that is not, or cannot be, the intended one."""


class ResumeError(TetherError, ValueError):
    """A checkpoint that does not belong to this trainer."""


class MissingLogProbsError(TetherError, LookupError):
    """A precomputed reference was asked for a response it does not hold, and has no source to compute it."""


class StoreError(TetherError, RuntimeError):
    """The log-prob store cannot be read or written safely."""


class InitialGapError(TetherError, ValueError):
    """A reference that should be the initial policy, but does not score like it."""


class DriftError(TetherError, RuntimeError):
    """A reference that should not change, but did during training."""


class NotFiniteError(TetherError, FloatingPointError):
    """Training made a loss or a weight NaN or infinite. Names the step; nothing from it was saved."""


class MissingPackageError(TetherError, ImportError):
    """A library is missing that this part of Tether needs, but Tether as a whole does not."""
