"""`ref_chosen_logps` and `ref_rejected_logps`: written as TRL reads them, and read where rows bring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer as TRLTrainer

from support.runs import as_dataset, curve, make_trainer, steps, stream, trained
from support.tiny import ADAM_EPSILON, naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer
from tether import BEMACallback
from tether.data.datasets import REFERENCE_CHECKSUM, REFERENCE_COLUMNS
from tether.errors import ConfigurationError, DataError, InitialGapError, MissingLogProbsError
from tether.trainer.reference_columns import with_reference_columns

pytestmark = pytest.mark.numerics

ROWS = tiny_pairs(12)
MAX_LENGTH = 60  # cuts some responses


def exported(tmp_path: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Dataset:
    options = {"max_length": MAX_LENGTH, "precompute_ref_log_probs": True} | options
    trainer = make_trainer(tmp_path / "export", rows=rows, **options)
    return with_reference_columns(trainer.train_dataset, trainer.reference, trainer.data_collator)


def unproven(rows: Dataset) -> Dataset:
    """Rows as another program writes them."""
    return rows.remove_columns([REFERENCE_CHECKSUM])


def test_columns_are_the_sums_over_what_is_fed(tmp_path: Path) -> None:
    for row in exported(tmp_path):
        for ids, column in zip(("chosen_ids", "rejected_ids"), REFERENCE_COLUMNS, strict=True):
            tokens = row[ids][: MAX_LENGTH - len(row["prompt_ids"])]
            expected = naive_log_probs(tiny_model(), row["prompt_ids"], tokens).sum().item()
            assert row[column] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return str(path)


def trl_trainer(folder: str, rows: Dataset, output_dir: Path, **options: Any) -> TRLTrainer:
    args = TRLConfig(
        str(output_dir),
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        adam_epsilon=ADAM_EPSILON,
        max_steps=3,
        logging_steps=1,
        **options,
    )
    return TRLTrainer(folder, args=args, train_dataset=rows, processing_class=tiny_tokenizer())


def trl_losses(trainer: TRLTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history[:-1]]


def test_trl_reads_the_columns_and_gets_the_loss_that_its_own_reference_gives(folder: str, tmp_path: Path) -> None:
    rows = exported(tmp_path)
    own = trl_losses(trl_trainer(folder, rows.remove_columns(list(REFERENCE_COLUMNS)), tmp_path / "own"))
    reader = trl_trainer(folder, rows, tmp_path / "columns")
    reader.precompute_ref_logps = True  # TRL's switch for reading the columns of a batch
    reader.ref_model = None
    assert trl_losses(reader) == pytest.approx(own, abs=1e-5)


def test_rows_that_trl_scored_train_here_as_they_train_there(folder: str, tmp_path: Path) -> None:
    there = trl_trainer(folder, as_dataset(ROWS), tmp_path / "trl", precompute_ref_log_probs=True)
    rows = there.train_dataset
    assert set(REFERENCE_COLUMNS) <= set(rows.column_names)
    here = trained(tmp_path / "here", rows=rows, max_length=MAX_LENGTH)
    assert curve(here) == pytest.approx(trl_losses(there), abs=1e-4)
    assert here.reference.num_passes == 0 and here.reference.identity.kind == "given"


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_rows_that_bring_sums_train_without_any_reference_pass(loss_type: str, tmp_path: Path) -> None:
    rows = exported(tmp_path)
    options: dict[str, Any] = {"loss_type": loss_type, "max_length": MAX_LENGTH}
    given = trained(tmp_path / "1", rows=rows, **options)
    computed = trained(tmp_path / "2", rows=ROWS, **options)
    assert (given.reference.num_passes, given.reference.extra_bytes, given.ref_model) == (0, 0, None)
    # Sums of hundreds of nats are rounded by 3e-5 each; under `OtherRounding(10)` the curves part by 2e-5.
    assert curve(given) == pytest.approx(curve(computed), rel=1e-4, abs=1e-4)
    assert steps(given)[0]["reference/initial_gap"] < 1e-5
    assert curve(trained(tmp_path / "3", rows=stream(list(rows)), **options)) == pytest.approx(
        curve(trained(tmp_path / "4", rows=rows, train_sampling_strategy="sequential", **options)), abs=1e-6
    )


def test_a_gap_of_given_sums_is_refused_unless_they_are_another_model_s(tmp_path: Path) -> None:
    rows = [row | {"ref_chosen_logps": row["ref_chosen_logps"] - 5.0} for row in unproven(exported(tmp_path))]
    with pytest.raises(InitialGapError, match="given reference") as caught:
        trained(tmp_path / "1", rows=rows, max_length=MAX_LENGTH)
    assert "`ref_columns='other'`" in caught.value.instead
    trainer = trained(tmp_path / "2", rows=rows, max_length=MAX_LENGTH, ref_columns="other")
    assert steps(trainer)[0]["reference/initial_gap"] > 0.05


def test_whose_the_columns_are_is_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ref_columns"):
        make_trainer(tmp_path, ref_columns="other")


def test_one_response_may_have_another_sum_in_another_row(tmp_path: Path) -> None:
    row = unproven(exported(tmp_path))[0]
    other = row | {"ref_chosen_logps": row["ref_chosen_logps"] - 1.0}
    trainer = make_trainer(tmp_path / "1", rows=[row, other], max_length=MAX_LENGTH)
    batch = trainer.data_collator([row, other])["batch"]
    chosen, _ = batch.of_responses(trainer.reference.log_probs(batch).sums())
    assert (chosen[0] - chosen[1]).item() == pytest.approx(1.0, abs=1e-4)


def test_evaluation_reads_the_columns_and_refuses_a_set_without_them(tmp_path: Path) -> None:
    rows = exported(tmp_path)
    trainer = trained(tmp_path / "1", rows=rows, eval_dataset=rows.select(range(4)), max_length=MAX_LENGTH)
    kept = trained(tmp_path / "2", rows=ROWS, eval_dataset=as_dataset(ROWS[:4]), max_length=MAX_LENGTH)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(kept.evaluate()["eval_loss"], abs=1e-5)
    with pytest.raises(MissingLogProbsError, match="ref_chosen_logps"):
        trainer.evaluate(as_dataset(ROWS[:4]))
    with pytest.raises(DataError, match="The eval set has no reference columns"):
        make_trainer(tmp_path / "3", rows=rows, eval_dataset=as_dataset(ROWS[:4]))


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "ref_model": {"ref_model": tiny_model()},
        "precompute_ref_log_probs": {"precompute_ref_log_probs": True},
        "sync_ref_model": {"sync_ref_model": True},
        "reference_free": {"reference_free": True},
        "ref_dtype": {"ref_dtype": "bfloat16"},
        "update_ref_model": {"callbacks": [BEMACallback(update_ref_model=True)]},
    }.items(),
)
def test_a_second_reference_is_refused_by_name(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=name):
        make_trainer(tmp_path / "1", rows=exported(tmp_path), **options)


def test_an_option_that_needs_every_token_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ld_alpha=0\.5"):
        make_trainer(tmp_path / "1", rows=exported(tmp_path), ld_alpha=0.5)


@pytest.mark.parametrize("damaged", ["prompt", "checksum"])
def test_text_with_a_flipped_bit_is_refused(damaged: str, tmp_path: Path) -> None:
    """As a Parquet file without checksums of its own brings it."""
    table = exported(tmp_path).data.table
    name, column = (REFERENCE_CHECKSUM,) * 2 if damaged == "checksum" else ("chosen", "chosen")
    texts = [text.encode() for text in table[column].to_pylist()]
    texts[2] = b"\xff" + texts[2][1:]
    broken = pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())
    table = table.set_column(table.column_names.index(name), name, broken)
    if damaged == "prompt":  # what is tokenized already is not read again
        table = table.drop_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    with pytest.raises(DataError, match=r"train set.*UTF-8"):
        make_trainer(tmp_path / "1", rows=Dataset(table), max_length=MAX_LENGTH)


@pytest.mark.parametrize("column", REFERENCE_COLUMNS)
@pytest.mark.parametrize("streams", [False, True])
def test_a_sum_that_was_changed_is_refused_by_its_checksum(column: str, streams: bool, tmp_path: Path) -> None:
    rows = list(exported(tmp_path))
    rows[3][column] -= 0.001
    with pytest.raises(DataError, match="has reference log-probs that do not belong to it") as caught:
        trained(tmp_path / "1", rows=stream(rows) if streams else rows, max_length=MAX_LENGTH, ref_columns="other")
    assert streams or caught.value.problem.startswith("Row 3 of the train set")


def test_sums_of_another_max_length_are_refused_with_a_checksum_and_without(tmp_path: Path) -> None:
    rows = exported(tmp_path)
    with pytest.raises(DataError, match="another `max_length`"):
        make_trainer(tmp_path / "1", rows=rows, max_length=MAX_LENGTH - 8)
    with pytest.raises(InitialGapError, match=r"row .* of the train set"):
        trained(tmp_path / "2", rows=unproven(rows), max_length=MAX_LENGTH - 8)


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), 5.0])
def test_a_sum_that_is_no_number_is_refused_with_its_row(value: Any, tmp_path: Path) -> None:
    rows = list(exported(tmp_path))
    rows[3]["ref_rejected_logps"] = value
    with pytest.raises(DataError, match="Row 3 of the train set has `ref_rejected_logps"):
        make_trainer(tmp_path / "1", rows=rows)


def test_text_in_the_columns_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [row | {name: str(row[name]) for name in REFERENCE_COLUMNS} for row in exported(tmp_path)]
    with pytest.raises(DataError, match="Row 0 of the train set has `ref_chosen_logps='"):
        make_trainer(tmp_path / "1", rows=rows)


@pytest.mark.parametrize("value", [None, float("nan"), "-12.5", "absent"])
def test_a_bad_sum_of_a_stream_is_named_when_it_is_read(value: Any, tmp_path: Path) -> None:
    rows = list(exported(tmp_path))
    rows[5]["ref_chosen_logps"] = value
    if value == "absent":
        del rows[5]["ref_chosen_logps"]
    with pytest.raises(DataError, match="Row 5 of the train set has `ref_chosen_logps="):
        trained(tmp_path / "1", rows=stream(rows), max_length=MAX_LENGTH)
    dropped = make_trainer(tmp_path / "2", rows=stream(rows), max_length=MAX_LENGTH, bad_rows="drop")
    assert len(list(dropped.train_dataset)) == len(rows) - 1


def test_the_columns_may_be_tensors(tmp_path: Path) -> None:
    rows = exported(tmp_path)
    plain, tensors = (
        trained(tmp_path / form, rows=rows.with_format(form), max_length=MAX_LENGTH) for form in ("python", "torch")
    )
    assert curve(plain) == curve(tensors)


def test_one_column_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`ref_chosen_logps`"):
        make_trainer(tmp_path / "1", rows=exported(tmp_path).remove_columns(["ref_rejected_logps"]))


def test_resuming_with_other_sums_is_refused(tmp_path: Path) -> None:
    rows, options = unproven(exported(tmp_path)), {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trained(tmp_path / "1", rows=rows, max_length=MAX_LENGTH, **options)
    changed = [row | {"ref_chosen_logps": row["ref_chosen_logps"] - 5.0} for row in rows]
    other = make_trainer(tmp_path / "1", rows=changed, max_length=MAX_LENGTH, **options | {"max_steps": 2})
    with pytest.raises(ValueError, match="another reference"):
        other.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-1"))
