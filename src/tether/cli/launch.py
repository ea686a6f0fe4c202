"""The options of `accelerate launch` beside a run's own: starts the processes they ask for, as `trl dpo` does.

Knows processes only; what each of them does, the recipe says.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from tether.cli.options import LAUNCHER
from tether.errors import ConfigurationError

# In the environment of the processes that were started here: the words that their user typed.
_STARTED = "TETHER_LAUNCHED"

# What `accelerate_config` may name besides a file: TRL's names, as options of the launcher.
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


def check_is_alone(given: Mapping[str, Any], prog: str) -> None:
    """Refuses options of the launcher where another is at work.

    Raises:
        ConfigurationError: Names the first.
    """
    if "LOCAL_RANK" in os.environ and _STARTED not in os.environ:
        name = next(iter(given))
        raise ConfigurationError(
            problem=f"Cannot use `{name}={given[name]}` in a process that a launcher has started: how many processes "
            "run, and where, is already decided.",
            details=f"`{name}` is an option of `accelerate launch`, and LOCAL_RANK is set.",
            instead=f"Take it out, or start with `{prog}` alone, which calls `accelerate launch` itself.",
        )


def launch(
    given: Mapping[str, Any], prog: str, words: Sequence[str], typed: Sequence[str], environment: Mapping[str, str]
) -> None:
    """Becomes the launcher, which starts this command in each of its processes; returns in those.

    Args:
        given: Options of the launcher, as text.
        prog: The command, with its verb.
        words: What follows it, without the launcher's options.
        typed: What follows it as the user wrote it.
        environment: The environment of the processes.

    Raises:
        ConfigurationError: For options that the launcher refuses, a configuration that is not there, or a sharding
            that was not chosen.
    """
    if _STARTED in os.environ:
        return
    options = [word for name, value in given.items() for word in _words(name, value)]
    _check_kind(options)
    options += _unsaid(options)
    command = [*options, "-m", "tether", *prog.split()[1:], *words]
    _LauncherParser(prog=prog, parents=[launch_command_parser()], add_help=False, allow_abbrev=False).parse_args(
        command
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # This process becomes the launcher, so that signals and the exit code are the launcher's.
    program = [sys.executable, "-m", "accelerate.commands.launch", *command]
    os.execve(program[0], program, {**environment, _STARTED: shlex.join(typed)})


def typed_words(words: Sequence[str]) -> list[str]:
    """What the user typed after the verb, also where a launcher handed on less of it."""
    return shlex.split(os.environ[_STARTED]) if _STARTED in os.environ else [*words]


class _LauncherParser(argparse.ArgumentParser):
    """accelerate's own, which raises where it would print its usage and leave the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            problem=f"Cannot start the processes of `{self.prog}`: {message}.",
            details="`accelerate launch` refuses this option.",
            instead="Change it: `accelerate launch --help` explains its options.",
        )


def _words(name: str, value: Any) -> list[str]:
    """An option of the launcher as its command line has it."""
    if name == "accelerate_config":
        return _configuration(str(value))
    if LAUNCHER[name]["type"] == ["boolean"]:  # present or absent
        return [f"--{name}"] if str(value).lower() in ("true", "yes", "on", "1") else []
    return [] if value is None else [f"--{name}", str(value)]


def _check_kind(options: Sequence[str]) -> None:
    """Refuses options of a way to shard that was not chosen, which accelerate would ignore."""
    for prefix, kind in (("--zero", "use_deepspeed"), ("--deepspeed_", "use_deepspeed"), ("--fsdp_", "use_fsdp")):
        shaped = next((word for word in options if word.startswith(prefix)), None)
        if shaped and f"--{kind}" not in options and "--config_file" not in options:
            raise ConfigurationError(
                problem=f"Cannot use `{shaped}` without `--{kind}`: it says how to shard the weights, and they "
                "are not sharded.",
                details=f"accelerate would ignore `{shaped}`.",
                instead=f"Add `--{kind}`, or take `{shaped}` out.",
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


def _unsaid(options: Sequence[str]) -> list[str]:
    """What several processes need, and what the launcher would otherwise name as its defaults."""
    if "--config_file" in options or os.path.isfile(default_config_file):
        return []
    defaults = {"--num_processes": str(max(1, torch.accelerator.device_count())), **_DEFAULTS}
    words = [word for name, value in defaults.items() if name not in options for word in (name, value)]
    # Without it, accelerate starts one process where it sees less than two GPUs, whatever the number asked for.
    number = options[options.index("--num_processes") + 1] if "--num_processes" in options else "1"
    return words if number == "1" or any(kind in options for kind in _KINDS) else ["--multi_gpu", *words]
