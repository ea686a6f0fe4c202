"""The runs of `test_samples.py`, in as many processes as it is started with; writes what each one logged.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/samples.py FOLDER PAIRS_PER_STEP
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import peft
import torch

from support.launch import leave
from support.runs import trained
from support.tiny import tiny_pairs

KINDS: dict[str, dict[str, Any]] = {"explicit": {}, "implicit": {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM")}}

if __name__ == "__main__":
    torch.set_num_threads(1)
    target, num_processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    seen: dict[str, Any] = {}
    for kind, options in KINDS.items():
        batch_size = int(sys.argv[2]) // num_processes
        trainer = trained(
            target / kind,
            report_samples=3,
            report_samples_max_new_tokens=8,
            per_device_train_batch_size=batch_size,
            eval_dataset=tiny_pairs(8, seed=3),
            eval_strategy="epoch",
            use_cpu=True,
            **options,
        )
        seen[kind] = [entry for entry in trainer.state.log_history if "samples/length" in entry]
    leave(target, seen)
