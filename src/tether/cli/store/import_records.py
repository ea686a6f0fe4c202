"""`tether store import`: the records of a Parquet file, into a store."""

from __future__ import annotations

from collections.abc import Sequence

from tether.cli import EXIT_DONE
from tether.cli.store.choosing import open_store, parse, store_parser
from tether.store import import_parquet

_ABOUT = """\
Puts the records of a Parquet file (columns `key` and `log_probs`, as `tether store export` writes them)
into the store; of two for a response the longer stays. The store is made if it is not there.

Rows with `ref_chosen_logps` and `ref_rejected_logps` need no import: name their file as `train_data`.
"""


def run(argv: Sequence[str]) -> int:
    parser = store_parser("import", _ABOUT)
    parser.add_argument("file", metavar="FILE.parquet", help="the file")
    parser.add_argument("--identity", metavar="DIGEST", help="whose log-probs they are, if the file does not say it")
    options = parse(parser, argv)
    with open_store(options.store, must_exist=False) as store:
        added = import_parquet(store, options.file, options.identity)
        print(f"{added:,} responses were new; {store.path} now has {store.count():,}.")
    return EXIT_DONE
