"""`tether store ...`: what is in a store of reference log-probs, and what to do with it. One file for each verb."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from tether.cli import EXIT_DONE
from tether.errors import ConfigurationError

HELP = """\
tether store: the log-probs of references, kept on disk so that each response is scored once.

  tether store info                        where the store is, which references it holds, how much of each
  tether store verify RECIPE.yaml          scores a sample of the recipe's rows again and compares
  tether store export FILE.parquet         the records of one reference, for anyone to read; with --rows
                                           RECIPE.yaml the recipe's rows with ref_chosen_logps and
                                           ref_rejected_logps, as TRL reads them
  tether store import FILE.parquet         the records of such a file, into the store
  tether store merge OTHER.sqlite ...      what other stores hold and this one lacks
  tether store prune                       removes a reference, or those that nobody used for long

The store is the one that all your runs share, or the one that `--store FILE` names
(for verify and export --rows: the recipe's `ref_store`). `tether store VERB --help` says more.
docs/store.md explains what is kept, when it is used again, and how to share it.
"""

# Each verb's module beside this file, with `run(argv) -> int`.
VERBS = {
    "info": "info",
    "verify": "verify",
    "export": "export_records",
    "import": "import_records",
    "merge": "merge",
    "prune": "prune",
}


def run(argv: Sequence[str]) -> int:
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(HELP, end="")
        return EXIT_DONE
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1)
        raise ConfigurationError(
            asked=f"`tether store {verb}`.",
            why="There is no such verb.",
            instead=f"{f'Did you mean `tether store {nearest[0]}`? ' if nearest else ''}The verbs are "
            f"{', '.join(VERBS)}; `tether store --help` says what each does.",
        )
    code: int = import_module(f"tether.cli.store.{VERBS[verb]}").run(rest)
    return code
