"""Small training runs for the tests: a trainer in one line, and what to read from it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from support.tiny import ADAM_EPSILON, tiny_model, tiny_pairs, tiny_tokenizer
from tether import DPOConfig, DPOTrainer
from tether.config.dpo_config import objective_of
from tether.config.rules.facts import Facts
from tether.data.truncation import Truncation

DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "adam_epsilon": ADAM_EPSILON,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
TRAINER_ARGUMENTS = (
    "callbacks",
    "compute_metrics",
    "data_collator",
    "eval_dataset",
    "loss",
    "optimizer_cls_and_kwargs",
    "optimizers",
    "peft_config",
    "preprocess_logits_for_metrics",
    "processing_class",
    "quantization_config",
    "ref_model",
    "reference",
)


def make_trainer(folder: Path, model: Any = None, rows: Any = None, **options: Any) -> DPOTrainer:
    """A trainer of a tiny Llama on tiny pairs; `options` are those of `DPOTrainer` and of `DPOConfig`."""
    given = {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    return DPOTrainer(
        model=tiny_model() if model is None else model,
        args=DPOConfig(str(folder), **DEFAULTS | options),
        train_dataset=as_dataset(tiny_pairs(24) if rows is None else rows),
        **{"processing_class": tiny_tokenizer()} | given,
    )


def trained(folder: Path, model: Any = None, rows: Any = None, **options: Any) -> DPOTrainer:
    """The same after training."""
    trainer = make_trainer(folder, model, rows, **options)
    trainer.train()
    return trainer


def facts_of(folder: Path, **changes: Any) -> Facts:
    """What such a run is asked to do; `changes` are those of `Facts`, and of `DPOConfig`."""
    names = {entry.name for entry in fields(Facts)}
    args = DPOConfig(str(folder), **DEFAULTS | {n: value for n, value in changes.items() if n not in names})
    facts = Facts(
        args=args,
        policy=tiny_model(),
        ref_model=None,
        reference=None,
        new_adapter=None,
        optimizer=None,
        tokenizer=tiny_tokenizer(),
        sets={"train": as_dataset(tiny_pairs(2))},
        truncation=Truncation(args.max_length, args.truncation_mode),
        objective=objective_of(args, None),
        has_own_figures=False,
        leaders=[],
        is_sharded=False,
    )
    return replace(facts, **{n: value for n, value in changes.items() if n in names})


def as_dataset(rows: Any) -> Any:
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def steps(trainer: DPOTrainer) -> list[dict[str, float]]:
    """The training log, one entry per logged step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def curve(trainer: DPOTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in steps(trainer)]


def shared_names(entry: dict[str, float]) -> set[str]:
    """Its figures that TRL logs too: all but those of the reference, and the counts of pairs."""
    return {name for name in entry if not name.removeprefix("eval_").startswith(("reference/", "pairs/"))}


def differences(first: list[dict[str, float]], second: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference between two logs of each metric that every entry has."""
    names = set.intersection(*(set(entry) for entry in (*first, *second)))
    pairs = list(zip(first, second, strict=True))
    return {
        name: max((abs(a[name] - b[name]) for a, b in pairs if not says_rounding(b, name)), default=0.0)
        for name in sorted(names)
    }


def says_rounding(entry: dict[str, float], name: str) -> bool:
    """Whether a figure is an accuracy among ties, as before the first step: the sign of a rounding, in TRL too.

    A sum of hundreds of nats is rounded by 3e-5, and a margin by that times `beta`; a step moves margins by 1e-2.
    """
    return name.endswith("rewards/accuracies") and abs(entry[name.replace("accuracies", "margins")]) < 1e-4
