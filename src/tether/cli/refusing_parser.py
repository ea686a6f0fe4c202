"""An argument parser that refuses in three parts instead of printing its usage and leaving the process."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

from tether.errors import ConfigurationError


class RefusingParser(argparse.ArgumentParser):
    """Raises `ConfigurationError` where argparse would call `sys.exit(2)`."""

    hint = ""  # what else is worth knowing when words cannot be read

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", message)  # one spelling of an option is enough
        raise ConfigurationError(
            asked=f"These words after `{self.prog}`.",
            why=f"{message[0].upper()}{message[1:].rstrip('.')}.",
            instead=f"{self.hint}`{self.prog} --help` shows how an option is written.",
        )


def refuse_unknown(what: str, name: str, known: Iterable[str], prog: str, dashes: str = "") -> NoReturn:
    """Refuses an option that does not exist, naming the nearest that does.

    Args:
        what: The option as it was written, and where.
        name: Its bare name.
        known: The bare names of all options.
        prog: The command whose help lists them.
        dashes: What stands before an option's name where this one was written.
    """
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    raise ConfigurationError(
        asked=f"{what}.",
        why=f"There is no option `{name}`.",
        instead=(f"Did you mean `{dashes}{nearest[0]}`? " if nearest else "Take it out. ")
        + f"`{prog} --help` lists every option.",
    )
