"""Claim: on a real language model a training step is several times faster than TRL's, and takes less memory.

SmolLM2-135M-Instruct in fp32 on a CPU, no activation checkpointing; Tether and TRL on the same rows and weights, in
turns. `short` is `examples/pairs.jsonl` (sequences of about 70 tokens), `instructions` the first pairs of `--pairs`
whose sequences have at most 512 tokens. `GRID` is what is measured: some eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import sides
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether import tokenize_pairs
from tether.models.gguf import use_as_plain

sys.path.insert(0, str(harness.ROOT / "tests"))
from support.real import SHARED, loading, missing

NAMES = ("tether", "trl")
SHORT = harness.ROOT / "examples" / "pairs.jsonl"
# Tokens of the longest sequence. TRL takes 3 MB for each position of the padded batch: 24 GB with 8 pairs of 512.
LONGEST = {"short": 512, "instructions": 512}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One kind of step: `batch` pairs a step, over the first `num_batches` batches, once each."""

    pairs: str
    batch: int
    threads: int
    reference: str
    num_batches: int
    scores: bool = False  # the scoring pass is timed too
    weighs: bool = False  # the peak memory is measured too, in a process for each side


GRID = (
    Case("short", 2, 2, "explicit", 2, weighs=True),
    Case("short", 2, 2, "implicit", 2),
    Case("short", 2, 2, "precomputed", 2),
    Case("short", 8, 2, "explicit", 1, scores=True, weighs=True),
    Case("short", 8, 2, "implicit", 1),
    Case("short", 2, 1, "explicit", 2),
    Case("instructions", 2, 2, "explicit", 1, scores=True, weighs=True),
    Case("instructions", 2, 2, "implicit", 1),
)
QUICK = (Case("short", 2, 1, "explicit", 1, scores=True, weighs=True), Case("short", 2, 1, "precomputed", 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, default=SHARED, help="pairs of instructions; left out where absent")
    parser.add_argument("--quick", action="store_true", help="only try that it works: two cases, nothing is kept")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sides.quiet()
    if arguments.child:
        side, case, folder = arguments.child
        _two_steps(side, Case(**json.loads(case)), folder, arguments.pairs)
        return 0
    if missing():
        print(f"Not measured: {missing()}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        _save_as_safetensors(folder)
        results = _measured(folder, arguments.pairs, quick=arguments.quick)
    if not arguments.quick:
        settings = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "longest_sequences": LONGEST}
        print(harness.write_results("real-model", results, "cpu", settings=settings))
    return 0


def _save_as_safetensors(folder: str) -> None:
    source, options = loading()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    use_as_plain(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)


def _measured(folder: str, path: Path, *, quick: bool) -> dict[str, Rows]:
    steps, cases = [], QUICK if quick else GRID
    for case in cases:
        if case.pairs == "short" or path.is_file():
            steps.append(_step(case, folder, path))
            print(
                f"{case.pairs:17s} {case.batch} {case.threads} {case.reference:12s} {harness.line_of(steps[-1])}",
                flush=True,
            )
    torch.set_num_threads(max(case.threads for case in cases))  # as the results say of the machine
    building = [_building(folder, reference, 1 if quick else 3) for reference in ("explicit", "implicit")]
    return {"steps": steps, "building": building}


def _step(case: Case, folder: str, path: Path) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    result = {name: getattr(case, name) for name in ("pairs", "batch", "threads", "reference")}
    result |= _timed(case, folder, path)
    gc.collect()  # the trainers are cycles, and the next processes need their memory
    if case.weighs:
        child = ("--pairs", str(path), "--child")
        result["peak_bytes"] = {
            name: harness.peak_memory_of(__file__, *child, name, json.dumps(asdict(case)), folder) for name in NAMES
        }
    return result


def _timed(case: Case, folder: str, path: Path) -> dict[str, Any]:
    rows = _rows(case, folder, path)
    batches = harness.batches_of(rows, case.batch)
    contenders = {name: _side(name, case, folder, rows) for name in NAMES}
    for side in contenders.values():
        side.step(_shortest(rows))
    peak = harness.matmul_flops_per_second("cpu", torch.float32)
    runs = {name: lambda item, side=side: side.step(batches[item]) for name, side in contenders.items()}
    seconds = harness.in_turns(runs, len(batches), "cpu")
    result = {
        "tokens": [harness.num_tokens(batch) for batch in batches],
        **harness.compared(seconds),
        "matmul_gflops_per_second": peak / 1e9,
        "share_of_matmul_peak": harness.share_of_peak(_load(folder), batches, case.reference, seconds["tether"], peak),
    }
    return result | ({"scoring_100_pairs": _scoring(contenders, batches)} if case.scores else {})


def _scoring(contenders: dict[str, sides.Side], batches: list[Rows]) -> dict[str, dict[str, float]]:
    runs = {name: lambda item, side=side: side.reference_pass(batches[item]) for name, side in contenders.items()}
    seconds = harness.in_turns(runs, len(batches), "cpu")
    per_100 = {name: [100 * time / len(batches[0]) for time in times] for name, times in seconds.items()}
    return harness.compared(per_100)


def _building(folder: str, reference: str, repeats: int) -> dict[str, Any]:
    """Seconds from a model in memory to a trainer for `SHORT`; both load it alike. The first time warms up."""
    texts, tokenizer = _texts(SHORT), AutoTokenizer.from_pretrained(folder)
    loading_seconds, building = [], {name: [] for name in NAMES}
    for repeat in range(repeats + 1):
        for name in NAMES:
            models: list[Any] = []
            load = harness.timed(lambda models=models: models.append(_load(folder)), "cpu")
            make = {"model": models.pop(), "tokenizer": tokenizer, "device": "cpu", "batch_size": 2, "rows": texts}
            build = harness.timed(lambda name=name, make=make: sides.make_side(name, reference, **make), "cpu")
            if repeat:
                loading_seconds.append(load)
                building[name].append(build)
    result = {"reference": reference, "load_seconds": statistics.median(loading_seconds), **harness.compared(building)}
    print(f"building              {reference:12s} {harness.line_of(result)}", flush=True)
    return result


def _two_steps(name: str, case: Case, folder: str, path: Path) -> None:
    """Two short pairs, with which the optimizer's state comes, and a whole batch."""
    torch.set_num_threads(case.threads)
    rows = _rows(case, folder, path)
    side = _side(name, case, folder, rows)
    side.step(_shortest(rows))
    side.step(rows[: case.batch])
    harness.report_peak_memory("cpu")


def _side(name: str, case: Case, folder: str, rows: Rows) -> sides.Side:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return sides.make_side(name, case.reference, _load(folder), tokenizer, "cpu", rows=rows, batch_size=case.batch)


def _load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _rows(case: Case, folder: str, path: Path) -> Rows:
    """The first tokenized pairs that are short enough, as many as the case needs."""
    texts = _texts(SHORT if case.pairs == "short" else path)
    pairs = tokenize_pairs(Dataset.from_list(texts), AutoTokenizer.from_pretrained(folder), max_length=None)
    rows = [{name: pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs]
    fitting = (row for row in rows if _longest(row) <= LONGEST[case.pairs])
    return [row for row, _ in zip(fitting, range(case.batch * case.num_batches), strict=False)]


def _shortest(rows: Rows) -> Rows:
    """Two pairs to warm up with: a precomputed reference answers none but its own."""
    return sorted(rows, key=_longest)[:2]


def _longest(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _texts(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
