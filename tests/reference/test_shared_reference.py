"""A `ref_model` that shares tensors with the policy is copied where it must be, or refused; the caller's stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from support.kinds import BATCH
from support.observe import bits, same_bits, traces
from support.runs import curve, make_trainer, trained
from support.tiny import tiny_model
from tether.data.datasets import batch_of
from tether.errors import ConfigurationError
from tether.scoring import score
from tether.testing import naive_log_probs_of

pytestmark = pytest.mark.numerics

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def shares_embedding(policy: Any) -> Any:
    other = tiny_model(seed=1)
    other.model.embed_tokens.weight = policy.model.embed_tokens.weight
    return other


def shares_layer(policy: Any) -> Any:
    other = tiny_model(seed=1)
    other.model.layers[0] = policy.model.layers[0]
    return other


def shares_all_but_the_head(policy: Any) -> Any:
    other = tiny_model(seed=1)
    other.model = policy.model
    return other


def shares_every_parameter(policy: Any) -> Any:
    """Modules of its own around the policy's parameters."""
    return copy.deepcopy(policy, {id(p): p for p in policy.parameters()})


def shares_modules(policy: Any) -> Any:
    """Another object around the policy's modules."""
    return copy.copy(policy)


def shares_storage(policy: Any) -> Any:
    """Parameters of its own that look at the policy's numbers."""
    other = copy.deepcopy(policy)
    for own, theirs in zip(other.parameters(), policy.parameters(), strict=True):
        own.data = theirs.data.view_as(theirs)
    return other


def shares_one_flat_storage(policy: Any) -> Any:
    """Both look into one long tensor at the same places, as flattened parameters do."""
    other = copy.deepcopy(policy)
    flat = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    start = 0
    for own, theirs in zip(other.parameters(), policy.parameters(), strict=True):
        piece = flat[start : start + theirs.numel()].view_as(theirs)
        own.data, theirs.data = piece, piece
        start += theirs.numel()
    return other


SHARING: dict[str, Callable[[Any], Any]] = {
    "its embedding": shares_embedding,
    "one layer": shares_layer,
    "all but the head": shares_all_but_the_head,
    "every parameter": shares_every_parameter,
    "its modules": shares_modules,
    "its storage": shares_storage,
    "one flat storage": shares_one_flat_storage,
}
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "fresh adapter": {"peft_config": LoraConfig(**LORA)},
    "trained head": {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])},
    "PiSSA": {"peft_config": LoraConfig(**LORA, init_lora_weights="pissa")},
}


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"ref_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_reference_that_shares_with_the_policy_stands_still(
    sharing: str, options: dict[str, Any], tmp_path: Path
) -> None:
    stands_still(sharing, "full", options, tmp_path)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sharing", ["its embedding", "one layer", "all but the head", "its storage"])
def test_a_reference_that_shares_with_the_base_of_an_adapter_stands_still(
    sharing: str, policy: str, tmp_path: Path
) -> None:
    """PEFT puts the adapter into modules that both have: the reference is the `ref_model` as it was handed over."""
    stands_still(sharing, policy, {}, tmp_path)


def stands_still(sharing: str, policy: str, options: dict[str, Any], folder: Path) -> None:
    model = tiny_model()
    other = SHARING[sharing](model)
    meant_model = copy.deepcopy(other)
    trainer = make_trainer(folder, model, ref_model=other, learning_rate=0.05, **POLICIES[policy], **options)
    batch = batch_of(trainer.data_collator([trainer.train_dataset[row] for row in range(4)]))
    meant = naive_log_probs_of(meant_model, batch)
    # Rounding: 7e-5 under `OtherRounding(3)`.
    close = {"atol": 0.6, "rtol": 0.05} if "ref_dtype" in options else {"atol": 1e-4, "rtol": 1e-5}
    before = trainer.reference.log_probs(batch).values
    torch.testing.assert_close(before, meant, **close)
    trainer.train()
    assert torch.equal(trainer.reference.log_probs(batch).values, before)
    assert trainer.reference.changed_tensors() == []
    assert (naive_log_probs_of(trainer.model, batch) - before).abs().mean() > 0.1, "the policy did not move"


