"""What fills the last round of several processes up is the first rows again, and counts for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from support.runs import make_trainer, stream
from tether import DataCollatorForPreference
from tether.data.collators import PairsOfPadded
from tether.data.datasets import PairCollator, batch_of
from tether.data.rounds import REPEATED, FilledOrder, FilledStream, MarkedRows, filled, own_rows
from tether.losses.weighting import RewardShift
from tether.types import PairScores

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, number], "rejected_ids": [8]} for number in range(9, 12)
]
AGAIN = [row | {REPEATED: True} for row in ROWS]


@given(number=st.integers(0, 20), size=st.integers(1, 9))
def test_rounds_are_whole_and_the_first_elements_come_again_in_order(number: int, size: int) -> None:
    found = list(filled(range(number), size, lambda element: element + 100))
    assert found[:number] == list(range(number)) and len(found) % size == 0 and len(found) - number < size
    assert found[number:] == [100 + place % number for place in range(len(found) - number)]
    assert len(FilledOrder(range(number), size)) == len(list(FilledOrder(range(number), size))) == len(found)


def test_a_set_and_a_stream_are_filled_alike() -> None:
    of_set = MarkedRows(Dataset.from_list(ROWS))
    by_order = of_set.__getitems__(list(FilledOrder(range(3), 8)))
    assert by_order == list(FilledStream(stream(ROWS), 8)) == [*ROWS, *AGAIN, *AGAIN[:2]]


def padded_seen(seen: list[Any]) -> PairsOfPadded:
    def collator(rows: list[Any]) -> Any:
        seen.extend(rows)
        return DataCollatorForPreference(0)(rows)

    return PairsOfPadded(collator)


def own_pairs(seen: list[Any]) -> PairsOfPadded:
    def collator(rows: list[Any]) -> Any:
        seen.extend(rows)
        return PairCollator()(rows)

    return PairsOfPadded(collator)


@pytest.mark.parametrize("kind", [lambda seen: PairCollator(), padded_seen, own_pairs])
def test_repeated_rows_leave_a_batch_unless_it_would_be_empty(kind: Any) -> None:
    seen: list[Any] = []
    collator = kind(seen)
    plain, part, nothing = (collator(rows) for rows in (ROWS[:2], [*ROWS[:2], AGAIN[0]], AGAIN[:2]))
    for inputs, counted in ((plain, 1), (part, 1), (nothing, 0)):
        batch = batch_of(inputs)
        assert batch.num_pairs == 2 and batch.counts is bool(counted) and batch.num_counted_pairs == 2 * counted
        assert inputs["pairs"].tolist() == [counted] * 2
        assert batch.num_sequence_tokens() == counted * batch_of(plain).num_sequence_tokens()
        assert batch.response_ids.tolist() == batch_of(plain).response_ids.tolist()
    assert not any(REPEATED in row for row in seen), "a collator of the user's never sees the mark"


def test_rows_that_count_are_those_without_a_mark() -> None:
    assert own_rows([AGAIN[0], ROWS[1]]) == ([ROWS[1]], True)
    assert own_rows(AGAIN) == (ROWS, False)


def test_pairs_that_do_not_count_have_no_loss_no_gradient_and_no_figures(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows=ROWS)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(AGAIN), num_items_in_batch=torch.tensor(3))
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in trainer.model.parameters() if parameter.grad is not None)
    assert "rewards/margins" not in trainer._train_sums.means() and trainer._num_train_tokens == 0


def test_pairs_that_do_not_count_leave_the_running_mean_of_rewards_as_it_is() -> None:
    values = [torch.tensor([-2.0, -5.0]), torch.tensor([-3.0, -4.0]), torch.zeros(2), torch.zeros(2)]
    scores = PairScores(*values, chosen_lengths=torch.ones(2).long(), rejected_lengths=torch.ones(2).long())
    shift = RewardShift()
    shift.update(scores, 0.1)
    before = shift.state()
    shift.update(scores, 0.1, counts=False)
    assert shift.state() == before == pytest.approx([0.1 * -14.0, 4.0])
