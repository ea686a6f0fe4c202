"""Every kind of reference passes the contract, and the contract notices a reference that does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.kinds import KINDS, Kind, OfKind, dropping_gpt2, lora, synchronized
from tether.errors import MissingPackageError
from tether.reference import ExplicitReference, ImplicitReference, Reference, Traits
from tether.reference.base import BatchSource
from tether.scoring import score
from tether.testing import ReferenceContract
from tether.types import PairBatch, ResponseLogProbs

pytestmark = pytest.mark.numerics


class TestEveryKind(OfKind):
    @pytest.fixture(params=KINDS, autouse=True)
    def of_kind(self, request: pytest.FixtureRequest) -> None:
        self.kind = KINDS[request.param]


class TestDefaults(ReferenceContract):
    """As a user writes it: what is not said is drawn and measured by the contract itself."""

    def make_policy(self) -> Any:
        return lora()

    def make_reference(self, policy: Any, folder: Path) -> Reference:
        return ImplicitReference(policy)


# ---------------------------------------------------------------------------- it notices what is wrong


class Wrapper(Reference):
    """A reference as it should be, to be broken in one place."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.source = policy, ExplicitReference.of_policy(policy)

    identity = property(lambda self: self.source.identity)
    num_passes = property(lambda self: self.source.num_passes)
    traits = property(lambda self: Traits(means_policy=True))

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        return self.source.log_probs(batch)


