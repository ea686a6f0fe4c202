"""One process trains in a folder at a time, and what is resumed there is the run that was started last."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerCallback

from support.runs import make_trainer, trained
from tether import last_checkpoint
from tether.errors import ConfigurationError, TetherError
from tether.trainer.manifest import write_manifest
from tether.trainer.run_folder import Owner, RunFolder, read_last_run

RUN: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process on this host."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def owned_by(folder: Path, **changes: Any) -> None:
    """A folder in which a run seems to train: this process, with some things changed."""
    with RunFolder(folder).held(None, take_over=False):
        text = (folder / "_tether_run.json").read_text()
    fields = json.loads(text)
    fields["owner"] |= changes
    (folder / "_tether_run.json").write_text(json.dumps(fields))


def keep(folder: RunFolder, step: int) -> str:
    """A checkpoint with nothing in it but its manifest."""
    (folder.staging / f"checkpoint-{step}").mkdir(parents=True)
    write_manifest(folder.staging / f"checkpoint-{step}", folder.run, step, {})
    return str(folder.publish(f"checkpoint-{step}"))


# ---- the lock --------------------------------------------------------------------------------------------------------


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    owned_by(tmp_path, pid=other.pid, born_at=psutil.Process(other.pid).create_time())
    with pytest.raises(ConfigurationError, match=f"process {other.pid} on {Owner.this().host} is training") as caught:
        trained(tmp_path, **RUN)
    assert "take_over" in caught.value.instead and "sign of life" in caught.value.details
    assert not list(tmp_path.glob("checkpoint-*"))
    trained(tmp_path, **RUN, take_over=True)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_dead_process_does_not_hold_its_folder(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    owned_by(tmp_path, pid=other.pid, born_at=psutil.Process(other.pid).create_time())
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # its parent has not asked for its end
    with RunFolder(tmp_path).held(None, take_over=False):
        pass
    other.wait()
    owned_by(tmp_path, pid=other.pid)
    with RunFolder(tmp_path).held(None, take_over=False):
        pass


def test_a_process_that_got_the_number_of_a_dead_one_does_not_hold_its_folder(
    tmp_path: Path, other: subprocess.Popen[bytes]
) -> None:
    owned_by(tmp_path, pid=other.pid, born_at=psutil.Process(other.pid).create_time() - 60)
    with RunFolder(tmp_path).held(None, take_over=False):
        pass


def test_a_process_on_another_host_holds_its_folder_until_it_is_taken_over(tmp_path: Path) -> None:
    owned_by(tmp_path, host="elsewhere", pid=7)
    with (
        pytest.raises(ConfigurationError, match="process 7 on elsewhere"),
        RunFolder(tmp_path).held(None, take_over=False),
    ):
        pass
    with RunFolder(tmp_path).held(None, take_over=True):
        pass


class Failing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_folder_is_free_after_training_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, **RUN, callbacks=[Failing()])
    for _ in range(2):
        last = read_last_run(tmp_path)
        assert last is not None and last.owner is None
        trained(tmp_path, **RUN)


def test_a_run_whose_folder_was_taken_over_keeps_nothing_more(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.held(None, take_over=False), second.held(None, take_over=True):
        own = keep(second, 1)
        with pytest.raises(TetherError, match="taken this folder over"):
            keep(first, 1)
        with pytest.raises(TetherError, match="taken this folder over"), first.saving("checkpoint-2"):
            raise FileNotFoundError("optimizer.pt")  # it was written where the second run has cleared away
        with pytest.raises(FileNotFoundError), second.saving("checkpoint-2"):
            raise FileNotFoundError("optimizer.pt")
        assert last_checkpoint(tmp_path) == own
    last = read_last_run(tmp_path)
    assert last is not None and last.run == second.run


# ---- the last checkpoint ---------------------------------------------------------------------------------------------


def test_the_last_checkpoint_is_one_of_the_run_that_was_started_last(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    assert last_checkpoint(tmp_path) is None
    with first.held(None, take_over=False):
        at_2, at_4 = keep(first, 2), keep(first, 4)
        assert last_checkpoint(tmp_path) == at_4
    with second.held(None, take_over=False):
        assert last_checkpoint(tmp_path) is None, "a new run has none yet"
    with second.held(Path(at_2), take_over=False):
        assert last_checkpoint(tmp_path) == at_2, "it goes on from there"
        at_3 = keep(second, 3)
        assert last_checkpoint(tmp_path) == at_3
    (tmp_path / "_tether_run.json").unlink()
    assert last_checkpoint(tmp_path) == at_3, "the one that was written last"


def test_a_checkpoint_that_lacks_a_file_or_a_manifest_is_passed_over(tmp_path: Path) -> None:
    trained(tmp_path, **RUN)
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_true_resumes_the_last_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, **RUN)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    resumed = make_trainer(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2]


def test_a_run_knows_whether_its_model_is_saved(tmp_path: Path) -> None:
    def step() -> int | None:
        last = read_last_run(tmp_path)
        return None if last is None else last.saved_step

    trainer = trained(tmp_path, **RUN)
    assert step() is None
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert step() is None
    trainer.save_model()
    assert step() == 2
    copy = shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-2"))
    make_trainer(copy, **RUN).train(resume_from_checkpoint=True)
    last = read_last_run(copy)
    assert last is not None and last.saved_step is None, "step 2 was taken again, and is not saved"
    make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)
    assert step() == 2, "nothing was trained"
    make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert step() is None
