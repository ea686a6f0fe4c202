"""The faults of `test_verdicts.py`, each on process 1 alone; writes what every process raised.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/verdicts.py FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from support.launch import leave
from support.runs import make_trainer
from support.tiny import tiny_model
from tether import DPOTrainer, LossOptions, PairScores
from tether.errors import TetherError
from tether.losses import LOSSES

RANK = int(os.environ["RANK"])


def trainer_of(folder: Path, **options: Any) -> DPOTrainer:
    return make_trainer(folder, **{"per_device_train_batch_size": 2, "use_cpu": True} | options)


def change(model: nn.Module | None) -> None:
    """On process 1 alone."""
    if RANK == 1:
        assert model is not None
        with torch.no_grad():
            next(model.parameters()).add_(0.5)


class ChangeReference(TrainerCallback):
    def __init__(self) -> None:
        self.trainer: DPOTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            assert self.trainer is not None
            change(self.trainer.ref_model)


def gap(folder: Path) -> None:
    trainer = trainer_of(folder)
    if RANK == 1:
        reference: Any = trainer.ref_model
        reference.model.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    trainer.train()


def drift(folder: Path) -> None:
    callback = ChangeReference()
    trainer = trainer_of(folder, callbacks=[callback], save_strategy="steps", save_steps=2)
    callback.trainer = trainer
    trainer.train()


def other_weights(folder: Path) -> None:
    model = tiny_model()
    change(model)
    trainer_of(folder, model=model)


def nan_weights(folder: Path) -> None:
    model = tiny_model()
    if RANK == 1:
        next(model.parameters()).data[0, 0] = torch.nan
    trainer_of(folder, model=model)


def nan_loss(folder: Path) -> None:
    """At the last step: process 0 sees its own loss alone, which is finite."""
    calls = iter(range(1, 9))

    def loss(scores: PairScores, options: LossOptions) -> Tensor:
        losses = LOSSES["sigmoid"](scores, options)
        return losses * torch.nan if next(calls) == 2 and RANK == 1 else losses

    try:
        trainer_of(folder, loss=loss, max_steps=2, logging_steps=2, save_strategy="steps", save_steps=1).train()
    finally:
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def nan_weights_late(folder: Path) -> None:
    """Every process holds them, whose own loss was finite."""
    calls = iter(range(1, 9))

    def loss(scores: PairScores, options: LossOptions) -> Tensor:
        losses = LOSSES["sigmoid"](scores, options)
        ruinous = next(calls) == 2 and RANK == 1
        return losses + torch.sqrt(scores.policy_chosen - scores.policy_chosen) if ruinous else losses

    trainer_of(folder, loss=loss, max_steps=2, logging_steps=2).train()


def resume(folder: Path) -> None:
    """As where each machine has a disk of its own, and that of process 1 holds another run's checkpoint."""
    trainer_of(folder, save_strategy="steps", save_steps=1, max_steps=1).train()
    own = folder / f"disk-{RANK}"
    shutil.copytree(folder / "checkpoint-1", own)
    identity = own / "reference" / "identity.json"
    if RANK == 1:
        identity.write_text(json.dumps(json.loads(identity.read_text()) | {"weights": "another"}))
    trainer_of(folder, max_steps=2).train(resume_from_checkpoint=str(own))


def missing_row(folder: Path) -> None:
    """A store that reached process 0 whole, and process 1 not at all."""
    whole, empty = folder / "whole.sqlite", folder / "empty.sqlite"
    trainer_of(folder, precompute_ref_log_probs=True, ref_store=str(whole))
    own = whole if RANK == 0 else empty
    trainer_of(folder, precompute_ref_log_probs=True, ref_store=str(own), ref_store_mode="require")


FAULTS: dict[str, Callable[[Path], None]] = {
    "gap": gap,
    "drift": drift,
    "other_weights": other_weights,
    "nan_weights": nan_weights,
    "nan_loss": nan_loss,
    "nan_weights_late": nan_weights_late,
    "resume": resume,
    "missing_row": missing_row,
}


def raised_by(fault: Callable[[Path], None], folder: Path) -> dict[str, str]:
    try:
        fault(folder)
    except TetherError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "none", "message": ""}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    seen = {name: raised_by(fault, target / name) for name, fault in FAULTS.items()}
    leave(target, seen)
