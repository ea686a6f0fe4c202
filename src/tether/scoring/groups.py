"""The structure of a packed row as one small tensor of lengths, written and read.

As a tensor it passes through a model's forward, checkpointing can replay it, and `torch.compile` need not look inside.
Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Group(NamedTuple):
    """The places of one prompt and its responses in a packed row."""

    start: int
    prompt_length: int
    response_lengths: list[int]


def lengths_tensor(groups: list[tuple[int, list[int]]]) -> Int[Tensor, " entries"]:
    """The structure of a row as one tensor on the host: for each group, the lengths of its prompt and its responses."""
    flat: list[int] = []
    for prompt_length, response_lengths in groups:
        flat += [prompt_length, len(response_lengths), *response_lengths]
    return torch.tensor(flat, dtype=torch.int64)


def groups_of(lengths: Int[Tensor, " entries"]) -> Iterator[Group]:
    """The groups of a row, from its `lengths_tensor`."""
    flat = lengths.tolist()
    place = start = 0
    while place < len(flat):
        prompt_length, count = flat[place], flat[place + 1]
        responses = flat[place + 2 : place + 2 + count]
        yield Group(start, prompt_length, responses)
        place += 2 + count
        start += prompt_length + sum(responses)
