"""A recipe's trainer over the store that a verb names; nothing is trained or written beside the store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tether.cli.assemble import build_trainer
from tether.cli.recipe import read_recipe
from tether.trainer import DPOTrainer


@contextmanager
def open_recipe(verb: str, about: str, words: Sequence[str], store: str | None, *, mode: str) -> Iterator[DPOTrainer]:
    """The trainer of a recipe, whose reference reads a store.

    Args:
        verb: The verb, for messages.
        about: What it does, for its --help.
        words: The recipe and further options.
        store: The store's file; None for the recipe's `ref_store`, or the shared one.
        mode: The `ref_store_mode`.
    """
    named = {} if store is None else {"ref_store": store}
    with tempfile.TemporaryDirectory() as nowhere:
        recipe = read_recipe(
            f"store {verb}",
            about,
            words,
            precompute_ref_log_probs=True,
            ref_store_mode=mode,
            output_dir=nowhere,
            **named,
        )
        yield build_trainer(recipe)
