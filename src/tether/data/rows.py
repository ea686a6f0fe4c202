"""From one row to its token ids: finds its format and where the response begins.

Knows tokenizers and chat templates; knows no set of rows, no limit of length and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from tether.data.chat import ChatTemplate, without_nulls
from tether.data.names import SYSTEM_COLUMN, columns_meant, how_to_map
from tether.errors import ConfigurationError, DataError
from tether.refusals import shown

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
MARGIN_COLUMN = "margin"  # how much better the chosen response is, in units of reward; optional
IMAGE_COLUMNS = ("image", "images")  # one, or a list; see `tether.data.image_rows`
# Sums that rows may have; see `tether.trainer.reference_columns`.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REFERENCE_CHECKSUM = "ref_checksum"
_ROUNDING = 0.01  # nats by which the sum over a response of sure tokens may come out above 0
RESPONSES = ("chosen", "rejected")
_NO_ANSWERS = ("user", "human", "system", "developer", "tool")  # roles of which a response has no last message
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Columns of ours: a row's number where the user sees it ("17 of pairs.jsonl"), and why a row cannot be read at all.
ROW_COLUMN, UNREADABLE_COLUMN = "tether_row", "tether_unreadable"


class RowTokens(NamedTuple):
    """The token ids of a row, untruncated.

    Attributes:
        prompt_ids: The prompt of both responses.
        chosen_ids: The preferred response.
        rejected_ids: The other one.
        lost_ids: The end of the prompt tokenized alone, where prompt + response continues differently: tokens that
            merge with the response's, or text that a template adds only in front of an open answer.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    lost_ids: list[int]


class RowReader(Protocol):
    """Makes token ids of a row."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of these ids."""
        ...

    def tokens(self, row: Mapping[str, Any], where: str) -> RowTokens:
        """The token ids of a row; `where` is its name in error messages ("Row 3 of the train set").

        Raises:
            DataError: If it is not a pair.
        """
        ...


def row_name(row: Mapping[str, Any], index: int, name: str) -> str:
    """A row in messages: by its own number if it has one, else by its place in its set ("Row 3 of the train set")."""
    return f"Row {row.get(ROW_COLUMN) or f'{index} of the {name} set'}"


