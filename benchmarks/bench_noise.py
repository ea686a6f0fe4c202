"""Claim: rounding in bfloat16 is measured at the start, stops no run, and hides no store that is 0.02 nats a token off.

SmolLM2-135M-Instruct on a CPU. `noise`: the same responses alone and in other company. `starts`: the checks before the
first step, with log-probs that a scoring pass stored (yes or no, one pair a batch), 100 times with other rows first:
against the store, and against one with every log-prob 0.02 lower (a store takes none above 0). Both as this processor
computes, and as one does whose products round otherwise for each number of rows (AMX, GPUs). Some 20 minutes on one
core. `costs`: what a start with a filled store takes beside a training step. `--only` measures a part, keeps the rest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import harness
import sides
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

import tether.reference.watch as watch
from tether import DPOConfig, DPOTrainer, PairCollator, batch_of, tokenize_pairs
from tether.errors import InitialGapError, StoreError
from tether.models.gguf import use_as_plain
from tether.reference.base import score_without_gradient
from tether.reference.noise import Noise, unreduced
from tether.reference.store_checks import StoreChecks
from tether.trainer.reference_run import ReferenceRun
from tether.types import PairBatch, Response, ResponseLogProbs, join_log_probs

sys.path.insert(0, str(harness.ROOT / "tests"))
from support.real import loading, missing, real_pairs, with_shift, yes_or_no
from support.rounding import RoundsByBatch

SHIFTS = (0.0, -0.02)
KERNELS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "this processor": nullcontext,
    "rounds by batch": RoundsByBatch,
}
DTYPES = {
    "bfloat16": (torch.bfloat16, None),
    "float32, bfloat16 autocast": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, None),
}
PARTS = ("costs", "noise", "starts")
Pair = tuple[Response, Response]
Score = Callable[[PairBatch], ResponseLogProbs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="only try that it works: little is measured, nothing kept")
    arguments = parser.parse_args()
    sides.quiet()
    if missing():
        print(f"Not measured: {missing()}")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, options = loading()
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        for part in arguments.only:
            if part == "costs":
                found = list(_costs(tokenizer, Path(folder)))
            elif part == "noise":
                found = list(_noise(tokenizer, 4 if arguments.quick else 24, quick=arguments.quick))
            else:
                num = 2 if arguments.quick else arguments.starts
                found = [_starts(kernels, tokenizer, Path(folder), num) for kernels in KERNELS]
            if not arguments.quick:
                results = (harness.read_results("noise", "cpu") or {}) | {part: found}
                print(harness.write_results("noise", results, "cpu", settings={"model": "SmolLM2-135M-Instruct"}))
    return 0


def _load(dtype: torch.dtype) -> Any:
    source, options = loading()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    use_as_plain(model)
    return model.to(dtype)


# --- how far the same responses are apart ----------------------------------------------------------------------------


def alone(score: Score, pairs: list[Pair]) -> list[torch.Tensor]:
    """Each pair in a batch of its own, as training with one pair a batch scores it."""
    return together(1, score, pairs)


def together(size: int, score: Score, pairs: list[Pair]) -> list[torch.Tensor]:
    """So many pairs a batch."""
    found = []
    for start in range(0, len(pairs), size):
        batch = PairBatch.of_pairs(pairs[start : start + size])
        values = score(batch).split()
        found += [values[index] for both in zip(batch.chosen, batch.rejected, strict=True) for index in both]
    return found


def swapped(size: int, score: Score, pairs: list[Pair]) -> list[torch.Tensor]:
    """The rejected response before the chosen one, which the attention of a packed row treats otherwise."""
    found = together(size, score, [(rejected, chosen) for chosen, rejected in pairs])
    return [found[index + 1 - 2 * (index % 2)] for index in range(len(found))]


def apart(score: Score, pairs: list[Pair]) -> list[torch.Tensor]:
    """Each response without the other of its pair, as where a scoring pass is cut between them."""
    return [score(PairBatch.of_pairs([(response, response)])).values for pair in pairs for response in pair]


WAYS: dict[str, Callable[[Score, list[Pair]], list[torch.Tensor]]] = {
    "2 pairs a batch": partial(together, 2),
    "4 pairs a batch": partial(together, 4),
    "8 pairs a batch": partial(together, 8),
    "all pairs in a batch": partial(together, 1000),
    "each response apart": apart,
    "all pairs, swapped": partial(swapped, 1000),
}


def _noise(tokenizer: Any, num: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    for name, (dtype, autocast_dtype) in DTYPES.items():
        model = _load(dtype)
        score = partial(score_without_gradient, model, autocast_dtype=autocast_dtype)
        for rows_name, rows in (("yes or no", yes_or_no(num)), ("sentences", real_pairs(num))):
            pairs = _pairs(rows, tokenizer)
            for kernels in KERNELS if name == "bfloat16" and not quick else ["this processor"]:
                with KERNELS[kernels]():
                    for found in in_company(score, pairs):
                        yield {"dtype": name, "rows": rows_name, "kernels": kernels} | found
        del model


def in_company(score: Score, pairs: list[Pair]) -> Iterator[dict[str, Any]]:
    """How far the responses are from those of their pair alone, in each company."""
    plain = alone(score, pairs)
    for way, scored in WAYS.items():
        yield {"way": way} | _compared(plain, scored(score, pairs))


def _pairs(rows: list[dict[str, Any]], tokenizer: Any) -> list[Pair]:
    tokenized: Any = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    batch = batch_of(PairCollator()(list(tokenized)))
    responses = batch.responses()
    return [(responses[c], responses[r]) for c, r in zip(batch.chosen, batch.rejected, strict=True)]


def _compared(one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    parts = [join_log_probs([_single(values) for values in each], range(len(each))) for each in (one, other)]
    noise = Noise.between(*parts, unreduced)
    difference = (parts[0].values - parts[1].values).double()
    return {
        "tokens": noise.num_tokens,
        "signed_mean": float(difference.mean()),
        "mean": noise.mean,
        "largest": float(difference.abs().max()),
        "standard_deviation": float(difference.std()),
        "shift": noise.shift,
        "spread": noise.spread,
        "spread_of_responses": noise.spread_of_responses,
    }


def _single(values: torch.Tensor) -> ResponseLogProbs:
    return ResponseLogProbs(values, torch.tensor([0, len(values)]))


# --- the checks before the first step --------------------------------------------------------------------------------


def _starts(kernels: str, tokenizer: Any, folder: Path, num: int) -> dict[str, Any]:
    rows = Dataset.from_list(yes_or_no(num + 20))
    model = _load(torch.bfloat16)
    with KERNELS[kernels](), remembered_scores() as forget:
        trainers = {}
        for shift in SHIFTS:
            path = folder / f"{kernels}{shift}.sqlite"
            if shift:
                with_shift(folder / f"{kernels}0.0.sqlite", path, shift)
            with suppress(StoreError):  # refused already when built, and so by every start
                trainers[shift] = _trainer(model, rows, tokenizer, path, folder)
        found: list[dict[float, dict[str, Any]]] = []
        for seed in range(num):
            forget()
            found.append({shift: _start(trainer, seed) for shift, trainer in trainers.items()})
            print(kernels, seed, found[-1], flush=True)
    return {
        "kernels": kernels,
        "starts": num,
        "refused": {
            str(shift): sum(start[shift]["refused"] for start in found) if shift in trainers else num
            for shift in SHIFTS
        },
        "initial_gap": max(start[0.0]["gap"] for start in found),
        "noise": statistics.median(start[0.0]["noise"] for start in found),
    }


def _trainer(model: Any, rows: Dataset, tokenizer: Any, path: Path, folder: Path, pairs_a_step: int = 1) -> DPOTrainer:
    args = DPOConfig(
        str(folder / "run"),
        per_device_train_batch_size=pairs_a_step,
        precompute_ref_log_probs=True,
        ref_store=str(path),
        max_steps=2,
        learning_rate=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)


def _start(trainer: DPOTrainer, seed: int) -> dict[str, Any]:
    """A start with the rows in another order: all checks before the first step, without the step."""
    rows: Any = trainer.train_dataset
    rows = rows.shuffle(seed=seed)
    policy = trainer.model
    run = ReferenceRun(
        trainer.reference,
        trainer.accelerator,
        trainer.args,
        lambda: trainer.data_collator,
        lambda: {"train": rows},
        policy,
        autocast_dtype=None,
        waits=False,
    )
    found: dict[str, Any] = {"refused": False, "gap": float("nan")}
    try:
        run.on_train_begin(trainer.args, TrainerState(), TrainerControl(), model=policy)
        batch = batch_of(trainer.data_collator([rows[0]]))
        figures = run.watch.gap_at_start(policy.train(), batch, trainer.reference.log_probs(batch))
        found["gap"] = figures["reference/initial_gap"]
    except InitialGapError as error:
        found |= {"refused": True, "why": error.problem}
    assert run.watch.noise is not None
    return found | {"noise": run.watch.noise.mean}


@contextmanager
def remembered_scores() -> Iterator[Callable[[], None]]:
    """While open, the policy answers what it has answered before, so that one start is judged by several stores."""
    plain, known = watch.score_without_gradient, {}

    def remembering(model: Any, batch: PairBatch, autocast_dtype: Any) -> ResponseLogProbs:
        key = tuple(batch.responses()), batch.chosen, batch.rejected
        if key not in known:
            known[key] = plain(model, batch, autocast_dtype)
        return known[key]

    watch.score_without_gradient = remembering
    try:
        yield known.clear
    finally:
        watch.score_without_gradient = plain


# --- what a start with a filled store takes ---------------------------------------------------------------------------


def _costs(tokenizer: Any, folder: Path) -> Iterator[dict[str, Any]]:
    for dtype in (torch.float32, torch.bfloat16):
        model = _load(dtype)
        for name, rows, pairs_a_step in (("sentences", real_pairs(40), 2), ("yes or no", yes_or_no(40), 1)):
            path = folder / f"{dtype}-{pairs_a_step}.sqlite"
            arguments = model, Dataset.from_list(rows), tokenizer, path, folder, pairs_a_step
            _trainer(*arguments)  # fills the store
            with _timed(StoreChecks, "look_at") as store, _timed(ReferenceRun, "_look_at_sample") as sample:
                trainer = _trainer(*arguments)
                trainer.train()
            by_length = sorted(range(len(rows)), key=lambda row: _num_tokens(trainer.train_dataset[row]))
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "rows": name,
                "pairs_a_step": pairs_a_step,
                "store_seconds": sum(store),
                "sample_seconds": sum(sample),
                "step_seconds": _seconds_of_a_step(trainer, by_length[len(rows) // 2 :][:pairs_a_step]),
                "longest_step_seconds": _seconds_of_a_step(trainer, by_length[-pairs_a_step:]),
            }


def _num_tokens(row: dict[str, Any]) -> int:
    return sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


@contextmanager
def _timed(owner: type, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a method, in time of the process."""
    plain, seconds = getattr(owner, name), list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - begin)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, plain)


def _seconds_of_a_step(trainer: DPOTrainer, places: list[int]) -> float:
    """The median of three steps on some rows."""
    rows: Any = trainer.train_dataset
    times = []
    for _ in range(3):
        begin = time.process_time()
        trainer.training_step(trainer.model_wrapped, trainer.data_collator(list(rows.select(places))))
        trainer.optimizer.step()
        times.append(time.process_time() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
