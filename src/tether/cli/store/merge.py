"""`tether store merge`: what other stores hold, into one."""

from __future__ import annotations

from collections.abc import Sequence

from tether.cli import EXIT_DONE
from tether.cli.store.choosing import open_store, parse, store_parser
from tether.store import merge

_ABOUT = """\
Puts every record of other stores into this one, those of several machines for instance
(`tether precompute --shard i/n`). The others are not changed, and may be in use.

  tether store merge machine-1.sqlite machine-2.sqlite --store all.sqlite
"""


def run(argv: Sequence[str]) -> int:
    parser = store_parser("merge", _ABOUT)
    parser.add_argument("others", metavar="OTHER.sqlite", nargs="+", help="the stores to take from")
    options = parse(parser, argv)
    with open_store(options.store, must_exist=False) as store:
        for other in options.others:
            print(f"{merge(store, other):,} responses were new in {other}")
        print(f"{store.path} now has {store.count():,}.")
    return EXIT_DONE
