"""Options of `trl dpo` that `tether train` does not take: why, and what to write instead.

All others it takes under TRL's names; this is the whole list of exceptions, and a test compares it with TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tether.errors import ConfigurationError


@dataclass(frozen=True)
class RefusedOption:
    """An option of TRL's that is refused, unless it says what is done anyway.

    Attributes:
        default: TRL's default, which changes nothing and may stand in a recipe.
        why: Why it cannot be.
        instead: What to write.
    """

    default: Any
    why: str
    instead: str


_LAUNCHED = (
    "How many processes run, and where, is their launcher's business.",
    "Take it out, and start with `torchrun --nproc_per_node N -m tether train recipe.yaml`, or with `accelerate "
    "launch [its options] -m tether train recipe.yaml`.",
)
_LAUNCHER_OPTIONS = (
    "accelerate_config config_file num_processes num_machines machine_rank main_process_ip main_process_port "
    "multi_gpu gpu_ids use_deepspeed use_fsdp dynamo_backend"
)

REFUSED: Mapping[str, RefusedOption] = {
    "ignore_bias_buffers": RefusedOption(
        False,
        "It keeps boolean buffers of some models from being sent to the other processes.",
        "Write `ddp_broadcast_buffers: false`, which keeps all from being sent.",
    ),
    "lora_task_type": RefusedOption(
        "CAUSAL_LM", "Responses are scored by a causal language model, whatever its adapter.", "Take it out."
    ),
    "mixed_precision": RefusedOption(
        None, "It is an option of the launcher's, and the trainer's own would win.", "Write `bf16: true`."
    ),
    **{name: RefusedOption(None, *_LAUNCHED) for name in _LAUNCHER_OPTIONS.split()},
}


def refuse_trl_option(name: str, value: Any, written: str) -> None:
    """Refuses an option of `REFUSED`, unless it has TRL's default.

    Args:
        name: The option.
        value: What it was given.
        written: How it was written, and where.

    Raises:
        ConfigurationError: With what to write instead.
    """
    option = REFUSED[name]
    if value != option.default or type(value) is not type(option.default):
        raise ConfigurationError(asked=f"{written}.", why=option.why, instead=option.instead)
