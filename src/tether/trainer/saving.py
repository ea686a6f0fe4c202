"""What a save needs besides weights, tried before the first step: a run must not end without a file.

Knows transformers' models and where they are written; knows no reference and no options.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging as transformers_logging

from tether.distributed import has_shards
from tether.errors import ConfigurationError, said
from tether.reference.adapter_tensors import saves_adapter_alone


def keep_savable(model: Any) -> None:
    """Lets a model's generation config be saved as it is.

    Published ones often have a temperature and no `do_sample`. transformers (5.23) saves such a file back while nobody
    has changed it, and raises `ValueError` once training has given it the tokenizer's padding token. What it says of
    generation is the author's: it is neither completed nor thrown away, and counts as unchanged.
    """
    config = getattr(model, "generation_config", None)
    if config is not None:
        config._original_object_hash = hash(config)


@contextmanager
def without_token_notice() -> Iterator[None]:
    """While open, transformers aligns a model's special tokens with the tokenizer's without saying so.

    It would in nearly every run, since models name a padding token of their own or none. Rows are not padded, and are
    tokenized by the tokenizer.
    """

    def keeps(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("The tokenizer has new PAD/BOS/EOS tokens")

    speakers = [logging.getLogger(f"transformers.{module}") for module in ("trainer", "trainer_utils")]
    for speaker in speakers:
        speaker.addFilter(keeps)
    try:
        yield
    finally:
        for speaker in speakers:
            speaker.removeFilter(keeps)


def try_saving(save: Callable[[str, Any], None], model: nn.Module, output_dir: str) -> None:
    """Saves a run's model once, in a folder that is then removed: without its weights, if it is not an adapter.

    Args:
        save: Saves to a folder: the state dict that is given, or the model's own if that is None.
        model: The policy.
        output_dir: Where the run will write.

    Raises:
        ConfigurationError: With what the library said, which otherwise would come with the first checkpoint.
    """
    is_adapter, is_whole = saves_adapter_alone(model), not has_shards(model)
    if is_adapter and not is_whole:
        return  # its tensors are gathered by what shards them, in training
    try:
        if not is_adapter and is_whole:
            remove_tied_weights_from_state_dict(dict(model.state_dict()), model)  # type: ignore[arg-type]
        with TemporaryDirectory(prefix="tried-", dir=output_dir) as folder, _in_silence():
            save(folder, None if is_adapter else {})
    except Exception as error:  # whatever it is, it would end the run at its first checkpoint
        raise ConfigurationError(
            problem=f"Cannot save this model, its tokenizer and the options to `output_dir={output_dir!r}`: "
            f"{type(error).__name__}: {said(error)}.",
            details="Training would run up to its first checkpoint and end with this error.",
            instead="Change what the error names, or write to another `output_dir`.",
        ) from error


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without the warnings and the bar that come with each save; whether bars are shown is the user's own again."""
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
