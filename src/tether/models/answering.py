"""Answers of a model to prompts: the most likely ones, or ones drawn at temperature 1.

Knows transformers' `generate`; knows no pair, no reference and no training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from tether.distributed import device_of
from tether.scoring.evaluation import evaluation_mode


def answer(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    *,
    seed: int | None = None,
    streamer: Any = None,
) -> list[list[int]]:
    """One answer to each prompt, as token ids with the end token if it came.

    What the model's own generation config says (penalties, temperatures) does not count. Leaves the model's mode and
    the random state as they were.

    Args:
        model: One that generates; a PEFT model too.
        prompts: Token ids; they are answered as one batch, padded on the left.
        ends: Tokens that end an answer.
        max_new_tokens: Most tokens of an answer.
        seed: Draw the answers at temperature 1 with this seed; by default each token is the most likely one.
        streamer: Gets the tokens as they come; for one prompt.
    """
    device = device_of(model)
    width = max(map(len, prompts))
    filling = ends[0] if ends else 0
    rows = [[filling] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    asked = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=seed is not None,
        eos_token_id=list(ends) or None,
        pad_token_id=filling,
        use_cache=True,
        **({} if seed is None else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    # By name: PEFT's `generate` passes nothing else on.
    inputs = {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}
    generates: Any = model
    with torch.no_grad(), evaluation_mode(model), _config_of(model, asked), same_random_state():
        if seed is not None:
            torch.manual_seed(seed)
        made = generates.generate(**inputs, generation_config=asked, streamer=streamer)
    return [_up_to_end(ids, ends) for ids in made[:, width:].tolist()]


def ends_of(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token, and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(int(end) for end in (tokenizer.eos_token_id, *listed) if end is not None))


def can_answer(model: nn.Module | None) -> bool:
    """Whether a model has `generate`."""
    return model is not None and hasattr(model, "generate")


@contextmanager
def same_random_state() -> Iterator[None]:
    """The random states of torch, numpy and Python afterwards as they were before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def _config_of(model: Any, config: GenerationConfig) -> Iterator[None]:
    """While open, this is the model's generation config: `generate` takes from that what it is not told."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = before


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The answer of a row, without what fills it up after its end token."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids
