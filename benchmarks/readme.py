"""Writes the measured tables of the documents anew from benchmarks/results, between their markers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "numerics.md"]


def main() -> int:
    texts = {document: document.read_text() for document in DOCUMENTS}
    written = {document: _with_tables(text) for document, text in texts.items()}
    if "--check" in sys.argv:
        return int(written != texts)
    for document, text in written.items():
        document.write_text(text)
    return 0


def _with_tables(text: str) -> str:
    return re.sub(
        r"(<!-- measured:([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + _section(match[2]) + match[3],
        text,
        flags=re.DOTALL,
    )


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


def _numerics(results: list[dict[str, Any]]) -> str:
    dtypes = list(dict.fromkeys(row["dtype"] for row in results))
    head = [f"| mean / largest single difference, in nats | {' | '.join(dtypes)} |", "| --- |" + " --- |" * len(dtypes)]
    found = {(row["way"], row["dtype"]): row for row in results}

    def table(kind: str, mean: str, single: str) -> list[str]:
        ways = dict.fromkeys(row["way"] for row in results if row["kind"] == kind)
        cells = ([found.get((way, dtype)) for dtype in dtypes] for way in ways)
        return [
            f"| {way} | " + " | ".join(f"{row[mean]:.1g} / {row[single]:.1g}" if row else "" for row in rows) + " |"
            for way, rows in zip(ways, cells, strict=True)
        ]

    rounding = table("rounding", "largest_mean", "largest_single")
    faults = table("fault", "smallest_mean", "smallest_single")
    return "\n".join(
        ["**Rounding**, the largest over all models:", "", *head, *rounding, ""]
        + ["**Another reference**, the smallest over all models:", "", *head, *faults, ""]
    )


_TABLES = {"step": _step, "precompute": _precompute, "numerics": _numerics}


if __name__ == "__main__":
    sys.exit(main())
