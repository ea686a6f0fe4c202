"""Options of `trl dpo` that `tether train` does not take: why, and what to write instead.

All others it takes under TRL's names; `REFUSED` is the whole list of exceptions, and a test compares it with TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
        "it keeps boolean buffers of some models from being sent to the other processes.",
        "Write `ddp_broadcast_buffers: false`, which keeps all from being sent.",
    ),
    "lora_task_type": RefusedOption(
        "CAUSAL_LM", "responses are scored by a causal language model, whatever its adapter.", "Take it out."
    ),
    "mixed_precision": RefusedOption(
        None, "it is an option of the launcher's, and the trainer's own would win.", "Write `bf16: true`."
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
    "ref_model_sync_rule": "`ref_model_mixup_alpha: 1` for hard, or in Python BEMACallback(update_ref_model=True) for "
    "bema; soft is what a sync does",
    "use_logits_to_keep": "nothing: only the logits of responses are made, and never all at once",
}


def former_or_refused(key: str, value: Any) -> tuple[str, str] | None:
    """Why an option of TRL's cannot be, and what to write instead; None if it can, or says what is done anyway.

    Args:
        key: The option.
        value: What it was given: text, or None.
    """
    if key in FORMER:
        return "TRL 1.16 and transformers 5 have no such option any more", f"Write {FORMER[key]}."
    option = REFUSED[key]
    is_default = str(value).lower() == str(option.default).lower()
    return None if is_default else (option.why.rstrip("."), option.instead)
