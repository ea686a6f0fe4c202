"""Claim: where the time of a training step goes, kind by kind, on every shape of data.

`torch.profiler` over one step with an explicit reference; self time of every operator, put into kinds. `needed` is the
time that the useful operations of a kind would take at the measured matmul peak.
"""

from __future__ import annotations

import argparse
from typing import Any

import bench_step
import harness
import sides
import torch
from torch.profiler import profile

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "tether::packed_attention",
        "tether::packed_attention_backward",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", help="only these shapes")
    arguments = parser.parse_args()
    sides.quiet()
    results = []
    for shape, rows in harness.each_shape(bench_step.BATCH):
        if arguments.shapes and shape not in arguments.shapes:
            continue
        result = _measure(shape, rows)
        kinds = "  ".join(f"{kind} {share:.0%}" for kind, share in result["shares"].items())
        print(f"{shape:14s} {result['seconds']:.2f} s: {kinds}", flush=True)
        results.append(result)
        harness.write_results("profile", results, "cpu")


def _measure(shape: str, rows: list[dict]) -> dict[str, Any]:
    side = bench_step._side("tether", "explicit", rows)
    side.step(rows)
    with profile() as run:
        side.step(rows)
    microseconds = {event.key: event.self_cpu_time_total for event in run.key_averages()}
    total = sum(microseconds.values())
    shares = {kind: sum(microseconds.get(name, 0) for name in names) / total for kind, names in KINDS.items()}
    shares["element by element, and the rest"] = 1 - sum(shares.values())
    peak = harness.matmul_flops_per_second("cpu", torch.float32)
    model = harness.qwen2()
    whole, passes = harness.useful_flops(model, rows), 4  # the reference, forward, and a backward worth two
    attention = harness.attention_flops(model, rows)
    return {
        "shape": shape,
        "seconds": total / 1e6,
        "shares": shares,
        "needed_seconds": {
            "matrix products": passes * (whole - attention) / peak,
            "attention": passes * attention / peak,
        },
    }


if __name__ == "__main__":
    main()
