"""The padded collator is TRL's, key by key; and a collator of padded batches trains as the trainer's own does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference as TRLCollator

from support.runs import curve, make_trainer, trained
from support.tiny import tiny_pairs
from tether import DataCollatorForPreference
from tether.data.collators import PairsOfPadded, pair_collator
from tether.data.datasets import PairCollator, batch_of
from tether.errors import ConfigurationError, DataError
from tether.types import PairBatch, ResponseLogProbs, scored_tokens

Row = dict[str, Any]


def drawn_rows(num: int = 12, **further: Any) -> list[Row]:
    draw = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(1, 256) for _ in range(draw.randint(least, most))]

    return [
        {"prompt_ids": ids(1, 6), "chosen_ids": ids(1, 14), "rejected_ids": ids(1, 14)} | further for _ in range(num)
    ]


CASES = [
    {},
    {"max_length": 9},
    {"max_length": 9, "truncation_mode": "keep_end"},
    {"pad_to_multiple_of": 8},
    {"max_length": 17, "pad_to_multiple_of": 8},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("further", [{}, {"ref_chosen_logps": 0.1, "ref_rejected_logps": -2.5, "other": "x"}])
def test_the_padded_batch_is_that_of_trl(options: dict[str, Any], further: Row) -> None:
    rows = drawn_rows(**further)
    ours, theirs = DataCollatorForPreference(3, **options)(rows), TRLCollator(3, **options)(rows)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_the_padded_collator_has_the_fields_of_trl() -> None:
    ours, theirs = DataCollatorForPreference(0), TRLCollator(0)
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize("options", [{"truncation_mode": "keep_middle"}, {"return_tensors": "np"}])
def test_what_the_padded_collator_cannot_do_is_refused_at_once(options: Row) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        DataCollatorForPreference(0, **options)


@pytest.mark.parametrize("order", [1, -1])
def test_a_sum_that_only_some_rows_of_a_batch_bring_is_refused(order: int) -> None:
    rows = [*drawn_rows(1), *drawn_rows(1, ref_chosen_logps=-1.5, ref_rejected_logps=-2.5)][::order]
    with pytest.raises(DataError, match=r"Row \d of a batch has `ref_chosen_logps=None`"):
        DataCollatorForPreference(3)(rows)


def fed(batch: PairBatch) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each chosen, then of each rejected sequence."""
    prompts = [part.tolist() for part in batch.prompt_ids.split(list(batch.prompt_lengths))]
    tokens = [part.tolist() for part in batch.response_ids.split(list(batch.response_lengths))]
    return [(prompts[batch.response_group[i]], tokens[i]) for i in (*batch.chosen, *batch.rejected)]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 8, 12])
def test_a_padded_batch_becomes_the_same_pairs(max_length: int | None, mode: str) -> None:
    rows = drawn_rows()
    ours = PairCollator(max_length, mode)(rows)
    theirs = PairsOfPadded(TRLCollator(0, max_length, mode))(rows)
    assert torch.equal(ours["pairs"], theirs["pairs"])
    assert fed(batch_of(theirs)) == fed(batch_of(ours))


def test_padding_on_the_left_is_taken_off_too() -> None:
    rows = drawn_rows()

    def left(examples: list[Row]) -> dict[str, torch.Tensor]:
        padded = DataCollatorForPreference(0)(examples)
        shifts = (padded["attention_mask"] == 0).sum(1).tolist()
        return {
            name: torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])
            for name, tensor in padded.items()
        }

    assert fed(batch_of(PairsOfPadded(left)(rows))) == fed(batch_of(PairCollator()(rows)))


def test_pairs_are_left_alone() -> None:
    rows = drawn_rows()
    found = PairsOfPadded(lambda given: PairCollator(9)(given[:3]))(rows)
    assert found["pairs"].tolist() == [1, 1, 1]
    assert fed(batch_of(found)) == fed(batch_of(PairCollator(9)(rows[:3])))


