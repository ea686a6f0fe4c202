"""The tests on this device: those marked `gpu`, then the fast ones of the folders that compute on it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness
from stage import Stage

SUITES = {
    "marked gpu": ["-m", "gpu", "tests"],
    "scoring": ["tests/scoring"],
    "references": ["tests/reference"],
    "trainer": ["tests/trainer"],
}
TOY = {"marked gpu": ["-m", "gpu", "tests/scoring"], "scoring": ["tests/scoring/test_attention.py"]}


def tests(stage: Stage) -> None:
    """Counts by outcome, and why each failure failed."""
    for name, arguments in (TOY if stage.toy else SUITES).items():
        stage.measure(name, partial(_run, stage, name, arguments))


def _run(stage: Stage, name: str, arguments: list[str]) -> dict[str, Any]:
    workers = "0" if stage.toy else "8"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "junit.xml")
        limits = ["--timeout=60", f"--session-timeout={max(1, int(stage.seconds_left))}"]
        options = ["-q", "-n", workers, *limits, f"--junitxml={path}", "-p", "no:cacheprovider"]
        done = subprocess.run([sys.executable, "-m", "pytest", *options, *arguments], cwd=harness.ROOT)
        suite = ElementTree.parse(path).getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    faults = {
        f"{case.get('classname')}.{case.get('name')}": (fault.get("message") or "")[:300]
        for case in suite
        for fault in case
        if fault.tag in ("failure", "error")
    }
    return {"suite": name, "exit": done.returncode, "seconds": float(suite.attrib["time"]), **counts, "faults": faults}
