"""The command `tether`: runs a verb, and turns errors into readable lines and an exit code.

Must start instantly: torch and everything that imports it are loaded by a verb, never here.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from tether.errors import TetherError

# Environment variable of processes that a launcher of ours has started: a folder for what one of them has said.
SAID = "TETHER_SAID"

EXIT_DONE, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 2, 130


def run_and_exit() -> NoReturn:
    """The installed command: runs `main` and ends the process with its exit code.

    One of several processes is ended without shutting the interpreter down: a gloo thread may still release Python
    objects at that point, which aborts a process that has finished ("terminate called without an active exception").
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # trackers flush there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The words after `tether`; by default those of this process.

    Returns:
        The exit code: 0 done, 2 refused (a `TetherError`, printed to standard error), 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words or os.environ.get("TETHER_TRACEBACK", "") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    _quiet_bitsandbytes()
    from tether.cli.verbs import run_verb

    try:
        return run_verb(words)
    except SystemExit as done:  # this process only started a launcher
        return int(done.code or EXIT_DONE)
    except TetherError as error:
        if traceback:
            raise
        _say(f"tether: {error}")
        return EXIT_REFUSED
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt as stop:
        if traceback:
            raise
        _say(f"\ntether: stopped. {stop}".rstrip())
        return EXIT_INTERRUPTED


def _say(text: str) -> None:
    """Prints to standard error, once for all processes that a launcher of ours has started."""
    folder = os.environ.get(SAID)
    if folder is not None:
        try:
            Path(folder, sha256(text.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
    print(text, file=sys.stderr)


def _quiet_bitsandbytes() -> None:
    """Silences bitsandbytes' warnings about 4-bit kernels (when peft imports it) and casts (in every 8-bit product)."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
