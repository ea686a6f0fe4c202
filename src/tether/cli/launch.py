"""The options of `accelerate launch` among a run's own: starts the processes they request, as `trl dpo` does.

Knows processes only; the recipe decides what each of them does.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tether.cli import SAID
from tether.cli.options import LAUNCHER
from tether.errors import ConfigurationError

# Environment variable of the processes started here: the words that the user typed.
_STARTED = "TETHER_LAUNCHED"

# Values of `accelerate_config` other than a file: TRL's names, as options of the launcher.
PRESETS: Mapping[str, str] = {
    "single_gpu": "--num_processes 1",
    "multi_gpu": "--multi_gpu",
    "zero1": "--use_deepspeed --zero_stage 1",
    "zero2": "--use_deepspeed --zero_stage 2",
    "zero3": "--use_deepspeed --zero_stage 3 --zero3_init_flag true --zero3_save_16bit_model true",
    "fsdp2": "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_state_dict_type FULL_STATE_DICT",
}

_DEFAULTS = {"--num_machines": "1", "--mixed_precision": "no", "--dynamo_backend": "no"}
_KINDS = ("--multi_gpu", "--use_deepspeed", "--use_fsdp", "--cpu")


def check_no_launcher(given: Mapping[str, Any], prog: str) -> None:
    """Refuses options of the launcher if another launcher has started this process.

    Raises:
        ConfigurationError: Names the first.
    """
    if "LOCAL_RANK" in os.environ and _STARTED not in os.environ:
        name = next(iter(given))
        raise ConfigurationError(
            problem=f"Cannot use `{name}={given[name]}` in a process that a launcher has started: how many processes "
            "run, and where, is already decided.",
            details=f"`{name}` is an option of `accelerate launch`, and LOCAL_RANK is set.",
            instead=f"Remove it, or start with `{prog}` alone, which calls `accelerate launch` itself.",
        )


def launch(
    given: Mapping[str, Any], prog: str, words: Sequence[str], typed: Sequence[str], environment: Mapping[str, str]
) -> None:
    """Replaces this process by the launcher, which runs this command in each of its processes; returns only in those.

    Args:
        given: Options of the launcher, as text.
        prog: The command, with its verb.
        words: The words after it, without the launcher's options.
        typed: The words after it, as the user typed them.
        environment: The environment of the processes.

    Raises:
        ConfigurationError: For options that the launcher refuses, a configuration that does not exist, or options of a
            sharding that was not chosen.
    """
    if _STARTED in os.environ:
        return
    options = [word for name, value in given.items() for word in _words(name, value)]
    _check_kind(options)
    options += _missing_options(options)
    command = [*options, "-m", "tether", *prog.split()[1:], *words]
    _LauncherParser(prog=prog, parents=[launch_command_parser()], add_help=False, allow_abbrev=False).parse_args(
        command
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # This process becomes the launcher, so that signals and the exit code are the launcher's.
    program = [sys.executable, "-m", __name__, *command]
    os.execve(program[0], program, {**environment, _STARTED: shlex.join(typed)})


def typed_words(words: Sequence[str]) -> list[str]:
    """The words that the user typed after the verb, even if a launcher passed on only some of them."""
    return shlex.split(os.environ[_STARTED]) if _STARTED in os.environ else [*words]


class _LauncherParser(argparse.ArgumentParser):
    """accelerate's parser, but raises an error instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            problem=f"Cannot start the processes of `{self.prog}`: {message}.",
            details="`accelerate launch` refuses this option.",
            instead="Change it: `accelerate launch --help` explains its options.",
        )


def _words(name: str, value: Any) -> list[str]:
    """An option of the launcher as words of its command line."""
    if name == "accelerate_config":
        return _configuration(str(value))
    if LAUNCHER[name]["type"] == ["boolean"]:  # present or absent
        return [f"--{name}"] if str(value).lower() in ("true", "yes", "on", "1") else []
    return [] if value is None else [f"--{name}", str(value)]


def _check_kind(options: Sequence[str]) -> None:
    """Refuses options of a kind of sharding that was not chosen, which accelerate would ignore."""
    for prefix, kind in (("--zero", "use_deepspeed"), ("--deepspeed_", "use_deepspeed"), ("--fsdp_", "use_fsdp")):
        shaped = next((word for word in options if word.startswith(prefix)), None)
        if shaped and f"--{kind}" not in options and "--config_file" not in options:
            raise ConfigurationError(
                problem=f"Cannot use `{shaped}` without `--{kind}`: it defines how to shard the weights, and they "
                "are not sharded.",
                details=f"accelerate would ignore `{shaped}`.",
                instead=f"Add `--{kind}`, or remove `{shaped}`.",
            )


def _configuration(name: str) -> list[str]:
    if Path(name).is_file():
        return ["--config_file", name]
    if name not in PRESETS:
        raise ConfigurationError(
            problem=f"Cannot use `accelerate_config={name}`: there is no such file, and no configuration of that name.",
            instead=f"Name a file written by `accelerate config`, or one of {', '.join(PRESETS)}.",
        )
    return PRESETS[name].split()


def _missing_options(options: Sequence[str]) -> list[str]:
    """Options that several processes need, and defaults that the launcher would otherwise warn about."""
    if "--config_file" in options or os.path.isfile(default_config_file):
        return []
    defaults = {"--num_processes": str(max(1, torch.accelerator.device_count())), **_DEFAULTS}
    words = [word for name, value in defaults.items() if name not in options for word in (name, value)]
    # Without it, accelerate starts one process if it sees fewer than two GPUs, whatever number was requested.
    number = options[options.index("--num_processes") + 1] if "--num_processes" in options else "1"
    return words if number == "1" or any(kind in options for kind in _KINDS) else ["--multi_gpu", *words]


def _run_launcher() -> NoReturn:
    """`accelerate launch`, but without a traceback for how its processes ended: they have said why themselves."""
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[SAID] = folder
            launch_command(launch_command_parser().parse_args())
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        _end(failed.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as failed:
        _end(failed.returncode)
    sys.exit()


def _end(code: int) -> NoReturn:
    """Ends with the exit code of a process; the shell's, if a signal ended it."""
    if code < 0:
        print(f"tether: a process was ended by {signal.Signals(-code).name}.", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _run_launcher()
