"""Claim: how a packed row's attention is computed on CUDA is the faster of the two ways.

Forward and backward of one layer's attention in bf16, pair by pair and in one variable-length call, on rows of every
shape of data. Without a CUDA device there is nothing to choose, and nothing is measured.
"""

from __future__ import annotations

import statistics
from typing import Any

import harness
import torch

from tether.scoring import attention
from tether.scoring.chains import Link, PackedRow

HEADS, KEY_HEADS, SIZE, BATCH = 12, 6, 128, 8


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: a CPU has one way only")
        return
    results = []
    for shape, rows in harness.each_shape(3 * BATCH):
        seconds: dict[str, list[float]] = {"pairwise": [], "varlen": []}
        for repeat in range(4):
            runs = {way: lambda item, way=way, rows=rows: _run(way, _row(rows, item)) for way in seconds}
            for way, times in harness.in_turns(runs, 3, "cuda").items():
                seconds[way] += times if repeat else []  # the first time is a warm-up
        result: dict[str, Any] = {
            "shape": shape,
            "median_seconds": {way: statistics.median(times) for way, times in seconds.items()},
            "varlen_times_faster": harness.median_ratio(seconds["pairwise"], seconds["varlen"]),
        }
        print(result, flush=True)
        results.append(result)
    harness.write_results("attention", results, "cuda")


def _row(rows: list[dict], item: int) -> PackedRow:
    links: list[Link] = []
    for row in rows[item * BATCH : (item + 1) * BATCH]:
        prompt, chosen, rejected = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        links += [Link(0, 0, prompt + chosen), Link(len(links), prompt, rejected)]
    return PackedRow(links, "cuda")


def _run(way: Any, row: PackedRow) -> None:
    width = sum(chain.own.stop - chain.own.start for chain in row.chains)
    leaves = [
        torch.randn(1, heads, width, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    attention.packed_attention(*leaves, row, scale=SIZE**-0.5, kernel=way).sum().backward()


if __name__ == "__main__":
    main()
