"""`tether ask`: policy and reference answer the same question.

Knows folders, models and a terminal; the greedy answers are those of `tether.models.answering`.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from tether.cli import EXIT_DONE
from tether.data.chat import ChatTemplate
from tether.errors import ConfigurationError, said
from tether.models.answering import answer, ends_of
from tether.models.loading import load_model, load_processing_class, load_processing_class_of, tokenizer_of
from tether.reference.adapter_state import adapter_off
from tether.reference.adapter_tensors import base_tensors, is_adapter_model
from tether.reference.identity import digest_tensors, digest_weights, model_tensors
from tether.trainer.reference_note import REFERENCE_FILE
from tether.trainer.run_folder import last_checkpoint

_WIDTH, _LABEL = 80, 11
_IN_FOLDER = ("config.json", "adapter_config.json")


class Voice(NamedTuple):
    """One that answers: a model, and the state that it answers in."""

    label: str
    model: Any
    state: Callable[[], AbstractContextManager[None]] = nullcontext


def ask(model: str, question: str | None, ref_model: str | None, max_new_tokens: int, trust_remote_code: bool) -> int:
    """Answers one question, or each that is typed until the input ends."""
    if question is not None and not question.strip():
        raise ConfigurationError(
            problem="Cannot ask an empty question.", instead='Write one: `tether ask RUN "What is a volcano?"`.'
        )
    transformers_logging.disable_progress_bar()
    folder = _model_of(model)
    note = _note_of(folder)
    options = {"dtype": "auto"} if not note or _is_full(folder) else _options_of(note)
    policy = _placed(_loaded(folder, options, trust_remote_code))
    tokenizer = _tokenizer(folder, policy, trust_remote_code)
    reference, remark = _reference(folder, policy, note, ref_model, trust_remote_code)
    if remark:
        print(f"tether: {remark}", file=sys.stderr)
    voices = [Voice("policy", policy), *([reference] if reference else [])]
    for asked in [question] if question is not None else _questions():
        if question is None and not sys.stdin.isatty():
            print(f"\n> {asked}")  # as it would stand there if it had been typed
        _answer(voices, tokenizer, asked, max_new_tokens)
    return EXIT_DONE


# ---- what answers ----------------------------------------------------------------------------------------------------


def _model_of(name: str) -> str:
    """The folder of the model that is meant: of a run without a final one, its last checkpoint."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ConfigurationError(
            problem=f"Cannot ask {name}: it is a file, and a model is a folder or a name on the hub.",
            instead="Name the output folder of a run.",
        )
    if not path.is_dir() or any((path / file).is_file() for file in _IN_FOLDER):
        return str(path) if path.is_dir() else name
    checkpoint = last_checkpoint(str(path))
    if checkpoint is None:
        raise ConfigurationError(
            problem=f"Cannot ask {name}: there is no model and no checkpoint in this folder.",
            instead="Name the output folder of a run (`output_dir`), a checkpoint, or any model.",
        )
    return str(checkpoint)


def _note_of(folder: str) -> dict[str, Any]:
    """What the run wrote of its reference; empty where it wrote nothing."""
    with suppress(OSError, ValueError):
        note = json.loads((Path(folder) / REFERENCE_FILE).read_text(encoding="utf-8"))
        return note if isinstance(note, dict) else {}
    return {}


def _is_full(folder: str) -> bool:
    return find_adapter_config_file(folder) is None


