"""What a model reads with a prompt besides token ids, and how the prompts of a batch are combined for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PromptImages:
    """What a model reads with a prompt besides its token ids. Equal if the model is fed the same.

    Attributes:
        inputs: The processor's output for this prompt alone, by the model's argument (`pixel_values`,
            `image_grid_thw`, ...); images, tiles or patches along the first dimension.
        token_inputs: One number per prompt token, by the model's argument (`token_type_ids`, ...); response tokens
            get 0.
        digest: Of both.
    """

    inputs: Mapping[str, Tensor]
    token_inputs: Mapping[str, Int[Tensor, " prompt_tokens"]]
    digest: bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptImages) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def on_each(self, change: Callable[[Tensor], Tensor]) -> PromptImages:
        """The same with every tensor changed (moved, pinned)."""
        inputs, token_inputs = (
            {name: change(tensor) for name, tensor in tensors.items()} for tensors in (self.inputs, self.token_inputs)
        )
        return replace(self, inputs=inputs, token_inputs=token_inputs)


def image_inputs(shown: Sequence[PromptImages | None], width: int) -> dict[str, Tensor]:
    """Extra arguments of a model for padded rows of prompt and response, or for a packed row of prompts.

    Images are in the order of the rows, once for each row that shows them. Where prompts differ beyond the first
    dimension (images of one row, tiles, height and width), the smaller ones are padded with zeros, as processors do
    for a batch.

    Args:
        shown: The images of each row's prompt, or of each prompt of a packed row; on the model's device.
        width: Tokens of the longest row.

    Returns:
        Empty if no row has images.
    """
    images = [each for each in shown if each is not None]
    names = dict.fromkeys(name for each in images for name in each.inputs)
    token_names = dict.fromkeys(name for each in images for name in each.token_inputs)
    inputs = {name: _stacked([each.inputs[name] for each in images]) for name in names}
    return inputs | {
        name: _rows([each.token_inputs[name] if each else None for each in shown], width) for name in token_names
    }


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates along the first dimension, padding with zeros to the largest."""
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
    filled = []
    for part in parts:
        sizes = zip(reversed(part.shape[1:]), reversed(shape), strict=True)  # `pad` starts with the last dimension
        missing = [edge for size, largest in sizes for edge in (0, largest - size)]
        filled.append(torch.nn.functional.pad(part, missing) if any(missing) else part)
    return torch.cat(filled)


def _rows(numbers: Sequence[Tensor | None], width: int) -> Tensor:
    """The numbers of each row's prompt tokens; 0 after them and for rows without images."""
    known = next(each for each in numbers if each is not None)
    rows = known.new_zeros(len(numbers), width)
    for row, each in zip(rows, numbers, strict=True):
        if each is not None:
            row[: len(each)] = each
    return rows
