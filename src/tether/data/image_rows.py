"""Rows with images: their token ids and the model's other inputs, by the processor of a vision-language model.

Knows processors, messages and images; knows no model, and no set of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

from tether.data.chat import ChatTemplate
from tether.data.names import SYSTEM_COLUMN
from tether.data.rows import (
    IMAGE_COLUMNS,
    MARGIN_COLUMN,
    TOKEN_COLUMNS,
    RowTokens,
    check_margin,
    has_image_column,
    split_responses,
    tokenize_row,
    with_prompt,
)
from tether.errors import ConfigurationError, DataError, said
from tether.types import PromptImages

# The columns that are read again when a row's batch is made.
PROMPT_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", SYSTEM_COLUMN, *IMAGE_COLUMNS)


class _Text(NamedTuple):
    """A row as text with image placeholders; the last two begin with the prompt."""

    prompt: str
    chosen: str
    rejected: str


class ImageRows:
    """Reads rows through the processor of a vision-language model.

    A row has `image` (one) or `images` (a list; empty or None for a row without): PIL images, arrays, paths or URLs.
    The text gives their places: blocks in messages (`{"type": "image"}`) or the processor's own placeholder in plain
    text. In messages without blocks, the images come before the user's first message. Plain text in such a set is fed
    as it is, without adding a BOS or EOS (as in TRL).

    Args:
        processor: Of a vision-language model: a tokenizer and an image processor.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self._processor: Any = processor
        self.tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer

    def tokens(self, row: Mapping[str, Any], where: str) -> RowTokens:
        """The token ids of a row, with as many for each image as the model sees; otherwise as `rows.tokenize_row`.

        Raises:
            DataError: If it is not a pair, an image cannot be read, or text and images do not match.
        """
        if any(row.get(column) is not None for column in TOKEN_COLUMNS):
            return tokenize_row(_without_images(row), where, self.tokenizer)
        if not has_image_column(row) and isinstance(row.get("chosen"), str):
            return tokenize_row(row, where, self.tokenizer)
        images = self._images(row, where)
        text = self._text(row, len(images), where)
        prompt, chosen, rejected = (self._ids(part) for part in text)
        tokens = split_responses(prompt, chosen, rejected, where)
        self._check_responses(tokens, where)
        check_margin({name: row[name] for name in (MARGIN_COLUMN,) if name in row}, where)
        if not images:
            return tokens
        prompt_ids = self._feed(text.prompt, images, where)["input_ids"][0].tolist()
        return tokens._replace(prompt_ids=_without_end(prompt_ids, tokens.lost_ids, where))

    def shown(self, row: Mapping[str, Any], where: str = "A row of a batch") -> PromptImages | None:
        """The images and token inputs of the row's prompt; None for a row without images.

        Args:
            row: A row that was tokenized, with the columns it was made from.
            where: Its name in error messages.

        Raises:
            DataError: If its images are not those that its token ids were made with.
        """
        images = self._images(row, where)
        if not images:
            self._check_shows_none(row, where)
            return None
        if row.get("chosen") is None:
            raise DataError(
                problem=f"{where} has token ids and images but no text: a processor reads images together with the "
                "text around them.",
                instead="Keep the columns `prompt`, `chosen` and `rejected` that the ids were made from.",
            )
        fed = self._feed(self._text(row, len(images), where).prompt, images, where)
        ids, length = fed.pop("input_ids"), len(row["prompt_ids"])
        if ids[0, :length].tolist() != list(row["prompt_ids"]):
            raise DataError(
                problem=f"{where} has images that do not belong to its `prompt_ids`: with them, the prompt becomes "
                "other tokens.",
                details=f"The row has {length} tokens in its prompt, and the processor makes {ids.shape[1]}.",
                instead="Give the row as text and images, without token ids, to be tokenized again.",
            )
        fed.pop("attention_mask", None)
        token_inputs = {name: value[0, :length] for name, value in fed.items() if value.shape == ids.shape}
        inputs = {name: value for name, value in fed.items() if name not in token_inputs}
        return PromptImages(inputs, token_inputs, _digest(inputs | token_inputs))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, row: Mapping[str, Any], num_images: int, where: str) -> _Text:
        row = with_prompt(_without_images(row), where)
        if isinstance(row["prompt"], str):
            return _Text(row["prompt"], *(row["prompt"] + row[side] for side in ("chosen", "rejected")))
        template = ChatTemplate(self._processor if self._processor.chat_template else self.tokenizer, row, where)
        prompt = _placed(_blocks(row["prompt"]), num_images, where)
        wholes = (template.text(prompt + _blocks(row[side])) for side in ("chosen", "rejected"))
        return _Text(template.text(prompt, add_generation_prompt=True), *wholes)

    def _images(self, row: Mapping[str, Any], where: str) -> list[Any]:
        """The row's images, opened."""
        try:
            given = {column: row[column] for column in IMAGE_COLUMNS if row.get(column) is not None}
            if len(given) == 2:
                raise DataError(
                    problem=f"{where} has both `image` and `images`, and it is not clear which of them the prompt "
                    "shows.",
                    instead="Keep `image` for a single image, or `images` for a list.",
                )
            one, several = given.get("image"), given.get("images", [])
            images = [one] if one is not None else [several] if isinstance(several, str) else list(several)
            return [load_image(image) if isinstance(image, str) else image for image in images]
        except Exception as error:  # decoders raise errors of any type
            raise _not_fed(where, error) from error

    def _feed(self, text: str, images: Sequence[Any], where: str) -> dict[str, Tensor]:
        """The processor's output for one prompt."""
        try:
            fed = dict(self._processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt"))
        except Exception as error:  # processors raise errors of any type
            raise _not_fed(where, error) from error
        if self._image_token_ids and not self._image_token_ids & set(fed["input_ids"].flatten().tolist()):
            raise DataError(  # older processors accept it
                problem=f"{where} has images, but its prompt has no place for them.",
                instead=f"Put `{getattr(self._processor, 'image_token', '<image>')}` where each image belongs.",
            )
        unknown = sorted(name for name, value in fed.items() if not isinstance(value, Tensor))
        if unknown or "cross_attention_mask" in fed:
            raise ConfigurationError(
                problem=f"Cannot use images with a {type(self._processor).__name__}: its "
                f"{', '.join(unknown) or 'cross_attention_mask'} defines which images each token of a prompt sees, and "
                "is not made for a response.",
                instead="Use a model that reads images as tokens of its prompt (LLaVA, Qwen-VL, Gemma 3, Idefics 3).",
            )
        return fed

    @property
    def _image_token_ids(self) -> set[int]:
        return {token for token in getattr(self._processor, "image_token_ids", []) if token is not None}

    def _check_shows_none(self, row: Mapping[str, Any], where: str) -> None:
        if self._image_token_ids & set(row["prompt_ids"]):
            raise DataError(
                problem=f"{where} has image tokens in its `prompt_ids` but no `image` or `images`: the model would "
                "read placeholders without seeing an image.",
                instead="Keep the column of images that the ids were made with.",
            )

    def _check_responses(self, tokens: RowTokens, where: str) -> None:
        if self._image_token_ids & {*tokens.chosen_ids, *tokens.rejected_ids}:
            raise DataError(
                problem=f"{where} has an image in a response: responses are scored token by token, and the model does "
                "not predict images.",
                instead="Put the images into the prompt.",
            )


def _without_images(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in row if name not in IMAGE_COLUMNS}


def _blocks(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a list of blocks, as templates of vision-language models expect."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def _placed(messages: list[dict[str, Any]], num_images: int, where: str) -> list[dict[str, Any]]:
    """The messages with a place for each image: their own, or before the user's first message."""
    placed = sum(block.get("type") == "image" for message in messages for block in message.get("content") or ())
    if placed == num_images:
        return messages
    user = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if placed or user is None:
        raise DataError(
            problem=f"{where} has {num_images} images but places for {placed}: each image needs a place in a message "
            "of the prompt.",
            instead='Write one block {"type": "image"} for each image, or none: the images then come before the first '
            "message of the user.",
        )
    first = messages[user]
    content = [{"type": "image"}] * num_images + list(first.get("content") or ())
    return [*messages[:user], {**first, "content": content}, *messages[user + 1 :]]


def _without_end(prompt_ids: list[int], lost_ids: list[int], where: str) -> list[int]:
    """The prompt's ids without those that merge with the response's."""
    if not lost_ids:
        return prompt_ids
    if prompt_ids[-len(lost_ids) :] != lost_ids:
        raise DataError(
            problem=f"{where} has a prompt that ends with an image and is rendered differently before its response: "
            "it is not clear where the response begins.",
            instead="End the prompt with text, or use a chat template that renders it the same way in both cases.",
        )
    return prompt_ids[: -len(lost_ids)]


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    digest = blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _not_fed(where: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(
        problem=f"{where} has images that cannot be used: reading them raised {type(error).__name__}.",
        details=f"The message is: {said(error)}.",
        instead="Give `image` (one) or `images` (a list) as PIL images, arrays or paths, as many as the prompt has "
        "places for.",
    )
