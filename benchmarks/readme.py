"""Writes the measured tables of README.md anew from benchmarks/results, between their markers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    written = re.sub(
        r"(<!-- measured:([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + _section(match[2]) + match[3],
        text,
        flags=re.DOTALL,
    )
    if "--check" in sys.argv:
        return int(written != text)
    readme.write_text(written)
    return 0


def _section(name: str) -> str:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return "Not measured yet.\n"
    record = json.loads(path.read_text())
    machine = record["machine"]
    where = f"{machine['name']}, {machine['threads']} threads" if machine["device"] == "cpu" else machine["name"]
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    table = _TABLES[record["benchmark"]](record["results"])
    return f"{table}\nMeasured {record['date']} on {where}; {versions}.\n"


def _step(results: list[dict[str, Any]]) -> str:
    lines = [
        "| pairs | reference | Tether | TRL | times faster | peak memory, Tether / TRL | share of matmul peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        seconds, peak = row["median_seconds"], row.get("peak_bytes")
        memory = f"{peak['tether'] / 2**30:.1f} / {peak['trl'] / 2**30:.1f} GiB" if peak else ""
        lines.append(
            f"| {row['shape']} | {row['reference']} | {seconds['tether']:.2f} s | {seconds['trl']:.2f} s "
            f"| {row['times_faster']['trl']:.1f} | {memory} | {row['share_of_matmul_peak']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _precompute(results: list[dict[str, Any]]) -> str:
    lines = ["| pairs | Tether | TRL | times faster |", "| --- | --- | --- | --- |"]
    for row in results:
        seconds = row["median_seconds"]
        lines.append(
            f"| {row['shape']} | {seconds['tether']:.2f} s | {seconds['trl']:.2f} s "
            f"| {row['times_faster']['trl']:.1f} |"
        )
    return "\n".join(lines) + "\n"


_TABLES = {"step": _step, "precompute": _precompute}


if __name__ == "__main__":
    sys.exit(main())
