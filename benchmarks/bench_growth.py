"""Claim: time and memory grow with the useful tokens alone, and memory not with the vocabulary.

Scoring forward and backward of the 39 M model, Tether against the plain way (padded batch, full logits), each point in
a process of its own: seconds, and the peak of resident memory beyond weights and gradients. The vocabulary is measured
twice: with every weight training, where autograd holds the gradients that a tied embedding gets from its two uses
before it adds them up, and with the embedding frozen, as under LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import sides
import torch

BASE = {"length": 256, "pairs": 4, "vocabulary": 32_000, "prompt_share": 0.5}
AXES: dict[str, list[float]] = {
    "length": [128, 256, 512, 1024],
    "pairs": [2, 4, 8, 16],
    "vocabulary": [8_000, 32_000, 128_000, 256_000],
    "frozen_vocabulary": [8_000, 32_000, 128_000, 256_000],
    "prompt_share": [0.1, 0.5, 0.9],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(json.loads(arguments.child))
        return
    results = [row for row in harness.read_results("growth", "cpu") if row["axis"] not in arguments.axes]
    for axis in arguments.axes:
        for value in AXES[axis]:
            point = {**BASE, axis.removeprefix("frozen_"): value, "frozen": axis.startswith("frozen_")}
            row = {"axis": axis, **point}
            for side in ("tether", "plain"):
                command = [sys.executable, __file__, "--child", json.dumps({**point, "side": side})]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                row[side] = json.loads(done.stdout.splitlines()[-1])
            results.append(row)
            cells = "  ".join(
                f"{side} {row[side]['seconds']:6.2f} s {row[side]['peak_bytes'] / 2**20:7.0f} MiB"
                for side in ("tether", "plain")
            )
            print(f"{axis:13s} {value:<8g} {cells}", flush=True)
            harness.write_results("growth", results, "cpu")


def _child(point: dict[str, Any]) -> None:
    sides.quiet()
    model = harness.qwen2(vocab_size=int(point["vocabulary"])).train()
    if point["frozen"]:
        model.get_input_embeddings().requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    prompt = int(point["length"] * point["prompt_share"])
    answer = int(point["length"]) - prompt
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 8_000, (count,), generator=generator).tolist()

    rows = [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(answer), "rejected_ids": ids(answer)}
        for _ in range(int(point["pairs"]))
    ]
    run = _tether(model, rows) if point["side"] == "tether" else _plain(model, rows)
    _reset_peak()
    before = _resident("VmRSS")
    seconds = [harness.timed(run, "cpu") for _ in range(3)]
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": _resident("VmHWM") - before}))


def _tether(model: Any, rows: list[dict]) -> Any:
    from tether import score
    from tether.data.datasets import PairCollator, batch_of

    batch = batch_of(PairCollator()(rows))
    return lambda: score(model, batch).values.sum().backward()


def _plain(model: Any, rows: list[dict]) -> Any:
    side = sides.PlainSide.__new__(sides.PlainSide)
    side._device = "cpu"
    return lambda: side._log_probs(model, rows).sum().backward()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
