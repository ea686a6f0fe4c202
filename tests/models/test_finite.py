"""A policy that becomes NaN stops the run at the step that did it, and is never written over one that is whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from support.observe import bits, same_bits
from support.runs import as_dataset, make_trainer, trained
from support.tiny import tiny_pairs
from tether import BEMACallback, LossOptions, PairScores
from tether.errors import NotFiniteError
from tether.losses import LOSSES
from tether.models.finite import LossWatch
from tether.models.finite import is_finite as all_finite

NUM_STEPS = 5
LORA: dict[str, Any] = {"peft_config": LoraConfig(r=2)}
Loss = Callable[[PairScores, LossOptions], Tensor]


def changed_at(step: int, change: Callable[[Tensor, PairScores], Tensor]) -> Loss:
    """DPO's loss, but for one step: a run of one micro-batch a step calls it once a step."""
    calls = iter(range(1, 1000))

    def loss(scores: PairScores, options: LossOptions) -> Tensor:
        losses = LOSSES["sigmoid"](scores, options)
        return change(losses, scores) if next(calls) == step else losses

    return loss


def broken_at(step: int, value: float = float("nan")) -> Loss:
    return changed_at(step, lambda losses, scores: losses * value)


def ruinous_at(step: int) -> Loss:
    """The loss is finite and its gradient is not, so that the step's weights are NaN before any loss says so."""
    return changed_at(step, lambda losses, scores: losses + torch.sqrt(scores.policy_chosen - scores.policy_chosen))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a fault, saved after every step."""
    folder = tmp_path_factory.mktemp("whole")
    trained(folder, loss=broken_at(1000), max_steps=NUM_STEPS, save_strategy="steps", save_steps=1)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("value", "schedule"),
    [
        ("nan", {"logging_steps": 1, "save_steps": 1}),
        ("inf", {"logging_steps": 1, "save_steps": 1}),
        ("nan", {"logging_steps": 4, "save_steps": 1}),  # found by the save
        ("nan", {"logging_steps": 5, "save_steps": 2}),  # two steps later
        ("nan", {"logging_strategy": "no", "save_steps": 100}),  # at the end
    ],
    ids=str,
)
def test_a_loss_that_is_not_finite_stops_the_run_by_its_step(
    value: str, schedule: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    options = {"max_steps": NUM_STEPS, "save_strategy": "steps"} | schedule
    trainer = make_trainer(tmp_path, loss=broken_at(3, float(value)), **options)
    with pytest.raises(NotFiniteError, match="the loss of step 3 is NaN or infinite") as caught:
        trainer.train()
    assert isinstance(caught.value, FloatingPointError)
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry), "NaN was logged as 0"
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (1, 2) if step % schedule["save_steps"] == 0}
    for name in saved:
        own, other = (load_file(run / name / "model.safetensors") for run in (tmp_path, whole))
        assert same_bits(own, other)


@pytest.mark.parametrize("options", [{}, {"logging_strategy": "no"}, LORA], ids=["full", "no log", "LoRA"])
def test_weights_that_the_last_step_ruined_replace_no_others(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss=ruinous_at(2), max_steps=2, save_strategy="steps", save_steps=2, **options)
    trainer.save_model()
    before = files_in(tmp_path)
    with pytest.raises(NotFiniteError, match=r"after step 2 its weight `.*` \(and \d+ more\) is NaN or infinite"):
        trainer.train()
    assert not is_finite(trainer.model)
    with pytest.raises(NotFiniteError, match="Cannot keep the policy"):
        trainer.save_model()
    after = files_in(tmp_path)
    after.pop("_tether_run.json")  # says which run was started last
    assert after == before


def test_a_run_that_saves_nothing_does_not_end_with_ruined_weights(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="after step 2"):
        trained(tmp_path, loss=ruinous_at(2), max_steps=2)


def test_a_finite_policy_is_saved_however_large_its_loss(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=1, learning_rate=1e3)
    trainer.save_model()
    assert same_bits(bits(AutoModelForCausalLM.from_pretrained(tmp_path)), bits(trainer.model))


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "LoRA"])
def test_a_synchronized_reference_takes_no_ruined_weights(options: dict[str, Any], tmp_path: Path) -> None:
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    trainer = make_trainer(tmp_path, loss=ruinous_at(2), max_steps=4, logging_steps=4, **sync | options)
    with pytest.raises(NotFiniteError, match="let the reference follow the policy: after step 2"):
        trainer.train()
    trainer.export_reference(tmp_path / "reference")
    saved = load_file(next((tmp_path / "reference").glob("*.safetensors")))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())


def test_an_average_takes_no_ruined_weights(tmp_path: Path) -> None:
    average = BEMACallback(update_freq=1)
    trainer = make_trainer(tmp_path, loss=ruinous_at(2), max_steps=4, logging_steps=4, callbacks=[average])
    with pytest.raises(NotFiniteError, match="average the policy: after step 2"):
        trainer.train()
    assert average.running_model is not None and is_finite(average.running_model)


def test_a_failed_run_leaves_a_trainer_that_can_be_asked(tmp_path: Path) -> None:
    """The verdict was given; evaluating what is left says what it is."""
    trainer = make_trainer(tmp_path, loss=broken_at(2), eval_dataset=as_dataset(tiny_pairs(4)))
    with pytest.raises(NotFiniteError):
        trainer.train()
    assert math.isnan(trainer.evaluate()["eval_loss"])


def test_looking_at_a_loss_reads_nothing_from_the_device() -> None:
    watch = LossWatch()
    for step in (1, 2):
        watch.see(torch.empty((), device="meta"), step)  # a tensor that has nothing to read
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        watch.check()


def test_the_first_of_several_broken_steps_is_named() -> None:
    watch = LossWatch()
    for step, loss in ((1, 0.5), (2, float("inf")), (2, 0.1), (3, float("nan"))):
        watch.see(torch.tensor(loss), step)
    with pytest.raises(NotFiniteError, match="loss of step 2"):
        watch.check()
    watch.check()  # it was told


def test_each_run_begins_anew(tmp_path: Path) -> None:
    """What an aborted run saw last is not told of the next one."""

    class Abort(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    abort = Abort()
    trainer = make_trainer(tmp_path, loss=broken_at(1), max_steps=1, callbacks=[abort])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(abort)
    trainer.train()


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_shows_what_is_not_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.zeros(0, dtype=dtype)) and all_finite(torch.ones(9).to(dtype))
    for value in (math.nan, math.inf, -math.inf):
        assert not all_finite(torch.tensor([1.0] * 7 + [value, 1.0]).to(dtype)), value
