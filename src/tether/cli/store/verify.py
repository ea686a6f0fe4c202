"""`tether store verify`: scores a sample of rows again and compares with what is stored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tether.cli import EXIT_DONE
from tether.cli.store.choosing import store_parser
from tether.errors import StoreError

_ABOUT = """\
Draws rows of a recipe's training set, has its reference score them again, and reports the largest
difference to what is stored, in nats. Before that every record of the reference is read and its checksum
proven. Options of `tether train` may follow the recipe. Exit code 2 if the difference is more than rounding.

  tether store verify recipe.yaml --sample 200
"""
_ROWS_AT_ONCE = 8


def run(argv: Sequence[str]) -> int:
    parser = store_parser("verify", _ABOUT)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the run whose rows and reference are meant")
    parser.add_argument("--sample", metavar="ROWS", type=int, default=64, help="how many rows [%(default)s]")
    parser.add_argument(
        "--sample_seed", "--sample-seed", metavar="INT", type=int, default=0, help="which [%(default)s]"
    )
    options, of_recipe = parser.parse_known_args(argv)
    from tether.cli.store.opening import open_recipe  # not before --help: it loads torch
    from tether.reference import StoredReference
    from tether.reference.verifying import check, verify

    with open_recipe("verify", _ABOUT, [options.recipe, *of_recipe], options.store, mode="lazy") as trainer:
        reference = trainer.reference
        assert isinstance(reference, StoredReference)
        identity, store = reference.identity.digest, reference.store
        num_intact = sum(len(batch) for batch in store.batches(identity))
        found = verify(reference, _sample(trainer, options.sample, options.sample_seed))
    if not found.num_responses:
        raise StoreError(
            asked=f"A verification of {store.path} for the reference {identity}.",
            why=f"None of the {found.num_missing} responses drawn is in it: it was filled with other rows, another "
            "template or tokenizer, or by another reference.",
            instead="Name the store with `--store`, or fill it: `tether precompute` with the same recipe.",
        )
    print(
        f"store      {store.path}\n"
        f"reference  {reference.identity.kind} {identity}\n"
        f"records    {num_intact:,}, every checksum right\n"
        f"sample     {found.num_responses:,} responses, {found.num_tokens:,} tokens scored again; "
        f"{found.num_missing:,} drawn ones not stored\n"
        f"difference {found.largest:.3g} nats at most ({found.where}), {found.mean:.3g} per token in the mean"
    )
    check(found, reference)
    return EXIT_DONE


def _sample(trainer: Any, num_rows: int, seed: int) -> Iterator[Any]:
    from tether.batches import token_columns
    from tether.data import batch_of

    rows = token_columns(trainer.train_dataset)
    drawn = sorted(random.Random(seed).sample(range(len(rows)), min(num_rows, len(rows))))
    for start in range(0, len(drawn), _ROWS_AT_ONCE):
        some = drawn[start : start + _ROWS_AT_ONCE]
        yield replace(batch_of(trainer.data_collator(rows.__getitems__(some))), rows=tuple(some))
