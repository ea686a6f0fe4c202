"""How the tokens of a `PairBatch` are laid out for a model: which rows go in, and where each response token is read.

Plans with plain integers on the host and moves the finished index tensors to the device once; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from tether.types import PairBatch


@dataclass(frozen=True)
class ScoringRows:
    """Model inputs of a batch and the places where its response tokens are predicted.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        width: Number of columns of `input_ids`.
        row: Row in which each response token is predicted.
        column: Column in which each response token is predicted (one before the token itself).
        targets: The response tokens, in the batch's order.
    """

    inputs: dict[str, Tensor]
    width: int
    row: Int[Tensor, " tokens"]
    column: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]


def padded_rows(batch: PairBatch, pad_token_id: int = 0) -> ScoringRows:
    """One row per response, `prompt response` padded on the right: the layout every causal model understands.

    Args:
        batch: The batch, on the model's device.
        pad_token_id: What fills the rows; masked, so that it reaches no result.
    """
    prompt_starts = list(accumulate(batch.prompt_lengths, initial=0))
    response_starts = list(accumulate(batch.response_lengths, initial=0))
    source: list[list[int]] = []
    row: list[int] = []
    column: list[int] = []
    lengths: list[int] = []
    num_prompt_tokens = batch.prompt_ids.shape[0]
    for response, (group, length) in enumerate(zip(batch.response_group, batch.response_lengths, strict=True)):
        prompt_length = batch.prompt_lengths[group]
        first = num_prompt_tokens + response_starts[response]
        source.append([*range(prompt_starts[group], prompt_starts[group + 1]), *range(first, first + length)])
        row += [response] * length
        column += range(prompt_length - 1, prompt_length + length - 1)
        lengths.append(prompt_length + length)
    width = max(lengths)
    gather = torch.zeros(len(source), width, dtype=torch.int64)
    mask = torch.zeros(len(source), width, dtype=torch.int64)
    for index, places in enumerate(source):
        gather[index, : len(places)] = torch.tensor(places)
        mask[index, : len(places)] = 1
    device = batch.device
    gather, mask = gather.to(device), mask.to(device)
    tokens = torch.cat([batch.prompt_ids, batch.response_ids])
    return ScoringRows(
        inputs={
            "input_ids": torch.where(mask.bool(), tokens[gather], pad_token_id),
            "attention_mask": mask,
        },
        width=width,
        row=torch.tensor(row, device=device),
        column=torch.tensor(column, device=device),
        targets=batch.response_ids,
    )
