"""TR-DPO through the trainer: the schedule, what is logged of it, what is said, and what is saved in the end."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from support.observe import bits, same_bits
from support.runs import curve, make_trainer, steps, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs
from tether import DPOTrainer
from tether.errors import ReferenceModelError, ResumeError

pytestmark = pytest.mark.numerics

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def lora(**options: Any) -> dict[str, Any]:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options)
    return {"peft_config": config, "learning_rate": 2e-2}


def sync(alpha: float = 0.5, every: int = 2) -> dict[str, Any]:
    return {"sync_ref_model": True, "ref_model_mixup_alpha": alpha, "ref_model_sync_steps": every}


KINDS: dict[str, dict[str, Any]] = {"full": {}, "LoRA": lora(), "DoRA": lora(use_dora=True)}


# ------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_reference_moves_after_the_optimizer_step(kind: str, tmp_path: Path) -> None:
    """With a hard update every other step the reference is the policy then: the loss is log 2, and only then."""
    trainer = trained(tmp_path, **KINDS[kind], **sync(1.0), max_steps=4)
    assert curve(trainer)[0::2] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert abs(curve(trainer)[1] - math.log(2)) > 1e-4 < abs(curve(trainer)[3] - math.log(2))
    assert steps(trainer)[0]["reference/initial_gap"] == 0.0


def test_an_adapters_reference_counts_optimizer_steps_not_micro_batches(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, **lora(), **sync()
    )
    assert curve(trainer, "reference/syncs") == [0, 1, 1, 2, 2]


def test_a_larger_reference_does_not_change_how_the_policy_trains(tmp_path: Path) -> None:
    """alpha = 0 never moves: the same run, bit for bit, as with the adapter switched off."""
    still = trained(tmp_path / "1", **lora(), max_steps=4)
    moving = trained(tmp_path / "2", **lora(), **sync(0.0, 1), max_steps=4)
    assert curve(still) == curve(moving) and same_bits(bits(still.model), bits(moving.model))


# ---------------------------------------------------------------------------------------------------- what is logged


def sentinel_log_probs(trainer: DPOTrainer, model: nn.Module) -> Tensor:
    """Of the first two pairs, one plain forward per response."""
    found = []
    with torch.no_grad():
        for row in (trainer.train_dataset[0], trainer.train_dataset[1]):
            found += [naive_log_probs(model.eval(), row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES]
    return torch.cat(found)


SIDES = ("chosen", "rejected")


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_the_distances_are_the_mean_differences_on_the_first_pairs(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **KINDS[kind], **sync(0.4, 3), max_steps=4)
    start = sentinel_log_probs(trainer, trainer.model)
    trainer.train()
    policy = sentinel_log_probs(trainer, trainer.model)
    if trainer.ref_model is not None:
        reference = sentinel_log_probs(trainer, trainer.ref_model)
    else:
        with trainer.null_ref_context():
            reference = sentinel_log_probs(trainer, trainer.model)
    last = steps(trainer)[-1]
    assert last["reference/distance"] == pytest.approx(float((policy - reference).abs().mean()), rel=1e-3)
    assert last["reference/distance_from_start"] == pytest.approx(float((start - reference).abs().mean()), rel=1e-3)
    assert last["reference/distance"] > 1e-4 < last["reference/distance_from_start"]
    assert curve(trainer, "reference/distance_from_start")[:2] == [0.0, 0.0], "before the first sync"
    assert curve(trainer, "reference/syncs") == [0, 0, 1, 1]
    assert ("reference/truncation" in last) == (kind == "LoRA")


def test_the_distances_are_logged_at_the_end_of_an_epoch_too(tmp_path: Path) -> None:
    (entry,) = steps(trained(tmp_path, **sync(), num_train_epochs=1, max_steps=-1, logging_strategy="epoch"))
    assert entry["reference/syncs"] == 3 and entry["reference/distance_from_start"] > 1e-4


def test_a_hard_sync_brings_the_distance_to_zero(tmp_path: Path) -> None:
    found = curve(trained(tmp_path, **lora(), **sync(1.0, 2), max_steps=4), "reference/distance")
    assert found[1] == found[3] == 0 and found[0] > 1e-4 < found[2]


def test_the_distance_to_the_start_is_that_of_the_policy_even_with_another_reference(tmp_path: Path) -> None:
    trainer = trained(tmp_path, ref_model=tiny_model(seed=1), **sync(1.0, 2), max_steps=2)
    before, after = curve(trainer, "reference/distance_from_start")
    assert before > 5 * after > 0


def test_a_run_resumed_with_other_rows_logs_no_distance_to_a_start_that_it_never_saw(tmp_path: Path) -> None:
    options = sync(0.5, 1) | {"max_steps": 4}
    trained(tmp_path, **options, save_strategy="steps", save_steps=2)
    resumed = make_trainer(tmp_path, rows=tiny_pairs(12, seed=3), **options, resume_changes=["data"])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last = steps(resumed)[-1]
    assert last["reference/distance"] > 0 and "reference/distance_from_start" not in last


def test_a_reference_that_stands_still_logs_no_distance(tmp_path: Path) -> None:
    (entry,) = steps(trained(tmp_path, max_steps=1))
    assert [name for name in entry if name.startswith("reference/")] == ["reference/initial_gap"]


# ------------------------------------------------------------------------------------------------------ what is said


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "tether.trainer.checkpoints"]


def test_a_run_that_ends_before_its_first_sync_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trained(tmp_path, **sync(every=4), max_steps=3)
    (line,) = said(caplog)
    assert "4 optimizer steps" in line and "3" in line and "ref_model_sync_steps" in line
    caplog.clear()
    trained(tmp_path, **sync(every=3), max_steps=3)
    trained(tmp_path, max_steps=3)  # does not move anyway
    assert said(caplog) == []


def test_checkpoints_of_weights_alone_say_what_they_lose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "max_steps": 2}
    trained(tmp_path, **sync(), **options)
    (line,) = said(caplog)
    assert "save_only_model" in line and "export_reference" in line
    caplog.clear()
    with pytest.raises(ResumeError, match="save_only_model"):
        make_trainer(tmp_path, **sync(), **options | {"save_only_model": False}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    make_trainer(tmp_path, **options)
    assert said(caplog) == []


@pytest.mark.parametrize("other", [{"ref_model_sync_rank": 9}, {"ref_model_mixup_alpha": 0.4}], ids=str)
def test_a_checkpoint_of_another_rule_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = lora() | sync() | {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trained(tmp_path, **options)
    (name,) = other
    with pytest.raises(ResumeError, match=name):
        make_trainer(tmp_path, **options | other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_a_still_adapter_is_refused_for_a_moving_one(tmp_path: Path) -> None:
    options: dict[str, Any] = lora() | {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trained(tmp_path, **options)
    with pytest.raises(ResumeError, match="kind"):
        make_trainer(tmp_path, **options, **sync()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---------------------------------------------------------------------------------------------------------- export


def test_the_final_reference_of_a_full_model_is_a_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", learning_rate=1e-2, **sync(0.4, 2), max_steps=4)
    trainer.export_reference(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert trainer.ref_model is not None
    assert torch.equal(loaded(IDS).logits, trainer.ref_model(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, trainer.model.eval()(IDS).logits)
    assert type(loaded) is type(tiny_model())
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@pytest.mark.parametrize("merged", [False, True])
def test_the_final_reference_of_an_adapter_is_an_adapter_or_a_model(merged: bool, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", **lora(), **sync(0.4, 1), max_steps=4)
    trainer.export_reference(tmp_path / "saved", merged=merged)
    loaded: Any
    if merged:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    else:
        loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved")).eval()
        assert loaded.peft_config["default"].r == 8, "twice the policy's"
    with trainer.null_ref_context():
        expected = sentinel_log_probs(trainer, trainer.model)
    torch.testing.assert_close(sentinel_log_probs(trainer, loaded), expected, rtol=0, atol=2e-5)
    assert (sentinel_log_probs(trainer, trainer.model) - expected).abs().max() > 1e-2


def test_a_reference_without_weights_of_its_own_is_not_exported(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", **lora())
    with pytest.raises(ReferenceModelError, match="adapter off"):
        trainer.export_reference(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------------------------------------------- the other dtypes


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_an_adapter_in_bfloat16_follows_too(how: str, tmp_path: Path) -> None:
    """Under autocast a cast of the policy's factors must not be taken for the reference's."""
    options: dict[str, Any] = {"bf16": True, "use_cpu": True} if how == "autocast" else {}
    model = tiny_model(dtype=torch.bfloat16) if how == "weights" else tiny_model()
    trainer = trained(tmp_path, model, **lora(), **options, **sync(1.0, 2), max_steps=4)
    assert curve(trainer)[0::2] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert abs(curve(trainer)[3] - math.log(2)) > 1e-4
    assert curve(trainer, "reference/distance")[1] == 0 < curve(trainer, "reference/distance")[0]
