"""The runs of `test_vision_processes.py` under DeepSpeed ZeRO-3, or without it in one process; writes what it saw.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/vision_zero.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support.launch import leave
from support.runs import make_trainer, steps
from support.scripts.vision_processes import KINDS, PAIRS_PER_STEP, rows
from support.scripts.zero_runs import deepspeed_config
from support.tiny_vision import tiny_image_pairs, tiny_processor, tiny_vision_model
from tether.distributed import has_shards
from tether.errors import DataError

NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def trainer_of(folder: Path, pairs: list[dict[str, Any]], **options: Any) -> Any:
    unset_hf_deepspeed_config()  # a model made while an earlier run's config is alive would be partitioned at birth
    if NUM_PROCESSES > 1:
        options["deepspeed"] = deepspeed_config(3, persistent=False)
    return make_trainer(
        folder,
        tiny_vision_model(),
        pairs,
        processing_class=tiny_processor(),
        per_device_train_batch_size=PAIRS_PER_STEP // NUM_PROCESSES,
        train_sampling_strategy="sequential",
        max_length=None,
        max_steps=3,
        use_cpu=True,
        **options,
    )


def refusal(folder: Path, *, free: bool) -> str:
    """How rows with and without images are refused: by the reference's forward; by the policy's if there is none."""
    try:
        trainer_of(folder / f"mixed-{free}", rows(), reference_free=free).train()
    except DataError as error:
        return str(error)
    return "not refused"


def run(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, kind in enumerate(("explicit", "implicit", "precomputed")):
        trainer = trainer_of(folder / str(number), tiny_image_pairs(12), **KINDS[kind])
        trainer.train()
        found[kind] = {"steps": steps(trainer), "sharded": has_shards(trainer.model)}
    if NUM_PROCESSES > 1:
        found["mixed"] = [refusal(folder, free=free) for free in (False, True)]
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    seen = run(target)
    leave(target, seen)
