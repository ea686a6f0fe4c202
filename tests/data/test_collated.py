"""Padded batches of a collator of the user's own become the same pairs, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.runs import as_dataset, curve, make_trainer, trained
from support.tiny import tiny_pairs
from tether.data.collators import DataCollatorForPreference, PairsOfPadded
from tether.data.datasets import PairCollator, batch_of
from tether.errors import ConfigurationError, DataError

pytestmark = pytest.mark.numerics

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]},
    {"prompt_ids": [5], "chosen_ids": [11], "rejected_ids": [12, 13, 14]},
]


def padded(rows: list[dict[str, Any]], left: bool = False, last: int | None = None) -> dict[str, torch.Tensor]:
    """A collator as a user would write one: plain loops, padding on either side, the last tokens alone if asked."""
    sequences = [
        (row["prompt_ids"] + row[side], [0] * len(row["prompt_ids"]) + [1] * len(row[side]))
        for side in ("chosen_ids", "rejected_ids")
        for row in rows
    ]
    sequences = [(ids[-last:], mask[-last:]) if last else (ids, mask) for ids, mask in sequences]
    width = max(len(ids) for ids, _ in sequences)

    def fill(values: list[int]) -> list[int]:
        padding = [0] * (width - len(values))
        return padding + values if left else values + padding

    return {
        "input_ids": torch.tensor([fill(ids) for ids, _ in sequences]),
        "attention_mask": torch.tensor([fill([1] * len(ids)) for ids, _ in sequences]),
        "completion_mask": torch.tensor([fill(mask) for _, mask in sequences]),
    }


@pytest.mark.parametrize("left", [False, True])
def test_padded_rows_are_the_pairs_that_our_own_collator_makes(left: bool) -> None:
    ours, theirs = batch_of(PairCollator()(ROWS)), batch_of(PairsOfPadded(lambda rows: padded(rows, left))(ROWS))
    for name, value in vars(ours).items():
        other = getattr(theirs, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_rows_cut_from_the_left_are_those_of_keep_end() -> None:
    ours = batch_of(PairCollator(max_length=2, truncation_mode="keep_end")(ROWS))
    theirs = batch_of(PairsOfPadded(lambda rows: padded(rows, last=2))(ROWS))
    assert ours.prompt_ids.tolist() == theirs.prompt_ids.tolist() and ours.keys == theirs.keys
    assert ours.response_ids.tolist() == theirs.response_ids.tolist()


def test_a_run_with_a_collator_is_the_run_without(tmp_path: Path) -> None:
    evaluation = {"eval_dataset": as_dataset(tiny_pairs(5, seed=1))}
    plain = trained(tmp_path / "1", **evaluation)
    theirs = trained(tmp_path / "2", data_collator=padded, precompute_ref_log_probs=True, **evaluation)
    assert curve(theirs) == pytest.approx(curve(plain), abs=1e-5)
    assert theirs.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


def test_sums_of_the_reference_that_rows_bring_are_kept() -> None:
    sums = {"ref_chosen_logps": [-3.0, -4.0], "ref_rejected_logps": [-5.0, -6.0]}
    rows = [row | {name: values[number] for name, values in sums.items()} for number, row in enumerate(ROWS)]
    collator = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=8)
    ours, theirs = batch_of(PairCollator()(rows)), batch_of(PairsOfPadded(collator)(rows))
    assert theirs.reference_sums == ours.reference_sums != () and theirs.keys == ours.keys
    with pytest.raises(ConfigurationError, match="ref_chosen_logps"):  # no row has them: the reference is another one
        PairsOfPadded(lambda given: collator(rows))(ROWS)


def test_keys_that_nothing_would_read_are_refused_by_name(tmp_path: Path) -> None:
    def with_images(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return padded(rows) | {"pixel_values": torch.zeros(2, 3)}

    with pytest.raises(ConfigurationError, match="pixel_values"):
        make_trainer(tmp_path, data_collator=with_images).train()


def test_a_row_without_a_response_is_refused() -> None:
    def cut(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: values[:, :3] for name, values in padded(rows).items()}

    with pytest.raises(DataError, match="data_collator"):
        PairsOfPadded(cut)(ROWS)