@dataclass(frozen=True)
class TextRows:
    """Reads rows of text, messages or token ids with a tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def tokens(self, row: Mapping[str, Any], where: str) -> RowTokens:
        """As `tokenize_row`.

        Raises:
            ConfigurationError: For a row with images.
        """
        if any(row.get(column) is not None for column in IMAGE_COLUMNS):
            raise ConfigurationError(
                problem=f"{where} is vision-related (it has images), and the `processing_class` is a "
                f"{type(self.tokenizer).__name__}: only the processor of a vision-language model reads images.",
                details="Without the images, the model would not see what the responses are about.",
                instead="Train a vision-language model with `processing_class=AutoProcessor.from_pretrained(...)`, or "
                "drop the column.",
            )
        return tokenize_row(row, where, self.tokenizer)


def has_image_column(columns: Any) -> bool:
    """Whether a row or a set, by its column names, has images."""
    return any(column in columns for column in IMAGE_COLUMNS)


def tokenize_row(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> RowTokens:
    """The token ids of a row in any of the formats; ids that the row has already are kept.

    Prompt and response are tokenized together. The response starts at the first token at which the chosen or the
    rejected sequence differs from the prompt tokenized alone: tokens that merge across the boundary belong to it.

    Args:
        row: `prompt`, `chosen`, `rejected` as text or messages; or without `prompt`; or the `TOKEN_COLUMNS`. For
            messages also `tools` and `chat_template_kwargs`; in any format a `MARGIN_COLUMN`.
        where: The row's name in error messages: "Row 3 of the train set".
        tokenizer: With a chat template, if the row is made of messages.

    Raises:
        DataError: If it is not a pair.
    """
    if any(row.get(column) is not None for column in TOKEN_COLUMNS):
        tokens = _given_tokens(row, where, tokenizer)
        check_margin(row, where)
        return tokens
    row = with_prompt(row, where)
    check_margin(row, where)
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        chosen, rejected = (text if text.endswith(end) else text + end for text in (chosen, rejected))
        prompt_ids, full_chosen, full_rejected = tokenizer([prompt, prompt + chosen, prompt + rejected])["input_ids"]
    else:
        template = ChatTemplate(tokenizer, row, where)
        (prompt_ids,) = template.ids([prompt], add_generation_prompt=True)
        full_chosen, full_rejected = template.ids([prompt + chosen, prompt + rejected])
    return split_responses(prompt_ids, full_chosen, full_rejected, where)


def split_responses(prompt_ids: list[int], full_chosen: list[int], full_rejected: list[int], where: str) -> RowTokens:
    """Finds where the responses begin, from the ids of the prompt alone and with each of them; see `tokenize_row`."""
    start = min(_common_prefix(prompt_ids, full) for full in (full_chosen, full_rejected))
    if prompt_ids and start == 0:
        raise DataError(
            problem=f"{where} has a prompt that merges with a response into one token: none of the prompt is left to "
            "predict the response from.",
            instead="End the prompt with a space or a line break, or begin both responses with one, or drop the row.",
        )
    tokens = RowTokens(prompt_ids[:start], full_chosen[start:], full_rejected[start:], prompt_ids[start:])
    _check_not_empty(tokens, where)
    return tokens


# ---- tokens ------------------------------------------------------------------------------------------------------


def _given_tokens(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> RowTokens:
    """The ids that a row has."""
    ids: list[list[int]] = []
    for column in TOKEN_COLUMNS:
        given = row.get(column)
        if given is None:
            raise DataError(
                problem=f"{where} has no `{column}` but has other token ids: ids that were not made together may not "
                "fit together.",
                instead=f"Give all of {', '.join(TOKEN_COLUMNS)}, or none of them and the row as text.",
            )
        ids.append([int(token) for token in given] if _is_token_ids(given, tokenizer) else _refuse_ids(column, where))
    prompt_ids, chosen_ids, rejected_ids = ids
    tokens = RowTokens(prompt_ids, chosen_ids, rejected_ids, lost_ids=[])
    _check_not_empty(tokens, where)
    return tokens


def _is_token_ids(value: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is a sequence of the tokenizer's ids."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return False
    ids = list(value)
    are_whole = all(not isinstance(token, bool) and _is_whole(token) and token >= 0 for token in ids)
    return are_whole and is_known(max(ids, default=0), tokenizer)


def is_known(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has ids up to this one; with gaps between them, their number is smaller."""
    return token < len(tokenizer) or token in tokenizer.get_vocab().values()


def _is_whole(token: Any) -> bool:
    return hasattr(token, "__index__")


def _refuse_ids(column: str, where: str) -> list[int]:
    raise DataError(
        problem=f"{where} has a `{column}` that is not a list of the tokenizer's ids: these are whole numbers from 0 "
        "up to the size of the vocabulary.",
        details="Other ids were probably made with another tokenizer.",
        instead="Tokenize the row with the trainer's tokenizer, or give it as text.",
    )


def _check_not_empty(tokens: RowTokens, where: str) -> None:
    for column in TOKEN_COLUMNS:
        if not getattr(tokens, column):
            raise DataError(
                problem=f"{where} has no tokens in `{column.removesuffix('_ids')}`: each token of a response is "
                "predicted from the tokens before it.",
                instead="Give the row a prompt and two responses (a tokenizer with a BOS token allows an empty "
                "prompt), or drop the row.",
            )


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


# ---- fields ------------------------------------------------------------------------------------------------------


