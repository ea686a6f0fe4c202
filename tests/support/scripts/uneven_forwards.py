"""The runs of `test_uneven_forwards.py`, in as many processes as it is started with; writes what each one saw.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/uneven_forwards.py FOLDER PAIRS_PER_STEP
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from support.launch import leave
from support.ropes import ROPES
from support.runs import make_trainer, steps
from support.tiny import tiny_model, tiny_pairs

# With checkpointing, DDP looks for no unused parameters, and makes its buckets anew in the second step.
OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "longrope": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
}
RANK, NUM_PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def run(rope: str, folder: Path, pairs_per_step: int) -> dict[str, Any]:
    """What this process sees of a run with rows beyond the limit: its logs, forwards with gradient, and weights."""
    options = OPTIONS[rope]
    trainer = make_trainer(
        folder,
        tiny_model("llama", **ROPES[rope]),
        tiny_pairs(16),
        max_length=60,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=pairs_per_step // NUM_PROCESSES // options.get("gradient_accumulation_steps", 1),
        use_cpu=True,
        **options,
    )
    num_forwards = [0] * trainer.args.max_steps

    def count(module: torch.nn.Module, *args: Any) -> None:
        num_forwards[trainer.state.global_step] += torch.is_grad_enabled()

    trainer.model.register_forward_pre_hook(count)
    trainer.train()
    sums = {name: float(p.detach().double().square().sum()) for name, p in trainer.model.named_parameters()}
    return {"steps": steps(trainer), "num_forwards": num_forwards, "weights": sums}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    seen = {rope: run(rope, target / rope, int(sys.argv[2])) for rope in OPTIONS}
    leave(target, seen)
