"""The runs of `test_two_processes.py`, in as many processes as it is started with; writes what each one saw.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/two_processes.py FOLDER PAIRS_PER_STEP
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset, load_from_disk
from peft import LoraConfig
from transformers import EvalPrediction

from support.launch import leave
from support.observe import bits, same_bits
from support.runs import as_dataset, make_trainer, steps, stream
from support.tiny import tiny_pairs
from tether import DPOTrainer, PrecomputedReference


def shards(rows: list[dict[str, Any]], first: int) -> IterableDataset:
    """A stream of two shards of different length."""

    def read(parts: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        for part in parts:
            yield from part

    return IterableDataset.from_generator(read, gen_kwargs={"parts": [rows[:first], rows[first:]]})


LORA: dict[str, Any] = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "learning_rate": 1e-2}
SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
EVAL_ROWS = tiny_pairs(7, seed=1)  # they do not divide by anything
KINDS: dict[str, dict[str, Any]] = {
    "explicit": {},
    "implicit": LORA,
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronized": SYNC,
    "synchronized, implicit": LORA | SYNC,
    "accumulated": {"gradient_accumulation_steps": 2, "loss_type": "ipo"},
    "reward shift": {"gradient_accumulation_steps": 2, "loss_type": "bco_pair", "beta": 0.5},
    "streamed": {"rows": stream(tiny_pairs(16)), "precompute_ref_log_probs": True},
    # The last round of a pass has one row: a process has part of its batch, or nothing.
    "ragged": {"rows": tiny_pairs(5)},
    "ragged, accumulated": {"rows": tiny_pairs(7), "gradient_accumulation_steps": 2, "loss_type": "ipo"},
    "ragged, reward shift": {"rows": tiny_pairs(5), "loss_type": "bco_pair", "beta": 0.5},
    "ragged, streamed": {"rows": stream(tiny_pairs(5)), "eval_dataset": stream(EVAL_ROWS)},
    "ragged, streamed, accumulated": {"rows": stream(tiny_pairs(7)), "gradient_accumulation_steps": 2},
    "streamed in shards": {"rows": shards(tiny_pairs(9), 6)},
}
# Ways to the same store, each into one of its own; the kinds above share a store.
STORED: dict[str, dict[str, Any]] = {
    "memory": {},
    "disk": {},
    "stream": {},
    "lazy": {"ref_store_mode": "lazy"},
}
NUM_ROWS = 16


def run(folder: Path, pairs_per_step: int) -> dict[str, Any]:
    """What this process sees of every kind of run."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    results: dict[str, Any] = {}

    def trainer_of(name: str, **options: Any) -> DPOTrainer:
        accumulated = options.get("gradient_accumulation_steps", 1)
        options = {
            "rows": tiny_pairs(NUM_ROWS),
            "eval_dataset": as_dataset(EVAL_ROWS),
            "per_device_train_batch_size": pairs_per_step // num_processes // accumulated,
            "per_device_eval_batch_size": 2,
            "max_steps": 6,
            "use_cpu": True,
        } | options
        return make_trainer(folder / f"{name}-{num_processes}", **options)

    for name, options in KINDS.items():
        trainer = trainer_of(name, **options)
        trainer.train()
        results[name] = {"steps": steps(trainer), "evaluation": trainer.evaluate()}
        results[name]["num_passes"] = trainer.reference.num_passes
        results[name]["num_computed"] = getattr(trainer.reference, "num_computed", None)
    results["stored"] = {
        name: stored(
            lambda name=name, options=options: trainer_of(
                f"stored-{name}",
                rows=rows_of(name, folder / f"rows-{num_processes}"),
                eval_dataset=None,
                precompute_ref_log_probs=True,
                ref_store=str(folder / f"{name}.sqlite"),
                max_steps=NUM_ROWS // pairs_per_step,
                **options,
            )
        )
        for name, options in STORED.items()
    }
    for name, rows in (("metrics", as_dataset(EVAL_ROWS)), ("metrics, streamed", stream(EVAL_ROWS))):
        results[name] = trainer_of(name, compute_metrics=sums_of, eval_dataset=rows).evaluate()
    saved = SYNC | {"save_strategy": "steps", "save_steps": 3}
    results["resumed"] = [
        resumes(lambda number=number, rows=rows: trainer_of(f"resumed-{number}", rows=rows, **saved), folder)
        for number, rows in enumerate((tiny_pairs(NUM_ROWS), tiny_pairs(5), stream(tiny_pairs(5))))
    ]
    results["best"] = best(
        trainer_of(
            "best",
            **LORA | SYNC,
            **{
                f"{what}_{by}": value
                for what in ("save", "eval")
                for by, value in (("strategy", "steps"), ("steps", 3))
            },
            load_best_model_at_end=True,
            metric_for_best_model="num_tokens",
            greater_is_better=False,
        )
    )
    return results


def best(trainer: DPOTrainer) -> list[float]:
    """The figure of the best checkpoint, which is the first, that of the last, and what is loaded at the end."""
    trainer.train()
    figures = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return [*figures, trainer.evaluate()["eval_loss"]]


def rows_of(name: str, folder: Path) -> Any:
    """The same rows from memory, from disk, or as a stream."""
    rows = tiny_pairs(NUM_ROWS)
    if name == "stream":
        return stream(rows)
    if name != "disk":
        return rows
    # Written once: the other process may be reading it already when it is asked for again.
    if os.environ.get("RANK", "0") == "0" and not (folder / "done").exists():
        as_dataset(rows).save_to_disk(folder)
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.05)
    return load_from_disk(folder)


def stored(make: Callable[[], DPOTrainer]) -> dict[str, Any]:
    """What this process scored in one epoch over the rows, and what is then in the store that all share."""
    trainer = make()
    trainer.train()
    reference = trainer.reference
    assert isinstance(reference, PrecomputedReference)
    trainer.accelerator.wait_for_everyone()
    again = make()
    again.train()
    return {
        "num_computed": reference.num_computed,
        "num_in_store": reference.store.count(),
        "num_passes_again": again.reference.num_passes,
    }


def sums_of(given: EvalPrediction) -> dict[str, float]:
    """Figures that no order of rows and no padding changes."""
    ids, logits = given.label_ids, given.predictions
    assert isinstance(ids, np.ndarray) and isinstance(logits, np.ndarray)
    return {"rows": float(len(ids)), "ids": float(ids[ids > 0].sum()), "logits": float(np.abs(logits[:, 3]).sum())}


def resumes(make: Callable[[], DPOTrainer], folder: Path) -> bool:
    """Whether a run stopped between two syncs and resumed is the uninterrupted one, bit for bit, in this process."""
    whole = make()
    whole.train()
    resumed = make()
    torch.rand(17)  # the random state is the checkpoint's business
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    module, expected = resumed.ref_model, whole.ref_model
    assert module is not None and expected is not None
    return same_bits(bits(resumed.model), bits(whole.model)) and same_bits(bits(module), bits(expected))


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    seen = run(target, int(sys.argv[2]))
    leave(target, seen)
