"""What is written about the store is true: its pages run, its benchmark runs, its format is the one on disk."""

from __future__ import annotations

import doctest
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import tether.store.key
from support.store_cases import ME, SOURCE, fill
from tether.store import LogProbStore, schema

ROOT = SOURCE.parent
FORMAT = (SOURCE / "tether" / "store" / "FORMAT.md").read_text()


def run_benchmark(out: Path, num_pairs: int) -> dict[str, float]:
    script = ROOT / "benchmarks" / "bench_store.py"
    subprocess.run(
        [
            sys.executable,
            str(script),
            "--pairs",
            str(num_pairs),
            "--out",
            str(out),
            "--folder",
            str(out.parent),
        ],
        check=True,
        capture_output=True,
        env={"PYTHONPATH": str(SOURCE)},
    )
    report = json.loads(out.read_text())
    assert {"date", "machine", "versions", "settings", "results"} <= report.keys()
    results: dict[str, float] = report["results"]
    return results


def test_store_page_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "store.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            code, _, said = line.partition("# [")
            if said:  # an expression with its value; words after the value are for people
                value = repr(eval(code, names))
                assert f"[{said}".startswith(value), value
            else:
                exec(line, names)


def test_store_key_example_is_true() -> None:
    assert doctest.testmod(tether.store.key) == (0, 1)


def test_store_format_page_describes_the_tables_on_disk(tmp_path: Path) -> None:
    with LogProbStore(tmp_path / "store.sqlite") as store:
        fill(store, [0])
    with (
        closing(sqlite3.connect(tmp_path / "store.sqlite")) as db,
        closing(sqlite3.connect(":memory:")) as page,
    ):
        for statement in re.findall(r"CREATE[^;]*;", re.sub(r" *--.*", "", FORMAT)):
            page.execute(statement)
        for table in ("identities", "records", "probes"):
            assert db.execute(f"PRAGMA table_info({table})").fetchall() == (
                page.execute(f"PRAGMA table_info({table})").fetchall()
            )
        assert db.execute("PRAGMA user_version").fetchone() == (schema.SCHEMA_VERSION,)
        assert f"format version {schema.SCHEMA_VERSION}" in FORMAT.splitlines()[0]
        assert hex(db.execute("PRAGMA application_id").fetchone()[0]) in FORMAT


def test_store_is_readable_by_the_format_page_alone(tmp_path: Path) -> None:
    with LogProbStore(tmp_path / "store.sqlite") as store:
        fill(store, range(3), length=4)
        expected = {key: value.tolist() for batch in store.batches(ME) for key, value in batch}
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as db:
        rows = db.execute("SELECT key, log_probs FROM records").fetchall()
    assert {key: np.frombuffer(blob, "<f4").tolist() for key, blob in rows} == expected


def test_store_benchmark_runs(tmp_path: Path) -> None:
    results = run_benchmark(tmp_path / "store.json", 500)
    assert results["rows_written_per_second"] > 0 and results["bytes_per_pair"] > 2 * 300 * 4


@pytest.mark.slow
def test_store_memory_does_not_grow_with_its_rows(tmp_path: Path) -> None:
    results = run_benchmark(tmp_path / "store.json", 100_000)
    size = 100_000 * results["bytes_per_pair"]
    assert results["peak_growth_after_a_tenth_bytes"] < 48e6 < size / 4  # SQLite's page cache, 32 MB, fills up


def test_every_line_of_the_table_of_changes_has_its_test() -> None:
    page = (ROOT / "docs" / "store.md").read_text()
    table = page.partition("## Change X")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if (line.startswith("| ") and "reused" in line) or "again" in line]
    assert len(lines) >= 15
    for line in lines:
        file, name = re.search(r"`(\w+/test_\w+\.py): (\w+)`", line).groups()  # type: ignore[union-attr]
        assert f"def test_{name}(" in (ROOT / "tests" / file).read_text(), line
