"""Renders messages as text and token ids, by a chat template and the row's variables for it.

Knows tokenizers, processors and templates; knows no preference pair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.errors import DataError, said

# Arguments of `apply_chat_template` that a row may not set: they decide the boundary, or the form of the result.
_RESERVED = frozenset(
    [
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
    ]
)


class ChatTemplate:
    """A chat template with a row's tools and variables for it.

    Args:
        renderer: A tokenizer or a processor, with a chat template unless the row has its own.
        row: May have `tools` (a list, or JSON text) and `chat_template_kwargs`.
        where: The row's name in error messages.

    Raises:
        DataError: If there is no template, or the row's tools or variables are invalid.
    """

    def __init__(self, renderer: PreTrainedTokenizerBase | ProcessorMixin, row: Mapping[str, Any], where: str) -> None:
        self._renderer, self._where = renderer, where
        # A row without tools has an empty list if others have tools; templates would announce an empty list of tools.
        self._options: dict[str, Any] = {"tools": self._tools(row.get("tools")) or None} | self._arguments(row)
        if renderer.chat_template is None and "chat_template" not in self._options:
            raise DataError(
                problem=f"{where} is made of messages, but the tokenizer has no chat template to turn them into text.",
                instead="Set `tokenizer.chat_template`, use the tokenizer of a chat model, or write the row as text.",
            )

    def ids(self, conversations: list[list[Any]], **options: Any) -> list[list[int]]:
        """The token ids of each conversation's messages as the template renders them.

        Raises:
            DataError: If rendering fails.
        """
        for one in conversations:
            self._check_parts(one, **options)
        ids: list[list[int]] = self._render(conversations, tokenize=True, return_dict=True, **options)["input_ids"]
        return ids

    def text(self, messages: list[Any], **options: Any) -> str:
        """The text of the messages as the template renders them.

        Raises:
            DataError: If rendering fails.
        """
        return str(self._render(messages, tokenize=False, **options))

    def _render(self, messages: list[Any], **options: Any) -> Any:
        try:
            return self._renderer.apply_chat_template(messages, **self._options, **options)
        except ImportError:
            raise
        except Exception as error:  # a template may raise anything, its own `raise_exception` included
            raise DataError(
                problem=f"{self._where} cannot be rendered by the tokenizer's chat template: {said(error)}.",
                instead="Change the row's messages to what the template accepts, or drop the row.",
            ) from error

    def _check_parts(self, messages: list[Any], **options: Any) -> None:
        """Refuses content in parts where the template renders text alone, or the list as Python prints it."""
        lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        if not lists:
            return
        text = self._tried(messages, **options)
        as_text = [one | {"content": "."} if one.get("content") in lists else one for one in messages]
        is_printed = text is not None and any(str(content) in text for content in lists)
        if is_printed or (text is None and self._tried(as_text, **options) is not None):
            raise DataError(
                problem=f"{self._where} has a message whose `content` is a list of parts, and the tokenizer's chat "
                "template renders text alone.",
                instead="Write the text of the parts as `content`, or use a template that renders them.",
            )

    def _tried(self, messages: list[Any], **options: Any) -> str | None:
        try:
            return str(self._renderer.apply_chat_template(messages, **self._options, tokenize=False, **options))
        except Exception:  # of which `_render` says what it is
            return None

    def _tools(self, tools: Any) -> Any:
        if not isinstance(tools, str):
            return without_nulls(tools)
        try:
            return json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(
                problem=f"{self._where} has `tools` that are not valid JSON.",
                details=f"The parser reports: {error}.",
                instead="Write a list of function descriptions, as a list or as JSON text.",
            ) from None

    def _arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        arguments = without_nulls(row.get("chat_template_kwargs") or {})
        reserved = sorted(_RESERVED & set(arguments)) if isinstance(arguments, dict) else ["a value without names"]
        if reserved:
            raise DataError(
                problem=f"{self._where} has `chat_template_kwargs` with {', '.join(reserved)}: only variables of the "
                "template can be set there.",
                details="How the template is called decides where the response begins, so the trainer sets its other "
                "arguments.",
                instead='Write variables that the template knows, such as {"enable_thinking": false}.',
            )
        return dict(arguments)


def without_nulls(value: Any) -> Any:
    """Removes keys whose value is null, at any depth.

    Arrow gives every row the keys of all rows, with null where a row has none. A template would treat such a key
    as set (`tool | tojson`, `enable_thinking is defined`).

    Example:
        >>> without_nulls([{"role": "user", "content": "Hi", "tool_calls": None}])
        [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value
