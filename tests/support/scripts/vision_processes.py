"""The runs of `test_vision_processes.py`, in as many processes as it is started with; writes what each one saw.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/vision_processes.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig

from support.launch import leave
from support.runs import make_trainer, steps
from support.tiny_vision import tiny_image_pairs, tiny_processor, tiny_vision_model

PAIRS_PER_STEP = 4
KINDS: dict[str, dict[str, Any]] = {
    "explicit": {},
    "implicit": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "learning_rate": 1e-2},
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def rows() -> list[dict[str, Any]]:
    """Rows of which some have no images, so that a process may have none in its part of a step."""
    return [row | ({"images": []} if number % 4 > 1 else {}) for number, row in enumerate(tiny_image_pairs(16))]


def run(folder: Path) -> dict[str, Any]:
    """The steps and the evaluation of every kind of run."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    found: dict[str, Any] = {}
    for number, (kind, options) in enumerate(KINDS.items()):
        trainer = make_trainer(
            folder / str(number),
            tiny_vision_model(),
            rows(),
            processing_class=tiny_processor(),
            per_device_train_batch_size=PAIRS_PER_STEP // num_processes,
            train_sampling_strategy="sequential",
            max_length=None,
            max_steps=4,
            **options,
        )
        trainer.train()
        found[kind] = {"steps": steps(trainer), "passes": trainer.reference.num_passes}
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    seen = run(target)
    leave(target, seen)
