"""From rows to tokens: as TRL tokenizes and truncates, with a key of the content, and a clear word on each bad row."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from support.tiny import CHAT_TEMPLATE, EOS, tiny_pairs, tiny_tokenizer
from support.trl_oracle import trl_batch, trl_tokens
from tether.data.datasets import PairCollator, batch_of, tokenize_pairs
from tether.data.rows import TextRows, split_responses
from tether.errors import DataError
from tether.store import content_key
from tether.types import PairBatch

Row = dict[str, Any]
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokens_of(rows: list[Row], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[Row]:
    dataset = tokenize_pairs(Dataset.from_list(rows), tokenizer, **{"max_length": None} | options)
    return [{name: row[name] for name in COLUMNS} for row in dataset]


def without_prompt(rows: list[Row]) -> list[Row]:
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


def pair(prompt: Any = "Why?", chosen: Any = " Because.", rejected: Any = " No.") -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def said(content: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


# ---------------------------------------------------------------------------------------------------- tokens


def test_the_ids_of_a_file_are_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its rows, the tokenizer and the template; as `datasets.map` keeps what it makes."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny_pairs(4, conversational=True))))
    plain, read = TextRows.tokens, []
    monkeypatch.setattr(TextRows, "tokens", lambda *row: read.append(row) or plain(*row))

    def num_read(template: str) -> int:
        read.clear()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        rows = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=tmp_path / "c")
        tokenize_pairs(rows, tokenizer, max_length=None)
        return len(read)

    folder = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(folder)
    assert [num_read(CHAT_TEMPLATE), num_read(CHAT_TEMPLATE), num_read(CHAT_TEMPLATE + " ")] == [4, 0, 4]


SHAPES = {
    "plain": lambda: tiny_pairs(24),
    "conversational": lambda: tiny_pairs(24, conversational=True),
    "plain without prompt": lambda: without_prompt(tiny_pairs(24)),
    "conversational without prompt": lambda: without_prompt(tiny_pairs(24, conversational=True)),
    "one begins the other": lambda: [{"chosen": "Why? Yes", "rejected": "Why? Yes, yes"}],
    "ends with EOS already": lambda: [pair(chosen=" Yes." + EOS), pair(rejected=" No." + EOS)],
    "with template arguments": lambda: [
        pair(said("Hi", "user"), said("Yes."), said("No.")) | {"chat_template_kwargs": {"shout": shout}}
        for shout in (True, False)
    ],
}


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_those_of_trl(shape: str, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = "{% if shout %}!!{% endif %}" + CHAT_TEMPLATE
    rows = SHAPES[shape]()
    assert tokens_of(rows, tokenizer) == trl_tokens(rows, tokenizer)


def test_tokens_of_plain_text_end_with_eos_once_and_those_of_messages_as_the_template_says() -> None:
    tokenizer = tiny_tokenizer()
    (row,) = tokens_of([pair(chosen=" Yes.", rejected=" No." + EOS)], tokenizer)
    for side in ("chosen_ids", "rejected_ids"):
        assert row[side].count(tokenizer.eos_token_id) == 1 and row[side][-1] == tokenizer.eos_token_id
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "")
    (row,) = tokens_of([pair(said("Why?", "user"), said("Yes."), said("No."))], tokenizer)
    assert tokenizer.eos_token_id not in row["chosen_ids"] + row["rejected_ids"]


def test_tokens_that_merge_across_the_boundary_belong_to_the_response() -> None:
    tokenizer = tiny_tokenizer(384)
    rows = [pair("The answer i", "s 42.", "n 42.")]
    (row,) = tokens_of(rows, tokenizer)
    alone = tokenizer("The answer i").input_ids
    assert len(row["prompt_ids"]) < len(alone), "nothing merged: choose another text"
    assert row["prompt_ids"] == alone[: len(row["prompt_ids"])]
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "The answer is 42." + EOS
    assert tokenizer.decode(row["prompt_ids"] + row["rejected_ids"]) == "The answer in 42." + EOS
    assert [row] == trl_tokens(rows, tokenizer)


def test_tokens_of_a_stream_equal_those_of_a_dataset() -> None:
    tokenizer, rows = tiny_tokenizer(), tiny_pairs(8)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    found = tokenize_pairs(stream, tokenizer, max_length=None)
    assert [{name: row[name] for name in COLUMNS} for row in found] == tokens_of(rows, tokenizer)


def test_tokenizing_keeps_long_rows_whole() -> None:
    tokenizer, rows = tiny_tokenizer(), tiny_pairs(8)
    longest = max(len(row["prompt_ids"]) for row in tokens_of(rows, tokenizer))
    assert tokens_of(rows, tokenizer, max_length=longest + 1) == tokens_of(rows, tokenizer)


# ------------------------------------------------------------------------------------------------ truncation


def fed(batch: PairBatch) -> list[tuple[list[int], list[int]]]:
    """Ids of each chosen, then of each rejected sequence, and which of them are scored (from the second on)."""
    prompts = [part.tolist() for part in batch.prompt_ids.split(list(batch.prompt_lengths))]
    tokens = [part.tolist() for part in batch.response_ids.split(list(batch.response_lengths))]
    parts = [(prompts[batch.response_group[i]], tokens[i]) for i in (*batch.chosen, *batch.rejected)]
    return [(prompt + response, [0] * (len(prompt) - 1) + [1] * len(response)) for prompt, response in parts]


@pytest.mark.parametrize("max_length", [2, 9, 40, 60, 500])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_feeds_and_scores_what_trl_feeds_and_scores(mode: str, max_length: int) -> None:
    tokenizer, rows = tiny_tokenizer(), [*tiny_pairs(24), pair("W"), pair("W", " a", " " + "b" * 90)]
    options = {"max_length": max_length, "truncation_mode": mode}
    kept = tokens_of(rows, tokenizer, **options)
    assert kept == trl_tokens(rows, tokenizer, **options)
    batch = batch_of(PairCollator(max_length, mode)(kept))
    # A sequence's first token has nothing before it to be predicted from; TRL's shift drops it as well.
    assert fed(batch) == [(ids, mask[1:]) for ids, mask in trl_batch(kept, max_length, mode)]


def test_collator_counts_pairs_in_its_first_tensor() -> None:
    rows = tokens_of(tiny_pairs(5), tiny_tokenizer())
    inputs = PairCollator()(rows)
    assert next(iter(inputs.values())).shape == (5,) and batch_of(inputs).num_pairs == 5


def test_collator_stores_a_shared_prompt_once() -> None:
    rows = tokens_of(tiny_pairs(4), tiny_tokenizer())
    assert rows[3]["prompt_ids"] == rows[2]["prompt_ids"]
    assert batch_of(PairCollator()(rows)).num_groups == 3


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_collator_makes_the_same_batch_of_a_set_in_another_format(form: str) -> None:
    plain = Dataset.from_list(tokens_of(tiny_pairs(4), tiny_tokenizer())).add_column("margin", [0.5] * 4)
    given = plain.with_format(form)
    ours, theirs = (batch_of(PairCollator()([rows[i] for i in range(4)])) for rows in (plain, given))
    assert (ours.num_groups, ours.keys) == (theirs.num_groups, theirs.keys)
    assert ours.prompt_ids.tolist() == theirs.prompt_ids.tolist() and ours.margins is not None
    assert theirs.margins is not None and ours.margins.tolist() == theirs.margins.tolist()


# ------------------------------------------------------------------------------------------------------ keys


def keys_of(rows: list[Row], max_length: int | None, mode: str = "keep_start") -> tuple[bytes, ...]:
    return batch_of(PairCollator(max_length, mode)(rows)).keys


def test_keys_are_made_from_the_untruncated_ids_where_the_start_is_kept() -> None:
    rows = tokens_of([pair()], tiny_tokenizer())
    expected = tuple(content_key(rows[0]["prompt_ids"], rows[0][side]) for side in ("chosen_ids", "rejected_ids"))
    limit = len(rows[0]["prompt_ids"]) + 1
    assert keys_of(rows, None) == keys_of(rows, limit) == keys_of(rows, limit + 1) == expected


def test_keys_are_made_from_what_is_fed_where_the_end_is_kept() -> None:
    rows = tokens_of([pair(chosen=" A long reason, and more.", rejected=" A long reason, and less.")], tiny_tokenizer())
    assert keys_of(rows, None, "keep_end") == keys_of(rows, None)
    assert not set(keys_of(rows, 12, "keep_end")) & set(keys_of(rows, None))
    batch = batch_of(PairCollator(12, "keep_end")(rows))
    whole = batch_of(PairCollator()(rows))
    assert batch.response_lengths != whole.response_lengths and len(set(batch.keys)) == batch.num_responses


def test_keys_tell_responses_apart_that_truncation_makes_alike() -> None:
    rows = tokens_of([pair(chosen=" Because it rains.", rejected=" Because it snows.")], tiny_tokenizer())
    batch = batch_of(PairCollator(len(rows[0]["prompt_ids"]) + 2)(rows))
    chosen, rejected = batch.response_ids.split(list(batch.response_lengths))
    assert chosen.tolist() == rejected.tolist() and batch.keys[0] != batch.keys[1]


# ---------------------------------------------------------------------------------------------- dropped rows


def test_rows_whose_prompt_fills_max_length_are_dropped_and_counted_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = tiny_tokenizer()
    rows = [pair(), pair("Why " * 40), pair("W"), pair("Why " * 50)]
    with caplog.at_level(logging.WARNING, "tether"):
        kept = tokens_of(rows, tokenizer, max_length=20, name="eval")
    assert kept == tokens_of([rows[0], rows[2]], tokenizer)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("tether")]
    assert line.splitlines() == [
        "2 of 4 rows of the eval set were dropped:",
        "  2: has a prompt that fills `max_length=20` and leaves no room for a response (rows 1, 3)",
    ]


def test_bad_rows_are_dropped_with_a_summary_of_reasons(caplog: pytest.LogCaptureFixture) -> None:
    rows = [pair(rejected=""), pair(), pair("Why " * 40), pair("W"), *[pair(chosen="")] * 6, pair(rejected="")]
    with caplog.at_level(logging.WARNING, "tether"):
        kept = tokens_of(rows, tiny_tokenizer(), max_length=20, bad_rows="drop")
    assert kept == tokens_of([rows[1], rows[3]], tiny_tokenizer())
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("tether")]
    assert line.splitlines() == [
        "9 of 11 rows of the train set were dropped:",
        "  2: has an empty `rejected` response: it has no token to score (rows 0, 10)",
        "  6: has an empty `chosen` response: it has no token to score (rows 4, 5, 6, 7, 8, ...)",
        "  1: has a prompt that fills `max_length=20` and leaves no room for a response (row 2)",
    ]


def test_all_bad_rows_are_listed_in_one_error() -> None:
    rows = [pair(), pair(rejected=""), pair("W"), pair(chosen=""), pair(rejected="")]
    with pytest.raises(DataError) as caught:
        tokens_of(rows, tiny_tokenizer())
    assert caught.value.problem == (
        "Row 1 of the train set has an empty `rejected` response: it has no token to score. "
        "In all, 3 of 5 rows cannot be used."
    )
    assert caught.value.details.splitlines() == [
        "The reasons, with the number of rows for each:",
        "    2: has an empty `rejected` response: it has no token to score (rows 1, 4)",
        "    1: has an empty `chosen` response: it has no token to score (row 3)",
    ]
    assert 'bad_rows="drop"' in caught.value.instead


@pytest.mark.parametrize("num_proc", [None, 2])
def test_bad_rows_at_the_start_do_not_decide_the_type_of_the_others(num_proc: int | None) -> None:
    rows = [*[pair(chosen="")] * 3, pair()]
    kept = tokens_of(rows, tiny_tokenizer(), bad_rows="drop", num_proc=num_proc)
    assert kept == tokens_of([pair()], tiny_tokenizer())


def test_cut_responses_are_counted_in_one_line_with_side_amount_and_rows(caplog: pytest.LogCaptureFixture) -> None:
    ids = [{"prompt_ids": [5] * 6, "chosen_ids": [6] * num, "rejected_ids": [7] * 4} for num in (4, 5, 9, 4)]
    ids.insert(1, {"prompt_ids": [5] * 10, "chosen_ids": [6], "rejected_ids": [7]})  # dropped, but numbers stay
    with caplog.at_level(logging.WARNING, "tether"):
        tokenize_pairs(Dataset.from_list(ids), tiny_tokenizer(), max_length=10)
    *_, line = [record.getMessage() for record in caplog.records if record.name.startswith("tether")]
    assert line == (
        "2 of 4 pairs of the train set lose the end of a response to `max_length=10`, 2 of the chosen and 0 of the "
        "rejected: 3 tokens on average, 5 at most (rows 2, 3). `max_length=15` would keep all."
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tether"):
        tokenize_pairs(Dataset.from_list(ids), tiny_tokenizer(), max_length=10, max_positions=12)
    assert "The longest has 15 tokens, and the model positions for 12." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tether"):
        list(tokenize_pairs(IterableDataset.from_generator(lambda: iter(ids[2:])), tiny_tokenizer(), max_length=10))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("tether")] == [
        "Row 0 of the train set loses the end of a response to `max_length=10` (1 of its tokens), and rows after "
        "it may too."
    ]


def test_rows_are_dropped_silently_only_where_there_are_none_to_drop(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tether"):
        assert len(tokens_of([pair()], tiny_tokenizer(), max_length=20)) == 1
        assert not [record for record in caplog.records if record.name.startswith("tether")]
        assert len(tokens_of([pair("Why " * 40)], tiny_tokenizer(), max_length=20, truncation_mode="keep_end")) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("tether")]
    assert line.startswith("1 of 1 pairs of the train set lose the start of the prompt to `max_length=20`")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], r"has no usable row: it is empty\."),
        ([pair("Why " * 40)] * 3, r"has no usable row: all rows were dropped\.\n.*\n\s+3: has a prompt that fills"),
    ],
    ids=["empty set", "all dropped"],
)
def test_a_set_in_which_no_row_remains_is_an_error(rows: list[Row], found: str) -> None:
    dataset = Dataset.from_list(rows) if rows else Dataset.from_dict({name: [] for name in pair()})
    with pytest.raises(DataError, match="The train set " + found):
        tokenize_pairs(dataset, tiny_tokenizer(), max_length=20)


def test_a_stream_names_each_row_that_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [pair(), pair("Why " * 40), pair(rejected=""), pair("W")]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with caplog.at_level(logging.WARNING, "tether"):
        found = list(tokenize_pairs(stream, tiny_tokenizer(), max_length=20, bad_rows="drop"))
    assert [{name: row[name] for name in COLUMNS} for row in found] == tokens_of([rows[0], rows[3]], tiny_tokenizer())
    assert [record.getMessage() for record in caplog.records if record.name.startswith("tether")] == [
        "Row 1 of the train set was dropped because it has a prompt that fills `max_length=20` and leaves no room for "
        "a response.",
        "Row 2 of the train set was dropped because it has an empty `rejected` response: it has no token to score.",
    ]


def test_a_stream_sums_up_when_it_has_left_out_many(caplog: pytest.LogCaptureFixture) -> None:
    stream = IterableDataset.from_generator(lambda: iter([pair("Why " * 40)] * 150))
    with caplog.at_level(logging.WARNING, "tether"):
        assert list(tokenize_pairs(stream, tiny_tokenizer(), max_length=20)) == []
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("tether")]
    assert len(messages) == 11
    assert messages[-1].startswith("100 rows of the train set were dropped so far:\n  100: has a prompt")


# -------------------------------------------------------------------------------------------------- bad rows

BAD_ROWS = {
    "no chosen": (pair(chosen=None), "has no `chosen`"),
    "no rejected": (pair(rejected=None), "has no `rejected`"),
    "empty chosen": (pair(chosen=""), "has an empty `chosen` response"),
    "empty rejected": (pair(rejected=""), "has an empty `rejected` response"),
    "no message": (pair(said("Hi", "user"), [], said("No.")), "has an empty `chosen` response"),
    "empty message": (pair(said("Hi", "user"), said("Yes."), said("")), "has an empty `rejected` response"),
    "mixed types": (pair("a", said("Yes."), said("No.")), "`prompt` is text, `chosen` is messages"),
    "mixed responses": ({"chosen": "Yes.", "rejected": said("No.")}, "`chosen` is text, `rejected` is messages"),
    "a number": (pair(chosen=1, rejected=2), "`chosen` is `int`"),
    "no roles": (pair(["a"], ["b"], ["c"]), "`prompt` is `list`"),
    "empty prompt without BOS": (pair(""), "has no tokens in `prompt`"),
    "nothing in common": (
        {"chosen": "Yes", "rejected": "No"},
        "has no `prompt`, and its responses have",
    ),
}


def test_a_prompt_that_merges_with_a_response_is_told_apart_from_an_empty_one() -> None:
    with pytest.raises(DataError, match="Row 3 has a prompt that merges with a response into one token: ") as caught:
        split_responses([1], [2], [3], "Row 3")
    assert "with a space" in caught.value.instead
    with pytest.raises(DataError, match="has no tokens in `prompt`"):
        split_responses([], [2], [3], "Row 3")


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_by_set_and_index_with_cause_and_remedy(row: str) -> None:
    bad, found = BAD_ROWS[row]
    with pytest.raises(DataError) as caught:
        tokens_of([bad], tiny_tokenizer(), name="eval")
    assert caught.value.problem.startswith("Row 0 of the eval set ") and found in caught.value.problem
    assert caught.value.instead


def test_a_bad_row_of_a_dataset_has_its_own_index() -> None:
    with pytest.raises(DataError, match="Row 2 of the train set has an empty `rejected`"):
        tokens_of([pair(), pair("W"), pair(rejected="")], tiny_tokenizer())
    with pytest.raises(DataError, match="Row 1 of the train set has no `chosen`"):
        tokens_of([pair(), {"prompt": "a", "chosen": None, "rejected": "b"}], tiny_tokenizer())


def test_a_bad_row_of_a_stream_is_named_when_it_is_read() -> None:
    rows = [pair(), pair("W"), {"prompt": "a", "rejected": "b"}]
    stream = tokenize_pairs(IterableDataset.from_generator(lambda: iter(rows)), tiny_tokenizer(), max_length=None)
    reader = iter(stream)
    assert next(reader)["prompt_ids"] and next(reader)["prompt_ids"]
    with pytest.raises(DataError, match="Row 2 of the train set has no `chosen`"):
        next(reader)


def test_messages_without_a_chat_template_are_an_error() -> None:
    with pytest.raises(DataError, match=r"Row 0 of the train set is made of messages.*no chat template"):
        tokens_of(tiny_pairs(2, conversational=True), tiny_tokenizer(chat=False))


def test_an_empty_prompt_is_fine_with_a_bos_token() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    (row,) = tokens_of([pair("")], tokenizer)
    assert row["prompt_ids"] == [tokenizer.bos_token_id]


def test_a_data_error_survives_the_way_from_a_worker_process() -> None:
    error = DataError("problem", instead="instead", details="details")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and isinstance(again, ValueError) and again.instead == "instead"
