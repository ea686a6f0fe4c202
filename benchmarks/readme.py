"""Writes the measured tables and numbers of README.md and docs/ anew from benchmarks/results, between their markers.

`<!-- measured:real-model-cpu -->` is followed by the whole table, `<!-- measured:real-model-cpu scoring -->` by a part
of it or by one number in a sentence (`_PARTS`), up to `<!-- end -->`. `<!-- measured:gpu -->` stays empty until
something was measured on a GPU.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
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
    if name == "gpu":
        return _gpu()
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return "Not measured yet.\n"
    record = json.loads(path.read_text())
    if part is not None:
        return _PARTS[record["benchmark"], part](record["results"])
    table = _TABLES[record["benchmark"]](record["results"] if "settings" not in record else record)
    return f"{table}\n{_measured_on(record)}"


def _measured_on(record: dict[str, Any]) -> str:
    where = record["machine"]["name"]
    if record["machine"]["device"] == "cpu":
        threads = record["machine"]["threads"]
        where += f", {threads} thread{'s' * (threads != 1)}"
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    return f"Measured {record['date']} on {where}; {versions}.\n"


def _table(head: str, rows: Iterable[Iterable[object]]) -> str:
    cells = [head.split(" | "), ["---"] * (head.count(" | ") + 1), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in cells)


def _seconds(row: dict[str, Any], digits: int = 2) -> list[str]:
    """Tether's time, TRL's, and how many times faster that is."""
    seconds = row["median_seconds"]
    return [*(f"{seconds[side]:.{digits}f} s" for side in ("tether", "trl")), f"{row['times_faster']['trl']:.1f}"]


def _memory(row: dict[str, Any]) -> str:
    peak = row.get("peak_bytes")
    return f"{peak['tether'] / 2**30:.1f} / {peak['trl'] / 2**30:.1f} GiB" if peak else ""


def _step(results: list[dict[str, Any]]) -> str:
    def with_bf16(seconds: dict[str, float]) -> str:
        return f"{seconds['trl'] / seconds['tether_bf16']:.1f}" if "tether_bf16" in seconds else ""

    return _table(
        "pairs | reference | Tether | TRL | times faster | with a bf16 reference | peak memory, Tether / TRL "
        "| share of matmul peak",
        (
            [
                row["shape"],
                row["reference"],
                *_seconds(row),
                with_bf16(row["median_seconds"]),
                _memory(row),
                _share(row),
            ]
            for row in results
        ),
    )


def _share(row: dict[str, Any]) -> str:
    return f"{row['share_of_matmul_peak']:.0%}"


def _real_steps(results: dict[str, Any]) -> str:
    names = "pairs", "batch", "threads", "dtype", "reference"
    return _table(
        "pairs | in a step | threads | dtype | reference | Tether | TRL | times faster | of the limit "
        "| peak memory, Tether / TRL",
        ([*(row[name] for name in names), *_seconds(row), _of_limit(row), _memory(row)] for row in results["steps"]),
    )


def _of_limit(row: dict[str, Any]) -> str:
    """How fast Tether was compared with bare products."""
    share = row["times_faster"].get("limit")
    return f"{share:.0%}" if share else ""


def _real_explicit_steps(results: dict[str, Any]) -> str:
    """Those with the most threads."""
    most = max(row["threads"] for row in results["steps"])
    return _table(
        "pairs | in a step | Tether | TRL | times faster | peak memory, Tether / TRL",
        (
            [row["pairs"], row["batch"], *_seconds(row, 1), _memory(row)]
            for row in results["steps"]
            if (row["reference"], row["threads"]) == ("explicit", most)
        ),
    )


def _real_scoring(results: dict[str, Any]) -> str:
    return _table(
        "pairs | in a batch | reference | Tether | TRL | times faster",
        (
            [row["pairs"], row["batch"], row["reference"], *_seconds(row["scoring_100_pairs"], 1)]
            for row in results["steps"]
            if "scoring_100_pairs" in row
        ),
    )


def _real_building(results: dict[str, Any]) -> str:
    return _table(
        "reference | loading the model | trainer, Tether | trainer, TRL",
        ([row["reference"], f"{row['load_seconds']:.2f} s", *_seconds(row)[:2]] for row in results["building"]),
    )


def _gpu() -> str:
    """The training steps measured on a GPU, with their title; nothing where there are none."""
    paths = {what: RESULTS / f"{stage}-cuda.json" for stage, what in _GPU_STAGES.items()}
    records = {what: json.loads(path.read_text()) for what, path in paths.items() if path.is_file()}
    rows = [
        (what, row)
        for what, record in records.items()
        for row in record["results"]
        if "trl" in row.get("times_faster", ())
    ]
    if not rows:
        return ""
    table = _table(
        "model | reference | pairs | Tether, tokens/s | TRL | times faster | Tether, pairs/s | share of matmul rate "
        "| peak memory, Tether / TRL",
        ([what, row["reference"], row["shape"], *_gpu_rates(row), _share(row), _memory(row)] for what, row in rows),
    )
    title = "On a GPU, in bf16, 8 pairs a step, each step on new lengths:"
    return f"{title}\n\n{table}\n{_measured_on([*records.values()][-1])}"


def _gpu_rates(row: dict[str, Any]) -> list[str]:
    tokens = row["tokens_per_second"]
    return [
        *(f"{tokens[side]:,.0f}" for side in ("tether", "trl")),
        f"{row['times_faster']['trl']:.1f}",
        f"{row['pairs_per_second']['tether']:.1f}",
    ]


_GPU_STAGES = {"step-8b": "8 B, LoRA", "qlora-8b": "8 B in 4 bits, LoRA", "step-1b": "1.2 B, every weight"}


def _factor(choose: Callable[[Iterable[float]], float]) -> Callable[[dict[str, Any]], str]:
    return lambda results: f"{choose(row['times_faster']['trl'] for row in results['steps']):.1f}"


def _first_step(results: dict[str, Any]) -> str:
    """How many times as long as later steps it takes, at most."""
    return f"{max(row['first_step']['tether'] / row['median_seconds']['tether'] for row in results['steps']):.1f}"


def _precompute(results: list[dict[str, Any]]) -> str:
    return _table("pairs | Tether | TRL | times faster", ([row["shape"], *_seconds(row)] for row in results))


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
    return _table("what | measured", rows.items())


def _growth(results: list[dict[str, Any]]) -> str:
    def line(row: dict[str, Any]) -> list[str]:
        axis = row["axis"]
        cells = [f"{row[side]['seconds']:.2f} s, {row[side]['peak_bytes'] / 2**20:,.0f} MiB" for side in _SIDES]
        return [_AXES.get(axis, axis), f"{row[axis.removeprefix('frozen_')]:,g}", *cells]

    return _table("grows | to | Tether | plain way", map(line, results))


_SIDES = ("tether", "plain")
_AXES = {
    "length": "tokens of a prompt and its response",
    "vocabulary": "vocabulary, every weight training",
    "frozen_vocabulary": "vocabulary, embedding frozen",
    "prompt_share": "share of the prompt",
}


def _profile(results: list[dict[str, Any]]) -> str:
    def line(row: dict[str, Any]) -> list[str]:
        cells = [row["shape"], f"{row['seconds']:.2f} s"]
        for kind, share in row["shares"].items():
            needed = row["needed_seconds"].get(kind)
            at_peak = f" ({needed:.2f} s at the peak)" if needed else ""
            cells.append(f"{share * row['seconds']:.2f} s{at_peak}")
        return cells

    return _table(f"pairs | step | {' | '.join(results[0]['shares'])}", map(line, results))


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


def _noise(results: dict[str, Any]) -> str:
    """Mean and largest difference: a line for each model, its kernels and rows, a column for each company."""
    names = ("dtype", "kernels", "rows")
    found = {(*(row[name] for name in names), row["way"]): row for row in results["noise"]}
    ways = list(dict.fromkeys(row["way"] for row in results["noise"]))
    lines = dict.fromkeys(key[:3] for key in found)
    cells = ([found[(*line, way)] for way in ways] for line in lines)
    table = [
        [*line, *(f"{row['mean']:.1g} / {row['largest']:.1g}" for row in rows)]
        for line, rows in zip(lines, cells, strict=True)
    ]
    return _table(f"mean / largest | kernels | answers | {' | '.join(ways)}", table)


def _starts(results: dict[str, Any]) -> str:
    def line(row: dict[str, Any]) -> list[object]:
        refused = [f"{row['refused'][shift]} of {row['starts']}" for shift in ("0.0", "-0.02")]
        return [row["kernels"], f"{row['noise']:.2g}", f"{row['initial_gap']:.2g}", *refused]

    head = "kernels | `reference/noise` | largest `reference/initial_gap` | refused | shifted by -0.02"
    return _table(head, map(line, results["starts"]))


def _costs(results: dict[str, Any]) -> str:
    def line(row: dict[str, Any]) -> list[object]:
        names = ("store_seconds", "sample_seconds", "step_seconds", "longest_step_seconds")
        return [row["dtype"], row["rows"], row["pairs_a_step"], *(f"{row[name]:.2f} s" for name in names)]

    head = "dtype | answers | pairs a step | probe and spot checks | gap and noise of a sample | median step | longest"
    return _table(head, map(line, results["costs"]))


def _vision(results: list[dict[str, Any]]) -> str:
    def line(row: dict[str, Any]) -> list[object]:
        seconds = _seconds(row | {"times_faster": {"trl": row["times_faster"]}})
        making = row["median_seconds_of_making_a_batch"]
        share = f"{making['tether']:.2f} / {making['trl']:.2f} s"
        return [row["family"], row["image_tokens"], row["reference"], *seconds, share]

    return _table(
        "family | tokens of an image | reference | Tether | TRL | times faster | of it making the batch, Tether / TRL",
        map(line, results),
    )


def _demo(results: list[dict[str, Any]]) -> str:
    rows = ([f"seed {run['seed']}: {name}", *values] for run in results for name, *values in run["figures"])
    return _table("figure | before | good | too far", rows)


def _demo_figures(results: list[dict[str, Any]]) -> str:
    return _table("on held-out pairs and questions | before | good | too far", results[0]["figures"])


def _demo_answers(results: list[dict[str, Any]]) -> str:
    """To the first questions."""
    rows = ([" ".join(text.split()) for text in row] for row in results[0]["answers"][:3])
    return _table("asked | before | good | too far", rows)


def _campaigns(results: list[dict[str, Any]]) -> str:
    outcomes = ("resumed equal", "refused, named", "harmless", "SILENT", "RAW", "LOST")
    return _table(
        f"campaign | done | trials | {' | '.join(outcomes).lower()}",
        (
            [count["campaign"], f"{count['units']:,} {count['unit']}", f"{count['trials']:,}"]
            + [f"{count['outcomes'].get(outcome, 0):,}" for outcome in outcomes]
            for count in results
        ),
    )


_TABLES = {
    "campaigns": _campaigns,
    "demo": _demo,
    "vision": _vision,
    "step": _step,
    "real-model": lambda record: _real_steps(record["results"]),
    "precompute": _precompute,
    "store": _store,
    "growth": _growth,
    "profile": _profile,
    "numerics": _numerics,
}
_PARTS = {
    ("demo", "figures"): _demo_figures,
    ("demo", "answers"): _demo_answers,
    ("real-model", "explicit"): _real_explicit_steps,
    ("real-model", "scoring"): _real_scoring,
    ("real-model", "building"): _real_building,
    ("real-model", "first"): _first_step,
    ("real-model", "least"): _factor(min),
    ("real-model", "most"): _factor(max),
    ("noise", "noise"): _noise,
    ("noise", "starts"): _starts,
    ("noise", "costs"): _costs,
    ("store", "share"): lambda found: f"{found['share_of_a_training_step']:.3%}",
}


if __name__ == "__main__":
    sys.exit(main())
