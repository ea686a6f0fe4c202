"""Two processes under DeepSpeed ZeRO train as one does: every reference, loaded whole and partitioned at birth."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import pytest

from support.launch import launch

KINDS = (
    "explicit",
    "named",
    "implicit",
    "continued",
    "saved",
    "precomputed",
    "precomputed-implicit",
    "synchronized",
    "synchronized-named",
    "hard",
)
MEANT_TO_DIFFER = ("named", "synchronized-named")
# <kind>/<stage>/<born or whole>: partitioned at birth, as a model loaded by its path is; or loaded whole, and
# partitioned when training starts. `persistent`: with DeepSpeed's default, by which small parameters (all of a tiny
# model) stay whole between passes, where they could hide an exchange.
QUICK = (
    *(f"{kind}/3/born" for kind in ("explicit", "implicit", "continued", "precomputed", "synchronized")),
    "explicit/3/whole",
    "synchronized/3/born/persistent",
    "synchronized-implicit/2/whole",  # an adapter follows where it stays whole; partitioned, it is refused
)
SLOW = (
    *(case for kind in KINDS for case in (f"{kind}/3/born", f"{kind}/3/whole", f"{kind}/2/whole") if case not in QUICK),
    "explicit/3/born/persistent",
    "continued/3/born/persistent",
    "explicit/3/born/checkpointed",  # activation checkpointing
    "saved/3/whole/checkpointed",
)
BF16 = (  # of DeepSpeed's own config
    "explicit/3/born/bf16",
    "explicit/2/whole/autocast",  # of DeepSpeed's engine, which no option of the trainer's says
)
SLOW_BF16 = ("explicit/2/whole/bf16", "continued/2/whole/bf16", "synchronized-implicit/2/whole/bf16")
RESUMED = ("synchronized/3/born", "synchronized/3/born/bf16")  # the latter keeps what bf16 rounds away
SLOW_RESUMED = (
    "explicit/3/born",
    "explicit/3/whole",
    "continued/3/born",
    "saved/3/whole",
    "precomputed/3/born",
    "synchronized/2/whole",
    "synchronized-named/3/born",
    "synchronized-implicit/2/whole",
)
BEST = ("synchronized/3/born",)
SLOW_BEST = ("synchronized-implicit/2/whole", "continued/3/born")
REFUSED = ("synchronized-implicit/3/born",)
SLOW_REFUSED = ("synchronized-implicit/3/whole",)


def runs_of(
    cases: tuple[str, ...], resumed: tuple[str, ...], best: tuple[str, ...], refused: tuple[str, ...]
) -> tuple[str, ...]:
    more = {"resume": resumed, "best": best, "refuse": refused}
    return (*cases, *(f"{case}:{what}" for what, each in more.items() for case in each))


QUICK_RUNS = runs_of((*QUICK, *BF16), RESUMED, BEST, REFUSED)
SLOW_RUNS = runs_of((*SLOW, *SLOW_BF16), SLOW_RESUMED, SLOW_BEST, SLOW_REFUSED)


def each_of(runs: Iterable[str]) -> list[Any]:
    """The runs as parameters of a test."""
    return [pytest.param(run, marks=pytest.mark.slow) if run in SLOW_RUNS else run for run in runs]


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.numerics,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="needs DeepSpeed: `pip install 'tether[deepspeed]' --no-build-isolation`",
    ),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same runs in one process without DeepSpeed, by kind."""
    cases = [f"{kind}/0/whole" for kind in (*KINDS, "synchronized-implicit")]
    (seen,) = launch("zero_runs.py", tmp_path_factory.mktemp("one") / "run", *cases)
    return {case.split("/")[0]: run for case, run in seen.items()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("zero_runs.py", tmp_path_factory.mktemp("quick") / "run", *QUICK_RUNS, num_processes=2)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("zero_runs.py", tmp_path_factory.mktemp("slow") / "run", *SLOW_RUNS, num_processes=2)


@pytest.fixture
def two(case: str, request: pytest.FixtureRequest) -> list[Any]:
    """What each process saw of the case."""
    processes = request.getfixturevalue("quick" if case in QUICK_RUNS else "slow")
    return [process[case] for process in processes]


CASES = (*QUICK, *SLOW)


def kind_of(case: str) -> str:
    return case.split("/")[0]


OWN_WEIGHTS = [case for case in CASES if kind_of(case) in ("explicit", "named")]
MOVING = [case for case in CASES if kind_of(case).startswith("synchronized") or kind_of(case) == "hard"]


@pytest.mark.parametrize("case", each_of((*CASES, *BF16, *SLOW_BF16)))
def test_the_first_loss_is_log_two_and_rewards_are_zero(case: str, two: list[dict[str, Any]]) -> None:
    first = two[0]["steps"][0]
    if kind_of(case) in MEANT_TO_DIFFER:
        assert first["reference/initial_gap"] > 0.1
        return
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # 3e-6 if precomputed under `OtherRounding(10)`
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-5), name
    assert first["reference/initial_gap"] < 1e-6


