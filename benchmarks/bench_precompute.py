"""Claim: the pass that scores a data set under the reference is several times faster than TRL's.

Forward only, explicit reference, the same rows and weights for Tether, TRL and a plain loop, in turns.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import harness
import sides
import torch

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3, help="measured batches of each shape (default 3)")
    parser.add_argument("--repeats", type=int, default=2, help="times each batch is measured (default 2)")
    parser.add_argument("--shapes", nargs="*", help="only these shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    sides.quiet()
    model = harness.qwen2("39m" if arguments.device == "cpu" else "1.5b")
    tokenizer = harness.train_tokenizer(["a b c d"] * 8, 300)
    bf16 = {"bf16": True} if arguments.device == "cuda" else {}
    contenders = {
        "tether": sides.TetherSide(copy.deepcopy(model), tokenizer, arguments.device, **bf16),
        "trl": sides.TRLSide(copy.deepcopy(model), tokenizer, arguments.device, **bf16),
        "plain": sides.PlainSide(copy.deepcopy(model), arguments.device, autocast=torch.bfloat16 if bf16 else None),
    }
    results = harness.read_results("precompute", arguments.device)
    for shape, rows in harness.each_shape(_count(arguments)):
        if not arguments.shapes or shape in arguments.shapes:
            result = _measure(shape, rows, contenders, arguments)
            results = [row for row in results if row["shape"] != shape] + [result]
            harness.write_results("precompute", results, arguments.device)


def _count(arguments: argparse.Namespace) -> int:
    return (arguments.batches + 1) * BATCH


def _measure(
    shape: str, rows: list[dict], contenders: dict[str, sides.Side], arguments: argparse.Namespace
) -> dict[str, Any]:
    warm_up, *batches = harness.batches_of(rows, BATCH)
    for side in contenders.values():
        side.reference_pass(warm_up)
    runs = {name: lambda item, side=side: side.reference_pass(batches[item]) for name, side in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, times in harness.in_turns(runs, len(batches), arguments.device).items():
            seconds[name] += times
    result = {
        "shape": shape,
        "pairs": BATCH,
        **harness.compared(seconds),
    }
    print(f"{shape:14s} {harness.line_of(result)}", flush=True)
    return result


if __name__ == "__main__":
    main()
