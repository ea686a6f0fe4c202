"""Stopped and resumed equals uninterrupted, bit for bit; and no checkpoint is taken for another run's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from support.observe import bits, same_bits
from support.runs import as_dataset, make_trainer, steps, trained
from support.tiny import tiny_model, tiny_pairs
from tether import DPOTrainer
from tether.errors import ResumeError

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.3}
STOP, END = 5, 8  # between two syncs, and in the second epoch
RUN: dict[str, Any] = {
    "max_steps": END,
    "save_strategy": "steps",
    "save_steps": STOP,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "warmup_steps": 2,
}


def continued() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_model(), LoraConfig(**LORA, init_lora_weights=False, bias="lora_only"))


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "explicit": lambda: {},
    "explicit, given": lambda: {"ref_model": tiny_model(seed=1)},
    "explicit, dropout": lambda: {
        "model": tiny_model("gpt2", resid_pdrop=0.2, attn_pdrop=0.2),
        "disable_dropout": False,
    },
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    "synchronized": lambda: SYNC,
    "synchronized, hard": lambda: SYNC | {"ref_model_mixup_alpha": 1.0},
    "synchronized, bfloat16": lambda: SYNC | {"ref_dtype": "bfloat16"},
    "synchronized, fresh LoRA": lambda: SYNC | {"peft_config": LoraConfig(**LORA), "ref_model_sync_steps": 2},
    "synchronized, hard, fresh LoRA": lambda: SYNC | {"peft_config": LoraConfig(**LORA), "ref_model_mixup_alpha": 1.0},
    "synchronized, continued LoRA": lambda: SYNC | {"model": continued()},
    "synchronized, given": lambda: SYNC | {"ref_model": tiny_model(seed=1)},
    "fresh LoRA": lambda: {"peft_config": LoraConfig(**LORA)},
    "fresh LoRA, precomputed": lambda: {"peft_config": LoraConfig(**LORA), "precompute_ref_log_probs": True},
    "continued LoRA": lambda: {"model": continued()},
    "prompt tuning": lambda: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    "reward shift": lambda: {"loss_type": ["sigmoid", "bco_pair"], "beta": 0.5},
    # Files of these name or cut their tensors otherwise than memory does.
    "renamed in files, mixtral": lambda: {"model": tiny_model("mixtral")},
    "renamed in files, mixtral, synchronized": lambda: SYNC | {"model": tiny_model("mixtral")},
    "renamed in files, gpt_neox": lambda: {"model": tiny_model("gpt_neox")},
    "batches by length": lambda: {"max_tokens_per_micro_batch": 200},
}


def without_clock(trainer: DPOTrainer) -> list[dict[str, float]]:
    clock = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in clock)}
        for entry in steps(trainer)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    rows = tiny_pairs(20)
    whole = trained(tmp_path, rows=rows, **RUN, **KINDS[kind]())
    resumed = make_trainer(tmp_path, rows=rows, **RUN, **KINDS[kind]())
    torch.rand(17)  # the random state is the checkpoint's business
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert resumed.state.global_step == END
    assert without_clock(resumed) == without_clock(whole)
    assert same_bits(bits(resumed.model), bits(whole.model))
    module, expected = resumed.reference.module, whole.reference.module
    if module is not None and expected is not None:
        assert same_bits(bits(module), bits(expected))
    if whole.reference.traits.moves and module is None:
        with resumed.reference.in_policy(), whole.reference.in_policy():
            assert same_bits(bits(resumed.model), bits(whole.model))
    assert resumed.reference.figures() == whole.reference.figures()


def test_the_uninterrupted_run_does_not_depend_on_where_it_was_saved(tmp_path: Path) -> None:
    """Saving changes nothing: what the resumed run is compared with is what a run without checkpoints gives."""
    saved = trained(tmp_path / "1", **RUN, **SYNC)
    unsaved = trained(tmp_path / "2", **RUN | SYNC | {"save_strategy": "no"})
    assert without_clock(saved) == without_clock(unsaved) and same_bits(bits(saved.model), bits(unsaved.model))


def test_a_checkpoint_says_which_reference_it_was_trained_against(tmp_path: Path) -> None:
    trainer = trained(tmp_path, **RUN)
    identity = json.loads((tmp_path / f"checkpoint-{STOP}" / "reference" / "identity.json").read_text())
    assert identity == trainer.reference.identity.describe()
    names = {path.name for path in (tmp_path / f"checkpoint-{STOP}" / "reference").iterdir()}
    assert names == {"identity.json", "probe.json"}


OTHER_REFERENCES: dict[str, Callable[[], dict[str, Any]]] = {
    "another initial model": lambda: {"model": tiny_model(seed=1)},
    "another reference model": lambda: {"ref_model": tiny_model(seed=1)},
    "another dtype": lambda: {"ref_dtype": "bfloat16"},
    "another kind": lambda: SYNC,
    "another autocast": lambda: {"bf16": True, "use_cpu": True},
}


@pytest.mark.parametrize("kind", OTHER_REFERENCES)
def test_a_checkpoint_is_refused_with_another_reference(kind: str, tmp_path: Path) -> None:
    trained(tmp_path, **RUN)
    other = make_trainer(tmp_path, **RUN, **OTHER_REFERENCES[kind]())
    with pytest.raises(ResumeError) as caught:
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert "checkpoint" in str(caught.value) and caught.value.instead
    assert other.state.global_step == 0, "no step was taken"


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def continued_from(seed: int) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(tiny_model(), LoraConfig(**LORA, init_lora_weights=False))


class Mistake(NamedTuple):
    """How a run began, how it was wrongly resumed, and what the error must name as different and as the same."""

    began: Callable[[Path], dict[str, Any]]
    resumed: Callable[[Path], dict[str, Any]]
    differs: str
    alike: str


def checkpoint_of(folder: Path) -> str:
    return str(folder / f"checkpoint-{STOP}")


FRESH: dict[str, Any] = {"peft_config": LoraConfig(**LORA)}
MISTAKES: dict[str, Mistake] = {
    "the folder of the model was overwritten": Mistake(
        lambda folder: {"model": saved(tiny_model(), folder / "model")},
        lambda folder: {"model": saved(tiny_model(seed=1), folder / "model")},
        "The base weights differ",
        "The same in both: the model's config.",
    ),
    "the folder of the base under an adapter was overwritten": Mistake(
        lambda folder: {"model": saved(tiny_model(), folder / "model"), **FRESH},
        lambda folder: {"model": saved(tiny_model(seed=1), folder / "model"), **FRESH},
        "The base weights differ",
        "The same in both: the model's config.",
    ),
    "built from the weights of the checkpoint": Mistake(
        lambda folder: {"model": saved(tiny_model(), folder / "model")},
        lambda folder: {"model": checkpoint_of(folder)},
        "The base weights differ",
        "The same in both: the model's config.",
    ),
    "built from the adapter of the checkpoint": Mistake(
        lambda folder: {"model": saved(tiny_model(), folder / "model"), **FRESH},
        lambda folder: {"model": checkpoint_of(folder)},
        "The adapter differs: none (the base alone) in the checkpoint",
        "The same in both: the base weights, the model's config.",
    ),
    "another adapter": Mistake(
        lambda folder: {"model": continued_from(0)},
        lambda folder: {"model": continued_from(1)},
        "The adapter differs",
        "The same in both: the base weights, the model's config.",
    ),
    "a fresh adapter in place of the one that was continued": Mistake(
        lambda folder: {"model": continued_from(0)},
        lambda folder: FRESH,
        "none (the base alone) in this trainer",
        "The same in both: the base weights, the model's config.",
    ),
    "another config": Mistake(
        lambda folder: {"model": tiny_model()},
        lambda folder: {"model": tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 50.0})},
        "The model's config differs",
        "The same in both: the base weights.",
    ),
    "another reference model": Mistake(
        lambda folder: {"ref_model": tiny_model(seed=1)},
        lambda folder: {"ref_model": tiny_model(seed=2)},
        "The base weights differ",
        "The same in both: the model's config.",
    ),
    "without the reference model": Mistake(
        lambda folder: {"ref_model": tiny_model(seed=1)}, lambda folder: {}, "The base weights differ", "config."
    ),
    "in another dtype": Mistake(
        lambda folder: {},
        lambda folder: {"bf16": True, "use_cpu": True},
        "Its `compute_dtype` was float32 and is bfloat16 in this trainer.",
        "The same in both: the base weights, the model's config.",
    ),
    "without a reference": Mistake(
        lambda folder: {},
        lambda folder: {"reference_free": True},
        "Its `kind` was explicit and is free in this trainer.",
        "",
    ),
    "no longer following": Mistake(
        lambda folder: SYNC, lambda folder: {}, "Its `kind` was synchronized and is explicit", "the base weights"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_resume_with_another_reference_says_what_differs_and_how_to_give_the_right_one(
    name: str, tmp_path: Path
) -> None:
    mistake = MISTAKES[name]
    trained(tmp_path, **RUN | {"max_steps": STOP}, **mistake.began(tmp_path))
    other = make_trainer(tmp_path, **RUN, **mistake.resumed(tmp_path))
    with pytest.raises(ResumeError) as caught:
        other.train(resume_from_checkpoint=checkpoint_of(tmp_path))
    assert mistake.differs in caught.value.details and mistake.alike in caught.value.details
    assert "version of Tether" not in caught.value.instead and " , " not in caught.value.details
    assert "Or start a new run" in caught.value.instead and len(caught.value.instead) > 60
    assert other.state.global_step == 0, "no step was taken"


def test_a_checkpoint_of_another_vocabulary_is_refused_in_one_line(tmp_path: Path) -> None:
    """Tether 0.1.0 called an explicit reference frozen."""
    trained(tmp_path, **RUN | {"max_steps": STOP})
    identity = tmp_path / f"checkpoint-{STOP}" / "reference" / "identity.json"
    identity.write_text(identity.read_text().replace('"explicit"', '"frozen"'))
    (tmp_path / f"checkpoint-{STOP}" / "manifest.json").unlink()
    with pytest.raises(ResumeError, match=r"Cannot resume from .*: it was written by Tether 0\.1\.0"):
        make_trainer(tmp_path, **RUN, resume_changes=["manifest"]).train(resume_from_checkpoint=checkpoint_of(tmp_path))


def test_a_checkpoint_without_its_reference_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, **RUN)
    shutil.rmtree(tmp_path / f"checkpoint-{STOP}" / "reference")
    with pytest.raises(ResumeError, match=r"`reference/identity.json` is missing"):
        make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))


def test_a_checkpoint_without_some_of_the_weights_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, tiny_model("mixtral"), ref_model=tiny_model(), **RUN)
    trainer = make_trainer(tmp_path, tiny_model("qwen2_moe"), ref_model=tiny_model(), **RUN)
    with pytest.raises(ResumeError, match="no weights for"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))


def test_a_checkpoint_of_weights_alone_is_refused_for_resuming(tmp_path: Path) -> None:
    trained(tmp_path, **RUN | {"save_only_model": True})
    assert not (tmp_path / f"checkpoint-{STOP}" / "reference").exists()
    checkpoint = str(tmp_path / f"checkpoint-{STOP}")
    with pytest.raises(ResumeError, match="save_only_model") as caught:
        make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=checkpoint)
    assert f"DPOTrainer({checkpoint!r}, ref_model=...)" in caught.value.instead
    again = trained(tmp_path / "again", checkpoint, ref_model=tiny_model(), max_steps=1)
    assert steps(again)[0]["reference/initial_gap"] > 0.01, "its reference is the one that the first run began with"


def test_a_checkpoint_goes_on_with_another_learning_rate_and_length(tmp_path: Path) -> None:
    trained(tmp_path, **RUN)
    longer = make_trainer(tmp_path, **RUN | {"max_steps": END + 1, "learning_rate": 1e-4})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == END + 1


def test_a_rotated_checkpoint_keeps_its_reference(tmp_path: Path) -> None:
    trained(tmp_path, **RUN | {"save_steps": 2, "save_total_limit": 1})
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert (checkpoint / "reference" / "identity.json").is_file()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
def test_the_best_checkpoint_can_be_loaded_at_the_end(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 3,
        "learning_rate": 0.03,
        "load_best_model_at_end": True,
        "eval_dataset": as_dataset(tiny_pairs(8, seed=1)),
    }
    trainer = trained(tmp_path, tiny_model(family), **RUN | options)
    figures = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(figures)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(figures), abs=1e-6)


def best_of_three(folder: Path) -> dict[str, Any]:
    """Options of a run that is worse with every step, after one that was stopped before its last."""
    options: dict[str, Any] = RUN | {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 3,
        "metric_for_best_model": "rewards/margins",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "eval_dataset": as_dataset(tiny_pairs(24)),
    }
    trained(folder, **options)
    shutil.rmtree(folder / "checkpoint-3")
    return options


def test_the_best_checkpoint_is_found_where_the_folder_was_copied_to(tmp_path: Path) -> None:
    options, there = best_of_three(tmp_path / "here"), tmp_path / "there"
    shutil.copytree(tmp_path / "here", there)
    for is_moved in (False, True):
        if is_moved:
            shutil.rmtree(tmp_path / "here")
        resumed = make_trainer(there, **options)
        resumed.train(resume_from_checkpoint=str(there / "checkpoint-2"))
        assert resumed.state.best_model_checkpoint == str(there / "checkpoint-1")


def test_a_damaged_best_checkpoint_is_not_loaded_at_the_end(tmp_path: Path) -> None:
    options = best_of_three(tmp_path)
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = make_trainer(tmp_path, **options)
    with pytest.raises(
        ResumeError, match=r"Cannot load the best checkpoint, .*checkpoint-1: `model.safetensors` is not"
    ):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("which", ["the last", "named by True", "named in the options", "the best"])
def test_every_way_to_name_a_checkpoint_resumes_it(which: str, tmp_path: Path) -> None:
    options: dict[str, Any] = RUN | {
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": as_dataset(tiny_pairs(8, seed=1)),
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/margins",
    }
    whole = trained(tmp_path, **options)
    best = whole.state.best_model_checkpoint
    assert best is not None
    shutil.rmtree(tmp_path / f"checkpoint-{END}")  # the run was stopped before it was done
    name = {
        "the last": str(tmp_path / f"checkpoint-{END - 2}"),
        "named by True": True,
        "named in the options": str(tmp_path / f"checkpoint-{END - 2}"),
        "the best": best if Path(best).is_dir() else str(tmp_path / "checkpoint-2"),
    }[which]
    in_options = {"resume_from_checkpoint": name} if which == "named in the options" else {}
    resumed = make_trainer(tmp_path, **options, **in_options)
    resumed.train(resume_from_checkpoint=resumed.args.resume_from_checkpoint or name)
    assert without_clock(resumed) == without_clock(whole)
    assert resumed.state.best_metric == whole.state.best_metric
    assert same_bits(bits(resumed.model), bits(whole.model))


def test_resuming_where_there_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="there is none"):
        make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)


def test_an_adapter_in_bfloat16_goes_on_in_bfloat16(tmp_path: Path) -> None:
    """PEFT loads it as float32."""

    def options() -> dict[str, Any]:
        adapter = get_peft_model(tiny_model(dtype=torch.bfloat16), LoraConfig(**LORA), autocast_adapter_dtype=False)
        return RUN | {"model": adapter, "learning_rate": 1e-2}

    torch.manual_seed(0)
    whole = trained(tmp_path, **options())
    torch.manual_seed(0)
    resumed = make_trainer(tmp_path, **options())
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert {p.dtype for p in resumed.model.parameters()} == {torch.bfloat16}
    assert without_clock(resumed) == without_clock(whole) and same_bits(bits(resumed.model), bits(whole.model))


def test_an_adapter_is_resumed_from_its_best_checkpoint(tmp_path: Path) -> None:
    """A checkpoint that holds the adapter alone: its base is the trainer's."""
    options: dict[str, Any] = RUN | {"peft_config": LoraConfig(**LORA), "save_steps": 2, "learning_rate": 1e-2}
    whole = trained(tmp_path, **options)
    resumed = make_trainer(tmp_path, **options)
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(bits(resumed.model), bits(whole.model))
