"""`tether train --dry_run`: does and shows everything up to the first step. Trains nothing and writes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from tether.cli.assemble import build_trainer
from tether.cli.recipe import Recipe
from tether.cli.summary import describe_start
from tether.data.datasets import TOKEN_COLUMNS, batch_of
from tether.reference import PrecomputedReference
from tether.trainer.batches import token_columns
from tether.trainer.dpo_trainer import DPOTrainer
from tether.types import PairBatch

_ROWS_AT_ONCE = 64


def describe_dry_run(recipe: Recipe) -> str:
    """Builds the run's trainer and describes the run, without the reference's pass before training."""
    config = recipe.config
    config.push_to_hub = False
    if config.precompute_ref_log_probs and config.ref_store_mode in ("auto", "fill"):
        config.ref_store_mode = "lazy"  # nothing is scored until a row is requested
    with tempfile.TemporaryDirectory() as nowhere:
        folder, config.output_dir = config.output_dir, nowhere
        trainer = build_trainer(recipe)
        if not trainer.is_deepspeed_enabled:  # their options are checked as they are made
            trainer.create_optimizer_and_scheduler(num_training_steps=max(1, config.max_steps))
        lines = [describe_start(trainer, recipe), _cost(trainer), _lengths(trainer), f"output     {folder}", ""]
        return "\n".join([*lines, *_first_pair(trainer), "", "This was a dry run: nothing was trained or saved."])


def _cost(trainer: DPOTrainer) -> str:
    """What the reference costs besides its weights: passes, or the number of responses that the store lacks."""
    reference, _, batch = trainer.reference, *next(_batches(trainer))
    if isinstance(reference, PrecomputedReference) and isinstance(trainer.train_dataset, Dataset):
        answers = [value is not None for _, batch in _batches(trainer) for value in reference.stored(batch)]
        return f"           {answers.count(True):,} of the {len(answers):,} responses to train on are in the store"
    if isinstance(reference, PrecomputedReference):
        return "           a pass over each row when it is first read, unless the store has its answers"
    before = reference.num_passes
    reference.log_probs(batch.to(trainer.args.device))
    return f"           {'a pass in every step' if reference.num_passes > before else 'no pass at all'}"


def _lengths(trainer: DPOTrainer) -> str:
    """Tokens of each pair, its prompt once, and how many pairs `max_length` cuts."""
    if not isinstance(trainer.train_dataset, Dataset):
        return "lengths    not known before the stream is read"
    lengths, num_cut = [], 0
    for rows, batch in _batches(trainer):
        fed = batch.fed_lengths()
        cut = [fed[c] + batch.response_lengths[r] for c, r in zip(batch.chosen, batch.rejected, strict=True)]
        whole = [sum(len(row[column]) for column in TOKEN_COLUMNS) for row in rows]
        num_cut += sum(one < other for one, other in zip(cut, whole, strict=True))
        lengths += cut
    mean = sum(lengths) / len(lengths)
    return (
        f"lengths    {min(lengths):,} to {max(lengths):,} tokens a pair, {mean:,.0f} on average\n"
        f"           max_length {trainer.args.max_length or 'none'} cuts {num_cut:,} of {len(lengths):,} pairs"
    )


def _first_pair(trainer: DPOTrainer) -> list[str]:
    """Prompt and responses of the first row, as the model reads them."""
    _, batch = next(_batches(trainer))
    responses = batch.responses()
    chosen, rejected = responses[batch.chosen[0]], responses[batch.rejected[0]]
    shown = {"prompt": chosen.prompt_ids, "chosen": chosen.token_ids, "rejected": rejected.token_ids}
    decode = trainer._tokenizer.decode
    return [f"first {name}, {len(ids)} tokens:\n  {decode(list(ids))!r}" for name, ids in shown.items()]


def _batches(trainer: DPOTrainer) -> Iterator[tuple[list[Any], PairBatch]]:
    """Rows of the training set and their batch, in order; of a stream the first row."""
    rows, collator = trainer.train_dataset, trainer.data_collator
    if not isinstance(rows, Dataset):
        first: Any = list(rows.take(1))  # type: ignore[union-attr]
        yield first, batch_of(collator(first))
        return
    columns = token_columns(rows, trainer.args.pair_columns.names)
    for start in range(0, len(columns), _ROWS_AT_ONCE):
        some = columns.__getitems__(list(range(start, min(start + _ROWS_AT_ONCE, len(columns)))))
        yield some, batch_of(collator(some))
