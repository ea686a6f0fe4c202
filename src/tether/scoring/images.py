"""What a model reads besides token ids, put together for the rows of a batch.

Knows tensors and rows; knows no family of models: a processor said which arguments there are.
"""

from __future__ import annotations

import torch
from torch import nn

from tether.distributed import has_shards, num_processes, reduced
from tether.errors import DataError
from tether.types import PairBatch


def check_even_images(base: nn.Module, batch: PairBatch) -> None:
    """Refuses a forward in which a part of the sharded vision tower's owners would not take part. Collective.

    Args:
        base: The model itself: a wrapper (DeepSpeed's engine) has another config, or none.
        batch: What this process feeds it.

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