@pytest.mark.parametrize("case", each_of(CASES))
def test_two_processes_have_the_losses_of_one(case: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """In fp32, over four steps of AdamW at a large learning rate."""
    expected, found = one[kind_of(case)], two[0]
    assert len(found["steps"]) == len(expected["steps"]) == 4
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        for name in ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), (theirs["step"], name)
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-4)


@pytest.mark.parametrize("case", each_of(CASES))
def test_the_identity_is_that_of_the_whole_weights(case: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """A digest of empty or partitioned tensors would be another one, and the same for every model."""
    assert [process["identity"] for process in two] == [one[kind_of(case)]["identity"]] * 2


@pytest.mark.parametrize("case", each_of(CASES))
def test_weights_are_partitioned_where_they_should_be(case: str, two: list[dict[str, Any]]) -> None:
    kind, stage, loaded = case.split("/")[:3]
    for process in two:
        assert process["partitioned_at_birth"] == (loaded == "born")
        assert process["policy_is_sharded"] == (stage == "3")
        has_own_weights = kind in ("explicit", "named", "synchronized", "synchronized-named", "hard")
        assert process["reference_is_sharded"] == (stage == "3" and has_own_weights)


@pytest.mark.parametrize("case", each_of(OWN_WEIGHTS))
def test_training_does_not_move_a_explicit_reference(case: str, two: list[dict[str, Any]]) -> None:
    assert [process["drift"] for process in two] == [0, 0]


@pytest.mark.parametrize("case", each_of(MOVING))
def test_the_figures_of_a_synchronized_reference_are_those_of_one_process(
    case: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    """The distance from the start too, of a policy that could not run before it was partitioned."""
    for ours, theirs in zip(two[0]["steps"], one[kind_of(case)]["steps"], strict=True):
        for name in ("reference/syncs", "reference/distance", "reference/distance_from_start"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (theirs["step"], name)
    assert two[0]["steps"][-1]["reference/syncs"] >= 1
    assert two[0]["steps"][-1]["reference/distance_from_start"] > 1e-4


@pytest.mark.parametrize(
    "case", each_of(case for case in CASES if kind_of(case) in ("explicit", "named") or case in MOVING)
)
def test_an_exported_reference_is_the_whole_one(case: str, two: list[dict[str, Any]]) -> None:
    of_adapter = kind_of(case) == "synchronized-implicit"
    assert [process["export_differs_in"] for process in two] == [None if of_adapter else []] * 2


@pytest.mark.parametrize("case", each_of(f"{case}:refuse" for case in (*REFUSED, *SLOW_REFUSED)))
def test_an_adapter_that_would_follow_a_partitioned_policy_is_refused(case: str, two: list[str]) -> None:
    for error in two:
        assert "`sync_ref_model=True` with a PEFT model under ZeRO-3" in error


@pytest.mark.parametrize("case", each_of(case for case in CASES if case.startswith("precomputed")))
def test_each_row_is_computed_once(case: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert sum(process["num_computed"] for process in two) == one[kind_of(case)]["num_computed"] > 0


@pytest.mark.parametrize("case", each_of(f"{case}:resume" for case in (*RESUMED, *SLOW_RESUMED)))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case: str, two: list[bool]) -> None:
    assert two == [True, True]


@pytest.mark.parametrize("case", each_of(f"{case}:best" for case in (*BEST, *SLOW_BEST)))
def test_the_best_checkpoint_comes_with_its_reference(case: str, two: list[list[float]]) -> None:
    for first, last, loaded in two:
        assert loaded == pytest.approx(first, abs=1e-6) and abs(first - last) > 1e-4
