"""What the trainer overrides of transformers' private methods is still there, with the arguments it had."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer, TrainingArguments

from tether import DPOConfig, DPOTrainer

OVERRIDDEN = {
    "_get_dataloader": ("dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_output_dir": ("trial",),
    "_init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_issue_warnings_after_load": ("load_result",),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_checkpoint": ("model", "trial"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_set_signature_columns_if_needed": (),
    "_track_num_input_tokens": ("inputs",),
}
# What it calls or reads, and does not override.
USED = ("_remove_unused_columns", "_save", "_prepare_inputs")


def ours() -> set[str]:
    """Private methods of our classes that transformers' trainer has too."""
    mine = [cls for cls in DPOTrainer.__mro__ if cls.__module__.startswith("tether.")]
    names = {name for cls in mine for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    return {name for name in names if callable(getattr(Trainer, name, None))}


def test_the_list_of_overridden_methods_is_whole() -> None:
    assert ours() == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_there_with_its_arguments(name: str) -> None:
    _, *parameters = inspect.signature(getattr(Trainer, name)).parameters
    assert tuple(parameters) == OVERRIDDEN[name]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_called_by_transformers(name: str) -> None:
    source = inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
    assert f"self.{name}(" in source


@pytest.mark.parametrize("name", USED)
def test_a_used_method_is_there(name: str) -> None:
    assert callable(getattr(Trainer, name))


def test_used_attributes_are_there() -> None:
    source = inspect.getsource(Trainer)
    assert all(f"self.{name} = " in source for name in ("_signature_columns", "_train_batch_size"))
    assert set(TrainingArguments._VALID_DICT_FIELDS) < set(DPOConfig._VALID_DICT_FIELDS)