def test_each_collator_has_its_way_to_pairs() -> None:
    own = PairCollator(7, "keep_end")
    assert pair_collator(None, 5, "keep_end") == PairCollator(5, "keep_end")
    assert pair_collator(own, 5, "keep_start") is own
    assert pair_collator(DataCollatorForPreference(0, 9, "keep_end"), 5, "keep_start") == PairCollator(9, "keep_end")
    assert isinstance(pair_collator(TRLCollator(0), 5, "keep_start"), PairsOfPadded)
    with pytest.raises(ConfigurationError, match="`data_collator` of type str"):
        pair_collator("pad", 5, "keep_start")


WRONG = {
    "no dict": (lambda padded: [1], "`data_collator` returned for 12 rows (a list)"),
    "another layout": (lambda padded: {"chosen_input_ids": padded["input_ids"]}, "chosen_input_ids"),
    "a key that nobody reads": (lambda padded: padded | {"weights": torch.ones(1)}, "weights"),
    "too few sequences": (lambda padded: {name: tensor[1:] for name, tensor in padded.items()}, "[23, "),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_layout_is_refused(name: str) -> None:
    change, found = WRONG[name]
    collator = PairsOfPadded(lambda rows: change(DataCollatorForPreference(0)(rows)))
    with pytest.raises(ConfigurationError) as caught:
        collator(drawn_rows())
    assert found in caught.value.problem and "completion_mask" in caught.value.instead


def masked(*masks: list[int]) -> PairsOfPadded:
    """A collator whose sequences have these completion masks."""

    def collator(rows: list[Row]) -> dict[str, torch.Tensor]:
        return DataCollatorForPreference(0)(rows) | {"completion_mask": torch.tensor(masks)}

    return PairsOfPadded(collator)


ROW: Row = {"prompt_ids": [1], "chosen_ids": [2, 3, 4], "rejected_ids": [2, 3, 4]}


def test_two_masks_over_one_text_are_two_responses_with_one_record() -> None:
    """The record has every token; which of them count is looked at afterwards."""
    batch = batch_of(masked([0, 1, 0, 1], [0, 1, 1, 0])([ROW]))
    assert batch.num_responses == 2 and len(set(batch.keys)) == 1
    assert batch.response_lengths == (3, 3) and batch.counted_lengths() == (2, 2)
    again = PairBatch.of_pairs([(batch.responses()[0], batch.responses()[1])])
    assert again.scored is not None and again.scored.tolist() == [True, False, True, True, True, False]
    assert batch.only([0, 1]).num_responses == 2
    values = torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 4.0])
    found = scored_tokens(batch, ResponseLogProbs(values, torch.tensor([0, 3, 6])))
    assert found.sums().tolist() == [5.0, 3.0] and found.lengths().tolist() == [2, 2]
    assert batch_of(masked([1, 0, 1, 1], [0, 1, 1, 1])([ROW])).prompt_lengths == (2, 1)


def test_a_mask_without_a_response_is_refused() -> None:
    with pytest.raises(DataError, match="completion mask of sequence 1 of a batch"):
        masked([0, 1, 1, 1], [1, 0, 0, 0])([ROW])


# ------------------------------------------------------------------------------------------------ the trainer


@pytest.mark.numerics
def test_a_trainer_with_a_padded_collator_trains_as_without(tmp_path: Path) -> None:
    """And truncates as the collator does, not as the options say."""
    rows = [row for row in tiny_pairs(40) if len(row["prompt"]) < 30]
    options = {"rows": rows, "optim": "sgd"}  # Adam would make much of rounding
    plain = trained(tmp_path / "a", max_length=30, **options)
    padded = trained(tmp_path / "b", data_collator=TRLCollator(0, max_length=30), **options)
    given = trained(tmp_path / "c", data_collator=DataCollatorForPreference(0, max_length=30), **options)
    assert curve(given) == curve(plain)
    assert curve(padded) == pytest.approx(curve(plain), abs=1e-5)  # responses cut alike are stored once
    whole = trained(tmp_path / "d", **options)
    assert abs(curve(whole)[1] - curve(plain)[1]) > 1e-4, "nothing was truncated: choose a shorter limit"