def with_prompt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with a prompt and two responses of one kind; without a prompt, their common start becomes the prompt.

    Raises:
        DataError: If it is not a pair.
    """
    fields = ("prompt", *RESPONSES)
    row = dict(row) | {name: _messages(without_nulls(row[name])) for name in fields if row.get(name) is not None}
    for field in RESPONSES:
        if row.get(field) is None:
            columns = sorted(row.keys() - {ROW_COLUMN, UNREADABLE_COLUMN, SYSTEM_COLUMN})
            raise DataError(
                problem=f"{where} has no `{field}`: a pair needs two responses to one prompt.",
                details=f"The row has these columns: {', '.join(columns)}.",
                instead=f"Add `{field}`, or drop the row.",
            )
    if _prompt_is_repeated(row):
        row["prompt"] = None
    if row.get("prompt") is None:
        row["rejected"] = _continued(row["chosen"], row["rejected"])
    _check_kinds(row, where)
    for field in RESPONSES:
        role = row[field][-1]["role"] if row[field] and isinstance(row[field], list) else ""
        if str(role).lower() in _NO_ANSWERS:
            raise DataError(
                problem=f"{where} has a `{field}` response that ends with a message of the role `{role}`: the model "
                "would be trained to speak for it.",
                instead='Give the answer the role "assistant", or drop the row.',
            )
        if _is_empty(row[field]):
            raise DataError(
                problem=f"{where} has an empty `{field}` response: it has no token to score.",
                instead="Drop the row, or give the response its text.",
            )
    if row.get("prompt") is None:
        split = _split_common_start(row["chosen"], row["rejected"])
        _check_has_prompt(row, split["prompt"], where)
        return _with_system(row | split, where)
    _check_prompt_comes_once(row, where)
    return _with_system(row, where)


def check_margin(row: Mapping[str, Any], where: str) -> None:
    """Raises a `DataError` if the row's margin is not a finite number."""
    if MARGIN_COLUMN not in row:
        return
    margin = row[MARGIN_COLUMN]
    if not is_number(margin):
        raise DataError(
            problem=f"{where} has `margin={shown(margin)}`: a margin must be a finite number.",
            details="It says how much better the chosen response is, in units of reward, and is subtracted from the "
            "reward margin.",
            instead="Give every row a finite number (0 for none), or drop the column.",
        )


def check_reference_sum(value: Any, column: str, where: str) -> None:
    """Raises a `DataError` if a row's reference log-prob is not finite, or above 0 by more than rounding."""
    if not is_log_prob(value):
        raise DataError(
            problem=f"{where} has `{column}={shown(value)}`: the sum of the reference's log-probs of a response must "
            "be a finite number, and not above 0.",
            instead="Compute it again, drop the row, or remove the columns from all rows.",
        )


def is_log_prob(value: Any) -> bool:
    """Whether it is a finite number, and not above 0 by more than rounding."""
    return is_number(value) and value <= _ROUNDING


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a tensor or array of one element counts too."""
    try:
        return hasattr(value, "__float__") and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _messages(value: Any) -> Any:
    """A message alone as a list of one, and ShareGPT's `from` and `value` as `role` and `content`."""
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
        return value
    if all(set(one) == {"from", "value"} and one["from"] in _SHAREGPT_ROLES for one in messages):
        return [{"role": _SHAREGPT_ROLES[one["from"]], "content": one["value"]} for one in messages]
    return messages


def _continued(chosen: Any, rejected: Any) -> Any:
    """An answer beside a whole conversation, as the same conversation with that answer at its end."""
    answer = [{"role": "assistant", "content": rejected}] if isinstance(rejected, str) and rejected else rejected
    if _kind(chosen) != "messages" or _kind(answer) != "messages" or len(chosen) < 2 or len(answer) != 1:
        return rejected
    is_answer = chosen[-1]["role"] == answer[0]["role"] == "assistant"
    return [*chosen[:-1], *answer] if is_answer else rejected


