"""The contract of a reference, as tests that you can run on a reference of your own.

For test suites: needs pytest, which Tether itself does not. Nothing else in the package imports it.
"""

from importlib.util import find_spec

from tether.errors import MissingPackageError


def _has_pytest() -> bool:
    try:
        return find_spec("pytest") is not None
    except ValueError:  # a module without a spec, or a blocked one
        return False


if not _has_pytest():
    raise MissingPackageError(
        problem="Cannot import `tether.testing`: its contract suites are pytest tests, and pytest is not installed.",
        details="Tether does not need pytest to train, so a plain install leaves it out.",
        instead="Install it where you run the tests: `pip install pytest`.",
    )

import pytest  # noqa: E402

# Before the import, so that a failing clause shows the values it compared.
pytest.register_assert_rewrite("tether.testing.contract")

from tether.testing.contract import ReferenceContract, Subject  # noqa: E402
from tether.testing.observation import bits, random_state, same_bits, traces  # noqa: E402
from tether.testing.oracle import naive_log_probs_of  # noqa: E402

__all__ = ["ReferenceContract", "Subject", "bits", "naive_log_probs_of", "random_state", "same_bits", "traces"]
