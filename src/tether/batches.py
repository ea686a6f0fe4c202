"""From tokenized sets to micro-batches on a device: for the precompute pass, and grouped by length for training.

Knows loaders, samplers and accelerate's way with them; knows no model and no reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from tether.config import DPOConfig
from tether.data import MARGIN_COLUMN, TOKEN_COLUMNS, batch_of
from tether.sampling import EvenBatches
from tether.types import PairBatch

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


class ProcessBatches:
    """Every n-th batch of a set, n the number of processes: together they see each row once.

    Args:
        dataset: A tokenized set.
        collator: Makes a batch of rows.
        size: Pairs of a batch.
        args: The run's options: which process this is, and its device.
    """

    def __init__(self, dataset: Dataset, collator: Collator, size: int, args: DPOConfig) -> None:
        rows = token_columns(dataset)
        starts = range(args.process_index * size, len(rows), size * args.world_size)
        parts = [list(range(start, min(start + size, len(rows)))) for start in starts]
        self._loader: DataLoader[Any] = DataLoader(rows, batch_sampler=parts, collate_fn=collator)
        self._device: torch.device = args.device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[PairBatch]:
        return (batch_of(inputs).to(self._device) for inputs in self._loader)


def even_loader(
    dataset: Dataset, collator: Collator, max_pairs: int, args: DPOConfig, accelerator: Accelerator
) -> tuple[DataLoader[Any], EvenBatches]:
    """The training batches of `EvenBatches`, dealt to the processes, and the sampler to tell the epoch to."""
    sampler = EvenBatches(
        pair_lengths(dataset, args.max_length),
        max_pairs=max_pairs,
        max_tokens=args.max_tokens_per_micro_batch,
        num_processes=args.world_size,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )
    loader: DataLoader[Any] = DataLoader(
        token_columns(dataset),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    evened = accelerator.even_batches
    accelerator.even_batches = False  # they are even already, and accelerate cannot even variable sizes
    try:
        return accelerator.prepare(loader), sampler
    finally:
        accelerator.even_batches = evened


def pair_lengths(dataset: Dataset, max_length: int | None) -> list[int]:
    """Tokens of each pair as it is laid out: its prompt once, and both responses as far as `max_length` lets them."""
    limit = max_length or sys.maxsize
    lengths = []
    for row in token_columns(dataset):
        room = max(limit - len(row["prompt_ids"]), 1)
        lengths.append(len(row["prompt_ids"]) + min(len(row["chosen_ids"]), room) + min(len(row["rejected_ids"]), room))
    return lengths


def token_columns(dataset: Dataset) -> Any:
    """The set with what a batch needs of it."""
    margin = [MARGIN_COLUMN] if MARGIN_COLUMN in dataset.column_names else []
    return dataset.select_columns([*TOKEN_COLUMNS, *margin])
