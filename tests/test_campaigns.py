"""The campaigns of kills and damages run, count, and can be gone on with; `make campaigns` runs the full numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support.store_cases import in_fork

ROOT = Path(__file__).resolve().parent.parent
CAMPAIGNS = ROOT / "benchmarks" / "campaigns"


def run_campaigns(results: Path) -> list[dict[str, Any]]:
    """The counts after two trials, and after two more; then the code is another."""
    tempfile.tempdir = str(results)
    sys.path.insert(0, str(CAMPAIGNS))
    spec = importlib.util.spec_from_file_location("campaigns", CAMPAIGNS / "__main__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["campaigns"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.harness.RESULTS = results
    found = []
    for _ in range(2):
        module.run_campaign(module._read_counts(False), "flipped bits in exports", 0.01, [])
        found += counts_in(results)
    module._code = lambda: "another"
    with pytest.raises(SystemExit, match="--anew"):
        module._read_counts(False)
    assert module._read_counts(True) == []
    return found


def counts_in(results: Path) -> list[dict[str, Any]]:
    counts: list[dict[str, Any]] = json.loads((results / "campaigns-cpu.json").read_text())["results"]
    return counts


def test_a_campaign_goes_on_with_the_next_trial_and_not_under_other_code(tmp_path: Path) -> None:
    counts = in_fork(lambda: run_campaigns(tmp_path))  # they change their process for good
    assert [count["trials"] for count in counts] == [count["units"] for count in counts] == [2, 4]
    assert [sum(count["outcomes"].values()) for count in counts] == [2, 4]
    assert not counts[-1]["failures"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_trial_of_a_share_of_every_campaign_is_silent_raw_or_lost(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(CAMPAIGNS), "--share", "0.02", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert len(counts_in(tmp_path)) == 7
