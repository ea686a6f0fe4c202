"""What a model reads besides token ids, put together for the rows of a batch.

Knows tensors and rows; knows no family of models: a processor said which arguments there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tether.distributed import has_shards, num_processes, reduced
from tether.errors import DataError
from tether.types import PairBatch, PromptImages


def image_inputs(shown: Sequence[PromptImages | None], width: int) -> dict[str, Tensor]:
    """The further arguments of a model for padded rows of prompt and response, or for a packed row of prompts.

    Images come in the order of the rows, once for each row that shows them. Where prompts differ in what is behind
    the first dimension (images of one row, tiles, height and width), the smaller ones are filled up with zeros, as
    the processors fill a batch.

    Args:
        shown: What the prompt of each row shows, or each prompt of a packed row; on the model's device.
        width: Tokens of the longest row.

    Returns:
        Nothing where no row has images.
    """
    images = [each for each in shown if each is not None]
    names = dict.fromkeys(name for each in images for name in each.inputs)
    token_names = dict.fromkeys(name for each in images for name in each.token_inputs)
    inputs = {name: _stacked([each.inputs[name] for each in images]) for name in names}
    return inputs | {
        name: _rows([each.token_inputs[name] if each else None for each in shown], width) for name in token_names
    }


def check_even_images(base: nn.Module, batch: PairBatch) -> None:
    """Refuses a forward in which a part of the sharded vision tower's owners would not take part. Collective.

    Args:
        base: The model itself: a wrapper (DeepSpeed's engine) has another config, or none.
        batch: What this process feeds it.

    Raises:
        DataError: On every process, if this batch has images on some of them and none on others.
    """
    has_tower = getattr(base.config, "vision_config", None) is not None
    if num_processes() == 1 or not has_tower or not has_shards(base):
        return
    flags = torch.tensor([int(bool(batch.images)), int(not batch.images)], device=batch.device)
    if reduced(flags, "max").sum() == 2:
        raise DataError(
            problem="Cannot run a sharded model on a batch with images on one process and none on another: the vision "
            "tower's weights are gathered from all processes, so the run would hang.",
            instead="Train rows with and without images separately, give every row an image, or train without ZeRO-3 "
            "and FSDP2.",
        )


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """One behind the other, filled up with zeros to the largest."""
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
    filled = []
    for part in parts:
        sizes = zip(reversed(part.shape[1:]), reversed(shape), strict=True)  # `pad` begins at the last dimension
        missing = [edge for size, largest in sizes for edge in (0, largest - size)]
        filled.append(torch.nn.functional.pad(part, missing) if any(missing) else part)
    return torch.cat(filled)


def _rows(numbers: Sequence[Tensor | None], width: int) -> Tensor:
    """The numbers of each row's prompt tokens, and 0 for everything behind them and for rows without images."""
    known = next(each for each in numbers if each is not None)
    rows = known.new_zeros(len(numbers), width)
    for row, each in zip(rows, numbers, strict=True):
        if each is not None:
            row[: len(each)] = each
    return rows
