"""Writes the measured tables and numbers of README.md and docs/ anew from benchmarks/results, between their markers.

`<!-- measured:step-cpu -->` is followed by the whole table, `<!-- measured:step-cpu explicit -->` by a part of it or by
one number in a sentence (`_PARTS`), up to `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    stale = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if _write(page)]
    return int("--check" in sys.argv and bool(stale))


def _write(page: Path) -> bool:
    """Whether the page was out of date; it is mended unless only a check was asked for."""
    text = page.read_text()
    written = re.sub(
        r"(<!-- measured:([\w-]+)(?: (\w+))? -->)(\n?).*?(<!-- end -->)",
        lambda match: match[1] + match[4] + _section(match[2], match[3]) + match[5],
        text,
        flags=re.DOTALL,
    )
    if "--check" not in sys.argv:
        page.write_text(written)
    return written != text


def _section(name: str, part: str | None) -> str:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return "Not measured yet.\n"
    record = json.loads(path.read_text())
    if part is not None:
        return _PARTS[record["benchmark"], part](record["results"])
    machine = record["machine"]
    where = f"{machine['name']}, {machine['threads']} threads" if machine["device"] == "cpu" else machine["name"]
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    table = _TABLES[record["benchmark"]](record["results"] if "settings" not in record else record)
    return f"{table}\nMeasured {record['date']} on {where}; {versions}.\n"


def _step(results: list[dict[str, Any]]) -> str:
    lines = [
        "| pairs | reference | Tether | TRL | times faster | with a bf16 reference | peak memory, Tether / TRL "
        "| share of matmul peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        seconds, peak = row["median_seconds"], row.get("peak_bytes")
        memory = f"{peak['tether'] / 2**30:.1f} / {peak['trl'] / 2**30:.1f} GiB" if peak else ""
        lines.append(
            f"| {row['shape']} | {row['reference']} | {seconds['tether']:.2f} s | {seconds['trl']:.2f} s "
            f"| {row['times_faster']['trl']:.1f} | {_with_bf16(seconds)} | {memory} "
            f"| {row['share_of_matmul_peak']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _explicit_steps(results: list[dict[str, Any]]) -> str:
    lines = [
        "| pairs | Tether | TRL | times faster | peak memory, Tether | peak memory, TRL |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        if row["reference"] == "explicit":
            seconds, peak = row["median_seconds"], row["peak_bytes"]
            lines.append(
                f"| {row['shape']} | {seconds['tether']:.1f} s | {seconds['trl']:.1f} s "
                f"| {row['times_faster']['trl']:.1f} | {peak['tether'] / 2**30:.1f} GiB "
                f"| {peak['trl'] / 2**30:.1f} GiB |"
            )
    return "\n".join(lines) + "\n"


def _with_bf16(seconds: dict[str, float]) -> str:
    return f"{seconds['trl'] / seconds['tether_bf16']:.1f}" if "tether_bf16" in seconds else ""


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


def _growth(results: list[dict[str, Any]]) -> str:
    lines = ["| grows | to | Tether | plain way |", "| --- | --- | --- | --- |"]
    for row in results:
        axis = row["axis"]
        value = row[axis.removeprefix("frozen_")]
        cells = (f"{row[side]['seconds']:.2f} s, {row[side]['peak_bytes'] / 2**20:,.0f} MiB" for side in _SIDES)
        lines.append(f"| {_AXES.get(axis, axis)} | {value:,g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_SIDES = ("tether", "plain")
_AXES = {
    "length": "tokens of a prompt and its response",
    "vocabulary": "vocabulary, every weight training",
    "frozen_vocabulary": "vocabulary, embedding frozen",
    "prompt_share": "share of the prompt",
}


def _profile(results: list[dict[str, Any]]) -> str:
    kinds = list(results[0]["shares"])
    lines = [f"| pairs | step | {' | '.join(kinds)} |", "| --- | --- |" + " --- |" * len(kinds)]
    for row in results:
        cells = []
        for kind, share in row["shares"].items():
            needed = row["needed_seconds"].get(kind)
            at_peak = f" ({needed:.2f} s at the peak)" if needed else ""
            cells.append(f"{share * row['seconds']:.2f} s{at_peak}")
        lines.append(f"| {row['shape']} | {row['seconds']:.2f} s | {' | '.join(cells)} |")
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
    parts = {"**Rounding**, the largest over all models:": rounding, "**Another reference**, the smallest:": faults}
    return "\n".join(line for title, rows in parts.items() for line in (title, "", *head, *rows, ""))


def _vision(results: list[dict[str, Any]]) -> str:
    lines = [
        "| family | tokens of an image | reference | Tether | TRL | times faster "
        "| of it making the batch, Tether / TRL |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        seconds, making = row["median_seconds"], row["median_seconds_of_making_a_batch"]
        lines.append(
            f"| {row['family']} | {row['image_tokens']} | {row['reference']} | {seconds['tether']:.2f} s "
            f"| {seconds['trl']:.2f} s | {row['times_faster']:.1f} | {making['tether']:.2f} / {making['trl']:.2f} s |"
        )
    return "\n".join(lines) + "\n"


_TABLES = {
    "vision": _vision,
    "step": _step,
    "precompute": _precompute,
    "store": _store,
    "growth": _growth,
    "profile": _profile,
    "numerics": _numerics,
}
_PARTS = {
    ("step", "explicit"): _explicit_steps,
    ("step", "least"): lambda results: f"{min(row['times_faster']['trl'] for row in results):.1f}",
    ("step", "most"): lambda results: f"{max(row['times_faster']['trl'] for row in results):.1f}",
    ("store", "share"): lambda found: f"{found['share_of_a_training_step']:.3%}",
}


if __name__ == "__main__":
    sys.exit(main())
