"""`BEMACallback`: its numbers, its schedule, adapters, resuming, and a reference that follows it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from support.observe import bits, same_bits
from support.runs import curve, facts_of, make_trainer, trained
from support.tiny import tiny_model, tiny_pairs
from tether import BEMACallback, SyncRefModelCallback
from tether.config.rules.reference import refused_reference
from tether.errors import ConfigurationError, ReferenceModelError, ResumeError

pytestmark = pytest.mark.numerics

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
RULE: dict[str, Any] = {"update_freq": 2, "ema_power": 0.6, "bias_power": 0.3, "lag": 4, "multiplier": 0.5}


class Weights(TrainerCallback):
    """A copy of the trained weights after each step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.after[state.global_step] = {name: p.detach().double() for name, p in named if p.requires_grad}
        self.after[state.global_step] = {name: p.clone() for name, p in self.after[state.global_step].items()}


def by_hand(after: dict[int, dict[str, torch.Tensor]], initial: dict[str, torch.Tensor], last: int, begin: int) -> Any:
    """The paper's recursion in float64, with the step as `t`."""
    start = {name: weight.double() for name, weight in (after[begin] if begin else initial).items()}
    average, corrected = dict(start), dict(start)
    for step in range(begin + 2, last + 1, 2):
        b, a = (4 + 0.5 * step) ** -0.6, (4 + 0.5 * step) ** -0.3
        average = {name: (1 - b) * average[name] + b * after[step][name] for name in start}
        corrected = {name: average[name] + a * (after[step][name] - start[name]) for name in start}
    return corrected


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("kind", ["full", "some frozen", "LoRA"])
def test_the_saved_average_is_that_of_the_paper(kind: str, begin: int, tmp_path: Path) -> None:
    model, weights = tiny_model(), Weights()
    if kind == "some frozen":
        model.get_input_embeddings().requires_grad_(False)
    options: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if kind == "LoRA" else {}
    average = BEMACallback(**RULE, update_after=begin)
    trainer = make_trainer(
        tmp_path, model, max_steps=5, learning_rate=1e-2, callbacks=[weights, average],
        gradient_checkpointing=True, **options,
    )  # fmt: skip
    initial = bits(trainer.model)
    trainer.train()
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    expected = by_hand(weights.after, {name: initial[name] for name in names}, 5, begin)
    if kind == "LoRA":
        saved: Any = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "bema"))
        assert not (tmp_path / "bema" / "model.safetensors").exists()
    else:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    found, running = dict(saved.named_parameters()), dict(average.running_model.named_parameters())
    for name in names:
        assert not torch.equal(expected[name], weights.after[5][name]), "the average is the policy: nothing is tested"
        torch.testing.assert_close(found[name].double(), expected[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(running[name].double(), expected[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(dict(trainer.model.named_parameters())[name].double(), weights.after[5][name])
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(average.running_model(ids).logits, saved.eval()(ids).logits)


def test_it_works_with_any_trainer_of_transformers(tmp_path: Path) -> None:
    average = BEMACallback(update_freq=1)
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}] * 4
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no")
    Trainer(tiny_model(), args, train_dataset=rows, callbacks=[average]).train()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bema").config.model_type == "llama"


RUN: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
FOLLOWS: dict[str, Any] = {"update_ref_model": True, "ref_model_update_freq": 2, "ref_model_update_after": 1}


KINDS: dict[str, dict[str, Any]] = {"full": {}, "LoRA": {"peft_config": LoraConfig(**LORA)}}


def reference_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """What the reference holds of the weights that train, in float64."""
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    with nullcontext() if trainer.ref_model is not None else trainer.null_ref_context():
        held = dict((trainer.ref_model or trainer.model).named_parameters())
        return {name: held[name].detach().double().clone() for name in names}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("follows", [{}, FOLLOWS], ids=["beside", "the reference follows"])
def test_a_resumed_run_has_the_average_of_the_uninterrupted_one(
    follows: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    def run(resume: bool) -> tuple[Any, BEMACallback]:
        average = BEMACallback(**RULE, **follows)
        trainer = make_trainer(tmp_path, callbacks=[average], **RUN, **KINDS[kind])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return trainer, average

    (whole, of_whole), (resumed, of_resumed) = run(False), run(True)
    for one, other in zip(of_whole._averages(), of_resumed._averages(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert same_bits(bits(whole.model), bits(resumed.model))
    assert same_bits(reference_weights(whole), reference_weights(resumed))


def test_a_reference_that_follows_the_average_is_saved_as_a_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", callbacks=[BEMACallback(**RULE, **FOLLOWS)], max_steps=6, learning_rate=1e-2)
    trainer.export_reference(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert trainer.ref_model is not None
    assert torch.equal(loaded(ids).logits, trainer.ref_model(ids).logits)
    assert not torch.equal(loaded(ids).logits, tiny_model()(ids).logits), "it has moved"


def test_an_adapters_reference_that_follows_the_average_is_saved_as_an_adapter(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, **KINDS["LoRA"]}
    trainer = trained(tmp_path / "run", callbacks=[BEMACallback(**RULE, **FOLLOWS)], **options)
    trainer.export_reference(tmp_path / "saved")
    loaded = dict(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved")).named_parameters())
    for name, weight in reference_weights(trainer).items():
        assert torch.equal(loaded[name].double(), weight)


def test_resuming_without_the_average_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, **RUN)
    with pytest.raises(ResumeError, match="BEMACallback"):
        make_trainer(tmp_path, callbacks=[BEMACallback()], **RUN).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError):  # and a reference that stood still is another one
        make_trainer(tmp_path, callbacks=[BEMACallback(update_ref_model=True)], **RUN).train(True)


def test_weights_alone_are_saved_without_the_average(tmp_path: Path) -> None:
    trained(tmp_path, callbacks=[BEMACallback(update_freq=1)], save_only_model=True, **RUN)
    assert not list(tmp_path.glob("checkpoint-*/bema.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_takes_the_average_on_its_own_schedule(kind: str, tmp_path: Path) -> None:
    """Updates after steps 2, 4, 6; the reference takes them after 1, 3, 5: that of 0, of 2, of 4."""
    weights, average = Weights(), BEMACallback(**RULE, **FOLLOWS)
    trainer = make_trainer(tmp_path, callbacks=[weights, average], **RUN | {"save_strategy": "no"}, **KINDS[kind])
    initial = bits(trainer.model)
    trainer.train()
    found = reference_weights(trainer)
    expected = by_hand(weights.after, {name: initial[name] for name in found}, 4, 0)
    for name, weight in found.items():
        assert not torch.equal(weight, weights.after[6][name]), "the average is the policy: nothing is tested"
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
    assert curve(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_that_follows_is_evaluated_and_saved_without_a_false_alarm(tmp_path: Path) -> None:
    average = BEMACallback(**RULE | {"update_freq": 1}, update_ref_model=True, ref_model_update_freq=1)
    trainer = trained(tmp_path, callbacks=[average], eval_dataset=tiny_pairs(4, seed=1), eval_strategy="steps",
                      eval_steps=1, **RUN)  # fmt: skip
    assert trainer.state.global_step == 6


CANNOT_FOLLOW: dict[str, dict[str, Any]] = {
    "precompute_ref_log_probs": {"precompute_ref_log_probs": True},
    "sync_ref_model": {"sync_ref_model": True},
    "PEFT": {"peft_config": LoraConfig(**LORA), "ref_model": tiny_model()},
    "reference_free": {"reference_free": True},
    "ref_chosen_logps": {
        "rows": [row | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0} for row in tiny_pairs(4)]
    },
}


@pytest.mark.parametrize("name", CANNOT_FOLLOW)
def test_a_reference_that_cannot_follow_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=name) as caught:
        make_trainer(tmp_path, callbacks=[BEMACallback(update_ref_model=True)], **CANNOT_FOLLOW[name])
    assert "update_ref_model=False" in caught.value.instead


def test_a_sharded_reference_cannot_follow(tmp_path: Path) -> None:
    """A run that is sharded needs several processes; what refuses it is asked here by itself."""
    (refusal,) = refused_reference(facts_of(tmp_path, leaders=[BEMACallback(update_ref_model=True)], is_sharded=True))
    assert "ZeRO-3 or FSDP2" in refusal.subject and "BEMACallback" in refusal.subject


def test_a_reference_of_another_architecture_cannot_follow(tmp_path: Path) -> None:
    average = BEMACallback(update_ref_model=True, ref_model_update_freq=1)
    trainer = make_trainer(tmp_path, ref_model=tiny_model("qwen2", hidden=64), callbacks=[average])
    with pytest.raises(ReferenceModelError, match="architecture"):
        trainer.train()


def test_a_callback_that_comes_too_late_for_its_reference_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(BEMACallback(update_ref_model=True))
    with pytest.raises(ConfigurationError, match="callbacks="):
        trainer.train()


@pytest.mark.parametrize("name", ["update_freq", "ref_model_update_freq"])
def test_a_schedule_that_counts_no_steps_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        BEMACallback(**{name: 0})


# ---------------------------------------------------------------------------------------- TRL's name for a sync


@pytest.mark.parametrize("later", [False, True])
def test_a_sync_callback_is_refused_where_no_option_moves_the_reference(later: bool, tmp_path: Path) -> None:
    def run(**options: Any) -> None:
        callback = SyncRefModelCallback(ref_model=None, accelerator=None)
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[] if later else [callback], **options)
        if later:
            trainer.add_callback(callback)
        trainer.train()

    run(sync_ref_model=True, ref_model_sync_steps=1)
    with pytest.raises(ValueError, match="`SyncRefModelCallback` without `sync_ref_model=True`"):
        run()
