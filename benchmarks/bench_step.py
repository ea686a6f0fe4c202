"""Claim: a training step is several times faster than TRL's, at half its peak memory, near the machine's peak.

Each shape of data, with an explicit, an implicit and a precomputed reference; Tether, TRL and (explicit only) a plain
hand-written loop on the same rows and weights, in turns. The share of the matmul peak counts useful operations only:
each prompt once, no padding, response positions in the head, no recomputation.
"""

from __future__ import annotations

import argparse
import copy
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "REFERENCE", "SHAPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sides.quiet()
    if arguments.child:
        _one_step(*arguments.child, device=arguments.device)
        return
    results = harness.read_results("step", arguments.device)
    for shape, rows in harness.each_shape(arguments.batches * BATCH):
        for reference in arguments.references:
            if not arguments.shapes or shape in arguments.shapes:
                result = _measure(shape, rows, reference, arguments)
                _print(result)
                results = [r for r in results if (r["shape"], r["reference"]) != (shape, reference)] + [result]
                harness.write_results("step", results, arguments.device)


def _measure(shape: str, rows: list[dict], reference: str, arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    batches = harness.batches_of(rows, BATCH)[: arguments.batches]
    names = [name for name in _names(reference, device) if name in arguments.sides]
    contenders = {side: _side(side, reference, device, rows) for side in names}
    for side in contenders.values():
        # A released reference answers stored rows only.
        side.step(rows[:BATCH] if reference == "precomputed" else _warm_up(device))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []
    for _ in range(arguments.repeats):
        peaks.append(harness.matmul_flops_per_second(device, _dtype(device)))
        runs = {name: lambda item, side=side: side.step(batches[item]) for name, side in contenders.items()}
        for name, times in harness.in_turns(runs, len(batches), device).items():
            seconds[name] += times
    peak = statistics.median(peaks)
    result = {
        "shape": shape,
        "reference": reference,
        "pairs": BATCH,
        "tokens": [harness.num_tokens(batch) for batch in batches],
        **harness.compared(seconds),
        "matmul_gflops_per_second": peak / 1e9,
        "share_of_matmul_peak": harness.share_of_peak(
            harness_model(device), batches, reference, seconds["tether"], peak
        ),
    }
    if reference in arguments.memory:
        result["peak_bytes"] = {
            name: harness.peak_memory_of(__file__, "--device", device, "--child", name, reference, shape)
            for name in contenders
            if name != "plain"
        }
    return result


def _warm_up(device: str) -> list[dict]:
    """Short on a CPU, where nothing is tuned by size; of usual size on an accelerator."""
    prompt, answer = (8, 8) if device == "cpu" else harness.SHAPES["chat"]
    return harness.synthetic_rows(prompt, answer, BATCH, seed=1)


def _names(reference: str, device: str = "cpu") -> tuple[str, ...]:
    """Who takes part; `tether_bf16` holds its reference in bf16 beside a policy in fp32 (`ref_dtype`)."""
    if reference != "explicit":
        return ("tether", "trl")
    return ("tether", "tether_bf16", "trl", "plain") if device == "cpu" else ("tether", "trl", "plain")


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def harness_model(device: str) -> Any:
    if device not in _models:
        _models[device] = harness.qwen2("39m" if device == "cpu" else "1.5b")
    return _models[device]


_models: dict[str, Any] = {}


def _side(name: str, reference: str, device: str, rows: list[dict]) -> sides.Side:
    model = copy.deepcopy(harness_model(device))
    if reference == "precomputed":
        tokenizer = harness.word_tokenizer(model.config.vocab_size)
        return sides.make_side(name, reference, model, tokenizer, device, batch_size=BATCH, rows=rows)
    tokenizer = harness.train_tokenizer(["a b c d"] * 8, 300)
    return sides.make_side(name, reference, model, tokenizer, device, batch_size=BATCH)


def _one_step(name: str, reference: str, shape: str, device: str) -> None:
    rows = dict(harness.each_shape(BATCH))[shape]
    side = _side(name, reference, device, rows)
    for _ in range(2):  # the optimizer's state comes with the first step
        side.step(rows)
    harness.report_peak_memory(device)


def _print(result: dict[str, Any]) -> None:
    print(f"{result['shape']:14s} {result['reference']:12s} {harness.line_of(result)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
