"""Which pairs a step reads: loaders, micro-batches, and where a run is in its set.

Overrides transformers' loading of batches; knows no reference and no loss.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from tether.config.dpo_config import DPOConfig
from tether.data.collators import Collator
from tether.data.datasets import batch_columns, batch_of, num_pairs_tensor, uncounted
from tether.data.sampling import EvenBatches
from tether.trainer.batches import counted_loader, even_loader
from tether.trainer.checkpoints import StreamPlace, load_place
from tether.trainer.sets import SetReader
from tether.types import copies_later

logger = logging.getLogger(__name__)


class EpochsOfBatches(TrainerCallback):
    """Numbers the epochs of even batches; transformers does not through the wrappers of a resumed, distributed run.

    Attributes:
        batches: Those of the run; None where transformers makes the batches.
    """

    batches: EvenBatches | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.batches is not None:
            self.batches.set_epoch(int((state.epoch or 0.0) + 1e-6))


class PairLoading(Trainer):
    """The part of the trainer that loads batches of pairs."""

    args: DPOConfig
    _sets: SetReader
    _epochs: EpochsOfBatches
    _place: StreamPlace | None
    _signature_columns: Any

    @property
    def data_collator(self) -> Collator:
        """What makes the batches; one that is set holds for every loader made from then on."""
        return self._sets.collator

    @data_collator.setter
    def data_collator(self, given: Any) -> None:
        if given is not self._sets.collator:  # as transformers' constructor does with the one that it is given
            self._sets.use_collator(given)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches; grouped by length and cut to the token budget where that is asked for."""
        wanted = self.args.max_tokens_per_micro_batch or self.args.train_sampling_strategy == "group_by_length"
        if not isinstance(self.train_dataset, Dataset) or not wanted:
            return super().get_train_dataloader()
        loader, self._epochs.batches = even_loader(
            self.train_dataset, self.data_collator, self._train_batch_size, self.args, self.accelerator
        )
        return loader

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        make = super()._get_dataloader
        # Evaluation takes rows as they come; transformers would group them by `input_ids`, which they do not have.
        order = (lambda _: sampler_fn(dataset)) if is_training and sampler_fn else None
        return counted_loader(
            lambda rows: make(rows, description, batch_size, order, is_training, dataloader_key),
            dataset,
            batch_size,
            self.accelerator,
            drop_last=bool(self.args.dataloader_drop_last),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and the number of their pairs.

        A pass over a stream may end before there are as many as were asked for. transformers would then add their
        gradient to that of the next step: batches that do not count let it take a step of what there is.
        """
        batches, num_pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        missing = num_batches - len(batches)
        if batches and self._place is not None:
            self._place.take_step(ends_pass=missing > 0 or self.accelerator.gradient_state.end_of_dataloader)
            batches += [uncounted(batches[-1])] * missing
        return batches, num_pairs

    def _init_training_state(
        self, max_steps: int, num_steps: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Epochs that are over, and batches of the next one that are."""
        epochs, batches = super()._init_training_state(max_steps, num_steps, num_epochs, checkpoint, trial)
        if isinstance(self.train_dataset, IterableDataset):
            self._place = StreamPlace() if checkpoint is None else load_place(Path(checkpoint))
            if self.args.ignore_data_skip:
                self._place.num_steps = 0
            epochs, batches = self._place.num_passes, self._place.num_steps * self.args.gradient_accumulation_steps
        if checkpoint is None or self.state.global_step < max_steps:
            return epochs, batches
        logger.warning(
            f"Nothing to train: {Path(checkpoint).name} is at step {self.state.global_step}, and the run has "
            f"{max_steps}. To go on, set a larger `num_train_epochs` or `max_steps`."
        )
        return num_epochs, 0  # in whatever epoch it ended

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = batch_columns(
                with_images=self._sets.image_rows is not None, further=self.args.pair_columns.names
            )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Pairs of the whole optimizer step: all micro-batches of all processes. None where means are taken of each."""
        if not batch_samples or not self.loss_is_scaled_for_ga:
            return None
        counts = [num_pairs_tensor(inputs).to(device, non_blocking=copies_later(device)) for inputs in batch_samples]
        total: Tensor = self.accelerator.reduce(torch.stack(counts).sum(), reduction="sum")
        return total

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        super()._track_num_input_tokens(self._fed(inputs))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(self._fed(inputs))

    def _fed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What transformers counts tokens by: each response with its prompt, without padding."""
        tokens = torch.ones(batch_of(inputs).num_sequence_tokens())
        return {getattr(self.model, "main_input_name", "input_ids"): tokens, "attention_mask": tokens}
