"""The exceptions of Tether.

Each says in one sentence what cannot be and why, then what to write instead, and is also the builtin a caller would
expect (`ValueError` for bad input, `RuntimeError` for a broken state). This module knows nothing else of the package.
"""

from typing import Any


class TetherError(Exception):
    """An error that says what to do about it.

    Args:
        problem: What cannot be and why, in one sentence that stands alone.
        instead: What to write or do instead.
        details: What else helps to see why: figures, rows, what a library said.
    """

    def __init__(self, problem: str, instead: str, details: str = "") -> None:
        super().__init__(problem, instead, details)
        self.problem = problem
        self.instead = instead
        self.details = details

    def __str__(self) -> str:
        return "\n  ".join(filter(None, (self.problem, self.details, self.instead)))


class ConfigurationError(TetherError, ValueError):
    """Options or arguments that cannot be honoured, alone or together. Raised at construction.

    Attributes:
        refusals: What is wrong with each (`tether.refusals.Refusal`), where that is known one by one.
    """

    refusals: tuple[Any, ...] = ()


class ArgumentTypeError(ConfigurationError, TypeError):
    """An argument of another kind than the one that is needed."""


class NotHereError(TetherError, AttributeError):
    """Something that TRL's trainer has under this name, and this one under another."""


class DataError(TetherError, ValueError):
    """A row that cannot be trained on. Names the row."""


class ReferenceModelError(TetherError, ValueError):
    """A reference that is not, or cannot be, the one that was meant."""


class ResumeError(TetherError, ValueError):
    """A checkpoint that does not belong to this trainer."""


class MissingLogProbsError(TetherError, LookupError):
    """A precomputed reference was asked for a response it does not hold, and has no source to compute it."""


class StoreError(TetherError, RuntimeError):
    """The log-prob store cannot be read or written safely."""


class InitialGapError(TetherError, ValueError):
    """A reference that was meant to be the initial policy, and does not score like it."""


class DriftError(TetherError, RuntimeError):
    """A reference that should stand still, and moved during training."""


class NotFiniteError(TetherError, FloatingPointError):
    """Training made a loss or a weight NaN or infinite. Names the step; nothing of it was saved."""


class MissingPackageError(TetherError, ImportError):
    """A library that this part of Tether needs, and Tether as a whole does not, is not installed."""
