"""The measurements for a GPU at toy scale, so that they work the first time where there is one, and their table."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from support.store_cases import in_fork

ROOT = Path(__file__).resolve().parent.parent


def run_stage(stage: str, folder: Path) -> dict[str, Any]:
    sys.argv = ["gpu", stage, "--scale", "toy", "--out", str(folder)]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu"), run_name="__main__")
    record: dict[str, Any] = json.loads((folder / f"{stage}-cpu.json").read_text())
    assert ended.value.code == 0, record["failed"]
    return record


def test_stages_run_at_toy_scale(tmp_path: Path) -> None:
    stages = ("step-1b", "head")  # in one process, which loads all that they need
    steps, head = in_fork(lambda: [run_stage(stage, tmp_path) for stage in stages], patience_seconds=240)
    assert not steps["failed"] and not head["failed"] and steps["scale"] == head["scale"] == "toy"
    measured = [(row["reference"], row["shape"], sorted(row["tokens_per_second"])) for row in steps["results"]]
    kinds, shapes = (
        ("explicit", "precomputed", "synchronized"),
        ("chat", "instructions", "summarisation", "real-shaped"),
    )
    assert measured == [(kind, shape, ["tether", "trl"]) for kind in kinds for shape in shapes]
    assert all(row["largest_difference"]["tether"] < 1e-5 for row in head["results"]) and len(head["results"]) == 8
    assert "peak memory, host syncs" in steps["left_out"] and "liger" in head["left_out"]


STEP = {
    "shape": "chat",
    "reference": "implicit",
    "median_seconds": {"trl": 3.0, "tether": 1.0},
    "times_faster": {"trl": 3.0},
    "tokens_per_second": {"trl": 3000.4, "tether": 9000.2},
    "pairs_per_second": {"trl": 7.0, "tether": 21.04},
    "share_of_matmul_peak": 0.6,
    "peak_bytes": {"trl": 60 * 2**30, "tether": 30 * 2**30},
}
TABLE = """On a GPU, in bf16, 8 pairs a step, each step on new lengths:

| model | reference | pairs | Tether, tokens/s | TRL | times faster | Tether, pairs/s | share of matmul rate \
| peak memory, Tether / TRL |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 8 B, LoRA | implicit | chat | 9,000 | 3,000 | 3.0 | 21.0 | 60% | 30.0 / 60.0 GiB |

Measured 2026-01-02 on a card; torch 3.
"""


def test_the_table_of_a_gpu_is_there_when_something_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme._section("gpu", None) == ""
    record = {
        "date": "2026-01-02",
        "machine": {"device": "cuda", "name": "a card"},
        "versions": {"torch": "3"},
        "results": [STEP, {"reference/initial_gap": 0.0}],
    }
    (tmp_path / "step-8b-cuda.json").write_text(json.dumps(record))
    assert readme._section("gpu", None) == TABLE
