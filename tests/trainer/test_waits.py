"""A step never waits for the device: the host queues work ahead, and reads nothing back but what the logger asks for.

Run on the meta device, which has shapes and no numbers: whoever reads one fails there. Copies that CUDA would wait for
are looked for in what reaches it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.runs import as_dataset, make_trainer
from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether import DPOConfig, DPOTrainer
from tether.config.dpo_config import objective_of
from tether.losses import LOSSES
from tether.scoring import attention
from tether.scoring.forward import Way
from tether.types import PairBatch, Response, ResponseLogProbs, TokenStatistics, offsets_of

MADE_ON_THE_HOST = ("tensor", "as_tensor", "new_tensor")


def kinds_of(values: Any) -> list[str]:
    return [leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class WaitingCopies(TorchDispatchMode):
    """Refuses copies between host and device that CUDA would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kinds_of((args, kwargs))
        result = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if len({*given, *(kinds_of(result) if copies else ())}) > 1:
            asynchronous = (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            assert copies and asynchronous and given[-1] == "cpu", f"{func} waits for the device"
        return result


class TensorsOfLists(TorchFunctionMode):
    """Refuses `torch.tensor(..., device=...)`, which is such a copy, and which the other mode does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in MADE_ON_THE_HOST:
            assert not result.is_meta, f"`{func.__name__}` waits for the device"
        return result


def use_meta_as_a_card(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of a card, and nothing to prove: a proof reads numbers, once."""
    engine: Any = sys.modules["tether.scoring.score"]
    monkeypatch.setattr(engine, "_way_of", lambda *args, **options: way)
    monkeypatch.setattr(attention, "_fits_varlen", lambda *args: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)  # meta has none


REFERENCES: dict[str, dict[str, Any]] = {
    "explicit": {},
    "implicit": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
    "precomputed": {"precompute_ref_log_probs": True},
    "given": {"rows": [row | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in tiny_pairs(8)]},
    "free": {"reference_free": True},
}


STEPS = [("explicit", "pairwise"), *((kind, "varlen") for kind in REFERENCES)]


@pytest.mark.parametrize(("kind", "kernel"), STEPS)
def test_a_step_waits_for_nothing(kind: str, kernel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, **REFERENCES[kind])
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.reference.log_probs(inputs["batch"])  # stored, if it is a reference that stores
    trainer.state.global_step = 1  # before, the gap is measured
    trainer.model.to("meta").train()
    if trainer.reference.module is not None:
        trainer.reference.module.to("meta")
    use_meta_as_a_card(Way("packed", kernel=kernel), monkeypatch)
    with WaitingCopies(), TensorsOfLists():
        on_device = {name: value.to("meta", non_blocking=True) for name, value in inputs.items()}
        loss = trainer.compute_loss(trainer.model, on_device, num_items_in_batch=torch.ones((), device="meta"))
        loss.backward()
        trainer._losses.see(loss, 1)
    assert loss.is_meta


def test_a_batch_that_is_pinned_is_sent_without_waiting(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), report_to=[])
    args.dataloader_pin_memory = True  # as where there is a card
    trainer = DPOTrainer(
        tiny_model(), args=args, train_dataset=as_dataset(tiny_pairs(2)), processing_class=tiny_tokenizer()
    )
    assert trainer.accelerator.non_blocking


def scored_batch() -> tuple[PairBatch, ResponseLogProbs]:
    """Two pairs, one response with tokens that do not count, and log-probs of all."""
    responses = [Response((3, 4), (5, 6, 7)), Response((3, 4), (8, 9), scored=(True, False)), Response((4,), (5, 6))]
    batch = PairBatch.of_pairs([(responses[0], responses[1]), (responses[2], Response((4,), (7,)))])
    values = torch.zeros(sum(batch.response_lengths), device="meta", requires_grad=True)
    statistics = TokenStatistics(values.detach(), values.detach(), values.detach() > 0, values.detach())
    return batch.to("meta"), ResponseLogProbs(values, offsets_of(batch.response_lengths, "meta"), statistics)


OPTIONS: list[dict[str, Any]] = [{}, {"ld_alpha": 0.5}, {"f_divergence_type": "js_divergence"}]
READ = [(name, options) for name, loss in LOSSES.items() for options in OPTIONS if options.keys() <= loss.takes]


@pytest.mark.parametrize(("name", "options"), READ, ids=str)
def test_losses_wait_for_nothing(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    smoothing = {"label_smoothing": 0.1} if "label_smoothing" in LOSSES[name].takes else {}
    args = DPOConfig(str(tmp_path), loss_type=[name], use_weighting=name == "sigmoid", **smoothing, **options)
    objective = objective_of(args, None)
    with WaitingCopies(), TensorsOfLists():
        batch, policy = scored_batch()
        _, losses = objective(batch, policy, policy.detach())
        losses.sum().backward()


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "condition": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "to the host": lambda x: x.cpu(),
    "to the host, unsafely": lambda x: x.to("cpu", non_blocking=True),
    "to the device": lambda x: torch.ones(2).to(x.device),
    "a list": lambda x: torch.tensor([1, 2], device=x.device),
    "a number": lambda x: x.new_tensor(3.0),
    "an index of the host": lambda x: x[torch.tensor([1, 0])],
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_found(name: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), WaitingCopies(), TensorsOfLists():
        WAITS[name](torch.ones(3, device="meta"))
