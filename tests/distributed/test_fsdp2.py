"""References beside a policy sharded by `fully_shard` in two processes, without the trainer.

Each loop is compared with the same one on whole weights: losses and, after the head was scored in tiles under
sharding, gradients.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from support.launch import launch

CASES = (
    "explicit/plain",
    "explicit/tied",
    "explicit/head",
    "explicit/tail",
    "explicit/checkpointed",
    "implicit/plain",
    "implicit/tied",
    "continued/plain",
    "saved/plain",
    "continued-saved/plain",
    "precomputed/plain",
    "synchronized/plain",
    "synchronized/bf16",
    "synchronized/tied",
    "hard/plain",
)
MOVING = ("synchronized", "hard")
# How far gradients may be from the unsharded ones, relative to the largest element: they are summed in another order.
GRADIENT_ERROR = {"bf16": 0.1}
LOSS_ERROR = {"bf16": 0.05}

pytestmark = [pytest.mark.distributed, pytest.mark.numerics]
both_orders = pytest.mark.parametrize("built", ["before", "after"])  # the reference, before or after sharding


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("fsdp2_runs.py", tmp_path_factory.mktemp("fsdp2") / "run", *CASES, "followed/plain", num_processes=2)


@both_orders
@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_is_log_two(case: str, built: str, two: list[dict[str, Any]]) -> None:
    assert two[0][case][built]["losses"][0] == pytest.approx(math.log(2), abs=1e-6)


@both_orders
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_whole_weights(case: str, built: str, two: list[dict[str, Any]]) -> None:
    error = LOSS_ERROR.get(case.split("/")[1], 1e-4)
    assert two[0][case][built]["losses"] == pytest.approx(two[0][case]["expected"], rel=error, abs=error)


@both_orders
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_whole_weights(case: str, built: str, two: list[dict[str, Any]]) -> None:
    """Of every tensor that trains, the head's and tied embeddings among them."""
    assert two[0][case][built]["gradient_error"] < GRADIENT_ERROR.get(case.split("/")[1], 1e-4)


@both_orders
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_reference_has_the_identity_of_the_whole_one(
    case: str, built: str, two: list[dict[str, Any]]
) -> None:
    assert all(process[case][built]["same_identity"] for process in two)


@both_orders
@pytest.mark.parametrize("case", CASES)
def test_training_changes_no_tensor_of_a_explicit_reference(case: str, built: str, two: list[dict[str, Any]]) -> None:
    assert [process[case][built]["changed"] for process in two] == [[], []]


@both_orders
@pytest.mark.parametrize("case", CASES)
def test_a_reference_survives_its_checkpoint(case: str, built: str, two: list[dict[str, Any]]) -> None:
    assert all(process[case][built]["survives_checkpoint"] for process in two)


@both_orders
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("implicit", "continued", "saved"))])
def test_trained_adapters_survive_their_checkpoint(case: str, built: str, two: list[dict[str, Any]]) -> None:
    assert [process[case][built]["adapters_survive"] for process in two] == [True, True]


def test_the_copy_of_a_sharded_policy_is_sharded(two: list[dict[str, Any]]) -> None:
    shown = {case: two[0][case]["after"]["reference_is_sharded"] for case in CASES}
    assert all(sharded for case, sharded in shown.items() if case.startswith(("explicit", *MOVING)))


@both_orders
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("explicit", *MOVING))])
def test_an_exported_reference_is_the_whole_one(case: str, built: str, two: list[dict[str, Any]]) -> None:
    assert [process[case][built]["exports_itself"] for process in two] == [True, True]


@both_orders
def test_an_adapter_that_would_follow_a_sharded_policy_is_refused(built: str, two: list[dict[str, Any]]) -> None:
    """At construction, or, if the policy is sharded after it, at the first sync."""
    for process in two:
        assert "`sync_ref_model=True` with a PEFT model under ZeRO-3 or FSDP2" in process["followed/plain"][built]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(MOVING)])
def test_parts_move_as_the_whole_reference_of_the_same_policy_does(case: str, two: list[dict[str, Any]]) -> None:
    """Bit for bit: a reference built before the policy was sharded stays whole."""
    assert two[0][case]["after"]["losses"] == two[0][case]["before"]["losses"]
