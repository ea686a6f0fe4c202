"""The runs of `test_zero.py`, in as many processes as it is started with; writes what each one saw.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/zero_runs.py FOLDER CASE...

With one process the same runs are made without DeepSpeed, to compare with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support.launch import leave
from support.observe import same_bits
from support.runs import as_dataset, make_trainer, steps
from support.tiny import tiny_model, tiny_pairs
from tether import DPOTrainer
from tether.distributed import forget_gathered, gather, has_shards
from tether.errors import ConfigurationError
from tether.types import PairBatch

NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
PAIRS_PER_STEP, NUM_STEPS = 4, 4


def lora(**options: Any) -> dict[str, Any]:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    return {"peft_config": config, "learning_rate": 1e-2}


# Three batches of 16 rows, and one of the 7 for evaluation: one process has more of them than the other.
STORED = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 7}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
REFERENCES: dict[str, dict[str, Any]] = {
    "explicit": {},
    "named": {"named": True},
    "implicit": lora(),
    "continued": lora(init_lora_weights=False),
    "saved": lora(modules_to_save=["lm_head"]),
    "precomputed": STORED,
    "precomputed-implicit": STORED | lora(),
    "synchronized": SYNC,
    "synchronized-named": SYNC | {"named": True},
    "synchronized-implicit": SYNC | lora(),
    "hard": SYNC | {"ref_model_mixup_alpha": 1.0},
}


def deepspeed_config(stage: int, persistent: bool, autocast: bool = False) -> dict[str, Any]:
    """`persistent`: small parameters stay whole on every process between passes, as they do by default."""
    zero: dict[str, Any] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    if not persistent:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
    }


def trainer_of(folder: Path, case: str, **more: Any) -> DPOTrainer:
    """`case` is REFERENCE/stage/how the model was loaded[/flag]: `explicit/3/born` was partitioned at birth."""
    kind, stage, loaded, *flags = case.split("/")
    options = REFERENCES[kind] | more
    named = options.pop("named", False)
    options["gradient_checkpointing"] = "checkpointed" in flags
    options["bf16"] = "bf16" in flags
    if NUM_PROCESSES > 1:
        options["deepspeed"] = deepspeed_config(int(stage), "persistent" in flags, "autocast" in flags)
    # From a folder the model is loaded by the trainer, when transformers already knows that it will be partitioned.
    # An instance made while an earlier run's config is still alive would be partitioned too.
    if loaded == "whole":
        unset_hf_deepspeed_config()
    models = Path(sys.argv[1]) / "models"
    model, other = (
        (str(models / "policy"), str(models / "other")) if loaded == "born" else (tiny_model(), tiny_model(seed=5))
    )
    os.environ["TETHER_HOME"] = str(folder / "home")
    return make_trainer(
        folder,
        model,
        tiny_pairs(16),
        ref_model=other if named else None,
        per_device_train_batch_size=PAIRS_PER_STEP // NUM_PROCESSES,
        per_device_eval_batch_size=2,
        eval_dataset=as_dataset(tiny_pairs(7, seed=1)),
        max_steps=NUM_STEPS,
        use_cpu=True,
        **options,
    )


def observed(folder: Path, case: str) -> dict[str, Any]:
    """What this process sees of one run."""
    trainer = trainer_of(folder, case)
    partitioned_at_birth = has_shards(trainer.model)
    batch = sentinel(trainer)
    before = trainer.reference.log_probs(batch).values if not trainer.reference.traits.runs_in_policy else None
    trainer.train()
    after = trainer.reference.log_probs(batch).values
    module = trainer.ref_model
    return {
        "steps": steps(trainer),
        "evaluation": trainer.evaluate()["eval_loss"],
        "identity": trainer.reference.identity.weights,
        "num_computed": getattr(trainer.reference, "num_computed", None),
        "partitioned_at_birth": partitioned_at_birth,
        "policy_is_sharded": has_shards(trainer.model),
        "reference_is_sharded": module is not None and has_shards(module),
        "extra_bytes": trainer.reference.extra_bytes,
        "export_differs_in": export_differs_in(trainer, folder / "exported"),
        "drift": None if before is None else float((after - before).abs().max()),
    }


def export_differs_in(trainer: DPOTrainer, folder: Path) -> list[str] | None:
    """Tensors of the exported reference that are not the reference's own, bit for bit; None where it has no model."""
    if trainer.ref_model is None:
        return None
    trainer.export_reference(folder)
    own = whole_bits(trainer.ref_model)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    saved = load_file(folder / "model.safetensors")
    return sorted(name for name in own.keys() | saved.keys() if not same_bits({0: saved[name]}, {0: own[name]}))


def refusal(folder: Path, case: str) -> str:
    """With what words the trainer is refused."""
    try:
        trainer_of(folder, case)
    except ConfigurationError as error:
        return str(error)
    return ""


def sentinel(trainer: DPOTrainer) -> PairBatch:
    batch: PairBatch = trainer.data_collator(list(trainer.train_dataset.take(2)))["batch"]
    return batch


def resumes(folder: Path, case: str) -> bool:
    """Whether a run that stopped half-way and was resumed is the uninterrupted one, bit for bit, in this process."""
    uninterrupted = trainer_of(folder, case, save_strategy="steps", save_steps=NUM_STEPS // 2)
    uninterrupted.train()
    resumed = trainer_of(folder, case)
    torch.rand(17)  # the random state is the checkpoint's business
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{NUM_STEPS // 2}"))
    batch = sentinel(resumed)
    answers = [trainer.reference.log_probs(batch).values for trainer in (resumed, uninterrupted)]
    weights = [whole_bits(trainer.model) for trainer in (resumed, uninterrupted)]
    return same_bits(*weights) and torch.equal(*answers)


def best(folder: Path, case: str) -> list[float]:
    """The figure of the best checkpoint, which is the first, that of the last, and what is loaded at the end."""
    options = {"metric_for_best_model": "num_tokens", "greater_is_better": False, "load_best_model_at_end": True}
    times = {f"{what}_{by}": value for what in ("save", "eval") for by, value in (("strategy", "steps"), ("steps", 2))}
    trainer = trainer_of(folder, case, **options, **times)
    trainer.train()
    figures = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return [*figures, trainer.evaluate()["eval_loss"]]


def whole_bits(model: nn.Module) -> dict[str, Tensor]:
    forget_gathered(model)
    return {name: gather(parameter).clone() for name, parameter in model.named_parameters()}


def make_models(folder: Path) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        tiny_model().save_pretrained(folder / "policy")
        tiny_model(seed=5).save_pretrained(folder / "other")
    if NUM_PROCESSES > 1:
        # Its kernel for processes of one machine takes a minute to compile; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    make_models(target / "models")
    seen: dict[str, Any] = {}
    for number, name in enumerate(sys.argv[2:]):
        run, _, checked = name.partition(":")
        place = target / f"run-{number}"
        seen[name] = {"": observed, "resume": resumes, "best": best, "refuse": refusal}[checked](place, run)
    leave(target, seen)
