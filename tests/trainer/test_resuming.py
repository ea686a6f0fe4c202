"""A resumed run is the checkpoint's run: what differs is listed, and refused where it changes what is minimised."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig

from support.observe import bits, same_bits
from support.runs import as_dataset, curve, make_trainer, trained
from support.tiny import tiny_model, tiny_pairs
from tether import BEMACallback
from tether.errors import ConfigurationError, ResumeError
from tether.types import PairScores

RUN: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with no options of its own."""
    folder = tmp_path_factory.mktemp("begun")
    trained(folder, **RUN)
    return folder


@pytest.fixture
def copied(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resume(folder: Path, **options: Any) -> Any:
    trainer = make_trainer(folder, **RUN | options)
    trainer.train(str(folder / "checkpoint-1"))
    return trainer


def own_loss(scores: PairScores, options: Any) -> Any:
    return (scores.policy_rejected - scores.policy_chosen) * options.beta


class Change(NamedTuple):
    """Options of a run, those it is resumed with, the name to allow, and what the error says."""

    began: Callable[[], dict[str, Any]]
    resumed: Callable[[], dict[str, Any]]
    name: str
    says: str


CHANGES: dict[str, Change] = {
    "beta": Change(lambda: {"beta": 0.1}, lambda: {"beta": 0.5}, "beta", "`beta` was 0.1 and is 0.5"),
    "the loss": Change(
        lambda: {}, lambda: {"loss_type": "ipo"}, "loss_type", r"`loss_type` was \['sigmoid'\] and is \['ipo'\]"
    ),
    "your own loss": Change(lambda: {}, lambda: {"loss": own_loss}, "loss_type", "'own_loss'"),
    "weights of losses": Change(
        lambda: {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        lambda: {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
        "loss_weights",
        "`loss_weights` was",
    ),
    "smoothing": Change(lambda: {}, lambda: {"label_smoothing": 0.1}, "label_smoothing", "`label_smoothing` was 0.0"),
    "BCO's shift": Change(
        lambda: {"loss_type": "bco_pair"},
        lambda: {"loss_type": "bco_pair", "bco_reward_shift": False},
        "bco_reward_shift",
        "`bco_reward_shift` was True and is False",
    ),
    "length": Change(lambda: {}, lambda: {"max_length": 60}, "max_length", "`max_length` was 1024 and is 60"),
    "BEMA's schedule": Change(
        lambda: {"callbacks": [BEMACallback(update_freq=1)]},
        lambda: {"callbacks": [BEMACallback(update_freq=2)]},
        "BEMACallback",
        "'update_freq': 1,.* and is .*'update_freq': 2,",
    ),
    "fewer rows": Change(
        lambda: {}, lambda: {"rows": tiny_pairs(20)}, "data", "the training set had 24 rows and has 20 rows"
    ),
    "other rows": Change(lambda: {}, lambda: {"rows": tiny_pairs(24, seed=1)}, "data", "has other rows"),
    "the batch": Change(
        lambda: {},
        lambda: {"per_device_train_batch_size": 4},
        "per_device_train_batch_size",
        "`per_device_train_batch_size` was 2 and is 4, so rows would be left out or come again",
    ),
    "the accumulation": Change(
        lambda: {},
        lambda: {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps",
        "`gradient_accumulation_steps` was 1 and is 2",
    ),
    "the seed": Change(lambda: {}, lambda: {"seed": 7}, "seed", "`seed` was 42 and is 7"),
    "the seed of the data": Change(lambda: {}, lambda: {"data_seed": 7}, "data_seed", "`data_seed` was None and is 7"),
    "the order": Change(
        lambda: {},
        lambda: {"train_sampling_strategy": "sequential"},
        "train_sampling_strategy",
        "`train_sampling_strategy` was 'random' and is 'sequential'",
    ),
    "the rows in another order": Change(lambda: {}, lambda: {"rows": tiny_pairs(24)[::-1]}, "data", "another order"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_that_changes_the_objective_or_the_pairs_must_name_it(name: str, begun: Path, tmp_path: Path) -> None:
    change = CHANGES[name]
    if change.began():
        trained(tmp_path, **RUN | {"max_steps": 1} | change.began())
    else:
        shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ResumeError, match=change.says) as caught:
        resume(tmp_path, **change.resumed())
    assert f"`resume_changes=['{change.name}']` (`--resume_changes {change.name}`)" in caught.value.instead
    if name in ("beta", "BEMA's schedule", "other rows", "the seed"):
        assert resume(tmp_path, **change.resumed(), resume_changes=[change.name]).state.global_step == 2


def test_all_that_differs_is_named_at_once(begun: Path) -> None:
    with pytest.raises(ResumeError) as caught:
        resume(begun, beta=0.5, max_length=20, rows=tiny_pairs(20), resume_changes=["beta"])
    assert "`beta`" not in caught.value.problem and "`max_length`" in caught.value.problem
    assert "The training set had 24 rows" in caught.value.details
    assert "`resume_changes=['beta', 'data', 'max_length']`" in caught.value.instead


def test_batches_of_another_shape_are_no_other_rows(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    resumed = resume(copied, **shape, data_seed=42)
    assert "`per_device_train_batch_size` was 2 and is 1" in caplog.text
    assert curve(resumed) == pytest.approx(curve(trained(copied / "whole", **RUN)), abs=1e-4)


def test_what_else_differs_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, **RUN, eval_dataset=as_dataset(tiny_pairs(4, seed=1)))
    caplog.clear()
    resume(tmp_path, eval_dataset=as_dataset(tiny_pairs(4, seed=2)), learning_rate=1e-4, max_grad_norm=2.0)
    (line,) = [record.message for record in caplog.records if record.name == "tether.trainer.resuming"]
    assert (
        "`learning_rate` was 0.001 and is 0.0001; `max_grad_norm` was 1.0 and is 2.0; the eval set is another." in line
    )
    assert line.endswith("The optimizer goes on with its own `learning_rate`.")
    caplog.clear()
    resume(tmp_path, eval_dataset=as_dataset(tiny_pairs(4, seed=1)))
    assert not [record for record in caplog.records if record.name.startswith("tether.trainer.re")]


def test_a_beta_that_a_callback_changes_is_no_other_option(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **RUN)
    compute, trainer.compute_loss = (
        trainer.compute_loss,
        lambda *a, **k: trainer.args.set_loss(beta=0.3) or compute(*a, **k),
    )
    trainer.train()
    assert resume(tmp_path).state.global_step == 2


def lora(**options: Any) -> dict[str, Any]:
    return {"peft_config": LoraConfig(**LORA | options)}


CROSSWISE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "LoRA as full": (
        lora(),
        {},
        r"it trained an adapter \(`default`\), and this trainer trains the model's own weights",
    ),
    "full as LoRA": ({}, lora(), r"it trained the model's own weights, and this trainer trains an adapter"),
    "another rank": (lora(), lora(r=8), r"`r` was 4 and is 8 \(adapter `default`\)"),
    "another alpha": (lora(), lora(lora_alpha=16), "`lora_alpha` was 8 and is 16"),
    "other targets": (lora(), lora(target_modules=["q_proj"]), "`target_modules` was .*v_proj.* and is .*q_proj"),
}


@pytest.mark.parametrize("name", CROSSWISE)
def test_a_crosswise_resume_names_what_differs(name: str, tmp_path: Path) -> None:
    began, resumed, says = CROSSWISE[name]
    trained(tmp_path, **RUN | {"max_steps": 1} | began)
    with pytest.raises(ResumeError, match=says):
        resume(tmp_path, **resumed)


def test_other_reference_columns_are_named(tmp_path: Path) -> None:
    def rows(sums: float) -> list[dict[str, Any]]:
        return [row | {"ref_chosen_logps": sums, "ref_rejected_logps": sums} for row in tiny_pairs(24)]

    trained(tmp_path, **RUN, rows=rows(-9.0), ref_columns="other")
    with pytest.raises(ResumeError, match="another reference") as caught:
        resume(tmp_path, rows=rows(-8.0), ref_columns="other")
    assert "Its `weights` was" in caught.value.details and "the same columns" in caught.value.instead


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop", "adagrad"])
def test_another_optimizer_is_refused_by_name(optim: str, begun: Path) -> None:
    with pytest.raises(ResumeError, match=f"with another optimizer: `optim` was 'adamw.*' and is '{optim}'"):
        resume(begun, optim=optim)


def test_another_optimizer_of_your_own_is_refused(copied: Path) -> None:
    with pytest.raises(ResumeError, match="cannot be read into this trainer") as caught:
        resume(copied, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-3}))
    assert "the optimizer's state has no dampening, momentum" in caught.value.details


def test_an_optimizer_of_another_kind_is_refused_in_a_sentence(copied: Path) -> None:
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)  # its optimizer has fewer tensors
    with pytest.raises(ResumeError, match="cannot be read into this trainer") as caught:
        resume(copied, model=model)
    assert "ValueError: loaded state dict" in caught.value.details


def test_tied_weights_are_not_said_to_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"model": tiny_model(tie_word_embeddings=True)}
    trained(tmp_path, **RUN, **options)
    caplog.clear()
    resume(tmp_path, model=tiny_model(tie_word_embeddings=True))
    assert not [record.message for record in caplog.records if "missing keys" in record.message]


