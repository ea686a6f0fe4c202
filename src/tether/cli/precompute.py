"""`tether precompute`: scores the pairs of a recipe under its reference and stores the log-probs. Trains nothing."""

from __future__ import annotations

import sys
import tempfile
import time

from tether.cli import EXIT_DONE, EXIT_INTERRUPTED
from tether.cli.assemble import build_trainer
from tether.cli.library_errors import report_library_errors
from tether.cli.recipe import Request, make_recipe
from tether.cli.summary import describe_start


def run(request: Request, shard: tuple[int, int] | None) -> int:
    try:
        return _fill_store(request, shard)
    except KeyboardInterrupt as stop:
        kept = f"{stop}" or "Responses scored so far are kept"
        print(f"\ntether: stopped. {kept}; run the same command to continue.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fill_store(request: Request, shard: tuple[int, int] | None) -> int:
    started = time.perf_counter()
    recipe = make_recipe(request)
    with tempfile.TemporaryDirectory() as nowhere:  # nothing is trained, so nothing is written to output_dir
        recipe.config.output_dir = nowhere
        recipe.config.run_name = recipe.config.run_name or "tether precompute"
        with report_library_errors("tether precompute"):
            trainer = build_trainer(recipe, shard=shard)
        lines = describe_start(trainer, recipe)
    if trainer.is_world_process_zero():
        print(f"{lines}\n           {trainer.reference.num_passes} passes, {time.perf_counter() - started:.1f} s")
        if shard is not None:
            print(f"This was part {shard[0]} of {shard[1]}. When all are done, join them with `tether store merge`.")
        elif not recipe.given.get("precompute_ref_log_probs"):
            print("To use them, set `precompute_ref_log_probs: true` for `tether train`.")
    return EXIT_DONE
