"""Writes the measured tables of README.md and docs/ anew from benchmarks/results, between their markers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    differing = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        written = re.sub(
            r"(<!-- measured:([\w-]+) -->\n).*?(<!-- end -->)",
            lambda match: match[1] + _section(match[2]) + match[3],
            text,
            flags=re.DOTALL,
        )
        differing += written != text
        if "--check" not in sys.argv:
            page.write_text(written)
    return int("--check" in sys.argv and differing > 0)


def _section(name: str) -> str:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return "Not measured yet.\n"
    record = json.loads(path.read_text())
    machine = record["machine"]
    where = f"{machine['name']}, {machine['threads']} threads" if machine["device"] == "cpu" else machine["name"]
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    table = _TABLES[record["benchmark"]](record["results"] if "settings" not in record else record)
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


def _store(record: dict[str, Any]) -> str:
    settings, found = record["settings"], record["results"]
    share = found.get("share_of_a_training_step")
    shortest = found["shortest_step_with_reading_under_1_percent_seconds"]
    rows = {
        "pairs": f"{settings['num_pairs']:,}",
        "responses written a second": f"{found['rows_written_per_second']:,.0f}",
        "responses looked up a second, 64 at a time": f"{found['rows_read_per_second']:,.0f}",
        "bytes a pair": f"{found['bytes_per_pair']:,.0f}",
        "peak memory, and its growth over the last nine tenths": f"{found['peak_bytes'] / 1e6:.0f} MB, "
        f"{found['peak_growth_after_a_tenth_bytes'] / 1e6:.0f} MB",
        "shortest step for which reading stays under 1 %, 32 pairs": f"{1e3 * shortest:.0f} ms",
        "share of the fastest measured training step": f"{share:.3%}" if share is not None else "not measured here",
    }
    return (
        "\n".join(["| what | measured |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
        + "\n"
    )


_TABLES = {"store": _store, "step": _step, "precompute": _precompute}


if __name__ == "__main__":
    sys.exit(main())