# ---- a checkpoint that proves nothing --------------------------------------------------------------------------------


def unprove(folder: Path, *missing: str) -> None:
    """Leaves the first checkpoint of a run as another library would have written it."""
    for name in ("manifest.json", "progress.json", *missing):
        (folder / "checkpoint-1" / name).unlink()
    shutil.rmtree(folder / "checkpoint-1" / "reference")


def test_a_checkpoint_without_a_manifest_is_resumed_only_if_that_is_named(tmp_path: Path) -> None:
    whole = trained(tmp_path, **RUN)
    unprove(tmp_path)
    with pytest.raises(ResumeError, match=r"has no manifest.json") as caught:
        resume(tmp_path)
    assert "`resume_changes=['manifest']`" in caught.value.instead
    resumed = resume(tmp_path, resume_changes=["manifest"])
    assert same_bits(bits(resumed.model), bits(whole.model)) and curve(resumed) == curve(whole)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_what_a_checkpoint_without_a_manifest_lacks_is_named(name: str, copied: Path) -> None:
    unprove(copied, name)
    with pytest.raises(ResumeError, match=f"`{name}` is missing"):
        resume(copied, resume_changes=["manifest"])


def test_a_damaged_file_of_a_checkpoint_without_a_manifest_is_an_error_in_a_sentence(copied: Path) -> None:
    unprove(copied)
    for name in ("optimizer.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"):
        path = copied / "checkpoint-1" / name
        before = path.read_bytes()
        path.write_bytes(before[: len(before) // 2])
        with pytest.raises(ResumeError, match="cannot be read into this trainer"):
            resume(copied, resume_changes=["manifest"])
        path.write_bytes(before)


# ---- what cannot be meant --------------------------------------------------------------------------------------------


def test_a_change_that_nothing_is_resumed_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="in a run that resumes nothing"):
        trained(tmp_path, **RUN, resume_changes=["beta"])
    with pytest.raises(ConfigurationError, match="`learning_rate` is not compared"):
        make_trainer(tmp_path, **RUN, resume_changes=["learning_rate"])


def test_a_finished_run_says_that_it_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of an epoch, after which transformers would go on."""
    whole = trained(tmp_path, **RUN)
    resumed = make_trainer(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2 and same_bits(bits(resumed.model), bits(whole.model))
    assert "Nothing to train: checkpoint-2 is at step 2, and the run has 2." in caplog.text
    longer = make_trainer(tmp_path, **RUN | {"max_steps": 3})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


def test_what_is_named_in_place_of_a_checkpoint_is_told(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    for name, says in (
        (begun, f"it is the folder of a run; its last checkpoint is {begun / 'checkpoint-2'}"),
        (tmp_path / "pairs.jsonl", "it is a file, not a folder"),
        ("", "from '': there is no such folder"),
    ):
        with pytest.raises(ResumeError, match=re.escape(says)):
            make_trainer(tmp_path, **RUN).train(name)


def test_a_checkpoint_that_is_passed_over_is_named(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copied / "checkpoint-2" / "model.safetensors").unlink()
    make_trainer(copied, **RUN).train(resume_from_checkpoint=True)
    said = "checkpoint-1. checkpoint-2 is passed over: `model.safetensors` is missing."
    assert f"Resuming from {copied}/{said}" in caplog.text


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="checkpoint-1: there is no such folder"):
        resume(tmp_path)
