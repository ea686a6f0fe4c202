"""Whether the options of a recipe go together, before anything is read; and what they leave to be said.

Knows options only; `DPOConfig` checks its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tether.cli.options import ScriptOptions
from tether.errors import ConfigurationError

# The adapter that TRL makes where a recipe says no more than `use_peft: true`.
_TRL_LORA = {"lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.05}
_LORA_DETAILS = (
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
_OF_TRAIN_DATA = ("dataset_config", "dataset_train_split", "dataset_test_split")


def check_script(script: ScriptOptions, given: Mapping[str, Any], prog: str) -> ScriptOptions:
    """The options with what follows from others filled in.

    Args:
        script: The options that are not `DPOConfig`'s.
        given: Every option that was given.
        prog: The command, for messages.

    Raises:
        ConfigurationError: If one is missing, or two contradict each other.
    """
    script = _without_splits_of_a_mixture(script)
    _check_sources(script, prog)
    _check_held_out(script)
    _check_streaming(script, given, prog)
    if script.model_revision is not None and script.ref_model is not None:
        _refuse(
            "`model_revision` together with `ref_model`",
            "The revision is one of the policy's repository, and would be looked for in the reference's too",
            "Download one of the two, and name its folder",
        )
    script = _with_adapter(script, given)
    checkpoint = given.get("resume_from_checkpoint")
    if checkpoint is not None and script.resume is not None:
        _refuse("`resume` together with `resume_from_checkpoint`", "They are the same option", "Keep `resume`")
    resume = script.resume or checkpoint
    return replace(script, resume=None if resume is None or resume.lower() == "false" else resume)


def _without_splits_of_a_mixture(script: ScriptOptions) -> ScriptOptions:
    """TRL calls the parts of a mixture `train` and `test`, so that its recipes may name these splits."""
    if script.datasets is None:
        return script
    train, test = script.dataset_train_split, script.dataset_test_split
    return replace(
        script,
        dataset_train_split=None if train == "train" else train,
        dataset_test_split=None if test == "test" and script.eval_fraction is not None else test,
    )


def _check_sources(script: ScriptOptions, prog: str) -> None:
    """A model, and one source of pairs."""
    data = script.train_data or script.datasets
    for name, value, example in (
        ("model", script.model, "Qwen/Qwen2.5-0.5B-Instruct"),
        ("train_data", data, "pairs.jsonl"),
    ):
        if not value:
            _refuse(
                f"`{prog}` without `{name}`",
                "A run needs a model to start from and pairs to learn from",
                f"Write `{name}: {example}` in the recipe, or `--{name} {example}`",
            )
    if script.datasets is None:
        return
    if script.train_data is not None:
        _refuse("`train_data` together with `datasets`", "Both say what to train on", "Keep one of the two")
    for name in _OF_TRAIN_DATA:
        if getattr(script, name) is not None:
            _refuse(
                f"`{name}` together with `datasets`",
                "It says more of `train_data`, and a mixture's parts say it each for itself",
                "Write `name` and `split` in the parts; hold pairs out with `eval_fraction`, or name `eval_data`",
            )


def _check_held_out(script: ScriptOptions) -> None:
    named = [name for name in ("eval_data", "eval_fraction", "dataset_test_split") if getattr(script, name) is not None]
    if len(named) > 1:
        _refuse(f"`{named[0]}` together with `{named[1]}`", "Both say which pairs are held out", "Keep one of the two")
    if script.eval_fraction is not None and not 0 < script.eval_fraction < 1:
        _refuse(
            f"`eval_fraction={script.eval_fraction}`",
            "It is the share of the pairs to hold out, and some must be left to train on",
            "A value between 0 and 1, such as 0.1",
        )


def _check_streaming(script: ScriptOptions, given: Mapping[str, Any], prog: str) -> None:
    if not script.dataset_streaming:
        return
    if script.eval_fraction is not None:
        _refuse(
            "`eval_fraction` together with `dataset_streaming`",
            "The share of a stream is not known before its end",
            "Name the held-out pairs with `eval_data` or `dataset_test_split`",
        )
    if prog.endswith(" precompute"):
        _refuse(
            "`tether precompute` with `dataset_streaming`",
            "A stream's rows are scored when training comes to them; nothing is read before",
            "`dataset_streaming: false` here, or leave the scoring to `tether train`",
        )
    if not (given.get("max_steps") or 0) > 0:
        _refuse(
            "`dataset_streaming` without `max_steps`",
            "Nobody knows where a stream ends, and the learning rate follows a schedule",
            "Add `max_steps: 1000`, or as many as there shall be",
        )


def _with_adapter(script: ScriptOptions, given: Mapping[str, Any]) -> ScriptOptions:
    """LoRA as TRL's recipes write it (`use_peft`) or as ours (`lora_r`)."""
    details = [name for name in ("lora_r", *_LORA_DETAILS) if given.get(name) not in (None, False)]
    if script.use_peft is False and details:
        _refuse(
            f"`use_peft: false` together with `{details[0]}`",
            "Without an adapter there is nothing for it to shape",
            "Keep one of the two",
        )
    drops = not given.get("disable_dropout", True)
    if script.use_peft:
        filled: dict[str, Any] = {name: value for name, value in _TRL_LORA.items() if getattr(script, name) is None}
        if not drops:  # it would be set to 0 with all other dropout
            filled.pop("lora_dropout", None)
        script = replace(script, **filled)
    _check_lora(script, details, drops)
    return script


def _check_lora(script: ScriptOptions, details: list[str], drops: bool) -> None:
    if details and script.lora_r is None:
        _refuse(
            f"`{details[0]}` without `lora_r`",
            "Without a rank no adapter is made, so there is nothing for it to shape",
            "Add `lora_r: 16` or `use_peft: true`, or take it out",
        )
    if script.lora_r is not None and script.lora_r < 1:
        _refuse(
            f"`lora_r={script.lora_r}`",
            "It is the rank of the adapter's matrices",
            "1 or more; leave it out to train the model's own weights",
        )
    if script.lora_dropout and not drops:
        _refuse(
            f"`lora_dropout={script.lora_dropout}` while `disable_dropout` is on (its default)",
            "All dropout is set to 0, the adapter's too",
            "Set `disable_dropout: false`, or take `lora_dropout` out",
        )


def _refuse(asked: str, why: str, instead: str) -> None:
    raise ConfigurationError(asked=f"{asked}.", why=f"{why}.", instead=f"{instead}.")
