"""`tether store prune`: removes what is no longer wanted, and gives the space back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from tether.cli import EXIT_DONE
from tether.cli.store.choosing import choose_identity, open_store, parse, store_parser
from tether.store import prune

_ABOUT = """\
Removes the records of one reference (--identity), of those that no run has used for some days
(--older_than), or of one if it was not used for so long (both). What is removed is scored again when a
run needs it.
"""


def run(argv: Sequence[str]) -> int:
    parser = store_parser("prune", _ABOUT)
    parser.add_argument("--identity", metavar="DIGEST", help="the reference, by the first letters of its digest")
    parser.add_argument("--older_than", "--older-than", metavar="DAYS", type=float, help="not used for this many days")
    options = parse(parser, argv)
    age = None if options.older_than is None else timedelta(days=options.older_than)
    with open_store(options.store) as store:
        identity = None if options.identity is None else choose_identity(store, options.identity)
        removed = prune(store, identity=identity, older_than=age)
        print(f"{removed:,} responses were removed; {store.path} now has {store.count():,}.")
    return EXIT_DONE
