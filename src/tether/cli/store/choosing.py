"""Which store, and which of its references: the words that the verbs of `tether store` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tether.cli.refusing_parser import RefusingParser, refuse_unknown
from tether.errors import StoreError
from tether.store import LogProbStore, default_store_path


def store_parser(verb: str, about: str) -> RefusingParser:
    """A parser with `--store`."""
    parser = RefusingParser(
        prog=f"tether store {verb}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--store", metavar="FILE", help="the store [the one that all your runs share]")
    return parser


def parse(parser: RefusingParser, argv: Sequence[str]) -> argparse.Namespace:
    """The words after a verb; refuses those that belong to no option."""
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        refuse_unknown(f"`{unknown[0]}` after `{parser.prog}`", name, vars(options), parser.prog, dashes="--")
    return options


def open_store(name: str | None, *, read_only: bool = False, must_exist: bool = True) -> LogProbStore:
    """The store that `--store` names, or the shared one.

    Raises:
        StoreError: If it is not there, unless it may be made.
    """
    path = Path(name).expanduser() if name else default_store_path()
    if must_exist and not path.is_file():
        raise StoreError(
            asked=f"The store {path.absolute()}.",
            why="There is no such file yet: nothing was scored into it.",
            instead="Name another with `--store FILE`, or fill this one: `tether precompute RECIPE.yaml`.",
        )
    return LogProbStore(path, read_only=read_only)


def choose_identity(store: LogProbStore, start: str | None) -> str:
    """The digest of a reference from its first letters, or the only one that a store holds.

    Raises:
        StoreError: If there is none, or more than one; lists them.
    """
    known = list(store.digests())
    found = [digest for digest in known if digest.startswith(start or "")]
    if len(found) == 1:
        return found[0]
    described = ", ".join(known) or "none"
    raise StoreError(
        asked=f"A reference {f'that starts with {start!r}' if start else 'without a name'} in {store.path}.",
        why=f"{len(found) or 'None'} of its references {'fits' if len(found) == 1 else 'fit'}; it holds {described}.",
        instead="Name one with `--identity` and its first letters; `tether store info` tells what each is.",
    )
