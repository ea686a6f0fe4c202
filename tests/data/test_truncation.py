"""One rule says where a row is cut: what is planned and what is dropped is what is fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference as TRLCollator

from support.runs import as_dataset, make_trainer
from tether import DataCollatorForPreference
from tether.data.datasets import PairCollator, batch_of, truncation_of
from tether.data.truncation import Truncation
from tether.trainer.batches import RowsToScore, pair_lengths
from tether.types import PairBatch

MODES = st.sampled_from(["keep_start", "keep_end"])
LENGTHS = st.integers(1, 30)
LIMITS = st.none() | st.integers(2, 40)
LONG = 900, 300, 200  # tokens of a prompt and of two responses


def row(num_prompt: int, num_chosen: int, num_rejected: int, first: int = 5) -> dict[str, Any]:
    """A row of ids of which no two are alike (below 250)."""
    numbers = iter(range(num_prompt + num_chosen + num_rejected))
    sizes = {"prompt_ids": num_prompt, "chosen_ids": num_chosen, "rejected_ids": num_rejected}
    return {name: [first + next(numbers) % 240 for _ in range(size)] for name, size in sizes.items()}


def laid_out(batch: PairBatch) -> int:
    return len(batch.prompt_ids) + len(batch.response_ids)


@given(mode=MODES, limit=LIMITS, prompt=LENGTHS, response=LENGTHS)
def test_a_row_is_cut_as_a_list_is_sliced(mode: str, limit: int | None, prompt: int, response: int) -> None:
    tokens = [0] * prompt + [1] * response
    kept = tokens if limit is None else tokens[:limit] if mode == "keep_start" else tokens[-limit:]
    scored = sum(kept[1:])  # nothing predicts the first token
    start, begin, stop = Truncation(limit, mode).span(prompt, response)
    assert tokens[start:stop] == kept and max(0, stop - begin) == scored
    assert bool(Truncation(limit, mode).leaves_room(prompt)) == (scored > 0)


@given(mode=MODES, limit=LIMITS, lengths=st.lists(st.tuples(LENGTHS, LENGTHS, LENGTHS), min_size=1, max_size=8))
def test_what_is_planned_of_a_row_is_what_is_fed_of_it(mode: str, limit: int | None, lengths: list[Any]) -> None:
    collator = PairCollator(limit, mode)
    rows = [row(*each) for each in lengths if collator.truncation.leaves_room(each[0])]
    if rows:
        planned = pair_lengths(as_dataset(rows), truncation_of(collator)).tolist()
        assert planned == [laid_out(batch_of(collator([each]))) for each in rows]


def test_each_response_cuts_its_own_part_off_the_start_of_a_prompt() -> None:
    assert int(Truncation(1024, "keep_end").num_tokens(*LONG)) == 2 * 1024
    assert int(Truncation(1024).num_tokens(*LONG)) == 900 + 124 + 124
    assert np.array_equal(Truncation(1024, "keep_end").num_tokens(*map(np.array, LONG)), 2048)


COLLATORS: dict[str, Any] = {
    "the trainer's own": (None, {"max_length": 100, "truncation_mode": "keep_end"}),
    "this package's, padded": (DataCollatorForPreference(0, 100, "keep_end"), {"max_length": 512}),
    "of another making": (TRLCollator(0, 100, "keep_end"), {"max_length": 512}),
}


@pytest.mark.parametrize("name", COLLATORS)
def test_no_micro_batch_exceeds_its_budget_whoever_cuts_the_rows(name: str, tmp_path: Path) -> None:
    collator, options = COLLATORS[name]
    budget = 500
    rows = [row(40 + 9 * number, 10 + 7 * number % 50, 10 + 11 * number % 60, first=number) for number in range(15)]
    trainer = make_trainer(
        tmp_path,
        rows=rows,
        data_collator=collator,
        max_tokens_per_micro_batch=budget,
        per_device_train_batch_size=8,
        **options,
    )
    batches = [batch_of(inputs) for inputs in trainer.get_train_dataloader()]
    assert sum(batch.num_pairs for batch in batches) == 15
    assert max(batch.num_pairs for batch in batches) > 1
    assert all(laid_out(batch) <= budget for batch in batches if batch.num_pairs > 1)


def test_a_pass_over_a_set_counts_the_tokens_that_its_collator_leaves(tmp_path: Path) -> None:
    collator = PairCollator(100, "keep_end")
    trainer = make_trainer(tmp_path, rows=[row(90, 40, 30), row(50, 40, 30)])
    rows = RowsToScore(trainer.train_dataset, collator, trainer.args)
    assert rows.num_tokens == sum(laid_out(batch_of(collator([each]))) for each in trainer.train_dataset) == 200 + 120


def test_rows_are_dropped_where_the_collator_leaves_no_response(tmp_path: Path) -> None:
    """Not where the options would, which this collator does not follow."""
    rows = [row(30, 10, 10), row(60, 10, 10)]
    cut = make_trainer(tmp_path, rows=rows, data_collator=DataCollatorForPreference(0, 50), max_length=512)
    assert len(cut.train_dataset) == 1
    kept = make_trainer(tmp_path, rows=rows, data_collator=DataCollatorForPreference(0, None), max_length=50)
    assert len(kept.train_dataset) == 2
