"""A reference through the front door: `DPOTrainer(..., reference=...)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from support.kinds import adapted
from support.observe import bits, same_bits
from support.runs import curve, make_trainer, trained
from support.tiny import tiny_model
from tether import BEMACallback, Placement, Traits
from tether.errors import ArgumentTypeError, ConfigurationError, DriftError, ReferenceModelError
from tether.reference import (
    BemaReference,
    ExplicitReference,
    FreeReference,
    ImplicitReference,
    PrecomputedReference,
    SynchronizedReference,
    WrappingReference,
)
from tether.store import LogProbStore

LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}

# What the options ask for, and the same made by hand.
SAME: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Path], dict[str, Any]]]] = {
    "explicit": (dict, lambda folder: {"reference": ExplicitReference.of_policy}),
    "another model": (
        lambda: {"ref_model": tiny_model(seed=1)},
        lambda folder: {"reference": ExplicitReference(tiny_model(seed=1))},
    ),
    "implicit": (lambda: LORA, lambda folder: LORA | {"reference": lambda policy: ImplicitReference(policy)}),
    "precomputed": (
        lambda: {"precompute_ref_log_probs": True},
        lambda folder: {
            "reference": lambda policy: PrecomputedReference(
                LogProbStore(folder / "store.sqlite"), ExplicitReference.before_training(policy)
            )
        },
    ),
    "synchronized": (
        lambda: {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        lambda folder: {
            "reference": lambda policy: SynchronizedReference(
                ExplicitReference.of_policy(policy), lambda: policy, alpha=0.5, every=2
            )
        },
    ),
    "synchronized adapter": (
        lambda: LORA | {"sync_ref_model": True, "ref_model_sync_steps": 2},
        lambda folder: (
            LORA
            | {
                "reference": lambda policy: SynchronizedReference(
                    ImplicitReference(policy, moves=True), lambda: policy, every=2
                )
            }
        ),
    ),
    "reference-free": (lambda: {"reference_free": True}, lambda folder: {"reference": FreeReference()}),
}


@pytest.mark.parametrize("name", SAME)
def test_a_reference_made_by_hand_is_the_one_that_options_ask_for(name: str, tmp_path: Path) -> None:
    asked, by_hand = SAME[name]
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    theirs = trained(tmp_path / "1", **options, **asked())
    ours = trained(tmp_path / "2", **options, **by_hand(tmp_path))
    assert curve(ours) == curve(theirs) and same_bits(bits(ours.model), bits(theirs.model))
    assert ours.reference.identity.digest == theirs.reference.identity.digest
    again = make_trainer(tmp_path / "2", **options, **by_hand(tmp_path))
    again.train(resume_from_checkpoint=str(tmp_path / "2" / "checkpoint-2"))
    assert same_bits(bits(again.model), bits(ours.model))


def test_bema_sets_a_reference_made_by_hand(tmp_path: Path) -> None:
    def average() -> BEMACallback:
        return BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=2)

    def by_hand(policy: nn.Module) -> BemaReference:
        return BemaReference(ExplicitReference.of_policy(policy))

    theirs = trained(tmp_path / "1", callbacks=[average()])
    ours = trained(tmp_path / "2", callbacks=[average()], reference=by_hand)
    assert curve(ours) == curve(theirs)
    with pytest.raises(ConfigurationError, match="takes no weights of an average"):
        make_trainer(tmp_path, callbacks=[average()], reference=ExplicitReference.of_policy)


BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "ref_model": ({"ref_model": tiny_model(seed=1)}, "ExplicitReference(ref_model)"),
    "precompute_ref_log_probs": ({"precompute_ref_log_probs": True}, "PrecomputedReference("),
    "sync_ref_model": ({"sync_ref_model": True}, "SynchronizedReference("),
    "reference_free": ({"reference_free": True}, "reference_free=False"),
    "ref_dtype": ({"ref_dtype": "bfloat16"}, "dtype="),
    "ref_store": ({"ref_store": "x", "precompute_ref_log_probs": True}, "LogProbStore(path)"),
    "ref_store_verify": ({"ref_store_verify": 8, "precompute_ref_log_probs": True}, "verify="),
    "ref_store_mode": ({"ref_store_mode": "lazy", "precompute_ref_log_probs": True}, "mode="),
}


@pytest.mark.parametrize("name", BESIDE)
def test_an_option_that_chooses_a_reference_is_refused_beside_one(name: str, tmp_path: Path) -> None:
    options, wrapper = BESIDE[name]
    with pytest.raises(ConfigurationError) as caught:
        make_trainer(tmp_path, reference=ExplicitReference(tiny_model(seed=2)), **options)
    (refusal,) = (refusal for refusal in caught.value.refusals if refusal.option == name)
    assert f"`{name}`" in refusal.subject and wrapper in refusal.instead


def test_rows_with_log_probs_of_their_own_are_refused_beside_one(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}]
    with pytest.raises(ConfigurationError, match=r"`reference=\.\.\.` with rows that bring"):
        make_trainer(tmp_path, rows=rows, reference=ExplicitReference(tiny_model(seed=2)))


@pytest.mark.parametrize("reference", [ExplicitReference, "out/model", tiny_model(), 3])
def test_what_is_no_reference_is_refused(reference: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="`reference`") as caught:
        make_trainer(tmp_path, reference=reference)
    assert "lambda policy" in caught.value.instead


def test_a_function_that_returns_no_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"function in `reference` returned: it is a LlamaForCausalLM"):
        make_trainer(tmp_path, reference=lambda policy: policy)


def test_a_reference_over_the_weights_that_train_is_refused(tmp_path: Path) -> None:
    """Else the rewards would be 0 at every step, and nothing would say so before the next save."""
    with pytest.raises(ReferenceModelError, match=r"its weight `.*` is one that the policy trains"):
        make_trainer(tmp_path, reference=lambda policy: ExplicitReference(policy))


def test_the_reference_cannot_be_exchanged_afterwards(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(AttributeError, match=r"DPOTrainer\(\.\.\., reference=\.\.\.\)"):
        trainer.reference = ExplicitReference(tiny_model())  # type: ignore[misc]


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "that follows another model": (
        lambda policy: SynchronizedReference(ExplicitReference.of_policy(policy), tiny_model, every=1),
        ReferenceModelError,
        "follows another model",
    ),
    "that would move the model it was made of": (
        lambda policy: SynchronizedReference(ExplicitReference(tiny_model(seed=1)), lambda: policy, every=1),
        ReferenceModelError,
        "shared with the model it was made of",
    ),
    "that moves a wrapper": (
        lambda policy: SynchronizedReference(  # type: ignore[type-var]
            WrappingReference(ExplicitReference.of_policy(policy)), lambda: policy, every=1
        ),
        ArgumentTypeError,
        "only a reference with its own weights",
    ),
    "that moves at no step": (
        lambda policy: SynchronizedReference(ExplicitReference.of_policy(policy), lambda: policy, every=0),
        ConfigurationError,
        "every=0",
    ),
    "without an adapter": (lambda policy: ImplicitReference(policy), ArgumentTypeError, "no adapter to switch"),
    "of another vocabulary": (
        lambda policy: ExplicitReference(tiny_model(vocab_size=128)),
        ConfigurationError,
        "another vocabulary",
    ),
    "without a head": (lambda policy: ExplicitReference(tiny_model().model), ConfigurationError, "no head"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reference_is_refused(name: str, tmp_path: Path) -> None:
    make, error, said = WRONG[name]
    with pytest.raises(error, match=said):
        make_trainer(tmp_path, reference=make)


def test_a_moving_reference_never_writes_to_the_model_it_was_made_of(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    before = bits(model)
    with pytest.raises(ReferenceModelError, match="shared with the model"):
        trained(
            tmp_path,
            reference=BemaReference(ExplicitReference(model)),
            callbacks=[BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)],
        )
    assert same_bits(bits(model), before)
    trained(
        tmp_path,
        reference=lambda policy: SynchronizedReference(
            ExplicitReference.of_other_model(model, policy, moves=True), lambda: policy, every=1
        ),
    )
    assert same_bits(bits(model), before)


def test_a_reference_in_another_dtype_than_the_policys_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placed = Placement(autocast_dtype=torch.bfloat16)
    make_trainer(tmp_path, bf16=True, reference=lambda policy: ExplicitReference.of_policy(policy, placed))
    assert "differ by rounding" not in caplog.text
    make_trainer(tmp_path, bf16=True, reference=ExplicitReference.of_policy)
    assert "computes in float32 and the policy in bfloat16" in caplog.text and "Placement(" in caplog.text
    policy = adapted(tiny_model(), LORA["peft_config"])
    with pytest.raises(ReferenceModelError, match="made for float32"):
        make_trainer(tmp_path, policy, bf16=True, reference=ImplicitReference(policy))


def test_an_implicit_reference_made_of_the_policy_takes_the_runs_autocast(tmp_path: Path) -> None:
    trainer = trained(tmp_path, bf16=True, max_steps=1, **LORA, reference=lambda policy: ImplicitReference(policy))
    assert trainer.reference.identity == make_trainer(tmp_path, bf16=True, **LORA).reference.identity
    assert trainer.reference.identity.compute_dtype == "bfloat16"
    assert curve(trainer, "reference/initial_gap") == [0]


def test_drift_of_a_reference_that_says_it_stands_still_is_found_at_a_save(tmp_path: Path) -> None:
    class Stands(WrappingReference[Any]):
        """A synchronized reference that says it stands still."""

        traits = Traits()

    def make(policy: nn.Module) -> Stands:
        return Stands(SynchronizedReference(ExplicitReference.of_policy(policy), lambda: policy, every=1))

    with pytest.raises(DriftError, match="should not change"):
        trained(tmp_path, reference=make, learning_rate=1e-2, save_strategy="steps", save_steps=1)
