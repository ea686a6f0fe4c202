"""Claim: the pass that scores a data set under the reference is several times faster than TRL's.

Forward only, explicit reference, the same rows and weights for Tether, TRL and a plain loop, in turns.
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
import sides

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3, help="measured batches of each shape (default 3)")
    parser.add_argument("--repeats", type=int, default=2, help="times each batch is measured (default 2)")
    parser.add_argument("--shapes", nargs="*", help="only these shapes")
    arguments = parser.parse_args()
    sides.quiet()
    tokenizer = harness.train_tokenizer(["a b c d"] * 8, 300)
    contenders = {
        name: sides.make_side(name, "explicit", harness.qwen2(), tokenizer, "cpu", batch_size=BATCH)
        for name in ("tether", "trl", "plain")
    }
    results = harness.read_results("precompute", "cpu")
    for shape, rows in harness.each_shape((arguments.batches + 1) * BATCH):
        if not arguments.shapes or shape in arguments.shapes:
            result = measured(shape, harness.batches_of(rows, BATCH), contenders, "cpu", arguments.repeats)
            print(f"{shape:14s} {harness.line_of(result)}", flush=True)
            results = [row for row in results if row["shape"] != shape] + [result]
            harness.write_results("precompute", results, "cpu")


def measured(
    shape: str, rows: list[list[dict]], contenders: dict[str, sides.Side], device: str, repeats: int
) -> dict[str, Any]:
    """Scoring every batch but the first, which warms up, as does the longest pair of the others."""
    warm_up, *batches = rows
    for side in contenders.values():
        side.reference_pass(warm_up)
        side.reference_pass(harness.longest_pair([row for batch in batches for row in batch]))
    runs = {name: lambda item, side=side: side.reference_pass(batches[item]) for name, side in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, times in harness.in_turns(runs, len(batches), device).items():
            seconds[name] += times
    return {"shape": shape, "pairs": len(warm_up), **harness.compared(seconds), **harness.rates(batches, seconds)}


if __name__ == "__main__":
    main()
