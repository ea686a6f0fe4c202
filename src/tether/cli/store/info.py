"""`tether store info`: which references a store holds, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence

from tether.cli import EXIT_DONE
from tether.cli.store.choosing import open_store, parse, store_parser
from tether.store import StoredIdentity

_ABOUT = """\
Says where the store is, how large it is, and of each reference what it is, how many responses were
scored, and when they were last used. Changes nothing.
"""


def run(argv: Sequence[str]) -> int:
    options = parse(store_parser("info", _ABOUT), argv)
    with open_store(options.store, read_only=True) as store:
        identities = store.identities()
        size = sum(part.stat().st_size for part in store.path.parent.glob(f"{store.path.name}*"))
        print(f"store      {store.path} ({size / 1e6:,.1f} MB)")
        for identity in identities:
            print(_describe(identity))
        if not identities:
            print("           It is empty.")
    return EXIT_DONE


def _describe(identity: StoredIdentity) -> str:
    about = identity.description or {}
    what = ", ".join(
        f"{name.replace('_', ' ')} {about[name]}" for name in ("compute_dtype", "scoring_version") if name in about
    )
    return (
        f"reference  {about.get('kind', '(not described)')} {identity.digest}{f': {what}' if what else ''}\n"
        f"           {identity.num_records:,} responses, {identity.num_tokens:,} tokens, "
        f"{identity.size_bytes / 1e6:,.1f} MB; since {identity.created:%Y-%m-%d}, "
        f"last used {identity.last_used:%Y-%m-%d}"
    )
