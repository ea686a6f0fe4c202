"""Checks that the options of a recipe go together before anything is read, and fills in what follows from them.

Knows options only; `DPOConfig` checks its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

from tether.cli.mistakes import Mistake
from tether.cli.options import ScriptOptions

# The adapter that TRL creates for `use_peft: true` alone.
_TRL_LORA: Mapping[str, Any] = {"lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.05}
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
_OF_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
_DEFAULTS = {entry.name: entry.default for entry in fields(ScriptOptions)}
_KEEP_ONE = "Keep one of the two."


def completed(script: ScriptOptions, given: Mapping[str, Any]) -> ScriptOptions:
    """The options, completed with those that follow from others.

    TRL names the parts of a mixture `train` and `test`, so its recipes may name these splits. An adapter is requested
    as in TRL's recipes (`use_peft`) or as in ours (`lora_r`).
    """
    if script.datasets is not None:
        train, test = script.dataset_train_split, script.dataset_test_split
        script = replace(
            script,
            dataset_train_split=None if train == "train" else train,
            dataset_test_split=None if test == "test" and script.eval_fraction is not None else test,
        )
    if script.use_peft:
        filled = {name: value for name, value in _TRL_LORA.items() if getattr(script, name) is None}
        if given.get("disable_dropout", True):  # otherwise it would be set to 0 with all other dropout
            filled.pop("lora_dropout", None)
        script = replace(script, **filled)
    resume: Any = given.get("resume_from_checkpoint") if script.resume is None else script.resume
    return replace(script, resume="true" if resume is True else None if resume is False else resume)


def contradictions(script: ScriptOptions, given: Mapping[str, Any], prog: str) -> Iterator[Mistake]:
    """What is missing, and what cannot be combined.

    Args:
        script: The options that are not `DPOConfig`'s, completed.
        given: Every option that was given.
        prog: The command.
    """
    yield from _in_sources(script, prog)
    yield from _in_held_out(script)
    yield from _in_parts(script)
    if script.dataset_streaming:
        yield from _in_stream(script, given, prog)
    yield from _in_adapter(script, given)
    yield from _in_quantization(script)
    if script.model_revision is not None and script.ref_model is not None:
        why = "the revision belongs to the policy's repository, and would be looked up in the reference's too"
        yield _together("model_revision", "ref_model", why, "Download one of the two, and name its folder.")
    if given.get("resume") is not None and given.get("resume_from_checkpoint") is not None:
        yield _together("resume", "resume_from_checkpoint", "they are the same option", "Keep `resume`.")
    if prog.endswith(" precompute"):
        for name in ("reference_free", "sync_ref_model"):
            if given.get(name):
                why = "there is no reference to score" if name == "reference_free" else "its answers change as it moves"
                yield Mistake(
                    f"`{prog}` with `{name}`", why, "Remove it: this verb is for references that stand still."
                )
    if script.dry_run and not prog.endswith(" train"):
        yield Mistake(f"`{prog}` with `dry_run`", "only `tether train` can stop before its first step", "Remove it.")


def _together(one: str, other: str, why: str, instead: str = _KEEP_ONE) -> Mistake:
    return Mistake(f"`{one}` together with `{other}`", why, instead)


def _in_sources(script: ScriptOptions, prog: str) -> Iterator[Mistake]:
    """A model, and one source of pairs."""
    for name, value, needs, example in (
        ("model", script.model, "a model to start from", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("train_data", script.train_data or script.datasets, "pairs to learn from", "pairs.jsonl"),
    ):
        if not value:
            written = f"Write `{name}: {example}` in the recipe, or `--{name} {example}`."
            yield Mistake(f"`{prog}` without `{name}`", f"a run needs {needs}", written)
    if script.datasets is None:
        return
    if script.train_data is not None:
        yield _together("train_data", "datasets", "both name the pairs to train on")
    for name in _OF_TRAIN_DATA:
        if getattr(script, name) is not None:
            why = "it belongs to `train_data`, while each part of a mixture has its own"
            instead = "Write `name` and `split` in the parts; hold pairs out with `eval_fraction` or `eval_data`."
            yield _together(name, "datasets", why, instead)


def _in_held_out(script: ScriptOptions) -> Iterator[Mistake]:
    named = [name for name in ("eval_data", "eval_fraction", "dataset_test_split") if getattr(script, name) is not None]
    for one, other in combinations(named, 2):
        yield _together(one, other, "both define which pairs are held out")
    share = script.eval_fraction
    if share is not None and not 0 < share < 1 and not (share >= 2 and share.is_integer()):
        why = "it is the share of the pairs to hold out, and some must be left to train on"
        yield Mistake(
            f"`eval_fraction={share}`", why, "Write a value between 0 and 1, such as 0.1, or a number of pairs."
        )


def _in_parts(script: ScriptOptions) -> Iterator[Mistake]:
    parts = script.datasets or ()
    shares = [part.fraction for part in parts if part.fraction is not None]
    if not shares:
        return
    if len(shares) < len(parts) or min(shares) < 0 or not sum(shares) > 0:
        listed = ", ".join(str(part.fraction) for part in parts)
        why = "a fraction is a part's share relative to the others, so each needs one, at least 0"
        yield Mistake(f"`datasets` with the fractions {listed}", why, "Give every part a fraction, or none.")
    if script.dataset_streaming:
        why = "a share of a stream is not known before its end"
        instead = "Leave the fractions out, or set `dataset_streaming: false`."
        yield Mistake("`fraction` of a part of `datasets` together with `dataset_streaming`", why, instead)


def _in_stream(script: ScriptOptions, given: Mapping[str, Any], prog: str) -> Iterator[Mistake]:
    if script.eval_fraction is not None:
        instead = "Name the held-out pairs with `eval_data` or `dataset_test_split`."
        yield _together(
            "eval_fraction", "dataset_streaming", "the share of a stream is not known before its end", instead
        )
    if prog.endswith(" precompute"):
        yield Mistake(
            "`tether precompute` with `dataset_streaming`",
            "a stream's rows are scored when training reads them, not before",
            "Write `dataset_streaming: false` here, or leave the scoring to `tether train`.",
        )
    if not (given.get("max_steps") or 0) > 0:
        why = "the length of a stream is not known in advance, and the learning rate follows a schedule"
        yield Mistake(
            "`dataset_streaming` without `max_steps`", why, "Add `max_steps: 1000`, or however many you want."
        )


def _in_adapter(script: ScriptOptions, given: Mapping[str, Any]) -> Iterator[Mistake]:
    details = [name for name in ("lora_r", *_LORA_DETAILS) if given.get(name) not in (None, False)]
    if script.use_peft is False:
        for name in details:
            yield Mistake(
                f"`use_peft: false` together with `{name}`", "it shapes an adapter, and none is made", _KEEP_ONE
            )
        return
    if script.lora_r is None:
        for name in details:
            instead = "Add `lora_r: 16` or `use_peft: true`, or remove it."
            yield Mistake(
                f"`{name}` without `lora_r`", "it shapes an adapter, and without a rank none is made", instead
            )
    elif script.lora_r < 1:
        instead = "Write 1 or more; leave it out to train the model's own weights."
        yield Mistake(f"`lora_r={script.lora_r}`", "it is the rank of the adapter's matrices", instead)
    if script.lora_dropout and given.get("disable_dropout", True):
        subject = f"`lora_dropout={script.lora_dropout}` while `disable_dropout` is on (its default)"
        instead = "Set `disable_dropout: false`, or remove `lora_dropout`."
        yield Mistake(subject, "all dropout is set to 0, the adapter's too", instead)


def _in_quantization(script: ScriptOptions) -> Iterator[Mistake]:
    if script.load_in_4bit and script.load_in_8bit:
        yield _together("load_in_4bit", "load_in_8bit", "a weight is held in one of the two")
    for name in _OF_4BIT:
        if getattr(script, name) != _DEFAULTS[name] and not script.load_in_4bit:
            why = "it defines how weights are held in 4 bits, and none are"
            yield Mistake(f"`{name}` without `load_in_4bit`", why, "Add `load_in_4bit: true`, or remove it.")
