"""The loops of `test_fsdp2.py`: no trainer, two processes, `fully_shard`; writes what each process saw.

torchrun --standalone --nproc_per_node 2 tests/support/scripts/fsdp2_runs.py FOLDER CASE...

Each case is run sharded, and on the same process unsharded with the batches of both processes, to compare with.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from support.launch import leave
from support.observe import same_bits
from support.runs import as_dataset
from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether.data.datasets import PairCollator, batch_of, tokenize_pairs
from tether.distributed import forget_gathered, gather, has_shards
from tether.errors import ConfigurationError
from tether.losses import LOSSES, LossOptions
from tether.reference import (
    ExplicitReference,
    ImplicitReference,
    PrecomputedReference,
    Reference,
    SynchronizedReference,
)
from tether.reference.adapter_tensors import adapter_tensors
from tether.scoring import score
from tether.store import LogProbStore
from tether.trainer.checkpoint_weights import load_weights, save_adapters
from tether.trainer.checkpoints import load_reference, save_reference
from tether.types import PairBatch, PairScores

NUM_STEPS = 4
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "bf16": {"dtype": torch.bfloat16},
    "checkpointed": {},  # activation checkpointing: layers are gathered again in the backward
    "head": {},  # the head is a unit of its own, so that its weight is given up before the backward
    "tail": {},  # embeddings, and norm and head together, as accelerate does it
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "implicit": {},
    "continued": {"init_lora_weights": False},
    "saved": {"modules_to_save": ["lm_head"]},
    # The head is in the root, which FSDP2 keeps gathered after a pass: it must not keep what was exchanged.
    "continued-saved": {"init_lora_weights": False, "modules_to_save": ["lm_head"]},
    "followed": {},  # by a synchronized reference, which is refused
}
# The policy's weight in each sync.
ALPHAS = {"synchronized": 0.5, "hard": 1.0, "followed": 0.5}


def model_of(case: str) -> nn.Module:
    kind, _, model = case.partition("/")
    policy: nn.Module = tiny_model(**MODELS[model])
    if model == "checkpointed":
        policy.gradient_checkpointing_enable()  # type: ignore[operator]
    if kind in ADAPTERS:
        torch.manual_seed(0)
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **ADAPTERS[kind]))
    return policy.train()


def shard(model: nn.Module, case: str) -> None:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    mesh = init_device_mesh("cpu", (2,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    if case.endswith("/head"):
        fully_shard(base.lm_head, mesh=mesh)
    if case.endswith("/tail"):
        fully_shard(base.model.embed_tokens, mesh=mesh)
        fully_shard([base.model.norm, base.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def pair_batches(size: int) -> list[PairBatch]:
    rows = tokenize_pairs(
        as_dataset(tiny_pairs(10)),
        tiny_tokenizer(),
        max_length=None,
        truncation_mode="keep_start",
        num_proc=None,
        name="train",
    )
    collate = PairCollator(None, "keep_start")
    starts = range(0, len(rows), size)
    return [batch_of(collate([rows[i] for i in range(s, min(s + size, len(rows)))])) for s in starts]


class Loop:
    """A few steps of SGD against a reference, by the library's pieces alone.

    Args:
        folder: For the store and the checkpoint.
        case: REFERENCE/MODEL.
        sharded: `no`, or whether the reference is built `before` or `after` the policy is sharded.
    """

    def __init__(self, folder: Path, case: str, sharded: str) -> None:
        self.folder, self.case, self.sharded = folder / sharded, case, sharded
        self.folder.mkdir(parents=True, exist_ok=True)
        self.policy, self.reference = self._build()

    def _build(self) -> tuple[nn.Module, Reference]:
        policy, kind = model_of(self.case), self.case.partition("/")[0]
        if self.sharded == "after":
            shard(policy, self.case)
        reference = self._reference(policy, kind)
        batches = pair_batches(2)  # 5 of them: one process has a batch more than the other
        reference.prepare({"train": lambda: batches if self.sharded == "no" else batches[dist.get_rank() :: 2]})
        if self.sharded != "no":
            dist.barrier()
        if self.sharded == "before":
            shard(policy, self.case)
        return policy, reference

    def _reference(self, policy: nn.Module, kind: str) -> Reference:
        moves = kind in ALPHAS
        released = kind == "precomputed" and not has_shards(policy)  # its weights are given up when they are scored
        explicit = ExplicitReference.before_training if released else ExplicitReference.of_policy
        has_adapter = isinstance(policy, PeftModel)
        source: Any = ImplicitReference(policy, moves=moves) if has_adapter else explicit(policy)
        if kind == "precomputed":
            return PrecomputedReference(LogProbStore(self.folder / "store.db"), source, release_when_filled=True)
        if moves:
            return SynchronizedReference(source, lambda: policy, alpha=ALPHAS[kind], every=2)
        reference: Reference = source
        return reference

    def run(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        losses = []
        for step, batch in enumerate(self._batches(), 1):
            loss = self._loss(batch)
            loss.backward()
            if step == 2:  # the first at which policy and reference differ
                gradients = {n: gather(p.grad).clone() for n, p in self.policy.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
            self.reference.advance(step)
            if self.reference.module is not None:
                self.reference.module.state_dict()  # gives up gathered copies, and whatever was written to them alone
            losses.append(self._mean(loss.detach()))
        return {"losses": losses, "gradients": gradients}

    def _batches(self) -> Iterator[PairBatch]:
        ours = pair_batches(4) if self.sharded == "no" else pair_batches(2)[dist.get_rank() :: 2]
        return (ours[step % 2] for step in range(NUM_STEPS))

    def _loss(self, batch: PairBatch) -> Tensor:
        reference = self.reference.log_probs(batch)
        scores = PairScores.of(batch, score(self.policy, batch), reference)
        return LOSSES["sigmoid"](scores, LossOptions(beta=0.1, label_smoothing=0.0)).mean()

    def _mean(self, loss: Tensor) -> float:
        if self.sharded != "no":
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return loss.item()

    def survives_checkpoint(self) -> bool:
        """Whether a reference built anew and loaded says the same as this one, bit for bit."""
        checkpoint, batch = self.folder / "checkpoint", pair_batches(2)[0]
        save_reference(checkpoint, self.reference, 0.0, writes=dist.get_rank() == 0)
        dist.barrier()
        before = self.reference.log_probs(batch).values
        _, again = self._build()
        load_reference(checkpoint, again)
        return torch.equal(again.log_probs(batch).values, before)

    def adapters_survive(self) -> bool | None:
        """Whether adapters sharded anew have, after loading, every bit of these; None for a full model."""
        checkpoint = self.folder / "checkpoint"
        if not isinstance(self.policy, PeftModel):
            return None
        save_adapters(self.policy, checkpoint, writes=dist.get_rank() == 0)
        dist.barrier()
        again = model_of(self.case)
        if self.sharded != "no":
            shard(again, self.case)
        loads = load_weights(again, checkpoint)
        own, other = ({name: gather(p) for name, p in adapter_tensors(m).items()} for m in (self.policy, again))
        return loads and same_bits(own, other)

    def exports_itself(self) -> bool | None:
        """Whether the exported reference has its tensors, bit for bit; None where it has no model."""
        module = self.reference.module
        if module is None:
            return None
        folder = self.folder / "exported"
        self.reference.export(folder if dist.get_rank() == 0 else None)
        forget_gathered(module)
        own = {name: gather(parameter) for name, parameter in module.named_parameters()}
        dist.barrier()
        return same_bits(load_file(folder / "model.safetensors"), own)


def refusals(folder: Path, case: str) -> dict[str, str]:
    """With what words a case is refused: at construction, or at the first sync."""
    said = {}
    for sharded in ("before", "after"):
        try:
            Loop(folder, case, sharded).reference.advance(2)
        except ConfigurationError as error:
            said[sharded] = str(error)
    return said


def compared(folder: Path, case: str) -> dict[str, Any]:
    """The sharded loops beside the unsharded one."""
    expected = Loop(folder, case, "no")
    one = expected.run()
    seen: dict[str, Any] = {"expected": one["losses"]}
    for sharded in ("before", "after"):
        loop = Loop(folder, case, sharded)
        two = loop.run()
        gradients, wanted = two["gradients"], one["gradients"]
        assert gradients.keys() == wanted.keys() and gradients
        errors = [((gradients[n] - g).abs().max() / g.abs().max()).item() for n, g in wanted.items()]
        module = loop.reference.module
        seen[sharded] = {
            "losses": two["losses"],
            "gradient_error": max(errors),
            "same_identity": loop.reference.identity == expected.reference.identity,
            "changed": [] if loop.reference.traits.moves else loop.reference.changed_tensors(),
            "reference_is_sharded": None if module is None else has_shards(module),
            "survives_checkpoint": loop.survives_checkpoint(),
            "exports_itself": loop.exports_itself(),
            "adapters_survive": loop.adapters_survive(),
        }
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    target = Path(sys.argv[1])
    seen: dict[str, Any] = {}
    for name in sys.argv[2:]:
        look = refusals if name.startswith("followed") else compared
        seen[name] = look(target / name.replace("/", "-"), name)
    leave(target, seen)
