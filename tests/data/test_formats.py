"""Every format of preference rows gives TRL's token ids, where TRL is right; else those of what was written."""

from __future__ import annotations

import json
import logging
from typing import Any

import datasets
import pyarrow
import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets
from packaging.version import Version
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from support.tiny import CHAT_TEMPLATE, tiny_pairs, tiny_tokenizer
from support.trl_oracle import trl_tokens
from tether.data.columns import named_as_ours
from tether.data.datasets import as_dataset, tokenize_pairs
from tether.data.rows import ROW_COLUMN
from tether.errors import DataError

Row = dict[str, Any]
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

# Renders tools, calls of them and parts of content, as templates of chat models do; a key that is null would be seen.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<eos>' }}{% endif %}"
    "{% if shout is defined %}{{ 'shout=' + (shout | string) }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if 'tool_calls' in message %}{{ message.tool_calls | tojson }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ '<eos>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Announces an open answer with a block that a finished conversation does not have.
THINKING = TEMPLATE.replace("assistant\\n' }}{% endif %}", "assistant\\n<think></think>' }}{% endif %}")

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "required": ["zone"]}}}


def said(content: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": content}


def called(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}


ASK = [said("Is it raining in Paris?", "user")]


def tokenizer_of(template: str = TEMPLATE, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


def tokens_of(rows: list[Row] | Dataset, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[Row]:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    tokenized = tokenize_pairs(dataset, tokenizer, **{"max_length": None} | options)
    ours = {name for name in tokenized.column_names if name.startswith("tether")}
    assert ours <= ({ROW_COLUMN} if len(tokenized) < len(dataset) else set())  # the numbers that they had
    return [{name: row[name] for name in COLUMNS} for row in tokenized]


FORMATS: dict[str, list[Row]] = {
    "text": tiny_pairs(8),
    "conversations": tiny_pairs(8, conversational=True),
    "whole texts": [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in tiny_pairs(8)],
    "whole conversations": [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        for row in tiny_pairs(8, conversational=True)
    ],
    "whole conversations of two lengths": [
        {"chosen": [*ASK, said("No.")], "rejected": [*ASK, said("No."), said("Sure?", "user"), said("Yes.")]}
    ],
    "whole conversations that are alike": [{"chosen": [*ASK, said("No.")], "rejected": [*ASK, said("No.")]}],
    "a system message": [
        {"prompt": [said("Be brief.", "system"), *ASK], "chosen": [said("No.")], "rejected": [said("Maybe so.")]}
    ],
    "responses of several turns": [
        {"prompt": ASK, "chosen": [said("Where?"), said("Paris.", "user"), said("No.")], "rejected": [said("Yes.")]}
    ],
    "a prompt that ends with the assistant": [
        {"prompt": [*ASK, said("Let me look.")], "chosen": [said("No.")], "rejected": [said("Yes.")]}
    ],
    "tools": [{"prompt": ASK, "chosen": [said("No.")], "rejected": [said("Yes.")], "tools": [WEATHER]}],
    "tools as JSON": [
        {"prompt": ASK, "chosen": [said("No.")], "rejected": [said("Yes.")], "tools": json.dumps([tool])}
        for tool in (WEATHER, CLOCK)
    ],
    "calls of tools": [
        {
            "prompt": ASK,
            "chosen": [called(city="Paris")],
            "rejected": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Nice"}}}]}
            ],
            "tools": [WEATHER],
        }
    ],
    "a call beside plain messages": [
        {"prompt": ASK, "chosen": [called(city="Paris"), said("No.")], "rejected": [said("Yes.")]}
    ],
    "a template's arguments": [
        {"prompt": ASK, "chosen": [said("No.")], "rejected": [said("Yes.")], "chat_template_kwargs": {"shout": shout}}
        for shout in (True, False)
    ],
    "a template of its own": [
        {
            "prompt": ASK,
            "chosen": [said("No.")],
            "rejected": [said("Yes.")],
            "chat_template_kwargs": {"chat_template": CHAT_TEMPLATE},
        }
    ],
    "parts of content": [
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "raining?"}]}
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
        }
    ],
    "further columns": [{**row, "score": number, "source": "x"} for number, row in enumerate(tiny_pairs(4))],
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("template", [TEMPLATE, THINKING], ids=["plain", "thinking"])
def test_a_format_gives_the_token_ids_of_trl(name: str, template: str) -> None:
    rows = FORMATS[name]
    if name == "a call beside plain messages" and Version(datasets.__version__) < Version("5.2"):
        pytest.skip("TRL renders the keys that older versions of datasets fill with null")
    assert tokens_of(rows, tokenizer_of(template)) == trl_tokens(rows, tokenizer_of(template))


