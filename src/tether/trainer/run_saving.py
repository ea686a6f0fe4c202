"""What a run saves and goes on from: the policy with its card, and checkpoints with the reference in them.

Overrides transformers' saving and loading; what a checkpoint keeps, `checkpoints` knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tether.config.dpo_config import DPOConfig
from tether.losses import Objective
from tether.models.finite import LossWatch, check_weights
from tether.trainer.callbacks import BEMACallback
from tether.trainer.checkpoint_weights import load_weights, save_adapters
from tether.trainer.checkpoints import Kept, StreamPlace, load_companions, load_run, save_run
from tether.trainer.model_card import write_model_card
from tether.trainer.reference_note import write_reference_note
from tether.trainer.reference_run import ReferenceRun


class RunSaving(Trainer):
    """The part of the trainer that saves and resumes."""

    args: DPOConfig
    model: Any
    _reference_run: ReferenceRun
    _objective: Objective
    _losses: LossWatch
    _place: StreamPlace | None
    _num_train_tokens: int
    _reference_name: str

    def export_reference(self, folder: str | Path, *, merged: bool = False) -> None:
        """Saves the reference as it is now, with the tokenizer, to be loaded as any other model or adapter.

        A full model loads with `AutoModelForCausalLM.from_pretrained(folder)`, an adapter with
        `PeftModel.from_pretrained(base, folder)`, whose ranks may be larger than the policy's. Every process must
        call it, because sharded weights are gathered; one writes.

        Args:
            folder: Where to.
            merged: Save an adapter's reference as a full model, with the adapter in its weights.

        Raises:
            ReferenceModelError: If the reference has no weights of its own, or cannot be saved in that form.
        """
        writes = self.args.should_save
        self._reference_run.reference.export(Path(folder) if writes else None, merged=merged)
        if writes:
            assert self.processing_class is not None
            self.processing_class.save_pretrained(folder)

    def create_model_card(  # type: ignore[override]  # TRL's arguments, which its scripts pass by position
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes `output_dir/README.md`: the loss, the reference and the options of this run, and what to cite.

        Args:
            model_name: The model's name; by default the output folder's.
            dataset_name: The data's name on the hub.
            tags: Further tags.
        """
        if self.is_world_process_zero():
            write_model_card(self, Path(str(self.args.output_dir)), model_name, dataset_name, tags)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy with its tokenizer and its card; weights that are NaN or infinite are refused."""
        self._check_weights()
        super().save_model(output_dir, _internal_call)
        # A checkpoint; DeepSpeed's own files of one have every tensor under its name.
        if _internal_call and output_dir is not None and not self.is_deepspeed_enabled:
            save_adapters(self.accelerator.unwrap_model(self.model), Path(output_dir), writes=self.args.should_save)
        if _internal_call or output_dir in (None, self.args.output_dir):  # all checkpoints share one card
            self.create_model_card()
        elif self.is_world_process_zero():
            write_model_card(self, Path(output_dir))
        if self.is_world_process_zero():
            write_reference_note(self, Path(output_dir or str(self.args.output_dir)), self._reference_name)

    def _check_weights(self) -> None:
        check_weights(self.accelerator.unwrap_model(self.model), "keep the policy", self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._losses.check()
        self._check_weights()  # before anything is written
        super()._save_checkpoint(model, trial)

    @property
    def _kept(self) -> Kept:
        run = self._reference_run
        return Kept(run.reference, run.watch, run.probes, self._objective.reward_shift)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        num_tokens = self._sum_tokens()  # every process takes part
        save_run(Path(output_dir), self._kept, num_tokens, self._place, writes=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        num_tokens = load_run(Path(checkpoint), self._kept)
        self._num_train_tokens = num_tokens if self.args.process_index == 0 else 0
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, BEMACallback):
                callback.resume_from(Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        checkpoint = Path(str(self.state.best_model_checkpoint))
        self.accelerator.wait_for_everyone()  # one process may still be writing it
        if self.is_deepspeed_enabled or not load_weights(self.accelerator.unwrap_model(self.model), checkpoint):
            super()._load_best_model()
        load_companions(checkpoint, self._kept)

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(totals, reduction="sum")
        return reduced

    def _sum_tokens(self) -> float:
        return self._sum_over_processes(torch.tensor(float(self._num_train_tokens), device=self.args.device)).item()
