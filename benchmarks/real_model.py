"""Claim: on a real language model a training step is about twice as fast as TRL's, and near what products alone take.

SmolLM2-135M-Instruct on a CPU, no activation checkpointing; Tether, TRL and bare products (`sides.LimitSide`) on the
same rows and weights, in turns. `short` is `examples/pairs.jsonl`: chat rows of about 70 tokens under the template's
system prompt. `long` is the first pairs of `--pairs` whose longer sequence has about 400. `GRID` is what is measured:
some ten minutes on two cores. `--only` measures a part of it and keeps the other results.
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
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether import tokenize_pairs
from tether.models.gguf import use_as_plain

sys.path.insert(0, str(harness.ROOT / "tests"))
from support.real import SHARED, loading, missing

NAMES = ("tether", "trl")
SHORT = harness.ROOT / "examples" / "pairs.jsonl"
LENGTHS = {"short": (1, 512), "long": (350, 450)}  # tokens of a pair's longer sequence
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One kind of step: `batch` pairs a step, over the first `num_batches` batches, once each."""

    pairs: str
    batch: int
    threads: int
    reference: str
    num_batches: int
    dtype: str = "float32"
    scores: bool = False  # the scoring pass is timed too
    weighs: bool = False  # the peak memory is measured too, in a process for each side

    @property
    def key(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("pairs", "batch", "threads", "reference", "dtype")}

    def is_among(self, words: list[str]) -> bool:
        return set(words) <= {*map(str, self.key.values()), "steps"}


GRID = (
    Case("short", 2, 2, "explicit", 4),
    Case("short", 2, 2, "implicit", 4),
    Case("short", 2, 2, "implicit", 4, "bfloat16"),
    Case("short", 2, 2, "precomputed", 4),
    Case("short", 2, 1, "explicit", 2),
    Case("short", 8, 2, "explicit", 2, scores=True, weighs=True),
    Case("short", 8, 2, "implicit", 2, weighs=True),
    Case("short", 8, 2, "implicit", 2, "bfloat16"),
    Case("short", 8, 2, "precomputed", 2),
    Case("long", 2, 2, "explicit", 2, scores=True),
    Case("long", 2, 2, "implicit", 2),
    Case("long", 2, 2, "implicit", 2, "bfloat16"),
)
BUILDING = ("explicit", "implicit")
_MOST_THREADS = max(case.threads for case in GRID)
QUICK = (
    Case("short", 2, 1, "explicit", 1, scores=True, weighs=True),
    Case("short", 2, 1, "implicit", 1, "bfloat16"),
    Case("short", 2, 1, "precomputed", 1),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, default=SHARED, help="long pairs; left out where absent")
    parser.add_argument("--quick", action="store_true", help="only try that it works: a few steps, nothing is kept")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="such as `short 8`, `bfloat16`, `building`"
    )
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
        _measure(folder, arguments.pairs, arguments.only, quick=arguments.quick)
    return 0


def _save_as_safetensors(folder: str) -> None:
    source, options = loading()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    use_as_plain(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)


def _measure(folder: str, path: Path, only: list[str], *, quick: bool) -> None:
    results: Any = (only and harness.read_results("real-model", "cpu")) or {"steps": [], "building": []}

    def keep(part: str, key: dict[str, Any], result: dict[str, Any]) -> None:
        """In place of an earlier one of the same key."""
        print(f"{' '.join(map(str, key.values())):32s} {harness.line_of(result)}", flush=True)
        results[part] = [row for row in results[part] if row | key != row] + [key | result]
        torch.set_num_threads(_MOST_THREADS)  # as the results say of the machine
        if not quick:
            settings = {"model": "SmolLM2-135M-Instruct", "lengths": LENGTHS}
            harness.write_results("real-model", results, "cpu", settings=settings)

    torch.set_num_threads(_MOST_THREADS)
    for case in QUICK if quick else GRID:
        if case.is_among(only) and (case.pairs == "short" or path.is_file()):
            keep("steps", case.key, _step(case, folder, path))
    for reference in BUILDING if set(only) <= {"building"} else ():
        keep("building", {"reference": reference}, _building(folder, reference, 1 if quick else 3))


def _step(case: Case, folder: str, path: Path) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    result = _timed(case, folder, path)
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
    fed = {_sizes(rows): contenders["tether"].num_fed(rows) for rows in batches}
    model = _load(folder, case.dtype)
    adapted = get_peft_model(model, sides.lora()) if case.reference == "implicit" else model
    contenders["limit"] = sides.LimitSide(adapted, case.reference, lambda rows: fed[_sizes(rows)])
    longest = max(batches, key=lambda rows: max(map(harness.length_of, rows)))
    first = {name: harness.timed(lambda side=side: side.step(longest), "cpu") for name, side in contenders.items()}
    runs = {name: lambda item, side=side: side.step(batches[item]) for name, side in contenders.items()}
    seconds = harness.in_turns(runs, len(batches), "cpu")
    result = {
        "tokens": [harness.num_tokens(batch) for batch in batches],
        "fed_tokens": [fed[_sizes(batch)] for batch in batches],
        "first_step": first,
        **harness.compared(seconds),
    }
    trainers = {name: contenders[name] for name in NAMES}
    return result | ({"scoring_100_pairs": _scoring(trainers, batches)} if case.scores else {})


def _sizes(rows: Rows) -> tuple[int, ...]:
    return tuple(len(ids) for row in rows for ids in row.values())


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
    return {"load_seconds": statistics.median(loading_seconds), **harness.compared(building)}


def _two_steps(name: str, case: Case, folder: str, path: Path) -> None:
    """Two short pairs, with which the optimizer's state comes, and a whole batch."""
    torch.set_num_threads(case.threads)
    rows = _rows(case, folder, path)
    side = _side(name, case, folder, rows)
    side.step(sorted(rows, key=harness.length_of)[:2])
    side.step(rows[: case.batch])
    harness.report_peak_memory("cpu")


def _side(name: str, case: Case, folder: str, rows: Rows) -> sides.Side:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _load(folder, case.dtype)
    return sides.make_side(name, case.reference, model, tokenizer, "cpu", rows=rows, batch_size=case.batch)


def _load(folder: str, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def _rows(case: Case, folder: str, path: Path) -> Rows:
    """The first tokenized pairs of the right length, as many as the case needs."""
    texts = _texts(SHORT if case.pairs == "short" else path)
    pairs = tokenize_pairs(Dataset.from_list(texts), AutoTokenizer.from_pretrained(folder), max_length=None)
    rows = [{name: pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs]
    least, most = LENGTHS[case.pairs]
    fitting = (row for row in rows if least <= harness.length_of(row) <= most)
    return [row for row, _ in zip(fitting, range(case.batch * case.num_batches), strict=False)]


def _texts(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