@pytest.mark.parametrize("sharing", ["one layer", "all but the head"])
def test_a_model_of_layers_with_another_config_is_scored_right(sharing: str) -> None:
    """Each layer reads the config of the model it came from; packed attention is switched on in the model's own."""
    model = SHARING[sharing](tiny_model())
    torch.testing.assert_close(score(model, BATCH).values, naive_log_probs_of(model, BATCH), atol=2e-5, rtol=1e-5)


def test_a_reference_that_shares_and_follows_moves_a_copy_of_its_own(tmp_path: Path) -> None:
    model = tiny_model()
    other = shares_layer(model)
    layer = other.model.layers[1]  # the policy does not have this one
    before = bits(layer)
    trainer = trained(tmp_path, model, ref_model=other, sync_ref_model=True, ref_model_sync_steps=1)
    assert trainer.reference.num_syncs == 3  # type: ignore[attr-defined]
    assert same_bits(bits(layer), before)
    module: Any = trainer.reference.module
    assert not {p.data_ptr() for p in module.parameters()} & {
        p.data_ptr() for p in (*trainer.model.parameters(), *other.parameters())
    }


SAME: dict[str, Callable[[], tuple[Any, Any]]] = {
    "the policy": lambda: (lambda model: (model, model))(tiny_model()),
    "the base of its adapter": lambda: (lambda base: (get_peft_model(base, LoraConfig(**LORA)), base))(tiny_model()),
}


@pytest.mark.parametrize("name", SAME)
def test_a_reference_that_is_the_policy_is_refused(name: str, tmp_path: Path) -> None:
    model, other = SAME[name]()
    with pytest.raises(ConfigurationError, match="same object"):
        make_trainer(tmp_path, model, ref_model=other)


# ------------------------------------------------------------------------------------- the caller's model


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "in another dtype": {"ref_dtype": "bfloat16"},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "under autocast": {"bf16": True, "use_cpu": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_callers_reference_is_never_modified(options: str, tmp_path: Path) -> None:
    """Its mode, what of it trains, dtype, device, hooks, and every bit."""
    other: Any = tiny_model("gpt2", seed=1, resid_pdrop=0.3, attn_pdrop=0.3).train()
    other.transformer.wte.requires_grad_(False)
    calls: list[int] = []
    other.lm_head.register_forward_hook(lambda *_: calls.append(1))
    before, numbers = traces(other), bits(other)
    where = {name: (tensor.dtype, tensor.device) for name, tensor in other.state_dict().items()}
    trainer = trained(tmp_path, tiny_model("gpt2"), ref_model=other, **OPTIONS[options])
    trainer.evaluate(trainer.train_dataset)
    assert traces(other) == before and same_bits(bits(other), numbers)
    assert {name: (tensor.dtype, tensor.device) for name, tensor in other.state_dict().items()} == where


@pytest.mark.parametrize("options", OPTIONS)
def test_one_reference_in_two_trainers_stays_what_it_was(options: str, tmp_path: Path) -> None:
    other = tiny_model(seed=1)
    first = trained(tmp_path / "1", ref_model=other, **OPTIONS[options])
    second = trained(tmp_path / "2", ref_model=other, **OPTIONS[options])
    alone = trained(tmp_path / "3", ref_model=tiny_model(seed=1), **OPTIONS[options])
    assert curve(first) == curve(second) == curve(alone)
    assert abs(curve(first)[0] - math.log(2)) > 1e-3


def test_two_trainers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    other: nn.Module = tiny_model(seed=1)
    first = make_trainer(tmp_path / "1", ref_model=other, sync_ref_model=True, ref_model_sync_steps=1)
    second = make_trainer(tmp_path / "2", ref_model=other)
    before = second.reference.log_probs(BATCH).values
    first.train()
    assert torch.equal(second.reference.log_probs(BATCH).values, before)
