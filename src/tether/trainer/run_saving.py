"""What a run saves and goes on from: the policy with its card, and checkpoints with the reference in them.

Overrides transformers' saving and loading; what a checkpoint keeps, `checkpoints` knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from tether.config.dpo_config import DPOConfig
from tether.distributed import of_main, raising_together
from tether.losses import Objective
from tether.models.finite import LossWatch, check_weights
from tether.trainer.callbacks import BEMACallback
from tether.trainer.checkpoint_weights import load_weights, save_adapters
from tether.trainer.checkpoints import Kept, StreamPlace, check_reference, load_companions, load_run, save_run
from tether.trainer.manifest import Manifest, check_files, listed_alone, read_manifest, write_manifest
from tether.trainer.model_card import write_model_card
from tether.trainer.reference_note import write_reference_note
from tether.trainer.reference_run import ReferenceRun
from tether.trainer.resuming import (
    AboutRun,
    check_optimizer,
    check_same_adapters,
    check_same_run,
    check_unproven,
    named_checkpoint,
    reading,
    refuse_changes,
)
from tether.trainer.run_folder import RunFolder
from tether.trainer.sets import named_sets


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
    _router_coefficient: float
    _folder: RunFolder
    _about: AboutRun
    _origin: Path | None = None
    _is_saving = False

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
            if output_dir in (None, self.args.output_dir):
                self._folder.note_saved(self.state.global_step)

    def _check_weights(self) -> None:
        check_weights(self.accelerator.unwrap_model(self.model), "keep the policy", self.state.global_step)

    @contextmanager
    def _in_folder(self, resume: Any) -> Iterator[str | None]:
        """A new run in `output_dir`; while open, this process holds it. Every process calls it.

        Args:
            resume: The checkpoint to go on from; True for the last one of the run that was last started there.

        Yields:
            The folder with what is listed of that checkpoint.
        """
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        self._about = AboutRun.of(
            args,
            policy,
            named_sets(self.train_dataset, self.eval_dataset),
            loss_type=self._objective.names,
            router_aux_loss_coef=self._router_coefficient,
            BEMACallback=[average.options for average in self._averages],
        )
        self._folder = RunFolder(Path(str(args.output_dir)))
        manifest, checkpoint = None, None
        with raising_together():
            if resume not in (None, False):
                checkpoint = named_checkpoint(self._folder.path, resume)
                manifest = self._checked(checkpoint)
            elif args.resume_changes:
                refuse_changes(args.resume_changes)
        self._origin = checkpoint
        with ExitStack() as stack:
            with raising_together():
                if self.is_world_process_zero():
                    stack.enter_context(self._folder.held(checkpoint, take_over=args.take_over))
            self._folder.run = of_main(self._folder.run)
            yield None if checkpoint is None else str(stack.enter_context(listed_alone(checkpoint, manifest)))

    def _checked(self, checkpoint: Path) -> Manifest | None:
        """The manifest of a checkpoint that is whole, and of this run."""
        manifest, allowed = read_manifest(checkpoint), self.args.resume_changes or []
        if manifest is None:
            check_unproven(checkpoint, allowed, self.args)
        else:
            if self.args.should_save:
                check_files(checkpoint, manifest)
            check_same_adapters(checkpoint, manifest.about, self._about)
        check_reference(checkpoint, self._reference_run.reference, is_proven=manifest is not None)
        if manifest is not None:
            check_same_run(checkpoint, manifest.about, self._about, allowed)
        return manifest

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are; while one is written, where it is until it is whole."""
        return str(self._folder.staging) if self._is_saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside its place, its manifest last, and moves it there whole."""
        self._losses.check()
        self._check_weights()  # before anything is written
        name, writes = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.args.should_save
        if writes:
            self._folder.clear()
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            with self._folder.saving(name):
                super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        written, place = self._folder.staging / name, self._folder.path / name
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(place)
            if writes:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()  # every process has written
        with raising_together():
            if writes and written.is_dir():
                with self._folder.saving(name):
                    write_manifest(written, self._folder.run, self.state.global_step, asdict(self._about))
                    self._folder.publish(name)
        if writes:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(self._folder.path), self.args.save_total_limit, best, use_mtime=True)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(place))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: a checkpoint is pushed once it is whole."""

    @property
    def _kept(self) -> Kept:
        run = self._reference_run
        return Kept(run.reference, run.watch, run.probes, self._objective.reward_shift)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        num_tokens = self._sum_tokens()  # every process takes part
        save_run(Path(output_dir), self._kept, num_tokens, self._place, writes=self.args.should_save)
        for average in self._averages if self.is_world_process_zero() else ():
            average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_optimizer(self.optimizer)
        num_tokens = load_run(Path(checkpoint), self._kept)
        self._num_train_tokens = num_tokens if self.args.process_index == 0 else 0
        for average in self._averages:
            average.resume_from(Path(checkpoint))

    @property
    def _averages(self) -> list[BEMACallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, BEMACallback)]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(resume_from_checkpoint):
            if not load_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Also finds the best checkpoint beside the one that is resumed: the folder may have been moved or copied."""
        reached = super()._init_training_state(*args, **kwargs)
        if self._origin is not None and (self._origin / TRAINER_STATE_NAME).is_file():
            recorded = TrainerState.load_from_json(str(self._origin / TRAINER_STATE_NAME)).best_model_checkpoint
            beside = self._origin.parent / Path(str(recorded)).name
            if recorded is not None and beside.is_dir():
                self.state.best_model_checkpoint = str(beside)
        return reached

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warns of weights that were not in a file, but not of other names of those that were."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(tensor) for name, tensor in named.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(named.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_best_model(self) -> None:
        checkpoint = Path(str(self.state.best_model_checkpoint))
        self.accelerator.wait_for_everyone()  # one process may still be writing it
        with raising_together():
            if self.args.should_save and (manifest := read_manifest(checkpoint)):
                instead = "Resume the last checkpoint with `load_best_model_at_end=False`, which keeps its weights."
                check_files(checkpoint, manifest, "load the best checkpoint,", instead)
        if self.is_deepspeed_enabled or not load_weights(self.accelerator.unwrap_model(self.model), checkpoint):
            super()._load_best_model()
        load_companions(checkpoint, self._kept)

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(totals, reduction="sum")
        return reduced

    def _sum_tokens(self) -> float:
        return self._sum_over_processes(torch.tensor(float(self._num_train_tokens), device=self.args.device)).item()
