"""`tether precompute`: scores the pairs of a recipe under its reference and keeps the answers. Trains nothing."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence

from tether.cli import EXIT_DONE, EXIT_INTERRUPTED
from tether.cli.assemble import build_trainer
from tether.cli.recipe import read_recipe
from tether.cli.summary import describe_start

_ABOUT = """\
Scores every response of the recipe's pairs, held-out ones too, under the reference, and keeps the
per-token log-probs in the store. Takes the recipe of `tether train`; what is already there is not
scored again, so it may be stopped and started, and run again after new rows came.

  tether precompute recipe.yaml
  tether train recipe.yaml --precompute_ref_log_probs      makes no reference pass
"""


def run(argv: Sequence[str]) -> int:
    try:
        return _fill_store(argv)
    except KeyboardInterrupt:
        print("\ntether: stopped. What was scored is kept; the same command goes on from there.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fill_store(argv: Sequence[str]) -> int:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as nowhere:  # nothing is trained, so nothing is written to output_dir
        recipe = read_recipe("precompute", _ABOUT, argv, precompute_ref_log_probs=True, output_dir=nowhere)
        trainer = build_trainer(recipe)
        lines = describe_start(trainer, recipe)
    if trainer.is_world_process_zero():
        print(f"{lines}\n           {trainer.reference.num_passes} passes, {time.perf_counter() - started:.1f} s")
        if not recipe.given.get("precompute_ref_log_probs"):
            print("To use them: set `precompute_ref_log_probs: true` for `tether train`.")
    return EXIT_DONE