class IsThePolicy(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        with torch.no_grad():
            self.policy.eval()
            values = score(self.policy, batch)
            self.policy.train()
        return values


class IsAnother(Wrapper):
    def __init__(self, policy: Any) -> None:
        self.policy, self.source = policy, ExplicitReference(dropping_gpt2(seed=1))


class DropsOut(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            return score(self.policy, batch)


class SwitchesToEvaluation(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        self.policy.eval()
        return super().log_probs(batch)


class SwitchesWhileBuilt(Wrapper):
    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        policy.lm_head.weight.requires_grad_(False)


class LeavesHooks(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        self.policy.register_forward_hook(lambda *_: None)
        return super().log_probs(batch)


class DrawsNumbers(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        torch.rand(1)
        return super().log_probs(batch)


class BreaksWhenItFails(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        self.policy.eval()
        answer = super().log_probs(batch)
        self.policy.train()
        return answer


class RecordsAGradient(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        answer = super().log_probs(batch)
        return replace(answer, values=answer.values * torch.ones(1, requires_grad=True))


class MixesItsResponses(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        answer = super().log_probs(batch)
        return replace(answer, values=answer.values.flip(0))


class CentresItsBatch(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        answer = super().log_probs(batch)
        return replace(answer, values=answer.values * (1 + 1e-3 * batch.num_pairs))


class IsNotDeterministic(Wrapper):
    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        answer = super().log_probs(batch)
        return replace(answer, values=answer.values + 1e-6 * self.num_passes)


class SaysItMoved(Wrapper):
    def advance(self, step: int) -> bool:
        return True


class MovesInSilence(Wrapper):
    def advance(self, step: int) -> bool:
        assert self.source.module is not None
        self.source.module.load_state_dict(self.policy.state_dict())
        return False


class ForgetsItsState(Wrapper):
    traits = property(lambda self: Traits(means_policy=True, moves=True))

    def __init__(self, policy: Any) -> None:
        self.policy, self.source = policy, synchronized(1.0)(policy, Path())

    def advance(self, step: int) -> bool:
        return self.source.advance(step)


class HasAnIdentityPerObject(Wrapper):
    identity = property(lambda self: replace(self.source.identity, weights=str(id(self))))


class HasOneIdentityForAll(Wrapper):
    identity = property(lambda self: replace(self.source.identity, weights="reference"))


class ChangesItsIdentity(Wrapper):
    identity = property(lambda self: replace(self.source.identity, weights=str(self.num_passes)))


class NeverCounts(Wrapper):
    num_passes = property(lambda self: -1)


class FreesMoreThanNothing(Wrapper):
    released = False
    extra_bytes = property(lambda self: 8 if self.released else 0)

    def release(self) -> None:
        self.released = True


class PreparesLoudly(Wrapper):
    def prepare(self, sets: Any, *, show_progress: bool = False) -> None:
        sources: dict[str, BatchSource] = sets
        for batches in sources.values():
            for batch in batches():
                score(self.policy, batch).values.sum().backward()


class LeavesThePolicyChanged(Wrapper):
    @contextmanager
    def in_policy(self) -> Any:
        self.policy.load_state_dict(self.source.module.state_dict())
        yield


FAULTS: dict[str, tuple[Callable[[Any], Reference], str]] = {
    "is another model": (IsAnother, "says_what_it_is_meant_to_say"),
    "is the policy itself": (IsThePolicy, "still_says_it_after_an_optimizer_step_of_the_policy"),
    "records a gradient": (RecordsAGradient, "answers_in_fp32_without_gradient_in_the_order_of_the_batch"),
    "mixes its responses": (MixesItsResponses, "says_what_it_is_meant_to_say"),
    "looks at the whole batch": (CentresItsBatch, "answers_do_not_depend_on_the_other_pairs_of_the_batch"),
    "does not repeat itself": (IsNotDeterministic, "repeats_itself_bit_for_bit"),
    "drops out": (DropsOut, "dropout_never_applies"),
    "switches what trains while it is built": (SwitchesWhileBuilt, "building_it_leaves_no_trace"),
    "leaves gradients while it prepares": (PreparesLoudly, "building_it_leaves_no_trace"),
    "switches the mode": (SwitchesToEvaluation, "asking_leaves_no_trace_however_often"),
    "leaves hooks": (LeavesHooks, "asking_leaves_no_trace_however_often"),
    "draws random numbers": (DrawsNumbers, "asking_leaves_no_trace_however_often"),
    "leaves the mode when it fails": (BreaksWhenItFails, "a_pass_that_fails_leaves_no_trace"),
    "leaves its weights in the policy": (
        LeavesThePolicyChanged,
        "in_the_policy_it_is_the_policy_in_another_state_or_an_error",
    ),
    "says that it moved": (SaysItMoved, "advance_says_truly_whether_it_moved"),
    "moves in silence": (MovesInSilence, "advance_says_truly_whether_it_moved"),
    "forgets its state": (ForgetsItsState, "its_state_goes_on_in_another_one_of_the_same_policy"),
    "changes its identity": (ChangesItsIdentity, "identity_is_constant_and_can_be_written_down"),
    "has an identity per object": (HasAnIdentityPerObject, "identity_is_that_of_the_weights_it_answers_with"),
    "has one identity for all weights": (HasOneIdentityForAll, "identity_is_that_of_the_weights_it_answers_with"),
    "does not count": (NeverCounts, "counts_are_counts"),
    "holds more once released": (FreesMoreThanNothing, "release_may_come_twice_and_frees_what_it_frees"),
}


def clauses() -> list[str]:
    return [name for name in vars(ReferenceContract) if name.startswith("test_")]


def check(reference: Callable[[Any], Reference], clause: str, folder: Path) -> None:
    """Runs one clause on a reference of a policy with dropout."""
    contract = OfKind()
    contract.kind = Kind(dropping_gpt2, lambda policy, _: reference(policy))
    subject = contract.make_subject(folder / "reference")
    method = getattr(contract, f"test_{clause}")
    method(subject, folder) if "tmp_path" in method.__annotations__ else method(subject)


@pytest.mark.parametrize("name", FAULTS)
def test_the_contract_notices_a_reference_that(name: str, tmp_path: Path) -> None:
    broken, clause = FAULTS[name]
    check(Wrapper, clause, tmp_path / "right")
    with pytest.raises(AssertionError):
        check(broken, clause, tmp_path / "wrong")


def test_every_clause_of_the_contract_is_broken_by_some_fault() -> None:
    broken = {f"test_{clause}" for _, clause in FAULTS.values()}
    # A pass that shares the policy's tensors between two graphs cannot be written without breaking autograd itself.
    assert set(clauses()) - broken == {"test_asking_does_not_disturb_the_gradient_of_the_policy"}


def test_a_contract_without_policy_or_reference_says_what_to_write() -> None:
    with pytest.raises(NotImplementedError, match="def make_policy"):
        ReferenceContract().make_policy()
    with pytest.raises(NotImplementedError, match="def make_reference"):
        ReferenceContract().make_reference(None, Path())


def test_the_contract_asks_for_pytest_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tether.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(MissingPackageError, match="pip install pytest") as caught:
        import tether.testing  # noqa: F401
    assert isinstance(caught.value, ImportError)


def test_the_contract_needs_no_second_trainer() -> None:
    """It can be run where TRL, which this project's own tests use, is not installed."""
    folder = Path(__file__).parents[2] / "src" / "tether" / "testing"
    assert [path.name for path in folder.glob("*.py") if "trl" in path.read_text()] == []
