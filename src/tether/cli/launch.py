"""The options of `accelerate launch` beside a run's own: starts the processes they ask for, as `trl dpo` does.

Knows processes only; what each of them does, the recipe says.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from tether.cli.refusing_parser import RefusingParser
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

# The launcher's options for machines and parallelism that Tether does not know, and what is decided here.
_OTHERS = ("aws_", "fp8_", "megatron_", "mpirun_", "parallelism_", "tpu", "no_tpu", "use_megatron", "use_parallelism")
_DECIDED = (
    "help",
    "module",
    "no_python",
    "env",
    "vm",
    "main_training_function",
    "mixed_precision",
    "downcast_bf16",
)


class Launcher:
    """The options that say how many processes run, and where.

    Args:
        own: The names of the run's own options, which come first.
        prog: The command, for messages.

    Attributes:
        options: The launcher's options by name: the argparse action that knows how one is written.
    """

    def __init__(self, own: Container[str], prog: str) -> None:
        self._prog = prog
        self._parser = RefusingParser(prog=prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self._parser.add_argument("--accelerate_config", "--accelerate-config")
        for action in launch_command_parser()._actions:
            spellings = [spelling for spelling in action.option_strings if spelling.startswith("--")]
            name = spellings[0].lstrip("-") if spellings else ""
            if name and name not in own and name not in _DECIDED and not name.startswith(_OTHERS):
                settings: Any = {"action": "store_true"} if action.nargs == 0 else {"type": action.type}
                self._parser.add_argument(*spellings, dest=name, **settings)
        self.options = {action.dest: action for action in self._parser._actions}

    def split(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """The launcher's options among some words, and the other words."""
        found, others = self._parser.parse_known_args(argv)
        return vars(found), others

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuses options of the launcher where another is at work.

        Raises:
            ConfigurationError: Names the option.
        """
        if not given or _STARTED in os.environ:
            return
        if "LOCAL_RANK" in os.environ:
            name = next(iter(given))
            raise ConfigurationError(
                asked=f"`{name}={given[name]}` in a process that a launcher has started.",
                why="How many processes run, and where, has been decided.",
                instead=f"Take it out; or start with `{self._prog}` alone, which calls `accelerate launch` itself.",
            )

    def start(
        self,
        given: Mapping[str, Any],
        verb: str,
        words: Sequence[str],
        typed: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        """Becomes the launcher, which starts this command in each of its processes; returns in those.

        Args:
            given: Options of the launcher.
            verb: The command's verb.
            words: What follows it, without the launcher's options.
            typed: What follows it as the user wrote it.
            environment: The environment of the processes.

        Raises:
            ConfigurationError: For a configuration that is not there, or a sharding that was not chosen.
        """
        if not given or _STARTED in os.environ:
            return
        options = [word for name, value in given.items() for word in self._words(name, value)]
        self._check_kind(options)
        options += _unsaid(options)
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "tether", verb, *words]
        _become(command, {**environment, _STARTED: shlex.join(typed)})

    def _words(self, name: str, value: Any) -> list[str]:
        if name == "accelerate_config":
            return self._configuration(str(value))
        if self.options[name].nargs == 0:  # present or absent
            return [f"--{name}"] if value else []
        if value is None:
            return []
        return [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]

    def _check_kind(self, options: Sequence[str]) -> None:
        """Refuses options of a way to shard that was not chosen, which accelerate would ignore."""
        for prefix, kind in (("--zero", "use_deepspeed"), ("--deepspeed_", "use_deepspeed"), ("--fsdp_", "use_fsdp")):
            shaped = next((word for word in options if word.startswith(prefix)), None)
            if shaped and f"--{kind}" not in options and "--config_file" not in options:
                raise ConfigurationError(
                    asked=f"`{shaped}` without `--{kind}`.",
                    why="It says how weights are sharded, and none are.",
                    instead=f"Add `{kind}`, or take it out.",
                )

    def _configuration(self, name: str) -> list[str]:
        if Path(name).is_file():
            return ["--config_file", name]
        if name not in PRESETS:
            raise ConfigurationError(
                asked=f"`accelerate_config={name}`.",
                why=f"There is no such file, and no configuration of that name; there are {', '.join(PRESETS)}.",
                instead="Name one of these, or a file written by `accelerate config`.",
            )
        return PRESETS[name].split()


def typed_words(words: Sequence[str]) -> list[str]:
    """What the user typed after the verb, also where a launcher handed on less of it."""
    return shlex.split(os.environ[_STARTED]) if _STARTED in os.environ else [*words]


def _unsaid(options: Sequence[str]) -> list[str]:
    """What several processes need, and what the launcher would otherwise name as its defaults."""
    if "--config_file" in options or os.path.isfile(default_config_file):
        return []
    defaults = {"--num_processes": str(max(1, torch.accelerator.device_count())), **_DEFAULTS}
    words = [word for name, value in defaults.items() if name not in options for word in (name, value)]
    # Without it, accelerate starts one process where it sees less than two GPUs, whatever the number asked for.
    number = options[options.index("--num_processes") + 1] if "--num_processes" in options else "1"
    return words if number == "1" or any(kind in options for kind in _KINDS) else ["--multi_gpu", *words]


def _become(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Replaces this process, so that signals and the exit code are the launcher's."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)
