"""What would end a run at its first checkpoint or evaluation is mended or refused before its first step."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from support.observe import bits, same_bits
from support.runs import as_dataset, curve, make_trainer, trained
from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether import BEMACallback, DPOTrainer
from tether.config.rules.run import refused_metric
from tether.errors import ConfigurationError

SHIPPED = {"temperature": 0.9, "top_p": 0.6, "early_stopping": True}  # without `do_sample`, and without beams
SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1}
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4}
CHECKPOINTS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


def published(folder: Path) -> str:
    """A model as instruct models are published; its tokenizer brings a padding token that the config lacks."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(pad=True).save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SHIPPED))
    return str(folder)


WRITTEN: dict[str, tuple[dict[str, Any], Callable[[DPOTrainer, Path], Any], str]] = {
    "a checkpoint": (CHECKPOINTS, lambda trainer, folder: None, "run/checkpoint-2"),
    "the model": ({}, lambda trainer, folder: trainer.save_model(), "run"),
    "a reference that moved": (SYNC, lambda trainer, folder: trainer.export_reference(folder / "saved"), "saved"),
    "a merged reference": (
        SYNC | {"peft_config": LoraConfig(**LORA)},
        lambda trainer, folder: trainer.export_reference(folder / "saved", merged=True),
        "saved",
    ),
    "an average": ({"callbacks": [BEMACallback(update_freq=1)]}, lambda trainer, folder: None, "run/bema"),
}


# Before, transformers saves no such config, also of a model that it has just loaded; a run says so at the start.
saves_unchanged = pytest.mark.skipif(
    "_original_object_hash" not in inspect.getsource(GenerationConfig.save_pretrained),
    reason="this version of transformers saves no generation config with a temperature and no do_sample",
)


@saves_unchanged
@pytest.mark.parametrize("what", WRITTEN)
def test_a_published_generation_config_is_saved_as_it_is(what: str, tmp_path: Path) -> None:
    options, save, folder = WRITTEN[what]
    base = published(tmp_path / "model")
    trainer = trained(tmp_path / "run", base, processing_class=tiny_tokenizer(pad=True), **options)
    save(trainer, tmp_path)
    saved = json.loads((tmp_path / folder / "generation_config.json").read_text())
    assert SHIPPED.items() <= saved.items() and "do_sample" not in saved
    assert GenerationConfig.from_pretrained(tmp_path / folder).temperature == 0.9
    assert AutoModelForCausalLM.from_pretrained(tmp_path / folder).generation_config.top_p == 0.6
    assert trainer.model.generation_config.do_sample is not True, "it generates as it did"


@saves_unchanged
def test_a_generation_config_made_in_memory_is_saved_too(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.7
    trained(tmp_path, model, **CHECKPOINTS)
    assert json.loads((tmp_path / "checkpoint-2" / "generation_config.json").read_text())["temperature"] == 0.7


def contradictory_generation() -> Any:
    model = tiny_model()
    model.generation_config.num_return_sequences = 2  # greedy search has one
    return model


def unwritable_config() -> Any:
    model = tiny_model()
    model.config.note = torch.zeros(2)
    return model


def shared_undeclared() -> Any:
    model = tiny_model()
    layers: Any = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    return model


def lora_of_what_json_cannot_write() -> Any:
    config = LoraConfig(**LORA, target_modules=["q_proj"])
    config.revision = nn.Identity()  # type: ignore[assignment]
    return config


UNSAVABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "num_return_sequences": lambda: {"model": contradictory_generation()},
    "JSON serializable": lambda: {"model": unwritable_config()},
    "shared tensors": lambda: {"model": shared_undeclared()},
    "not JSON": lambda: {"peft_config": lora_of_what_json_cannot_write()},
    "pickle": lambda: {"lr_scheduler_kwargs": {"x": lambda step: step}},
}


