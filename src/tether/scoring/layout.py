"""The layouts of a `PairBatch` for a model: which rows go in, and where each response token is read.

Plans with plain integers on the host and moves the finished index tensors to the device once; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from tether.scoring.chains import Link, PackedRow
from tether.types import PairBatch, image_inputs, placed

_Places: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoringRows:
    """Model inputs of a batch, and the positions at which its response tokens are predicted.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        width: Number of columns of `input_ids`.
        row: Row in which each response token is predicted.
        column: Column in which each response token is predicted (one before the token itself).
        targets: The response tokens, in the batch's order.
    """

    inputs: dict[str, Any]
    width: int
    row: Int[Tensor, " tokens"]
    column: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]


def packed_rows(batch: PairBatch, router_weights: bool = False, whole: bool = False) -> ScoringRows:
    """One row for the whole batch, each prompt once: `prompt_0 response_0 response_1 prompt_1 response_2 ...`.

    What a prompt has in common with the one before it (`PairBatch.prefixes`) is not repeated either. Positions continue
    those of the tokens before in the same sequence; `packed_row` tells the attention which these are. The last token of
    a response is only predicted, so it is not in the row.

    Args:
        batch: The batch, on the model's device.
        router_weights: Weight each token, in the attention mask, by the number of sequences of the padded layout that
            it stands for: a router's load-balancing loss then equals the padded one.
        whole: Feed the last token of each response too; as it is with `router_weights`, because that loss counts it.
    """
    plan = _plan(batch, whole or router_weights)
    row = PackedRow(plan.links, batch.device)
    positions = [_run(link.depth, link.length) for link in plan.links]
    columns = [plan.columns[response] for response in range(batch.num_responses)]
    planned = [np.concatenate(runs) for runs in (positions, plan.source, columns)]
    weights = [_sequence_counts(batch, row, plan.chain_of)] if router_weights else []
    position_ids, places, column, *masks = placed([*planned, *weights], batch.device)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([batch.prompt_ids, batch.response_ids])[places][None],
        "position_ids": position_ids[None],
        "packed_row": row,
        **image_inputs(batch.images, len(places)),
    }
    if masks:
        inputs["attention_mask"] = masks[0][None]
    return ScoringRows(inputs, len(places), torch.zeros_like(column), column, batch.response_ids)


class _Plan(NamedTuple):
    """A packed row: its chains, where its tokens come from; for each response, its chain and where it is predicted."""

    links: list[Link]
    source: list[_Places]
    chain_of: dict[int, int]
    columns: dict[int, _Places]


def _plan(batch: PairBatch, whole: bool) -> _Plan:
    members: list[list[int]] = [[] for _ in batch.prompt_lengths]
    for response, group in enumerate(batch.response_group):
        members[group].append(response)
    prompt_starts = list(accumulate(batch.prompt_lengths, initial=0))
    response_starts = list(accumulate(batch.response_lengths, initial=batch.prompt_ids.shape[0]))
    links, source, chain_of, columns = plan = _Plan([], [], {}, {})
    start = before = 0
    for group, shared in batch.prefixes or [(group, 0) for group in range(batch.num_groups)]:
        prompt_length, first = batch.prompt_lengths[group], len(links)
        links.append(Link(before, shared, prompt_length - shared))
        source.append(_run(prompt_starts[group] + shared, prompt_length - shared))
        start += prompt_length - shared
        last_of_prompt, before = start - 1, first
        for response in members[group]:
            num = batch.response_lengths[response] - (not whole)
            if response == members[group][0]:  # goes on in the prompt's chain
                links[first] = links[first]._replace(length=links[first].length + num)
            elif num:
                links.append(Link(first, prompt_length, num))
            chain_of[response] = len(links) - 1
            source.append(_run(response_starts[response], num))
            columns[response] = _run(start - 1, batch.response_lengths[response])
            columns[response][0] = last_of_prompt
            start += num
    return plan


def padded_rows(batch: PairBatch, pad_token_id: int = 0, spare: int = 0) -> ScoringRows:
    """One row per response, `prompt response` padded on the right: the layout every causal model understands.

    Args:
        batch: The batch, on the model's device.
        pad_token_id: Fills the rows; masked, so it affects no result.
        spare: Columns of padding behind the longest row.
    """
    prompt_starts = list(accumulate(batch.prompt_lengths, initial=0))
    response_starts = list(accumulate(batch.response_lengths, initial=batch.prompt_ids.shape[0]))
    width = max(batch.fed_lengths()) + spare
    source: _Places = np.zeros((batch.num_responses, width), dtype=np.int64)
    mask: _Places = np.zeros_like(source)
    rows: list[_Places] = []
    columns: list[_Places] = []
    for response, (group, length) in enumerate(zip(batch.response_group, batch.response_lengths, strict=True)):
        prompt_length = batch.prompt_lengths[group]
        source[response, :prompt_length] = _run(prompt_starts[group], prompt_length)
        source[response, prompt_length : prompt_length + length] = _run(response_starts[response], length)
        mask[response, : prompt_length + length] = 1
        rows.append(np.full(length, response))
        columns.append(_run(prompt_length - 1, length))
    planned = [mask.ravel(), source.ravel(), np.concatenate(rows), np.concatenate(columns)]
    flat_mask, places, row, column = placed(planned, batch.device)
    attention_mask = flat_mask.view(mask.shape)
    tokens = torch.cat([batch.prompt_ids, batch.response_ids])[places.view(mask.shape)]
    return ScoringRows(
        inputs={
            "input_ids": tokens.where(attention_mask.bool(), pad_token_id),
            "attention_mask": attention_mask,
            **image_inputs([batch.images[group] for group in batch.response_group if batch.images], width),
        },
        width=width,
        row=row,
        column=column,
        targets=batch.response_ids,
    )


def _sequence_counts(batch: PairBatch, row: PackedRow, chain_of: Mapping[int, int]) -> _Places:
    """How many (pair, side) sequences each token of the packed row stands for."""
    counts: _Places = np.zeros(row.chains[-1].own.stop, dtype=np.int64)
    for response in (*batch.chosen, *batch.rejected):
        for places in row.chains[chain_of[response]].sequence:
            counts[places] += 1
    return counts


def _run(start: int, length: int) -> _Places:
    return np.arange(start, start + length)
