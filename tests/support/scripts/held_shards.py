"""The runs of `test_held_shards.py`, in two processes: what an adapter's reference shares is sharded, and changes.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/held_shards.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support.launch import leave
from support.runs import as_dataset, make_trainer
from support.tiny import tiny_model, tiny_pairs
from tether.distributed import local_shard
from tether.errors import DriftError
from tether.reference import ImplicitReference
from tether.reference.held import HeldTensors
from tether.testing import naive_log_probs_of

CHANGED = "base_model.model.model.layers.0.mlp.up_proj.weight"


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))


def shrink(model: nn.Module) -> None:
    """As a fused kernel writes: without a version."""
    local_shard(dict(model.named_parameters())[CHANGED]).data.mul_(0.5)


def fsdp2() -> dict[str, Any]:
    """A loop without the trainer. After a pass the root's own weights are whole, as FSDP2 leaves them."""
    policy = adapted()
    mesh = init_device_mesh("cpu", (2,))
    for layer in policy.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    held = HeldTensors(ImplicitReference(policy).held_by_others())
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1, fused=True)
    ids = torch.arange(5, 15)[None]
    found: list[list[str]] = []
    for _ in range(3):
        policy(ids).logits.sum().backward()
        optimizer.step()
        found.append(held.changed_at_step())
        with torch.no_grad():
            policy(ids)
        found += [held.changed_at_step(), held.changed()]
    shrink(policy)
    return {"sound": found, "bytes": held.num_bytes, "changed": held.changed()}


class Shrinks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:  # before, a batch of other lengths would be refused for it
            shrink(model)


def zero(folder: Path, stage: int, prepare: Callable[[Any], object], **options: Any) -> Any:
    """A run under ZeRO, with what its reference answers after it, and what the initial policy answers."""
    unset_hf_deepspeed_config()
    policy = adapted()
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    config |= {"gradient_accumulation_steps": "auto"}
    more = {"deepspeed": config, "use_cpu": True, "learning_rate": 0.03, "max_steps": 4} | options
    trainer = make_trainer(folder, policy, as_dataset(tiny_pairs(16)), per_device_train_batch_size=2, **more)
    prepare(policy)
    batch = trainer.data_collator(list(trainer.train_dataset.take(2)))["batch"]
    try:
        trainer.train()
    except DriftError as error:
        return error.problem
    unset_hf_deepspeed_config()  # else the next model would be partitioned too
    moved = trainer.reference.log_probs(batch).values - naive_log_probs_of(tiny_model(), batch)
    return {"kept_bytes": trainer.reference.extra_bytes, "moved": float(moved.abs().max())}


def unfreeze(policy: Any) -> None:
    policy.requires_grad_(True)


def leave_it(policy: Any) -> None:
    pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile; gloo does the same
    torch.distributed.init_process_group("gloo")
    target = Path(sys.argv[1])
    seen = {
        "fsdp2": fsdp2(),
        "changed": zero(target / "changed", 3, leave_it, callbacks=[Shrinks()]),
        "sound": zero(target / "sound", 3, leave_it),
        "unfrozen/2": zero(target / "2", 2, unfreeze),
        "unfrozen/3": zero(target / "3", 3, unfreeze),
    }
    leave(target, seen)
