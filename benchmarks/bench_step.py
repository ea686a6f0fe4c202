"""Claim: a training step is several times faster than TRL's, at half its peak memory, near the machine's peak.

Each shape of data, with an explicit, an implicit and a precomputed reference; Tether, TRL and (explicit only) a plain
hand-written loop on the same rows and weights, in turns. The share of the matmul peak counts useful operations only:
each prompt once, no padding, response positions in the head, no recomputation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import harness
import sides
import torch

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2, help="measured batches of each shape (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="times each batch is measured (default 2)")
    parser.add_argument("--shapes", nargs="*", help="only these shapes")
    parser.add_argument("--references", nargs="*", default=["explicit", "implicit", "precomputed"])
    parser.add_argument(
        "--memory",
        nargs="*",
        default=["explicit"],
        help="references whose peak memory is measured (a process for each)",
    )
    parser.add_argument("--sides", nargs="*", default=["tether", "tether_bf16", "trl", "plain"], help="only these")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "REFERENCE", "SHAPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sides.quiet()
    if arguments.child:
        _one_step(*arguments.child)
        return
    results = harness.read_results("step", "cpu")
    for shape, rows in harness.each_shape(arguments.batches * BATCH):
        for reference in arguments.references:
            if not arguments.shapes or shape in arguments.shapes:
                result = _measure(shape, rows, reference, arguments)
                _print(result)
                results = [r for r in results if (r["shape"], r["reference"]) != (shape, reference)] + [result]
                harness.write_results("step", results, "cpu")


def _measure(shape: str, rows: list[dict], reference: str, arguments: argparse.Namespace) -> dict[str, Any]:
    batches = harness.batches_of(rows, BATCH)[: arguments.batches]
    names = [name for name in _names(reference) if name in arguments.sides]
    contenders = {side: _side(side, reference, rows) for side in names}
    for side in contenders.values():
        side.step(harness.longest_pair(rows))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []
    for _ in range(arguments.repeats):
        peaks.append(harness.matmul_flops_per_second("cpu", torch.float32))
        runs = {name: lambda item, side=side: side.step(batches[item]) for name, side in contenders.items()}
        for name, times in harness.in_turns(runs, len(batches), "cpu").items():
            seconds[name] += times
    peak = statistics.median(peaks)
    result = {
        "shape": shape,
        "reference": reference,
        "pairs": BATCH,
        "tokens": [harness.num_tokens(batch) for batch in batches],
        **harness.compared(seconds),
        "matmul_gflops_per_second": peak / 1e9,
        "share_of_matmul_peak": harness.share_of_peak(harness.qwen2(), batches, reference, seconds["tether"], peak),
    }
    if reference in arguments.memory:
        result["peak_bytes"] = {
            name: harness.peak_memory_of(__file__, "--child", name, reference, shape)
            for name in contenders
            if name != "plain"
        }
    return result


def _names(reference: str) -> tuple[str, ...]:
    """Who takes part; `tether_bf16` holds its reference in bf16 beside a policy in fp32 (`ref_dtype`)."""
    return ("tether", "tether_bf16", "trl", "plain") if reference == "explicit" else ("tether", "trl")


def _side(name: str, reference: str, rows: list[dict]) -> sides.Side:
    model = harness.qwen2()
    if reference == "precomputed":
        tokenizer = harness.word_tokenizer(model.config.vocab_size)
        return sides.make_side(name, reference, model, tokenizer, "cpu", batch_size=BATCH, rows=rows)
    tokenizer = harness.train_tokenizer(["a b c d"] * 8, 300)
    return sides.make_side(name, reference, model, tokenizer, "cpu", batch_size=BATCH)


def _one_step(name: str, reference: str, shape: str) -> None:
    rows = dict(harness.each_shape(BATCH))[shape]
    side = _side(name, reference, rows)
    for _ in range(2):  # the optimizer's state comes with the first step
        side.step(rows)
    harness.report_peak_memory("cpu")


def _print(result: dict[str, Any]) -> None:
    print(f"{result['shape']:14s} {result['reference']:12s} {harness.line_of(result)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
