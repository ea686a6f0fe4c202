"""A fault that one process sees is raised by all of them: none goes on, and none waits for ever."""

from __future__ import annotations

from typing import Any

import pytest

from support.launch import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process raised; had one of them waited for the other, the launcher would run out of time."""
    return launch("verdicts.py", tmp_path_factory.mktemp("verdicts") / "run", num_processes=2)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("gap", "InitialGapError", "of the train set differently"),
        ("drift", "DriftError", "these of its tensors did: `model.embed_tokens.weight`"),
        ("other_weights", "ReferenceModelError", "process 1"),
        ("nan_weights", "ReferenceModelError", "`model.embed_tokens.weight` has NaN"),
        ("nan_loss", "NotFiniteError", "the loss of step 2 is NaN or infinite"),
        ("nan_weights_late", "NotFiniteError", "after step 2 its weight `model.embed_tokens.weight`"),
        ("resume", "ResumeError", "another reference"),
        ("missing_row", "MissingLogProbsError", "one of them the chosen response of row"),
    ],
)
def test_a_fault_on_one_process_is_raised_on_both(fault: str, error: str, says: str, two: list[dict[str, Any]]) -> None:
    for process in two:
        assert process[fault]["kind"] == error, process[fault]["message"]
        assert says in process[fault]["message"]
