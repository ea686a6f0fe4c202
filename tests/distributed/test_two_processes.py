"""Two processes train as one process with twice the batch does; each row is scored once between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.runs import says_rounding
from support.tiny import tiny_pairs

SCRIPT = Path(__file__).parents[1] / "support" / "scripts" / "two_processes.py"
KINDS = (
    "explicit",
    "implicit",
    "precomputed",
    "synchronized",
    "synchronized, implicit",
    "accumulated",
    "streamed",
    "ragged",
    "ragged, accumulated",
    "ragged, reward shift",
    "ragged, streamed",
    "ragged, streamed, accumulated",
    "streamed in shards",
)
PAIRS_PER_STEP = 4
# Other batches round otherwise: after six steps rewards part by 7e-5 where the processes run under `OtherRounding(10)`.
CLOSE = {"rel": 1e-4, "abs": 1e-4}

pytestmark = [pytest.mark.distributed, pytest.mark.numerics]


def run(command: list[str], folder: Path) -> list[dict[str, Any]]:
    """Runs the script; returns what each of its processes saw."""
    folder.mkdir()
    root = SCRIPT.parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root.parent / "src"), str(root)]),
        "TETHER_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [*command, str(SCRIPT), str(folder), str(PAIRS_PER_STEP)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("process-*.json"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (seen,) = run([sys.executable], tmp_path_factory.mktemp("one") / "run")
    return seen


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return run(launcher, tmp_path_factory.mktemp("two") / "run")


def test_the_launcher_started_two_processes(two: list[dict[str, Any]]) -> None:
    assert len(two) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_and_metrics_of_one_with_twice_the_batch(
    kind: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    expected, found = one[kind]["steps"], two[0][kind]["steps"]
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not says_rounding(theirs, name):
                assert ours[name] == pytest.approx(value, **CLOSE), (theirs["step"], name)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_evaluate_each_pair_once(kind: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """7 pairs in batches of 2 on 2 processes: none counts twice because batches had to be evened, in streams too."""
    for name, value in one[kind]["evaluation"].items():
        if any(word in name for word in ("runtime", "per_second", "preparation")):
            continue
        assert two[0][kind]["evaluation"][name] == pytest.approx(value, **CLOSE), name


def test_two_processes_precompute_each_row_once(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    total = sum(process["precomputed"]["num_computed"] for process in two)
    assert total == one["precomputed"]["num_computed"] > 0
    assert all(process["precomputed"]["num_passes"] > 0 for process in two), "both take part"


@pytest.mark.parametrize("way", ["memory", "disk", "stream", "lazy"])
def test_two_processes_fill_one_store_together_each_row_once(
    way: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    shares = [process["stored"][way] for process in two]
    total = one["stored"][way]["num_computed"]
    assert total == len(_distinct_responses())
    assert sum(share["num_computed"] for share in shares) == total, "each once, by one of the two"
    assert all(0 < share["num_computed"] < total for share in shares), "both take part"
    assert all(share["num_in_store"] == total for share in shares), "in one store"
    assert all(share["num_passes_again"] == 0 for share in shares), "which serves both"


def _distinct_responses() -> set[tuple[str, str]]:
    return {(row["prompt"], row[side]) for row in tiny_pairs(16) for side in ("chosen", "rejected")}


@pytest.mark.parametrize("process", [0, 1])
def test_two_processes_resume_bit_for_bit(process: int, two: list[dict[str, Any]]) -> None:
    assert two[process]["resumed"] == [True, True, True]


@pytest.mark.parametrize("process", [0, 1])
def test_two_processes_load_the_best_adapter_with_its_reference(process: int, two: list[dict[str, Any]]) -> None:
    first, last, loaded = two[process]["best"]
    assert loaded == pytest.approx(first, abs=1e-6) and abs(first - last) > 1e-4


@pytest.mark.parametrize("kind", ["metrics", "metrics, streamed"])
def test_compute_metrics_gets_every_row_of_two_processes_once(kind: str, one: Any, two: Any) -> None:
    assert one[kind]["eval_rows"] == 14
    for seen in two:
        for name in ("eval_rows", "eval_ids", "eval_logits"):
            assert seen[kind][name] == pytest.approx(one[kind][name], rel=1e-5), name
