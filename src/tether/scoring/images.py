"""Checks the images of a batch before a sharded model reads them.

Knows tensors and rows; knows no family of models: the processor decides which arguments there are.
"""

from __future__ import annotations

import torch
from torch import nn

from tether.distributed import has_shards, num_processes, reduced
from tether.errors import DataError
from tether.types import PairBatch


def check_even_images(base: nn.Module, batch: PairBatch) -> None:
    """Refuses a forward in which only some processes would use a sharded vision tower. Collective.

    Args:
        base: The model itself, since a wrapper (DeepSpeed's engine) has another config, or none.
        batch: This process's input.

    Raises:
        DataError: On every process, if this batch has images on some of them and none on others.
    """
    has_tower = getattr(base.config, "vision_config", None) is not None
    if num_processes() == 1 or not has_tower or not has_shards(base):
        return
    flags = torch.tensor([int(bool(batch.images)), int(not batch.images)], device=batch.device)
    if reduced(flags, "max").sum() == 2:
        raise DataError(
            problem="Cannot run a sharded model on a batch with images on one process and none on another: the vision "
            "tower's weights are gathered from all processes, so the run would hang.",
            instead="Train rows with and without images separately, give every row an image, or train without ZeRO-3 "
            "and FSDP2.",
        )
