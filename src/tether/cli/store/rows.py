"""The verbs of `tether store` that score a recipe's rows. Nothing is trained, or written outside the store."""

from __future__ import annotations

import random
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tether.cli import EXIT_DONE
from tether.cli.assemble import build_trainer
from tether.cli.pairs import without_row_numbers
from tether.cli.recipe import Request, make_recipe
from tether.data.datasets import batch_of
from tether.errors import ConfigurationError, StoreError
from tether.reference import PrecomputedReference
from tether.reference.verifying import check
from tether.reference.verifying import verify as verify_sample
from tether.store.replacing import PARQUET, check_kind, replacing
from tether.store.sqlite_errors import how_to_salvage
from tether.trainer.batches import token_columns
from tether.trainer.dpo_trainer import DPOTrainer
from tether.trainer.reference_columns import with_reference_columns

_ROWS_AT_ONCE = 8


def verify(request: Request, num_rows: int, seed: int) -> int:
    """Scores a sample of rows again and compares it with the stored values."""
    with _trainer_of(request) as trainer:
        reference = trainer.reference
        assert isinstance(reference, PrecomputedReference)
        identity, store = reference.identity.digest, reference.store
        damage = store.find_damage()
        num_put = sum(known.num_put for known in store.identities() if known.digest == identity)
        num_intact = sum(len(batch) for batch in store.batches(identity))
        found = verify_sample(reference, _sample(trainer, num_rows, seed))
    if found.gap is None:
        raise StoreError(
            problem=f"Cannot verify the store {store.path} for the reference {identity}: it holds none of the "
            f"{found.num_missing} responses drawn.",
            details="It was filled with other rows, another template or tokenizer, or by another reference.",
            instead="Name another with `--store`, or fill this one with `tether precompute` and the same recipe.",
        )
    num_lost = num_put - num_intact
    print(
        f"store      {store.path}, {'the file is damaged' if damage else 'the file is sound'}\n"
        f"reference  {reference.identity.kind} {identity}\n"
        f"records    {num_intact:,}, {f'{num_lost:,} lost' if num_lost > 0 else 'all that were put'}, every checksum "
        "correct\n"
        f"sample     {found.num_responses:,} responses, {found.num_tokens:,} tokens scored again; "
        f"{found.num_missing:,} drawn ones not stored\n"
        f"difference {found.gap.largest:.3g} nats at most ({found.where}), {found.gap.mean:.3g} per token on average"
    )
    check(found, reference)
    if damage:
        raise StoreError(
            problem=f"Cannot rely on the log-prob store {store.path}: the file is damaged ({'; '.join(damage[:3])}).",
            details="The records that were found are right: their checksums fit.",
            instead=f"Save them into a new file: {how_to_salvage(store.path)}.",
        )
    if num_lost > 0:
        command = shlex.join([*request.words, "--ref_store", str(store.path)])
        raise StoreError(
            problem=f"Cannot find {num_lost:,} of the {num_put:,} records that were put into the log-prob store "
            f"{store.path}: they are damaged, or were removed by something else than Tether.",
            instead=f"Score them again: `tether precompute {command}`.",
        )
    return EXIT_DONE


def export(request: Request, file: str, set_name: str) -> int:
    """Writes a recipe's pairs with the sums of its reference."""
    target = Path(file).expanduser().absolute()
    check_kind(target, PARQUET)  # before anything is scored
    with _trainer_of(request) as trainer:
        rows: Any = trainer.train_dataset if set_name == "train" else trainer.eval_dataset
        if rows is None:
            raise ConfigurationError(
                problem="Cannot export `--set eval`: the recipe has no held-out pairs.",
                instead="Name them with `eval_data` or `eval_fraction`, or leave `--set` out.",
            )
        collator: Any = trainer.data_collator
        rows = without_row_numbers(with_reference_columns(rows, trainer.reference, collator))
        if trainer.is_world_process_zero():
            with replacing(target, PARQUET) as unfinished:
                rows.to_parquet(unfinished)
            print(f"{len(rows):,} pairs with ref_chosen_logps and ref_rejected_logps are in {file}.")
    return EXIT_DONE


@contextmanager
def _trainer_of(request: Request) -> Iterator[DPOTrainer]:
    with tempfile.TemporaryDirectory() as nowhere:
        yield build_trainer(make_recipe(replace(request, forced={**request.forced, "output_dir": nowhere})))


def _sample(trainer: Any, num_rows: int, seed: int) -> Iterator[Any]:
    rows = token_columns(trainer.train_dataset, trainer.args.pair_columns.names)
    drawn = sorted(random.Random(seed).sample(range(len(rows)), min(num_rows, len(rows))))
    for start in range(0, len(drawn), _ROWS_AT_ONCE):
        some = drawn[start : start + _ROWS_AT_ONCE]
        yield replace(batch_of(trainer.data_collator(rows.__getitems__(some))), rows=tuple(some))
