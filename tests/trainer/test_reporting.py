"""What reports hear of a run: TensorBoard through transformers, under TRL's metric names and ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs import as_dataset, steps, stream, trained
from support.tiny import tiny_pairs
from tether.errors import DataError


def test_tensorboard_has_every_logged_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trained(
        tmp_path / "run",
        report_to=["tensorboard"],
        eval_dataset={"held": as_dataset(tiny_pairs(4, seed=1))},
        eval_strategy="steps",
        eval_steps=3,
    )
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    logged = steps(trainer)
    names = {name for entry in logged for name in entry} - {"step", "epoch"}
    assert {"rewards/margins", "logps/chosen", "reference/initial_gap"} <= names
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(entry["step"], entry[name]) for entry in logged if name in entry]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected], name
    evaluated = [entry for entry in trainer.state.log_history if "eval_held_loss" in entry]
    assert [event.value for event in events.Scalars("eval/held_rewards/margins")] == [
        pytest.approx(entry["eval_held_rewards/margins"], rel=1e-6) for entry in evaluated
    ]


def test_a_run_says_nothing_of_special_tokens_that_transformers_aligns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(tmp_path, max_steps=1)
    assert trainer.model.config.pad_token_id == 0 and "PAD/BOS/EOS" not in caplog.text


def test_an_error_of_a_worker_is_told_as_without_one(tmp_path: Path) -> None:
    told = []
    for number in (0, 1):
        rows = stream([*tiny_pairs(4), {"prompt": "a", "chosen": "b"}])
        with pytest.raises(DataError) as caught:
            trained(tmp_path, rows=rows, max_steps=4, dataloader_num_workers=number)
        told.append((caught.value.problem, caught.value.details, caught.value.instead, str(caught.value)))
    assert told[0] == told[1] and "Traceback" not in told[1][3]
