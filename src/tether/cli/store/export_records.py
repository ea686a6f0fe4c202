"""`tether store export`: the records of one reference as Parquet, or rows with its sums as columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tether.cli import EXIT_DONE
from tether.cli.store.choosing import choose_identity, open_store, parse, store_parser
from tether.errors import ConfigurationError
from tether.store import export_parquet

_ABOUT = """\
Writes the records of one reference to a Parquet file: `key` and `log_probs`, which `tether store import`
reads.

With --rows, writes the pairs of a recipe instead, tokenized, with what its reference says of each response:
`ref_chosen_logps` and `ref_rejected_logps`, the sums that TRL reads. What the store lacks is scored. Options
of `tether train` may follow the recipe.

  tether store export scores.parquet --identity 1a2b
  tether store export rows.parquet --rows recipe.yaml --max_length 512
"""


def run(argv: Sequence[str]) -> int:
    parser = store_parser("export", _ABOUT)
    parser.add_argument("file", metavar="FILE.parquet", help="the file to write; replaced if it is there")
    parser.add_argument("--identity", metavar="DIGEST", help="the reference, by the first letters of its digest")
    parser.add_argument("--rows", metavar="RECIPE.yaml", help="write this recipe's pairs with their sums")
    parser.add_argument("--set", choices=["train", "eval"], default="train", help="which of its sets [%(default)s]")
    if "--rows" in argv or any(word.startswith("--rows=") for word in argv):
        options, of_recipe = parser.parse_known_args(argv)
        return _export_rows(options, [options.rows, *of_recipe])
    options = parse(parser, argv)
    with open_store(options.store) as store:
        identity = choose_identity(store, options.identity)
        print(f"{export_parquet(store, options.file, identity):,} responses of {identity} are in {options.file}.")
    return EXIT_DONE


def _export_rows(options: Any, words: Sequence[str]) -> int:
    if options.identity is not None:
        raise ConfigurationError(
            asked="`--identity` together with `--rows`.",
            why="The recipe says which reference its rows are scored by.",
            instead="Leave `--identity` out.",
        )
    from tether.cli.store.opening import open_recipe  # not before --help: it loads torch
    from tether.columns import with_reference_columns

    with open_recipe("export", _ABOUT, words, options.store, mode="lazy") as trainer:
        rows: Any = trainer.train_dataset if options.set == "train" else trainer.eval_dataset
        if rows is None:
            raise ConfigurationError(
                asked="`--set eval` of a recipe without held-out pairs.",
                why="There are none to write.",
                instead="Name them with `eval_data` or `eval_fraction`, or leave `--set` out.",
            )
        collator: Any = trainer.data_collator
        rows = with_reference_columns(rows, trainer.reference, collator)
        if trainer.is_world_process_zero():
            rows.to_parquet(Path(options.file).expanduser())
            print(f"{len(rows):,} pairs with ref_chosen_logps and ref_rejected_logps are in {options.file}.")
    return EXIT_DONE