@pytest.mark.parametrize("said", UNSAVABLE)
def test_what_cannot_be_saved_is_refused_at_construction(said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_trainer(tmp_path, **UNSAVABLE[said]())
    first = caught.value.problem
    assert first.startswith("Cannot save") and str(tmp_path) in first
    assert said.removeprefix("not ") in first
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused_at_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", kwargs.get("dir"))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # root may write anywhere
    with pytest.raises(ConfigurationError, match="Permission denied"):
        make_trainer(tmp_path)


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_trying_to_save_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    model = tiny_model()
    before = bits(model)
    make_trainer(tmp_path, model, **{"peft_config": LoraConfig(**LORA)} if kind == "LoRA" else {})
    assert list(tmp_path.iterdir()) == []
    if kind == "full":
        assert same_bits(bits(model), before)


# ------------------------------------------------------------------------------------------------------ evaluation

EVALUATES: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
EVAL = tiny_pairs(7, seed=1)


@pytest.mark.numerics
def test_grouping_by_length_is_for_training_and_evaluation_goes_on(tmp_path: Path) -> None:
    options = EVALUATES | {"eval_dataset": as_dataset(EVAL), "per_device_eval_batch_size": 3}
    grouped = trained(tmp_path / "1", train_sampling_strategy="group_by_length", **options)
    figures = [entry for entry in grouped.state.log_history if "eval_loss" in entry]
    assert len(figures) == 1 and len(curve(grouped)) == 2
    plain = make_trainer(tmp_path / "2", grouped.model, ref_model=grouped.ref_model, **options)
    assert figures[0]["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)
    logits = grouped.predict(EVAL).predictions
    assert (torch.tensor(logits) - torch.tensor(plain.predict(EVAL).predictions)).abs().max() < 1e-5, "in their order"


NAMED = {"a": as_dataset(EVAL), "b": as_dataset(EVAL)}
METRICS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"metric_for_best_model": "accuracy"}, "rewards/accuracies"),
    "of one set among several": ({"metric_for_best_model": "rewards/margins", "eval_dataset": NAMED}, "b_loss"),
    "the default, with several sets": (
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "eval_dataset": NAMED},
        "a_loss",
    ),
    "of a plateau, with several sets": ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_dataset": NAMED}, "a_loss"),
    "of a router that is not there": ({"metric_for_best_model": "eval_aux_loss"}, "loss"),
    "computed, but not asked for": (
        {"metric_for_best_model": "own", "compute_metrics": lambda p: {"own": 1.0}, "prediction_loss_only": True},
        "loss",
    ),
}


@pytest.mark.parametrize("kind", METRICS)
def test_a_best_by_a_figure_that_evaluation_does_not_give_is_refused(kind: str, tmp_path: Path) -> None:
    options, there = METRICS[kind]
    with pytest.raises(ConfigurationError, match="metric_for_best_model") as caught:
        make_trainer(tmp_path, **EVALUATES | {"eval_dataset": as_dataset(EVAL)} | options)
    assert there in caught.value.instead


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_figures_that_can_choose_the_best_are_those_of_an_evaluation(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model(family), eval_dataset=as_dataset(EVAL), **EVALUATES)
    given = {name for name in trainer.evaluate() if name not in ("epoch", "eval_model_preparation_time")}
    facts: dict[str, Any] = {"has_own": False, "has_router": family == "mixtral"}
    for name in given:
        assert not list(refused_metric(name, [], **facts))
    (refusal,) = refused_metric("?", [], **facts)
    named = refusal.instead.partition(": ")[2].removesuffix(".").split(", ")
    assert {f"eval_{name}" for name in named} <= given


@pytest.mark.parametrize("option", ["per_device_eval_batch_size", "eval_accumulation_steps"])
def test_evaluation_of_nothing_at_once_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=option):
        make_trainer(tmp_path, eval_dataset=as_dataset(EVAL), **EVALUATES | {option: 0})


def test_saving_the_best_of_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="save_strategy='best'"):
        make_trainer(tmp_path, save_strategy="best", metric_for_best_model="loss")
