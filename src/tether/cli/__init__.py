"""The command `tether`: runs a verb, and turns an error into three readable lines and an exit code.

Must stay instant: torch and everything that imports it are loaded by a verb, never here.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from tether.cli.verbs import run_verb
from tether.errors import TetherError

EXIT_DONE, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 2, 130

HELP = """\
tether: train a language model on preference pairs (DPO and its family), with the reference
model as a thing you can hold, name, store, verify and swap.

  tether demo                        the whole line on a tiny task: trains a model, prefers, compares all
                                     four references, writes a report; offline, minutes on a CPU
  tether train RECIPE.yaml           train a policy on pairs
  tether precompute RECIPE.yaml      score the pairs under the reference once and keep the answers on
                                     disk: `train` then needs no reference model
  tether store VERB                  what is kept: info, verify, export, import, merge, prune

A recipe is a YAML file of options; any of them is also a flag, and the flag wins:

  tether train recipe.yaml --beta 0.2 --output_dir out/beta-0.2
  tether train --model Qwen/Qwen2.5-0.5B-Instruct --train_data pairs.jsonl --eval_fraction 0.1 --lora_r 16

`tether VERB --help` explains every option, and `train` which reference to choose. `tether --version`.
An error says what was asked, why it cannot be and what to write instead; --traceback (or
TETHER_TRACEBACK=1) also shows where it was raised. Exit code 0: done, 2: refused, 130: interrupted.

To read more: README.md, docs/recipes.md, examples/. In Python: from tether import DPOConfig, DPOTrainer
"""

# Each is a module beside this file with `run(argv) -> int`.
VERBS = ("demo", "train", "precompute", "store")


def run_and_exit() -> NoReturn:
    """The installed command: `main`, and the end of the process with its exit code.

    A process of several is ended without tearing the interpreter down: a thread of gloo may still let go of Python
    objects then, which aborts a process whose work is done ("terminate called without an active exception").
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # trackers write their last there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The words after `tether`; by default those of this process.

    Returns:
        The exit code: 0 done, 2 refused (a `TetherError`, told on standard error), 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words or os.environ.get("TETHER_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    _quiet_bitsandbytes()
    try:
        return _run(words)
    except SystemExit as done:  # after --help
        return int(done.code or EXIT_DONE)
    except TetherError as error:
        if traceback:
            raise
        print(f"tether: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt as stop:
        if traceback:
            raise
        print(f"\ntether: stopped. {stop}".rstrip(), file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"tether {_version()}")
        return EXIT_DONE
    return run_verb("tether", HELP, {verb: f"tether.cli.{verb}" for verb in VERBS}, words)


def _quiet_bitsandbytes() -> None:
    """Where it is installed, it warns of 4-bit kernels when peft imports it, and of a cast in every 8-bit product."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _version() -> str:
    try:
        return version("tether")
    except PackageNotFoundError:  # run from its source
        return "(not installed)"
