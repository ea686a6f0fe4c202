"""`tether store ...`: what is in a store of reference log-probs, and what to do with it. One file for each verb."""

from __future__ import annotations

from collections.abc import Sequence

from tether.cli.verbs import run_verb

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
    "info": "tether.cli.store.info",
    "verify": "tether.cli.store.verify",
    "export": "tether.cli.store.export_records",
    "import": "tether.cli.store.import_records",
    "merge": "tether.cli.store.merge",
    "prune": "tether.cli.store.prune",
}


def run(argv: Sequence[str]) -> int:
    return run_verb("tether store", HELP, VERBS, argv)