@pytest.mark.parametrize("collator", [TRLCollator, DataCollatorForPreference])
def test_a_collator_that_leaves_no_response_is_an_error_that_says_what_to_set(tmp_path: Path, collator: Any) -> None:
    with pytest.raises(DataError) as caught:
        trained(tmp_path, data_collator=collator(0, max_length=3))
    assert "`max_length`" in caught.value.instead


@pytest.mark.parametrize("removed", [True, False])
def test_a_collator_sees_the_columns_that_remove_unused_columns_leaves(tmp_path: Path, removed: bool) -> None:
    seen: list[set[str]] = []

    def collator(rows: list[Row]) -> dict[str, torch.Tensor]:
        seen.append(set(rows[0]))
        return DataCollatorForPreference(0)(rows)

    rows = [row | {"source": "x"} for row in tiny_pairs(8)]
    trained(tmp_path, rows=rows, data_collator=collator, remove_unused_columns=removed, max_steps=1)
    tokens = {"prompt_ids", "chosen_ids", "rejected_ids"}
    assert seen[-1] == (tokens if removed else tokens | {"source", "prompt", "chosen", "rejected"})


def test_unused_columns_make_no_difference_to_the_trainers_own_collator(tmp_path: Path) -> None:
    rows = [row | {"source": number, "tags": ["a"] * number} for number, row in enumerate(tiny_pairs(12))]
    curves = [curve(trained(tmp_path / str(kept), rows=rows, remove_unused_columns=not kept)) for kept in (True, False)]
    assert curves[0] == curves[1] == curve(trained(tmp_path / "plain", rows=tiny_pairs(12)))


def test_tokenized_rows_train_as_their_text_does(tmp_path: Path) -> None:
    text = trained(tmp_path / "text", rows=tiny_pairs(12))
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [{name: text.train_dataset[index][name] for name in columns} for index in range(12)]
    assert curve(trained(tmp_path / "ids", rows=ids)) == curve(text)


def test_bad_rows_are_dropped_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [*tiny_pairs(8), {"prompt": "Why?", "chosen": " Yes.", "rejected": ""}]
    trainer = make_trainer(tmp_path, rows=rows, bad_rows="drop", eval_dataset={"held": rows[-2:]})
    assert len(trainer.train_dataset) == 8 and len(trainer.eval_dataset["held"]) == 1


@pytest.mark.numerics
@pytest.mark.parametrize("options", [{"loss_type": "ipo"}, {"ld_alpha": 0.5}, {"use_weighting": True}])
def test_masks_with_holes_train_alike_with_stored_answers(options: dict[str, Any], tmp_path: Path) -> None:
    """Two masks over every text: which one is decided by the row's place in the batch."""
    padding = DataCollatorForPreference(0)

    def holed(rows: list[Row]) -> dict[str, torch.Tensor]:
        padded = padding(rows)
        places = torch.arange(padded["completion_mask"].shape[1]) + torch.arange(2 * len(rows))[:, None]
        return padded | {"completion_mask": padded["completion_mask"] * (places % 3 > 0)}

    rows = [row for row in tiny_pairs(4) for _ in range(3)]
    given: dict[str, Any] = {"rows": rows, "data_collator": holed, "optim": "sgd", "learning_rate": 1e-3, **options}
    live = trained(tmp_path / "live", **given)
    stored = trained(tmp_path / "stored", precompute_ref_log_probs=True, **given)
    whole = trained(tmp_path / "whole", **given | {"data_collator": None})
    assert curve(stored, "rewards/margins")[1:] == pytest.approx(curve(live, "rewards/margins")[1:], rel=1e-3, abs=1e-5)
    assert curve(stored) == pytest.approx(curve(live), rel=1e-4)
    assert curve(live)[-1] != pytest.approx(curve(whole)[-1], rel=1e-4)
    with pytest.raises(ConfigurationError, match="a reference that knows sums only"):
        brought = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]
        options.pop("ld_alpha", None)
        trained(tmp_path / "sums", rows=brought, data_collator=holed, ref_columns="other", **options)
