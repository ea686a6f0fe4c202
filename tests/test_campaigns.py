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
CHEAP = "flipped bits in exports"


def add_two_trials(results: Path) -> None:
    """In this process, which has everything imported."""
    tempfile.tempdir = str(results)
    sys.path.insert(0, str(CAMPAIGNS))
    spec = importlib.util.spec_from_file_location("campaigns", CAMPAIGNS / "__main__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["campaigns"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.harness.RESULTS = results
    module.run_campaign(module._read_counts(False), CHEAP, 0.01, [])


def counts_in(results: Path) -> list[dict[str, Any]]:
    counts: list[dict[str, Any]] = json.loads((results / "campaigns-cpu.json").read_text())["results"]
    return counts


def test_a_campaign_goes_on_with_the_next_trial(tmp_path: Path) -> None:
    for times in (1, 2):
        in_fork(lambda: add_two_trials(tmp_path))  # it changes its process for good
        (count,) = counts_in(tmp_path)
        assert count["trials"] == count["units"] == sum(count["outcomes"].values()) == 2 * times
        assert not count["failures"]


def test_counts_of_other_code_are_not_added_to(tmp_path: Path) -> None:
    in_fork(lambda: add_two_trials(tmp_path))
    path = tmp_path / "campaigns-cpu.json"
    path.write_text(path.read_text().replace(counts_in(tmp_path)[0]["code"], "another"))
    with pytest.raises(SystemExit, match="--anew"):
        in_fork(lambda: add_two_trials(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_trial_of_a_share_of_every_campaign_is_silent_raw_or_lost(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(CAMPAIGNS), "--share", "0.02", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert len(counts_in(tmp_path)) == 7