def _with_system(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with the system message that `columns` named; a row of text then becomes a conversation."""
    system = row.get(SYSTEM_COLUMN)
    if not system:
        return row
    if isinstance(row["prompt"], str):
        row |= {side: [{"role": "assistant", "content": row[side]}] for side in RESPONSES}
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(system, str) or row["prompt"][0].get("role") == "system":
        why = "not text" if not isinstance(system, str) else "a second one: its prompt begins with another"
        raise DataError(
            problem=f"{where} has a system message, in the column that `columns` names, that is {why}.",
            instead="Leave `system` out of `columns`, or drop the row.",
        )
    row["prompt"] = [{"role": "system", "content": system}, *row["prompt"]]
    return row


def _check_has_prompt(row: Mapping[str, Any], start: Any, where: str) -> None:
    """Refuses a row whose prompt is in a column that is not read: its responses do not begin with it."""
    meant = columns_meant(name for name, value in row.items() if value is not None and name != ROW_COLUMN)
    theirs = meant.get("prompt")
    text = row.get(theirs) if isinstance(theirs, str) else None
    is_elsewhere = theirs is not None and isinstance(start, str) and not (isinstance(text, str) and text in start)
    if start and not is_elsewhere and SYSTEM_COLUMN not in row:
        return
    why = f"`{theirs}` is not read" if theirs else "its responses have no common start, which would be it"
    raise DataError(
        problem=f"{where} has no `prompt`, and {why}.",
        details=f"Its columns are {', '.join(sorted(row.keys() - {ROW_COLUMN, SYSTEM_COLUMN}))}.",
        instead=how_to_map(meant) if theirs else "Give the row a `prompt`, which may be empty text, or drop it.",
    )


def _prompt_is_repeated(row: Mapping[str, Any]) -> bool:
    """Whether the prompt is the text of the first message of both conversations, as in many published sets."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not isinstance(prompt, str) or {_kind(chosen), _kind(rejected)} != {"messages"}:
        return False
    shared = chosen[: _common_prefix(chosen, rejected)]
    return any(message.get("content") == prompt for message in shared)


def _check_kinds(row: Mapping[str, Any], where: str) -> None:
    kinds = {name: _kind(row[name]) for name in ("prompt", *RESPONSES) if row.get(name) is not None}
    if set(kinds.values()) in ({"text"}, {"messages"}):
        return
    raise DataError(
        problem=f"{where} is neither all text nor all messages: "
        + ", ".join(f"`{field}` is {kind}" for field, kind in kinds.items())
        + ".",
        details="The responses continue the prompt, so all of them must be of one kind.",
        instead='Write {"prompt": "...", "chosen": "...", "rejected": "..."} or a list of '
        '{"role": ..., "content": ...} for each.',
    )


def _check_prompt_comes_once(row: Mapping[str, Any], where: str) -> None:
    """Refuses whole conversations beside a prompt: the prompt would be rendered twice."""
    prompt = row["prompt"]
    if isinstance(prompt, list) and prompt and all(row[side][: len(prompt)] == prompt for side in RESPONSES):
        raise DataError(
            problem=f"{where} has a `prompt` that both of its responses repeat at their start: the model would read it "
            "twice.",
            instead="Drop the column `prompt`: the common start of the two conversations is then the prompt.",
        )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return next((fault for message in value if (fault := _fault_of(message))), "messages")
    return f"`{type(value).__name__}`"


def _fault_of(message: Mapping[str, Any]) -> str:
    """Why a mapping is no message; empty if it is one."""
    role, content = message.get("role"), message.get("content")
    if role is None:
        return "a list with a message that has no `role`"
    if not isinstance(role, str):
        return f"a list with a message whose `role` is {shown(role)}, which is not text"
    if isinstance(content, int | float):
        return f"a list with a message whose `content` is {shown(content)}, which is not text"
    return ""


def _is_empty(response: str | list[dict[str, Any]]) -> bool:
    if isinstance(response, str):
        return not response
    return not response or not any(message.get("content") or message.get("tool_calls") for message in response)


def _split_common_start(chosen: Any, rejected: Any) -> dict[str, Any]:
    """The longest common start as prompt; in text, a space before the difference belongs to the responses."""
    length = _common_prefix(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        length = max(0, length - 1)  # leaves a response, even if one text begins the other or both are equal
    elif isinstance(chosen, str) and chosen[:length].endswith(" "):
        length -= 1
    return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}
