"""`tether precompute`: scores the pairs of a recipe under its reference and keeps the answers. Trains nothing."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence

from tether.cli import EXIT_DONE, EXIT_INTERRUPTED
from tether.cli.assemble import build_trainer
from tether.cli.library_errors import library_errors_told
from tether.cli.recipe import read_recipe
from tether.cli.summary import describe_start
from tether.errors import ConfigurationError

_ABOUT = """\
Scores every response of the recipe's pairs, held-out ones too, under the reference, and keeps the
per-token log-probs in the store. Takes the recipe of `tether train`; what is already there is not
scored again, so it may be stopped and started, and run again after new rows came.

  tether precompute recipe.yaml
  tether train recipe.yaml --precompute_ref_log_probs      makes no reference pass

Processes of one machine share the rows (--num_processes). For many machines, part i of n on each, and join:

  tether precompute recipe.yaml --shard 1/4 --ref_store part-1.sqlite
  tether store merge part-1.sqlite part-2.sqlite part-3.sqlite part-4.sqlite
"""


def run(argv: Sequence[str]) -> int:
    try:
        return _fill_store(argv)
    except KeyboardInterrupt as stop:
        kept = f"{stop}" or "What was scored is kept"
        print(f"\ntether: stopped. {kept}; the same command goes on from there.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fill_store(argv: Sequence[str]) -> int:
    started = time.perf_counter()
    shard, words = _read_shard(argv)
    recipe = read_recipe(
        "precompute",
        _ABOUT,
        words,
        beside=() if shard is None else ("--shard", f"{shard[0]}/{shard[1]}"),
        precompute_ref_log_probs=True,
        ref_store_mode="fill",
    )
    with tempfile.TemporaryDirectory() as nowhere:  # nothing is trained, so nothing is written to output_dir
        recipe.config.output_dir = nowhere
        with library_errors_told("tether precompute"):
            trainer = build_trainer(recipe, shard=shard)
        lines = describe_start(trainer, recipe)
    if trainer.is_world_process_zero():
        print(f"{lines}\n           {trainer.reference.num_passes} passes, {time.perf_counter() - started:.1f} s")
        if shard is not None:
            print(f"This was part {shard[0]} of {shard[1]}. When all are done: `tether store merge` their stores.")
        elif not recipe.given.get("precompute_ref_log_probs"):
            print("To use them: set `precompute_ref_log_probs: true` for `tether train`.")
    return EXIT_DONE


def _read_shard(argv: Sequence[str]) -> tuple[tuple[int, int] | None, list[str]]:
    """`--shard i/n`, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--shard", nargs="?", const="")
    options, words = parser.parse_known_args(argv)
    if options.shard is None:
        return None, words
    numbers = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    number, total = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= number <= total:
        raise ConfigurationError(
            asked=f"`--shard {options.shard}`.",
            why="It says which part of how many this is.",
            instead="Write `--shard 1/4` on the first of four machines, `--shard 4/4` on the last.",
        )
    return (number, total), words
