"""Options of `trl dpo` that `tether train` does not accept, with the reason and the alternative.

All others are accepted under TRL's names. `REFUSED` is the whole list of exceptions; a test compares it with TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RefusedOption:
    """An option of TRL's that is refused, unless its value changes nothing.

    Attributes:
        default: TRL's default, which changes nothing and is accepted.
        why: Why it is refused.
        instead: What to write.
    """

    default: Any
    why: str
    instead: str


REFUSED: Mapping[str, RefusedOption] = {
    "ignore_bias_buffers": RefusedOption(
        False,
        "it keeps boolean buffers of some models from being sent to the other processes.",
        "Write `ddp_broadcast_buffers: false`, which keeps all from being sent.",
    ),
    "lora_task_type": RefusedOption(
        "CAUSAL_LM", "responses are scored by a causal language model, whatever its adapter.", "Remove it."
    ),
    "mixed_precision": RefusedOption(
        None, "it is an option of the launcher's, and the trainer's own would win.", "Write `bf16: true`."
    ),
}


def why_refused(key: str, value: Any) -> tuple[str, str] | None:
    """Why an option of TRL's is refused, and what to write instead; None if its value changes nothing.

    Args:
        key: The option.
        value: Its value: text, or None.
    """
    option = REFUSED[key]
    is_default = str(value).lower() == str(option.default).lower()
    return None if is_default else (option.why.rstrip("."), option.instead)