def _options_of(note: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": note.get("dtype", "auto"), **note.get("options", {})}


def _loaded(name: str, options: dict[str, Any], trust_remote_code: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT (0.21) asks transformers (5.23) by an old name
            return load_model(name, options, trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigurationError(
            problem=f"Cannot ask {name}: it cannot be loaded as a language model.",
            details=f"transformers reports: {said(error)}.",
            instead="Name the output folder of a run, a checkpoint, a model's folder, or its name on the hub.",
        ) from error


def _placed(model: Any) -> Any:
    model.eval()
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def _tokenizer(folder: str, policy: Any, trust_remote_code: bool) -> Any:
    """Beside the model, or beside an adapter's base."""
    with suppress(OSError, ValueError, KeyError):
        return tokenizer_of(load_processing_class_of(folder, trust_remote_code))
    try:
        return tokenizer_of(load_processing_class(None, policy, trust_remote_code))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            problem=f"Cannot ask {folder}: there is no tokenizer beside the model.",
            instead="Save it there: `tokenizer.save_pretrained(folder)`.",
        ) from error


def _reference(
    folder: str, policy: Any, note: dict[str, Any], ref_model: str | None, trust_remote_code: bool
) -> tuple[Voice | None, str]:
    """The reference beside a policy, and a remark: why there is none, or how it differs from the run's."""
    if ref_model is not None:
        return Voice("reference", _placed(_loaded(_model_of(ref_model), {"dtype": "auto"}, trust_remote_code))), ""
    name, kind = note.get("model"), note.get("kind", "implicit" if is_adapter_model(policy) else "")
    began_with_adapter = name is not None and bool(note.get("adapter")) and not _is_full(name)
    moved = f"the {kind} reference has moved since; this is what it started from." if kind in _MOVING else ""
    if is_adapter_model(policy) and kind in ("implicit", *_MOVING) and not began_with_adapter:
        if note.get("adapter") and not moved:
            return None, "no reference beside it: its run started from an adapter that has no folder."
        base = policy.get_base_model()
        off = Voice("reference", policy, lambda: adapter_off(policy))
        return off, moved or _difference(note, base_tensors(base), base.config)
    if name is None:
        why = f"its run had a {kind} reference, which has no model to load" if kind else "it does not name one"
        return None, f"no reference beside {folder}: {why}. `--ref_model` names one."
    try:
        model = _placed(_loaded(name, _options_of(note), trust_remote_code))
    except ConfigurationError:
        return None, f"no reference beside it: its run named {name}, which cannot be loaded. `--ref_model` names one."
    differs = "" if is_adapter_model(model) else _difference(note, model_tensors(model), model.config)
    return Voice("reference", model), moved or differs


_MOVING = ("synchronized", "bema")


def _difference(note: dict[str, Any], tensors: Any, config: Any) -> str:
    """A remark if these are not the weights that the run was trained against."""
    if not note or digest_weights(digest_tensors(tensors), config) == note.get("weights"):
        return ""
    return f"the weights of {note.get('model')} are not those that the run was trained against."


# ---- questions and answers -------------------------------------------------------------------------------------------


def _questions() -> Iterator[str]:
    """What is typed, or comes by a pipe, line by line."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # keys to edit the line
    print("Each question stands alone. Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            typed = input("\n> ").strip()
        except EOFError:
            print()
            return
        if typed:
            yield typed


def _answer(voices: list[Voice], tokenizer: Any, question: str, max_new_tokens: int) -> None:
    if not _is_unicode(question):
        raise ConfigurationError(
            problem=f"Cannot ask {question!r}: it is not text in UTF-8.",
            instead="Write the question in UTF-8, as terminals do by default.",
        )
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer, {}, "The question")
        (ids,) = template.ids([[{"role": "user", "content": question}]], add_generation_prompt=True)
    else:
        ids = list(tokenizer(question)["input_ids"])
    for voice in voices:
        ends = ends_of(voice.model, tokenizer)
        with voice.state():
            answer(voice.model, [ids], ends, max_new_tokens, streamer=Column(tokenizer, voice.label))


def _is_unicode(text: str) -> bool:
    """Whether there is nothing in it that could not be decoded."""
    return not re.search("[\ud800-\udfff]", text)


class Column(TextStreamer):
    """Writes an answer beside its label as it comes: in a terminal wrapped, elsewhere as it is."""

    def __init__(self, tokenizer: Any, label: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._wraps = sys.stdout.isatty()
        self._label, self._at, self._space = label, _LABEL, ""
        self._has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._has_begun:
            sys.stdout.write(self._label.ljust(_LABEL))
            text, self._has_begun = text.lstrip(), True
        for part in re.findall(r"\n|[^\S\n]+|\S+", text) if self._wraps else []:
            self._put(part)
        if not self._wraps:
            sys.stdout.write(text)
        sys.stdout.write("\n" if stream_end else "")
        sys.stdout.flush()

    def _put(self, part: str) -> None:
        if part == "\n":
            self._break_line()
        elif part.isspace():
            self._space = part
        else:
            if self._at > _LABEL and self._at + len(self._space) + len(part) > _WIDTH:
                self._break_line()
            sys.stdout.write(self._space + part)
            self._at += len(self._space) + len(part)
            self._space = ""

    def _break_line(self) -> None:
        sys.stdout.write("\n" + " " * _LABEL)
        self._at, self._space = _LABEL, ""
