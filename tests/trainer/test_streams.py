"""A run over a stream is the run over the same rows as a set; stopped and resumed it is the uninterrupted one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from support.observe import bits, same_bits
from support.runs import as_dataset, make_trainer, steps, stream, trained
from support.tiny import tiny_model, tiny_pairs
from tether import DPOTrainer
from tether.errors import ResumeError

ROWS = tiny_pairs(10)  # 5 batches a pass
END = 8
RUN: dict[str, Any] = {"max_steps": END, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
STREAMS: dict[str, Callable[[], Any]] = {
    "generator": lambda: stream(ROWS),
    "Arrow": lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
    "shuffled": lambda: Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4),
    "ragged": lambda: stream(ROWS[:9]),
}
CLOCK = ("runtime", "per_second", "epoch")


def log_of(trainer: DPOTrainer) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in CLOCK)}
        for entry in steps(trainer)
    ]


def dropping_out() -> Any:
    return tiny_model("gpt2", resid_pdrop=0.2, attn_pdrop=0.2)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", STREAMS)
def test_a_resumed_stream_goes_on_with_the_rows_of_the_uninterrupted_run(
    name: str, accumulation: int, tmp_path: Path
) -> None:
    """In its first pass, at the end of one and in a later one; the random state is the same too."""
    options: dict[str, Any] = RUN | {"gradient_accumulation_steps": accumulation, "disable_dropout": False}
    whole = trained(tmp_path, dropping_out(), STREAMS[name](), **options)
    for stop in (2, 5, 7):
        resumed = make_trainer(tmp_path, dropping_out(), STREAMS[name](), **options | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert log_of(resumed) == log_of(whole), stop
        assert same_bits(bits(resumed.model), bits(whole.model)), stop


@pytest.mark.parametrize("accumulation", [1, 3, 7])
@pytest.mark.parametrize("num_rows", [10, 9])
def test_a_stream_is_trained_on_as_the_same_rows_in_a_set_are(num_rows: int, accumulation: int, tmp_path: Path) -> None:
    """A step that a pass leaves with less batches is a mean over what it has, and the next pass begins anew."""
    options: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "loss_type": "bco_pair"}
    options |= {"gradient_accumulation_steps": accumulation, "optim": "sgd"}
    as_set = trained(tmp_path / "1", rows=ROWS[:num_rows], train_sampling_strategy="sequential", **options)
    streamed = trained(tmp_path / "2", rows=stream(ROWS[:num_rows]), **options)
    assert log_of(streamed) == log_of(as_set)
    assert same_bits(bits(streamed.model), bits(as_set.model))


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path: Path) -> None:
    """The shorter one ends within its first pass, of which it knew no end."""
    options = RUN | {"lr_scheduler_type": "constant"}
    trained(tmp_path, rows=stream(ROWS), **options | {"max_steps": 3})
    longer = make_trainer(tmp_path, rows=stream(ROWS), **options)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    whole = trained(tmp_path / "whole", rows=stream(ROWS), **options)
    assert log_of(longer) == log_of(whole) and same_bits(bits(longer.model), bits(whole.model))


def test_a_checkpoint_that_does_not_say_where_its_stream_was_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, rows=ROWS, **RUN)
    with pytest.raises(ResumeError, match="does not say how far its run had read one"):
        trainer = make_trainer(tmp_path, rows=stream(ROWS), **RUN, resume_changes=["data"])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# ------------------------------------------------------------------------------------------------- finished runs

FINISHED: dict[str, dict[str, Any]] = {
    "steps, within an epoch": {"max_steps": 3},
    "steps, at the end of an epoch": {"max_steps": 5},
    "part of an epoch": {"max_steps": -1, "num_train_epochs": 0.5},
    "an epoch and a half": {"max_steps": -1, "num_train_epochs": 1.5},
    "a stream, within a pass": {"max_steps": 3, "rows": stream(ROWS)},
    "a stream, at the end of a pass": {"max_steps": 5, "rows": stream(ROWS)},
    "saved by epoch": {"max_steps": 3, "save_strategy": "epoch", "eval_strategy": "epoch"},
}


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_that_is_resumed_trains_nothing(name: str, tmp_path: Path) -> None:
    options = RUN | {"rows": ROWS, "eval_dataset": as_dataset(ROWS[:2])} | FINISHED[name]
    whole = trained(tmp_path, **options)
    end = whole.state.global_step
    for _ in range(2):  # as a script that is restarted does
        resumed = make_trainer(tmp_path, **options)
        output = resumed.train(resume_from_checkpoint=True)
        assert output.global_step == resumed.state.global_step == end
        assert same_bits(bits(resumed.model), bits(whole.model))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} >= {f"checkpoint-{end}"}
    assert not (tmp_path / f"checkpoint-{end + 1}").exists()


def test_a_run_that_is_resumed_beyond_its_new_end_trains_nothing(tmp_path: Path) -> None:
    whole = trained(tmp_path, rows=ROWS, **RUN | {"max_steps": 4})
    shutil.rmtree(tmp_path / "checkpoint-1")
    shorter = make_trainer(tmp_path, rows=ROWS, **RUN | {"max_steps": 2})
    shorter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert shorter.state.global_step == 4 and same_bits(bits(shorter.model), bits(whole.model))
    assert not torch.equal(next(shorter.model.parameters()), next(tiny_model().parameters()))