@pytest.mark.parametrize("name", ["text", "whole conversations", "a template's arguments"])
def test_a_format_gives_the_same_token_ids_from_a_stream(name: str) -> None:
    rows, tokenizer = FORMATS[name], tokenizer_of()
    stream = tokenize_pairs(IterableDataset.from_generator(lambda: iter(rows)), tokenizer, max_length=None)
    assert [{column: row[column] for column in COLUMNS} for row in stream] == tokens_of(rows, tokenizer)


def test_the_other_columns_stay() -> None:
    dataset = tokenize_pairs(Dataset.from_list(FORMATS["further columns"]), tokenizer_of(), max_length=None)
    assert dataset["score"][:] == [0, 1, 2, 3] and dataset[2]["prompt"] == FORMATS["further columns"][2]["prompt"]


# ---------------------------------------------------------------------------------------------- the boundary


def test_a_template_that_renders_an_open_answer_differently_is_said_once_with_what_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = tokenizer_of(THINKING)
    with caplog.at_level(logging.WARNING, "tether"):
        (row, *_) = tokens_of(FORMATS["conversations"], tokenizer, name="eval")
    assert "<think>" not in tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("In 8 of 8 rows of the eval set") and "(row 0: '<think></think>')" in message


def test_only_rows_that_lose_something_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    merging, clean = {"prompt": "The answer i", "chosen": "s 42.", "rejected": "n 42."}, tiny_pairs(1)[0]
    with caplog.at_level(logging.WARNING, "tether"):
        tokens_of([clean, merging, clean], tiny_tokenizer(384))
        tokens_of([clean, clean], tiny_tokenizer(384))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("In 1 of 3 rows of the train set") and "(row 1: " in message


# ------------------------------------------------------------------------- where TRL's tokens are not followed


def rendered(row: Row, tokenizer: PreTrainedTokenizerFast, side: str) -> list[int]:
    """Prompt and response of a row as it was written, before Arrow had it."""
    options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
    messages = row["prompt"] + row[side]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


NULLS: dict[str, list[Row]] = {
    "tools of two shapes": [
        {"prompt": ASK, "chosen": [said("No.")], "rejected": [said("Yes.")], "tools": [tool]}
        for tool in (WEATHER, CLOCK)
    ],
    "calls with other arguments": [
        {"prompt": ASK, "chosen": [call], "rejected": [said("Yes.")]}
        for call in (called(city="Paris"), called(zone="CET"))
    ],
    "arguments that only one row has": [
        {"prompt": ASK, "chosen": [said("No.")], "rejected": [said("Yes.")], "chat_template_kwargs": arguments}
        for arguments in ({"shout": True}, {"whisper": True})
    ],
}


@pytest.mark.parametrize("name", NULLS)
def test_keys_that_arrow_fills_with_null_are_not_rendered(name: str) -> None:
    """TRL renders them: `tojson` shows nulls, and `is defined` finds keys that nobody wrote."""
    rows, tokenizer = NULLS[name], tokenizer_of()
    filled = Dataset(pyarrow.Table.from_pylist(rows))  # as a Parquet file has them; `from_list` is milder
    for row, tokens, same in zip(rows, tokens_of(filled, tokenizer), tokens_of(rows, tokenizer), strict=True):
        assert tokens == same
        for side in ("chosen", "rejected"):
            assert tokens["prompt_ids"] + tokens[f"{side}_ids"] == rendered(row, tokenizer, side)
    assert trl_tokens(filled, tokenizer) != tokens_of(rows, tokenizer), "TRL does too by now: change docs/data.md"


def test_a_row_without_tools_is_rendered_like_one_of_a_set_without_tools() -> None:
    """TRL hands the empty list to the template, and some announce that there are no tools."""
    tokenizer = tokenizer_of(TEMPLATE.replace("{% if tools %}", "{% if tools is not none %}"))
    rows = FORMATS["a system message"]
    without = tokens_of(rows, tokenizer)
    assert tokens_of([{**row, "tools": []} for row in rows], tokenizer) == without
    assert tokens_of([{**rows[0], "tools": None}], tokenizer) == without


