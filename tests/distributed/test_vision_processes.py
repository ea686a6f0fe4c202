"""Two processes train a vision-language model as one does with twice the batch, also where one sees no image."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from support.launch import launch
from support.runs import says_rounding
from support.scripts.vision_processes import KINDS

pytestmark = [pytest.mark.distributed, pytest.mark.numerics]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("vision")
    (one,) = launch("vision_processes.py", folder / "one")
    return one, launch("vision_processes.py", folder / "two", num_processes=2)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_steps_of_one(kind: str, seen: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, two = seen
    assert len(two) == 2
    expected, found = one[kind]["steps"], two[0][kind]["steps"]
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if not says_rounding(theirs, name):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (theirs["step"], name)
    assert max(step["loss"] for step in expected) - min(step["loss"] for step in expected) > 1e-2


# ---- sharded -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed, which is not installed")
    folder = tmp_path_factory.mktemp("vision-zero")
    (one,) = launch("vision_zero.py", folder / "one")
    return one, launch("vision_zero.py", folder / "two", num_processes=2)


@pytest.mark.parametrize("kind", ["explicit", "implicit", "precomputed"])
def test_zero_3_has_the_losses_of_one_process(kind: str, sharded: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    one, two = sharded
    assert two[0][kind]["sharded"] and not one[kind]["sharded"]
    losses = [[step["loss"] for step in seen[kind]["steps"]] for seen in (one, two[0])]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[0]) == 3
    assert max(losses[0]) - min(losses[0]) > 1e-3


def test_a_sharded_vision_tower_that_one_process_would_not_use_is_refused_on_all(
    sharded: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    _, two = sharded
    assert all("images on one process and none on another" in told for seen in two for told in seen["mixed"])
