"""What is particular to each kind of reference: what it holds, shares, copies and gives up.

What all of them have in common is in tests/reference/test_reference_contract.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from support.kinds import (
    BATCH,
    CLOSE,
    FIRST,
    LORA,
    SOURCES,
    adapted,
    draw,
    dropping_gpt2,
    lora,
    partly_frozen,
    response,
    train,
)
from support.observe import bits, same_bits, traces
from support.tiny import tiny_model
from tether.errors import MissingLogProbsError
from tether.reference import (
    ExplicitReference,
    ImplicitReference,
    Placement,
    PrecomputedReference,
    Reference,
    SynchronizedReference,
)
from tether.scoring import score
from tether.store import LogProbStore
from tether.testing import naive_log_probs_of
from tether.types import PairBatch

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("name", ["explicit", "implicit, fresh LoRA", "synchronized"])
def test_reference_that_computes_counts_every_batch(name: str, tmp_path: Path) -> None:
    reference = SOURCES[name].reference(SOURCES[name].policy(), tmp_path)
    for _ in range(3):
        reference.log_probs(BATCH)
    assert reference.num_passes == 3


# --------------------------------------------------------------------------------------- explicit: what it holds


def storages(model: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_explicit_reference_copies_what_trains_and_shares_what_does_not() -> None:
    policy = partly_frozen()
    reference = ExplicitReference.of_policy(policy)
    module = reference.module
    assert module is not None and not any(parameter.requires_grad for parameter in module.parameters())
    for (name, own), (_, theirs) in zip(module.named_parameters(), policy.named_parameters(), strict=True):
        assert (own.data_ptr() == theirs.data_ptr()) == (not theirs.requires_grad), name
    trainable = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    assert reference.extra_bytes == trainable


def test_explicit_reference_before_training_holds_nothing_and_is_an_error_once_released() -> None:
    reference = ExplicitReference.before_training(dropping_gpt2().train())
    assert reference.extra_bytes == 0
    reference.log_probs(BATCH)
    reference.release()
    assert reference.module is None and reference.extra_bytes == 0
    with pytest.raises(MissingLogProbsError, match="released"):
        reference.log_probs(BATCH)


@pytest.mark.parametrize("options", [{}, {"moves": True}, {"placement": Placement(dtype=torch.bfloat16)}], ids=str)
def test_explicit_reference_never_changes_the_model_it_was_given(options: dict[str, Any]) -> None:
    policy, other = dropping_gpt2().train(), dropping_gpt2(seed=1).train()
    before, numbers = traces(other), bits(other)
    reference: Reference = ExplicitReference.of_other_model(other, policy, **options)
    reference.log_probs(BATCH)
    if options.get("moves"):
        assert isinstance(reference, ExplicitReference)
        reference = SynchronizedReference(reference, lambda: policy, alpha=0.5, every=1)
        assert reference.advance(1)
    reference.release()
    assert traces(other) == before and same_bits(bits(other), numbers)


def test_explicit_reference_shares_another_model_without_a_copy() -> None:
    policy, other = dropping_gpt2(), dropping_gpt2(seed=1)
    module = ExplicitReference.of_other_model(other, policy).module
    assert module is not None and storages(module) == storages(other)


def test_explicit_reference_of_the_base_under_a_trained_policy_keeps_its_own_copy() -> None:
    """`ref_model` may share tensors with the policy: those that train are copied, so that it stands still."""
    policy = dropping_gpt2()
    other = copy.copy(policy)
    reference = ExplicitReference.of_other_model(other, policy)
    before = reference.log_probs(BATCH).values
    train(policy)
    assert torch.equal(reference.log_probs(BATCH).values, before)


def test_explicit_reference_in_another_dtype_scores_in_it_and_says_so() -> None:
    policy = dropping_gpt2()
    reference = ExplicitReference.of_policy(policy, Placement(dtype=torch.bfloat16))
    assert reference.module is not None
    assert {parameter.dtype for parameter in reference.module.parameters()} == {torch.bfloat16}
    expected = naive_log_probs_of(tiny_model("gpt2", dtype=torch.bfloat16), BATCH)
    assert reference.log_probs(BATCH).values.dtype == torch.float32
    torch.testing.assert_close(reference.log_probs(BATCH).values, expected, atol=0.05, rtol=0.05)
    assert reference.identity.compute_dtype == "bfloat16"
    assert reference.identity.digest != ExplicitReference.of_policy(policy).identity.digest


def test_explicit_reference_keeps_rotary_frequencies_in_fp32_when_its_weights_are_cast() -> None:
    policy = tiny_model("llama")
    module = ExplicitReference.of_policy(policy, Placement(dtype=torch.bfloat16)).module
    assert module is not None
    frequencies = {name: buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    assert frequencies and all(torch.equal(buffer, policy.get_buffer(name)) for name, buffer in frequencies.items())


def test_reference_runs_under_the_autocast_of_the_policy() -> None:
    policy = dropping_gpt2()
    reference = ExplicitReference.of_policy(policy, Placement(autocast_dtype=torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = score(policy.eval(), BATCH).values
    assert torch.equal(reference.log_probs(BATCH).values, expected)
    assert reference.identity.compute_dtype == "bfloat16"


# ------------------------------------------------------------------------------------ implicit: what it exchanges


def test_implicit_reference_is_the_base_alone_for_a_fresh_adapter_and_holds_nothing() -> None:
    base = dropping_gpt2()
    expected = naive_log_probs_of(base, BATCH)
    reference = ImplicitReference(adapted(base, LoraConfig(**LORA)))
    assert reference.extra_bytes == 0
    torch.testing.assert_close(reference.log_probs(BATCH).values, expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("implicit, continued LoRA", "lora_"),
        ("implicit, LoRA with biases", ".bias"),
        ("implicit, PiSSA", "lora_"),
        ("implicit, prompt tuning", "prompt"),
    ],
)
def test_implicit_reference_holds_the_tensors_that_train_and_reach_it(name: str, held: str) -> None:
    policy = SOURCES[name].policy()
    bytes_held = sum(p.numel() * 4 for n, p in policy.named_parameters() if p.requires_grad and held in n)
    assert ImplicitReference(policy).extra_bytes == bytes_held > 0


def test_implicit_reference_of_a_trained_adapter_differs_from_its_base() -> None:
    policy = lora(init_lora_weights=False)
    reference = ImplicitReference(policy)
    says = reference.log_probs(BATCH).values
    with policy.disable_adapter():
        assert (naive_log_probs_of(policy, BATCH) - says).abs().mean() > 0.05


# ------------------------------------------------------------------------------------------- precomputed: the store


def test_precomputed_reference_computes_what_is_missing_once_and_no_more(tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "store.sqlite")
    source = ExplicitReference.of_policy(dropping_gpt2())
    reference = PrecomputedReference(store, source, release_when_filled=False)
    first = reference.log_probs(BATCH).values
    assert reference.num_passes == 1
    assert torch.equal(reference.log_probs(BATCH).values, first) and reference.num_passes == 1
    reference.prepare({"train": lambda: [BATCH, BATCH]})
    assert reference.num_passes == 1


def test_precomputed_reference_is_reused_by_any_reference_that_would_say_the_same(tmp_path: Path) -> None:
    """Full fine-tuning fills the store; a fresh adapter on the same base finds everything there, and vice versa."""
    PrecomputedReference(LogProbStore(tmp_path / "s"), ExplicitReference.before_training(dropping_gpt2())).prepare(
        {"train": lambda: [BATCH]}
    )
    other = PrecomputedReference(
        LogProbStore(tmp_path / "s"), ImplicitReference(adapted(dropping_gpt2(), LoraConfig(**LORA)))
    )
    other.prepare({"train": lambda: [BATCH]})
    assert other.num_passes == 0


def test_precomputed_reference_is_not_reused_by_another_model_or_dtype(tmp_path: Path) -> None:
    sources = [
        ExplicitReference.before_training(dropping_gpt2()),
        ExplicitReference.before_training(dropping_gpt2(seed=1)),
        ExplicitReference.of_policy(dropping_gpt2(), Placement(dtype=torch.bfloat16)),
        ExplicitReference.before_training(dropping_gpt2(), autocast_dtype=torch.bfloat16),
    ]
    for source in sources:
        reference = PrecomputedReference(LogProbStore(tmp_path / "s"), source)
        reference.prepare({"train": lambda: [BATCH]})
        assert reference.num_passes == 1


def test_precomputed_reference_serves_shorter_responses_of_the_same_key(tmp_path: Path) -> None:
    reference = PrecomputedReference(LogProbStore(tmp_path / "s"), ExplicitReference.of_policy(dropping_gpt2()))
    reference.prepare({"train": lambda: [BATCH]})
    whole = response(FIRST, draw(2, 13))
    cut = whole._replace(token_ids=whole.token_ids[:4])
    found = reference.log_probs(PairBatch.of_pairs([(cut, response(FIRST, draw(3, 5)))]))
    assert torch.equal(found.split()[0], reference.log_probs(BATCH).split()[0][:4]) and reference.num_passes == 1


def test_precomputed_reference_without_source_reads_and_says_clearly_what_it_lacks(tmp_path: Path) -> None:
    store, source = LogProbStore(tmp_path / "s"), ExplicitReference.of_policy(dropping_gpt2())
    PrecomputedReference(store, source).prepare({"train": lambda: [BATCH]})
    reader = PrecomputedReference(store, identity=source.identity)
    assert reader.log_probs(BATCH).num_responses == BATCH.num_responses and reader.num_passes == 0
    unknown = PairBatch.of_pairs([(response((9,), (8,)), response((9,), (7,)))])
    with pytest.raises(MissingLogProbsError, match="does not hold"):
        reader.log_probs(unknown)
    with pytest.raises(ValueError, match="source or the identity"):
        PrecomputedReference(store)


def test_precomputed_reference_over_an_adapter_goes_on_answering_new_rows_after_its_release(tmp_path: Path) -> None:
    policy = lora()
    expected = naive_log_probs_of(policy, BATCH)
    reference = PrecomputedReference(LogProbStore(tmp_path / "s"), ImplicitReference(policy))
    reference.prepare({})
    train(policy)
    torch.testing.assert_close(reference.log_probs(BATCH).values, expected, **CLOSE)