def test_a_prompt_that_is_also_the_first_message_is_read_once() -> None:
    """As published sets have it; TRL fails on text beside messages."""
    tokenizer, rows = tokenizer_of(), FORMATS["whole conversations"]
    beside = [{"prompt": ASK[0]["content"], "chosen": [*ASK, said("No.")], "rejected": [*ASK, said("Yes.")]}]
    assert tokens_of(beside, tokenizer) == tokens_of([{k: beside[0][k] for k in ("chosen", "rejected")}], tokenizer)
    with pytest.raises(DataError, match="`prompt` is text, `chosen` is messages"):
        tokens_of([{**rows[0], "prompt": "Something else"}], tokenizer)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"content": "No."}, "that has no `role`"),
        ({"role": None, "content": "No."}, "that has no `role`"),
        ({"role": 3, "content": "No."}, "whose `role` is 3"),
        ({"role": "assistant", "content": 5}, "whose `content` is 5"),
    ],
)
def test_what_a_message_lacks_is_named(message: dict[str, Any], fault: str) -> None:
    row = {"prompt": ASK, "chosen": [said("Yes.")], "rejected": [message]}
    with pytest.raises(DataError, match=f"`rejected` is a list with a message {fault}"):
        tokens_of([row], tokenizer_of())


@pytest.mark.parametrize("role", ["user", "human", "system"])
def test_an_answer_that_is_not_the_models_is_refused(role: str) -> None:
    row = {"prompt": ASK, "chosen": [said("Yes.")], "rejected": [said("No."), said("Why?", role)]}
    with pytest.raises(DataError, match=f"`rejected` response that ends with a message of the role `{role}`"):
        tokens_of([row], tokenizer_of())


