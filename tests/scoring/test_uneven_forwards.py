"""Processes that make different numbers of forwards, as length-dependent rotary embeddings ask for, train together."""

from __future__ import annotations

from typing import Any

import pytest

from support.launch import launch
from support.ropes import ROPES
from support.runs import says_rounding

pytestmark = [pytest.mark.distributed, pytest.mark.numerics]
PAIRS_PER_STEP = 4


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (seen,) = launch("uneven_forwards.py", tmp_path_factory.mktemp("one") / "run", str(PAIRS_PER_STEP))
    return seen


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Had one process waited for a forward of the other, the launcher would run out of time."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return launch("uneven_forwards.py", folder, str(PAIRS_PER_STEP), num_processes=2)


@pytest.mark.parametrize("rope", ROPES)
def test_the_processes_make_different_numbers_of_forwards(rope: str, two: list[dict[str, Any]]) -> None:
    """Else nothing below would show anything."""
    first, second = (process[rope]["num_forwards"] for process in two)
    assert any(ours != theirs for ours, theirs in zip(first, second, strict=True)), (first, second)


@pytest.mark.parametrize("rope", ROPES)
def test_processes_with_different_numbers_of_forwards_train_as_one_process_does(
    rope: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    expected, found = one[rope]["steps"], two[0][rope]["steps"]
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not says_rounding(theirs, name):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (theirs["step"], name)
    assert two[0][rope]["weights"] == two[1][rope]["weights"] == pytest.approx(one[rope]["weights"], rel=1e-5)
