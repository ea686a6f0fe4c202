"""From a verb to the module that does it: the same for `tether` and for `tether store`.

Must stay instant: a verb's module is imported when it is asked for, and no other.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from tether.errors import ConfigurationError


def run_verb(command: str, help_text: str, verbs: Mapping[str, str], words: Sequence[str]) -> int:
    """Runs the verb that the words begin with, on the words behind it.

    Args:
        command: What stands before the verb, for messages: `tether`, say.
        help_text: Printed for `--help`, and where there is no verb.
        verbs: The module of each verb, with `run(argv) -> int`.
        words: What stands behind the command.

    Returns:
        The verb's exit code.

    Raises:
        SystemExit: After `--help`, as argparse does.
        ConfigurationError: If there is no such verb; names the nearest.
    """
    verb, *rest = words or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(help_text, end="")
        sys.exit()
    if verb not in verbs:
        nearest = difflib.get_close_matches(verb, verbs, n=1)
        raise ConfigurationError(
            asked=f"`{command} {verb}`.",
            why="There is no such verb.",
            instead=f"{f'Did you mean `{command} {nearest[0]}`? ' if nearest else ''}The verbs are "
            f"{', '.join(verbs)}; `{command} --help` says what each does.",
        )
    code: int = import_module(verbs[verb]).run(rest)
    return code
