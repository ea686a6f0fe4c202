"""`tether store ...`: inspects and manages a store of reference log-probs.

The verbs' arguments and help texts; `records` does what needs no model, `rows` what needs a recipe's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from tether.cli.help import HELP_NAMES, WORDS, FixedHelpGroup
from tether.cli.mistakes import refuse, unknown_option
from tether.cli.recipe import Request, read_request
from tether.errors import ConfigurationError

HELP = """\
tether store: the log-probs of references, kept on disk so that each response
is scored once.

  tether store info [FILE]            where the store is, which references it
                                      holds, how much of each, and which runs
                                      filled it
  tether store verify RECIPE.yaml     score a sample of the recipe's rows again
                                      and compare
  tether store export FILE.parquet    write the records of one reference to a
                                      file; with --rows RECIPE.yaml, the
                                      recipe's rows with ref_chosen_logps and
                                      ref_rejected_logps, as TRL reads them
  tether store import FILE.parquet    add the records of such a file
  tether store merge OTHER.sqlite ... add what other stores hold and this one
                                      lacks
  tether store prune                  remove a reference, or those that no run
                                      has used for a long time
  tether store salvage DAMAGED.sqlite take every intact record of a damaged
                                      store into another

The store is the one that all your runs share, or the one named by `--store`
(for verify and export --rows: the recipe's `ref_store`). `tether store VERB
--help` explains more. docs/store.md explains what is kept, when it is used
again, and how to share it.
"""

Store = Annotated[str | None, typer.Option(metavar="FILE", help="The store. Default: the one that all runs share.")]
Digest = Annotated[
    str | None, typer.Option(metavar="DIGEST", help="The reference, by the first letters of its digest.")
]
File = Annotated[str, typer.Argument(metavar="FILE.parquet", help="The file.")]

app = typer.Typer(cls=FixedHelpGroup, help=HELP, context_settings=HELP_NAMES, rich_markup_mode=None)


@app.command(context_settings=HELP_NAMES)
def info(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="The store, as `--store` names it.")] = None,
    store: Store = None,
) -> int:
    """Prints the store's path and size and, for each reference, what it is, how many responses were scored, when they
    were last used, and which runs filled it: their model, rows, limit and time. Changes nothing.
    """
    from tether.cli.store import records

    return records.info(file if store is None else store)


@app.command(context_settings=WORDS)
def verify(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The run whose rows and reference to verify.")],
    store: Store = None,
    sample: Annotated[int, typer.Option(metavar="ROWS", min=1, help="Size of the sample.")] = 64,
    sample_seed: Annotated[int, typer.Option("--sample_seed", "--sample-seed", metavar="INT", help="Its seed.")] = 0,
) -> int:
    """Draws rows of a recipe's training set, scores them again with its reference, and reports the largest difference
    from the stored values, in nats. Before that, checks the file, the checksum of every record of the reference, and
    whether all that was put is still there. Options of `tether train` may follow the recipe. Exit code 2 if the
    difference is more than rounding, or something is damaged or lost.

    tether store verify recipe.yaml --sample 200
    """
    request = _request("verify", [recipe, *ctx.args], store)
    from tether.cli.store import rows

    return rows.verify(request, sample, sample_seed)


@app.command(context_settings=WORDS)
def export(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE.parquet", help="The file to write or replace.")],
    store: Store = None,
    identity: Digest = None,
    rows: Annotated[
        str | None, typer.Option(metavar="RECIPE.yaml", help="Write this recipe's pairs with their sums.")
    ] = None,
    set: Annotated[Literal["train", "eval"], typer.Option(help="Which set of the recipe.")] = "train",
) -> int:
    """Writes the records of one reference to a Parquet file: `key` and `log_probs`, which `tether store import` reads.

    With --rows, writes the pairs of a recipe instead, tokenized, with the reference's log-prob of each response as
    `ref_chosen_logps` and `ref_rejected_logps`, the sums that TRL reads. Missing responses are scored. Options of
    `tether train` may follow the recipe.

    tether store export scores.parquet --identity 1a2b

    tether store export rows.parquet --rows recipe.yaml --max_length 512
    """
    if rows is None:
        known = ["identity", "rows", "set", "store"]
        unknown = [unknown_option(f"`{word}`", word.lstrip("-"), known, dashes="--") for word in ctx.args]
        refuse(unknown, ctx.command_path)
        from tether.cli.store import records

        return records.export(store, file, identity)
    if identity is not None:
        raise ConfigurationError(
            problem="Cannot use `--identity` together with `--rows`: the recipe determines the reference of its rows.",
            details="`--identity` chooses among the references whose records a store holds.",
            instead="Leave `--identity` out.",
        )
    request = _request("export", [rows, *ctx.args], store)
    from tether.cli.store import rows as of_recipe

    return of_recipe.export(request, file, set)


@app.command("import", context_settings=HELP_NAMES)
def import_file(file: File, store: Store = None, identity: Digest = None) -> int:
    """Adds the records of a Parquet file (columns `key` and `log_probs`, as written by `tether store export`) to the
    store; of two records for a response, the longer is kept. The store is created if it does not exist.

    Rows with `ref_chosen_logps` and `ref_rejected_logps` need no import: name their file as `train_data`.
    """
    from tether.cli.store import records

    return records.import_file(store, file, identity)


@app.command(context_settings=HELP_NAMES)
def merge(
    others: Annotated[list[str], typer.Argument(metavar="OTHER.sqlite...", help="The stores to read.")],
    store: Store = None,
) -> int:
    """Adds every record of other stores to this one, such as those of several machines (`tether precompute
    --shard i/n`). The others are not changed, and may be in use.

    tether store merge machine-1.sqlite machine-2.sqlite --store all.sqlite
    """
    from tether.cli.store import records

    return records.merge_into(store, others)


@app.command(context_settings=HELP_NAMES)
def prune(
    store: Store = None,
    identity: Digest = None,
    older_than: Annotated[
        float | None, typer.Option("--older_than", "--older-than", metavar="DAYS", help="Not used for this many days.")
    ] = None,
) -> int:
    """Removes the records of one reference (--identity), of those that no run has used for some days (--older_than),
    or of one if it was not used for that long (both). Removed responses are scored again when a run needs them.
    """
    from tether.cli.store import records

    return records.prune_store(store, identity, older_than)


@app.command(context_settings=HELP_NAMES)
def salvage(
    damaged: Annotated[str, typer.Argument(metavar="DAMAGED.sqlite", help="The damaged file; it is not changed.")],
    store: Store = None,
) -> int:
    """Copies every intact record of a damaged store, proven by its checksum, into another one, which is created if it
    does not exist.

    tether store salvage damaged.sqlite --store fresh.sqlite
    """
    from tether.cli.store import records

    return records.salvage_into(store, damaged)


def _request(verb: str, words: list[str], store: str | None) -> Request:
    """A recipe that uses the store named by `--store`; nothing is trained."""
    named: dict[str, Any] = {} if store is None else {"ref_store": store}
    if verb == "verify":  # which does that itself, and says what it found
        named["ref_store_verify"] = 0
    return read_request(f"store {verb}", words, precompute_ref_log_probs=True, ref_store_mode="lazy", **named)


VERBS = ("info", "verify", "export", "import", "merge", "prune", "salvage")
