"""What the log-prob store costs: rows written and looked up a second, bytes a pair, memory.

Claim: a million pairs go in and come out with memory that does not grow with their number, and reading takes
under 1 % of a training step. The scores are synthetic; nothing here runs a model.

    python benchmarks/bench_store.py --pairs 100000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from tether.store import LogProbStore, content_key

IDENTITY = "synthetic-reference"
WRITE_BATCH, READ_PAIRS, NUM_READS = 128, 32, 1000
POOL = -np.random.default_rng(0).random(1 << 20, dtype=np.float32)


def key_of(row: int) -> bytes:
    return blake2b(row.to_bytes(8, "little"), digest_size=16).digest()


def log_probs_of(row: int, mean_tokens: int) -> np.ndarray:
    """Lengths evenly from half the mean to one and a half of it."""
    length = mean_tokens // 2 + row * 7919 % (mean_tokens + 1)
    start = row * 104729 % (len(POOL) - length)
    return POOL[start : start + length]


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def batches(num_rows: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def write(store: LogProbStore, num_rows: int, mean_tokens: int) -> dict[str, float]:
    """Every row, in batches as a scoring pass hands them over. The making of the rows is not counted."""
    seconds, peak_at_tenth = 0.0, 0
    for rows in batches(num_rows, WRITE_BATCH):
        keys, values = [key_of(row) for row in rows], [log_probs_of(row, mean_tokens) for row in rows]
        start = time.perf_counter()
        store.put(IDENTITY, keys, values)
        seconds += time.perf_counter() - start
        if not peak_at_tenth and rows.stop >= num_rows // 10:
            peak_at_tenth = peak_bytes()
    return {
        "write_seconds": seconds,
        "rows_written_per_second": num_rows / seconds,
        "peak_at_a_tenth_bytes": peak_at_tenth,
    }


def find_missing(store: LogProbStore, num_rows: int, *, verify: bool) -> float:
    """Rows a second of the question that opens a run: which rows still have to be scored?"""
    seconds = 0.0
    for rows in batches(num_rows, 10_000):
        keys = [key_of(row) for row in rows]
        start = time.perf_counter()
        assert not store.missing(IDENTITY, keys, [1] * len(keys), verify=verify)
        seconds += time.perf_counter() - start
    return num_rows / seconds


def read(store: LogProbStore, num_rows: int, mean_tokens: int) -> dict[str, float]:
    """Random batches as training asks for them."""
    draw, times = np.random.default_rng(1), []
    for _ in range(NUM_READS):
        rows = draw.integers(0, num_rows, 2 * READ_PAIRS).tolist()
        keys, truth = [key_of(row) for row in rows], [log_probs_of(row, mean_tokens) for row in rows]
        start = time.perf_counter()
        answers = store.get(IDENTITY, keys, [len(value) for value in truth])
        times.append(time.perf_counter() - start)
        assert all(np.array_equal(a, b) for a, b in zip(answers, truth, strict=True) if a is not None)
        assert all(answer is not None for answer in answers)
    median = statistics.median(times)
    return {
        "read_median_seconds": median,
        "read_slowest_seconds": max(times),
        "rows_read_per_second": 2 * READ_PAIRS / median,
        "shortest_step_with_reading_under_1_percent_seconds": 100 * median,
    }


def read_all(store: LogProbStore, num_rows: int) -> float:
    start = time.perf_counter()
    assert sum(len(batch) for batch in store.batches(IDENTITY)) == num_rows
    return num_rows / (time.perf_counter() - start)


def key_seconds() -> float:
    prompt, response = list(range(200)), list(range(100))
    start = time.perf_counter()
    for _ in range(10_000):
        content_key(prompt, response)
    return (time.perf_counter() - start) / 10_000


def machine() -> dict[str, Any]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "device": "cpu",
        "name": model,
        "threads": 1,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def measure(folder: Path, num_pairs: int, mean_tokens: int) -> dict[str, float]:
    num_rows, path = 2 * num_pairs, folder / "store.sqlite"
    results: dict[str, float] = {"baseline_bytes": peak_bytes(), "key_seconds_300_tokens": key_seconds()}
    with LogProbStore(path) as store:
        results |= write(store, num_rows, mean_tokens)
    results["bytes_per_pair"] = path.stat().st_size / num_pairs
    with LogProbStore(path) as store:
        results |= read(store, num_rows, mean_tokens)
        results["rows_checked_per_second"] = find_missing(store, num_rows, verify=False)
        results["rows_verified_per_second"] = find_missing(store, num_rows, verify=True)
        results["rows_iterated_per_second"] = read_all(store, num_rows)
    results |= share_of_step(results["read_median_seconds"])
    results["peak_bytes"] = peak_bytes()
    results["peak_growth_after_a_tenth_bytes"] = results["peak_bytes"] - results["peak_at_a_tenth_bytes"]
    return results


def shortest_step() -> dict[str, Any] | None:
    """The fastest training step that benchmarks/bench_step.py has measured on this kind of machine."""
    path = Path(__file__).parent / "results" / "step-cpu.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    step = min(record["results"], key=lambda result: result["median_seconds"]["tether"])
    return step if record["machine"]["name"] == machine()["name"] else None


def share_of_step(read_seconds: float) -> dict[str, float]:
    """The share of that step that reading its responses takes."""
    step = shortest_step()
    if step is None:
        return {}
    reading = read_seconds * 2 * step["pairs"] / (2 * READ_PAIRS)
    return {"share_of_a_training_step": reading / step["median_seconds"]["tether"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="number of pairs (default: a million)")
    parser.add_argument("--tokens", type=int, default=300, help="mean number of response tokens")
    parser.add_argument("--folder", type=Path, help="where the store lies meanwhile (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), options.pairs, options.tokens)
    report = {
        "benchmark": "store",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {
            "numpy": np.__version__,
            "sqlite": sqlite3.sqlite_version,
        },
        "settings": {
            "num_pairs": options.pairs,
            "mean_response_tokens": options.tokens,
            "rows_per_write": WRITE_BATCH,
            "rows_per_read": 2 * READ_PAIRS,
        },
        "results": {name: float(f"{value:.4g}") for name, value in results.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["results"], indent=2))


if __name__ == "__main__":
    main()
