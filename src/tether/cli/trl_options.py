"""Options of `trl dpo` that `tether train` does not take: why, and what to write instead.

All others it takes under TRL's names; `REFUSED` is the whole list of exceptions, and a test compares it with TRL's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
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
}

# Options of earlier versions of TRL and transformers, which recipes still have: what to write instead.
FORMER: Mapping[str, str] = {
    "torch_dtype": "`dtype`",
    "warmup_ratio": "`warmup_steps`: below 1, it is a share of all steps",
    "evaluation_strategy": "`eval_strategy`",
    "group_by_length": "`train_sampling_strategy: group_by_length`",
    "no_cuda": "`use_cpu: true`",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR, in `env` say",
    "max_prompt_length": "`max_length`, for prompt and response together",
    "max_completion_length": "`max_length`, for prompt and response together",
    "rpo_alpha": "`loss_type: [sigmoid, sft]`, with the alpha as the second of `loss_weights`",
    "force_use_ref_model": "`ref_model`, with the model that is the reference",
    "ref_adapter_name": "nothing: the reference of a continued adapter is the adapter as it was",
    "model_adapter_name": "nothing: the adapter beside the weights is the one that goes on training",
    "overwrite_output_dir": "nothing: a run writes to its folder, and `resume` goes on from what is there",
    "save_safetensors": "nothing: weights are saved as safetensors",
    "generate_during_eval": "nothing: evaluation scores the held-out pairs",
    "label_pad_token_id": "nothing: rows have no padding",
    "padding_value": "nothing: rows have no padding",
    "ref_model_sync_rule": "`ref_model_mixup_alpha: 1` for `hard`, `BEMACallback(update_ref_model=True)` in Python for "
    "`bema`; `soft` is what a sync does",
    "use_logits_to_keep": "nothing: only the logits of responses are made, and never all at once",
}


def refuse_trl_option(name: str, value: Any, written: str) -> None:
    """Refuses an option of `REFUSED`, unless it has TRL's default.

    Args:
        name: The option.
        value: What it was given, by a recipe or as a word; None for a flag without a value.
        written: How it was written, and where.

    Raises:
        ConfigurationError: With what to write instead.
    """
    option = REFUSED[name]
    is_default = value == option.default and type(value) is type(option.default)
    if not is_default and not (isinstance(value, str) and value.lower() == str(option.default).lower()):
        raise ConfigurationError(asked=f"{written}.", why=option.why, instead=option.instead)


def refuse_former_option(name: str, written: str) -> None:
    """Refuses an option of `FORMER`.

    Raises:
        ConfigurationError: With what to write instead.
    """
    if name in FORMER:
        raise ConfigurationError(
            asked=f"{written}.",
            why="TRL 1.16 and transformers 5 have no such option any more.",
            instead=f"Write {FORMER[name]}.",
        )


def take_refused_flags(argv: Sequence[str], prog: str) -> list[str]:
    """The words without the flags of `REFUSED` that say what is done anyway.

    Raises:
        ConfigurationError: For one that says something else.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, option in REFUSED.items():
        dashed = f"--{name.replace('_', '-')}"
        parser.add_argument(f"--{name}", dashed, nargs="?", const=True if option.default is False else "")
    found, others = parser.parse_known_args(argv)
    for name, value in vars(found).items():
        refuse_trl_option(name, value, f"`--{name}{'' if value in (True, '') else f' {value}'}` after `{prog}`")
    return others