@pytest.mark.parametrize("content", ["{{ '' + m.content }}", "{{ m.content }}", "{{ m.content.strip() }}"])
def test_content_in_parts_is_refused_where_the_template_renders_text_alone(content: str) -> None:
    """One template fails, the next shows the model the list as Python prints it."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Is it raining?"}]}]
    row = {"prompt": parts, "chosen": [said("Yes.")], "rejected": [said("No.")]}
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role }}CONTENT{% endfor %}".replace("CONTENT", content)
    with pytest.raises(DataError, match="`content` is a list of parts, and the tokenizer's chat template renders text"):
        tokens_of([row], tokenizer_of(template))
    assert tokens_of([row | {"prompt": ASK}], tokenizer_of(template))


def test_a_prompt_with_which_the_responses_begin_again_is_refused() -> None:
    """TRL renders it twice."""
    row = {"prompt": ASK, "chosen": [*ASK, said("No.")], "rejected": [*ASK, said("Yes.")]}
    with pytest.raises(DataError, match=r"Row 0 of the train set has a `prompt` that both .* repeat at their start"):
        tokens_of([row], tokenizer_of())


def test_rows_of_several_formats_may_stand_in_one_set() -> None:
    tokenizer = tokenizer_of()
    text, tokens = FORMATS["text"], tokens_of(FORMATS["whole texts"], tokenizer)
    both = concatenate_datasets([Dataset.from_list(text), Dataset.from_list(tokens)])
    assert tokens_of(both, tokenizer) == tokens_of(text, tokenizer) + tokens
    some = [{**row, "prompt": None} for row in FORMATS["whole texts"]]
    assert tokens_of([*text, *some], tokenizer) == tokens_of(text, tokenizer) + tokens


# --------------------------------------------------------------------------------------------- tokenised rows

IDS: Row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}


def test_tokenized_rows_are_taken_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """TRL asks them for text; its comments say that it should not."""
    rows = [IDS, {**IDS, "chosen_ids": [200, 0]}]
    assert tokens_of(rows, tiny_tokenizer(chat=False)) == rows
    with caplog.at_level(logging.WARNING, "tether"):
        kept = tokens_of([*rows, {**IDS, "prompt_ids": [1] * 9}], tiny_tokenizer(), max_length=9)
    assert kept == rows
    assert "1 of 3 rows" in caplog.text and "row 2" in caplog.text
    shuffled = Dataset.from_list([{**IDS, "prompt_ids": [1] * n} for n in range(1, 9)]).select([7, 0, 3])
    assert [len(row["prompt_ids"]) for row in tokens_of(shuffled, tiny_tokenizer(), max_length=8)] == [1, 4]


def test_a_tokenized_set_is_not_copied() -> None:
    dataset = Dataset.from_list([IDS] * 3)
    assert tokenize_pairs(dataset, tiny_tokenizer(), max_length=8) is dataset


BAD_IDS = {
    "an id beyond the vocabulary": (
        {**IDS, "chosen_ids": [7, 256]},
        "`chosen_ids` that is not a list of the tokenizer's",
    ),
    "an id below 0": ({**IDS, "rejected_ids": [-1]}, "`rejected_ids` that is not a list of the tokenizer's"),
    "no response": ({**IDS, "rejected_ids": []}, "no tokens in `rejected`"),
    "no prompt": ({**IDS, "prompt_ids": []}, "no tokens in `prompt`"),
    "a column short": ({**IDS, "rejected_ids": None}, "no `rejected_ids` but has other token ids"),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["set", "stream"])
@pytest.mark.parametrize("name", BAD_IDS)
def test_a_bad_tokenized_row_is_named(name: str, streamed: bool) -> None:
    row, found = BAD_IDS[name]
    rows = [IDS, row]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    with pytest.raises(DataError) as caught:
        list(tokenize_pairs(dataset, tiny_tokenizer(), max_length=None))
    assert caught.value.problem.startswith("Row 1 of the train set has") and found in caught.value.problem


# ------------------------------------------------------------------------------------------------ bad messages

BAD_MESSAGES = {
    "a template that refuses": ({"shout": 1, "chat_template": "{{ raise_exception('Be silent.') }}"}, "Be silent."),
    "an argument that moves the boundary": ({"add_generation_prompt": False}, "add_generation_prompt"),
    "an argument that truncates": ({"max_length": 3}, "max_length"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_row_that_the_template_cannot_render_is_named(name: str) -> None:
    arguments, found = BAD_MESSAGES[name]
    row = {"prompt": ASK, "chosen": [said("No.")], "rejected": [said("Yes.")], "chat_template_kwargs": arguments}
    with pytest.raises(DataError) as caught:
        tokens_of([row], tokenizer_of())
    assert caught.value.problem.startswith("Row 0 of the train set ") and found in caught.value.problem


def test_tools_that_are_no_json_are_named() -> None:
    with pytest.raises(DataError, match=r"Row 0 of the train set has `tools` that are not valid JSON"):
        tokens_of([{**FORMATS["tools as JSON"][0], "tools": "weather"}], tokenizer_of())


# ------------------------------------------------------------------------------------------- lists of any rows

PLAIN = {"prompt": "The answer is", "chosen": "4", "rejected": '"no"'}  # both are JSON by themselves
WHOLE = {"chosen": "The ship left.", "rejected": "The ship sank."}
TALK = {"prompt": ASK, "chosen": [said("Yes.")], "rejected": [said("No.")]}
TOOLS = TALK | {"tools": json.dumps([WEATHER])}
LISTED = TALK | {"tools": [CLOCK], "chat_template_kwargs": {"shout": True}}
NAMED = TALK | {"chat_template_kwargs": {"shout": "very"}}
IDS = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("first", range(7))
def test_a_row_of_a_list_is_read_alike_wherever_it_stands(first: int, num_proc: int | None) -> None:
    """And as it is read alone: the columns of the first row, text or messages, decide nothing for the others."""
    rows = [PLAIN, WHOLE, TALK, TOOLS, LISTED, NAMED, IDS]
    rows = rows[first:] + rows[:first]
    tokenizer = tokenizer_of()
    alone = [tokens_of(as_dataset([row]), tokenizer)[0] for row in rows]
    dataset = as_dataset(rows)
    assert tokens_of(dataset, tokenizer, num_proc=num_proc) == alone
    kept = tokenize_pairs(dataset, tokenizer, max_length=None)
    for row, found in zip(rows, kept, strict=True):
        assert {name: value for name, value in found.items() if name in ("prompt", "chosen", "rejected")} == {
            name: row.get(name) for name in ("prompt", "chosen", "rejected")
        }


@pytest.mark.parametrize("order", [1, -1])
def test_a_number_that_some_rows_of_a_list_bring_is_not_passed_over(order: int) -> None:
    rows = [PLAIN, PLAIN | {"margin": 0.5}][::order]
    with pytest.raises(DataError, match=r"Row \d of the train set has `margin=None`"):
        tokenize_pairs(as_dataset(rows), tokenizer_of(), max_length=None)


@pytest.mark.parametrize("name", ["margin", "ref_chosen_logps", "ref_rejected_logps"])
def test_a_number_that_a_later_row_of_a_stream_brings_is_not_passed_over(name: str) -> None:
    rows = [PLAIN, PLAIN, PLAIN | {name: 0.5}]
    stream = tokenize_pairs(IterableDataset.from_generator(lambda: iter(rows)), tokenizer_of(), max_length=None)
    with pytest.raises(DataError, match=f"Row 2 of the train set has a `{name}`"):
        list(stream)


def test_rows_that_a_transform_makes_are_read() -> None:
    plain = Dataset.from_dict({"question": ["Hi", "Bye"]})

    def pairs(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {"prompt": batch["question"], "chosen": [" yes"] * len(batch["question"]), "rejected": [" no"] * 2}

    made = as_dataset(plain.with_transform(pairs))
    rows = [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in ("Hi", "Bye")]
    assert tokens_of(made, tiny_tokenizer()) == tokens_of(rows, tiny_tokenizer())  # type: ignore[arg-type]


def test_ids_of_a_vocabulary_with_gaps_are_known() -> None:
    """Such a tokenizer has fewer tokens than its largest id."""
    parts = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 290
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<eos>")
    rows = [IDS, {**IDS, "chosen_ids": [7, 290]}]
    assert tokens_of(rows, tokenizer) == rows
    with pytest.raises(DataError, match="Row 1 of the train set has a `chosen_ids`"):
        tokens_of([IDS, {**IDS, "chosen_ids": [7, 291]}], tokenizer)


BROKEN: dict[str, Any] = {
    "a lone surrogate": "a\ud800b",
    "a lone surrogate in a message": [{"role": "assistant", "content": "a\udfff"}],
    "a huge number": 10**400,
    "an object": object(),
    "a set": {1, 2},
    "a list that holds itself": (lambda one: one.append(one) or one)([]),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("column", ["chosen", "source", "margin"])
def test_a_value_that_cannot_be_stored_is_that_of_a_bad_row(name: str, column: str) -> None:
    clean = PLAIN | {"source": "a", "margin": 1.0}
    rows = as_dataset([clean, clean | {column: BROKEN[name]}, clean])
    kept = tokenize_pairs(rows, tiny_tokenizer(), max_length=None, bad_rows="drop")
    assert len(kept) in ((2, 3) if column == "source" else (2,))  # type: ignore[arg-type]
    if len(kept) == 2:  # type: ignore[arg-type]
        with pytest.raises(DataError, match="Row 1 of the train set ") as caught:
            tokenize_pairs(rows, tiny_tokenizer(), max_length=None)
        assert len(str(caught.value)) < 1000


def test_text_that_is_not_utf_8_is_that_of_a_bad_row() -> None:
    texts = pyarrow.array([b"yes", b"caf\xe9", b"so"]).view(pyarrow.string())
    rows = Dataset(pyarrow.table({"prompt": ["a", "b", "c"], "chosen": texts, "rejected": ["x", "y", "z"]}))
    with pytest.raises(DataError, match="Row 1 of the train set is not text in UTF-8"):
        tokenize_pairs(as_dataset(rows), tiny_tokenizer(), max_length=None)
    assert len(tokenize_pairs(as_dataset(rows), tiny_tokenizer(), max_length=None, bad_rows="drop")) == 2  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- columns under other names


def user(text: str) -> Row:
    return said(text, "user")


SHAREGPT = {"conversations": [{"from": "human", "value": "Hi?"}]}
# Rows as published sets have them, what `columns` has to be, and the same row under our names.
NAMED_OTHERWISE: dict[str, tuple[Row, Row, Row]] = {
    "Intel's": (
        {"system": "Be brief.", "question": "Hi?", "chosen": "A.", "rejected": "B."},
        {"prompt": "question", "system": "system"},
        {"prompt": [said("Be brief.", "system"), user("Hi?")], "chosen": [said("A.")], "rejected": [said("B.")]},
    ),
    "Alpaca's": (
        {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"},
        {"prompt": ["instruction", "input"]},
        {"prompt": "Add.\n1, 2", "chosen": "3", "rejected": "4"},
    ),
    "other words": (
        {"question": "Hi?", "preferred": "A.", "dispreferred": "B."},
        {"prompt": "question", "chosen": "preferred", "rejected": "dispreferred"},
        {"prompt": "Hi?", "chosen": "A.", "rejected": "B."},
    ),
    "text with a common start": (
        {"question": "Hi?", "chosen": "It is A.", "rejected": "It is B."},
        {"prompt": "question"},
        {"prompt": "Hi?", "chosen": "It is A.", "rejected": "It is B."},
    ),
    "ShareGPT's": (
        SHAREGPT | {"chosen": {"from": "gpt", "value": "A."}, "rejected": {"from": "gpt", "value": "B."}},
        {"prompt": "conversations"},
        {"prompt": [user("Hi?")], "chosen": [said("A.")], "rejected": [said("B.")]},
    ),
    "messages": (
        {"messages": [user("Hi?"), said("A.")], "rejected": [said("B.")]},
        {"chosen": "messages"},
        {"prompt": [user("Hi?")], "chosen": [said("A.")], "rejected": [said("B.")]},
    ),
    "messages and text": (
        {"messages": [user("Hi?"), said("A.")], "rejected_response": "B."},
        {"chosen": "messages", "rejected": "rejected_response"},
        {"prompt": [user("Hi?")], "chosen": [said("A.")], "rejected": [said("B.")]},
    ),
    "misspelt": (
        {"Prompt": "Hi?", "Choosen": "A.", "rejected": "B."},
        {"prompt": "Prompt", "chosen": "Choosen"},
        {"prompt": "Hi?", "chosen": "A.", "rejected": "B."},
    ),
}


def test_a_mapping_of_which_a_part_is_known_names_the_rest() -> None:
    theirs = {"question": "Hi?", "answer_good": "A.", "answer_bad": "B."}
    with pytest.raises(DataError) as caught:
        tokenize_pairs(Dataset.from_list([theirs]), tokenizer_of(), max_length=None)
    whole = {"prompt": "question", "chosen": "...", "rejected": "..."}
    assert f"Write `columns={json.dumps(whole)}`" in caught.value.instead


@pytest.mark.parametrize("name", NAMED_OTHERWISE)
@pytest.mark.parametrize("is_stream", [False, True])
def test_columns_under_other_names_are_refused_with_the_mapping_that_reads_them(name: str, is_stream: bool) -> None:
    theirs, columns, ours = NAMED_OTHERWISE[name]
    tokenizer = tokenizer_of()
    dataset = IterableDataset.from_generator(lambda: iter([theirs])) if is_stream else Dataset.from_list([theirs])
    with pytest.raises(DataError) as caught:
        next(iter(tokenize_pairs(dataset, tokenizer, max_length=None)))
    if not is_stream or {"chosen", "rejected"} <= theirs.keys():
        assert f"Write `columns={json.dumps(columns)}`" in caught.value.instead
    read = tokenize_pairs(named_as_ours(dataset, columns, "train"), tokenizer, max_length=None)
    (expected,) = tokens_of([ours], tokenizer)
    assert {column: next(iter(read))[column] for column in COLUMNS} == expected


def test_whole_texts_and_conversations_may_have_a_column_that_repeats_their_prompt() -> None:
    texts = {"question": "Hi?", "chosen": "Hi? A.", "rejected": "Hi? B."}
    chats = {"question": "Hi?", "chosen": [user("Hi?"), said("A.")], "rejected": [user("Hi?"), said("B.")]}
    for row in (texts, chats):
        bare = {side: row[side] for side in ("chosen", "rejected")}
        assert tokens_of([row], tokenizer_of()) == tokens_of([bare], tokenizer_of())


def test_a_row_whose_prompt_is_nowhere_is_refused_though_a_bos_would_stand_for_it() -> None:
    with pytest.raises(DataError, match="has no `prompt`, and its responses have no common start"):
        tokens_of([{"chosen": "Yes.", "rejected": "No."}], tokenizer_of(bos=True))
    tokens_of([{"prompt": "", "chosen": "Yes.", "rejected": "No."}], tokenizer_of(bos=True))


def test_columns_may_be_swapped_and_stand_in_for_ours() -> None:
    row = {"prompt": "Bye.", "question": "Hi?", "chosen": "A.", "rejected": "B."}
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    read = named_as_ours(Dataset.from_list([row]), columns, "train")
    assert read[0] == {"prompt": "Hi?", "chosen": "B.", "rejected": "A."}
    with pytest.raises(DataError, match="it has no column `query`, which `columns` names"):
        named_as_ours(Dataset.from_list([row]), {"prompt": "query"}, "train")


def test_a_system_message_comes_once() -> None:
    row = {
        "system": "S",
        "prompt": [said("T", "system"), user("Hi?")],
        "chosen": [said("A.")],
        "rejected": [said("B.")],
    }
    with pytest.raises(DataError, match="a second one"):
        tokenize_pairs(
            named_as_ours(Dataset.from_list([row]), {"system": "system"}, "train"), tokenizer_of(), max_length=None
        )
