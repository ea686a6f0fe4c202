"""`ReferenceContract`: what every reference must do, as one pytest suite to subclass.

Uses only what `Reference` promises; knows no kind of reference. Log-probs are compared with naive code that shares
nothing with the scoring engine.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tether.errors import ReferenceModelError
from tether.reference import Reference
from tether.reference.base import compute_dtype_name
from tether.reference.noise import coarser
from tether.scoring import score
from tether.store import content_key
from tether.testing.observation import bits, random_state, same_bits, traces
from tether.testing.oracle import naive_log_probs_of
from tether.types import PairBatch, Response

_DROPOUT = 0.3
# Mean and largest difference, in nats, of two scorings by unlike code, by the coarser dtype.
_OTHER_CODE = {
    "float64": (1e-3, 1e-2),
    "float32": (1e-3, 1e-2),
    "tf32": (5e-2, 2.0),
    "float16": (5e-2, 2.0),
    "bfloat16": (1e-1, 3.0),
}


@dataclass
class Subject:
    """The objects that a clause of the contract tests.

    Attributes:
        policy: The policy, in training mode, with dropout wherever it has any.
        reference: Its reference, built and prepared.
        batch: The pairs to score.
        meant: The log-prob that the reference should return for each response token, in nats (by the naive oracle).
        left_behind: Traces on the policy from building and preparing the reference; empty if all is well.
    """

    policy: nn.Module
    reference: Reference
    batch: PairBatch
    meant: Tensor
    left_behind: list[str]


class ReferenceContract:
    """The contract of `tether.reference.Reference`. Subclass it, define what to test, and pytest runs every clause.

    A reference returns the right log-probs, repeatably, in fp32 and without gradient; leaves no trace on the policy,
    whether it is built, called or fails; does not follow the policy's training unless it is meant to; and has an
    identity.

    Example, in your own test file::

        from tether.testing import ReferenceContract

        class TestMyReference(ReferenceContract):
            def make_policy(self):
                return AutoModelForCausalLM.from_pretrained("my-tiny-model")

            def make_reference(self, policy, folder):
                return MyReference(policy, cache=folder / "cache")

    Each clause gets its own policy and reference. `make_policy` must return the same weights every time.
    """

    tolerance: tuple[float, float] | None = None
    """Largest mean and largest single difference from the naive oracle, in nats per token; by default what rounding
    explains in the dtypes of policy and reference: 1e-3 and 1e-2 in float32, 0.1 and 3 in bfloat16."""

    def make_policy(self) -> Any:
        """A policy before its first step: a causal language model, with the same weights on every call."""
        raise NotImplementedError("Define the policy to test in your subclass: `def make_policy(self)`.")

    def make_reference(self, policy: Any, folder: Path) -> Reference:
        """The reference of this policy; it may use the empty `folder` for files."""
        raise NotImplementedError("Define the reference to test in your subclass: `def make_reference(...)`.")

    def meant_model(self, policy: Any) -> Any:
        """The model whose log-probs the reference should return: by default the policy as it is now."""
        return policy

    def make_batch(self, policy: Any) -> PairBatch:
        """The pairs to score: by default random ids, with a shared prompt, a shared response and a single token."""
        return _random_pairs(int(policy.get_input_embeddings().weight.shape[0]))

    def make_subject(self, folder: Path) -> Subject:
        """Builds and prepares the reference of a new policy, and records the traces that this leaves."""
        folder.mkdir(parents=True, exist_ok=True)
        policy = self.make_policy()
        turn_up_dropout(policy)
        batch = self.make_batch(policy).to(next(policy.parameters()).device)
        meant = naive_log_probs_of(self.meant_model(policy), batch)
        policy.train()
        before = _Witness(policy)
        reference = self.make_reference(policy, folder)
        reference.prepare({"contract": lambda: [batch]})
        return Subject(policy, reference, batch, meant, before.left_behind())

    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        return self.make_subject(tmp_path / "reference")

    # ---- its log-probs -----------------------------------------------------------------------------------------------

    def test_says_what_it_is_meant_to_say(self, subject: Subject) -> None:
        """Equal to the naive log-softmax of the intended model, in evaluation mode."""
        self._assert_close(subject, _answer(subject), subject.meant)

    def test_still_says_it_after_an_optimizer_step_of_the_policy(self, subject: Subject) -> None:
        before, policy_before = _answer(subject), naive_log_probs_of(subject.policy, subject.batch)
        take_optimizer_step(subject.policy)
        moved = (naive_log_probs_of(subject.policy, subject.batch) - policy_before).abs().mean()
        assert moved > 0.01, "the step did not change the policy's answers, so this clause tests nothing"
        assert torch.equal(_answer(subject), before)

    def test_answers_in_fp32_without_gradient_in_the_order_of_the_batch(self, subject: Subject) -> None:
        log_probs = subject.reference.log_probs(subject.batch)
        assert log_probs.values.dtype == torch.float32 and not log_probs.values.requires_grad
        assert not log_probs.values.is_inference(), "a loss that multiplies by an inference tensor fails"
        assert log_probs.values.device == log_probs.offsets.device == subject.batch.device
        assert log_probs.lengths().tolist() == list(subject.batch.response_lengths)
        assert bool(torch.isfinite(log_probs.values).all()) and bool((log_probs.values <= 0).all())

    def test_repeats_itself_bit_for_bit(self, subject: Subject) -> None:
        first = _answer(subject)
        torch.rand(3)  # the second answer must not depend on the random state
        assert torch.equal(_answer(subject), first)

    def test_answers_do_not_depend_on_the_other_pairs_of_the_batch(self, subject: Subject) -> None:
        whole = dict(zip(subject.batch.keys, subject.reference.log_probs(subject.batch).split(), strict=True))
        for pair in (0, subject.batch.num_pairs - 1):
            alone = _pair_of(subject.batch, pair)
            for key, values in zip(alone.keys, subject.reference.log_probs(alone).split(), strict=True):
                self._assert_close(subject, values, whole[key])

    def test_dropout_never_applies(self, subject: Subject) -> None:
        """The policy trains with dropout in every clause; here the reference's own model does too."""
        if subject.reference.module is not None:
            turn_up_dropout(subject.reference.module)
            subject.reference.module.train()
        self._assert_close(subject, _answer(subject), subject.meant)

    # ---- its side effects --------------------------------------------------------------------------------------------

    def test_building_it_leaves_no_trace(self, subject: Subject) -> None:
        assert subject.left_behind == []

    def test_asking_leaves_no_trace_however_often(self, subject: Subject) -> None:
        before = _Witness(subject.policy)
        for _ in range(3):
            subject.reference.log_probs(subject.batch)
        assert before.left_behind() == []

    def test_a_pass_that_fails_leaves_no_trace(self, subject: Subject) -> None:
        if subject.batch.device.type != "cpu":
            pytest.skip("ids beyond the vocabulary break the state of an accelerator")
        before = _Witness(subject.policy)
        prompt, beyond = (1,), 1 << 40
        pair = (Response(prompt, (beyond,), b"1" * 16), Response(prompt, (beyond + 1,), b"2" * 16))
        with contextlib.suppress(Exception):  # any error will do
            subject.reference.log_probs(PairBatch.of_pairs([pair]))
        assert before.left_behind() == []

    def test_asking_does_not_disturb_the_gradient_of_the_policy(self, subject: Subject) -> None:
        subject.policy.eval()  # dropout would draw other numbers
        before = _gradient(subject.policy, subject.batch)
        subject.reference.log_probs(subject.batch)
        after = _gradient(subject.policy, subject.batch)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []

    def test_in_the_policy_it_is_the_policy_in_another_state_or_an_error(self, subject: Subject) -> None:
        take_optimizer_step(subject.policy)
        before = _Witness(subject.policy)
        try:
            with subject.reference.in_policy():
                self._assert_close(subject, naive_log_probs_of(subject.policy, subject.batch), subject.meant)
        except ReferenceModelError as error:
            assert error.instead
        assert before.left_behind() == []

    # ---- whether it moves ----------------------------------------------------------------------------------------

    def test_advance_says_truly_whether_it_moved(self, subject: Subject) -> None:
        moved = False
        for step in range(1, 5):
            take_optimizer_step(subject.policy)
            before = _answer(subject)
            said = subject.reference.advance(step)
            assert said is (not torch.equal(_answer(subject), before))
            moved |= said
        assert moved <= subject.reference.traits.moves, "a reference with `Traits(moves=False)` moved"
        assert subject.reference.traits.moves or subject.reference.changed_tensors() == []

    def test_its_state_goes_on_in_another_one_of_the_same_policy(self, subject: Subject, tmp_path: Path) -> None:
        """Saved with a checkpoint and loaded by the trainer that resumes, into a reference of its own."""
        for step in range(1, 4):
            take_optimizer_step(subject.policy)
            subject.reference.advance(step)
        before, state = _answer(subject), tmp_path / "state"
        state.mkdir()
        subject.reference.save(state)
        resumed = self.make_subject(tmp_path / "resumed")
        resumed.reference.load(state)
        assert torch.equal(_answer(resumed), before)

    # ---- its identity ------------------------------------------------------------------------------------------------

    def test_identity_is_constant_and_can_be_written_down(self, subject: Subject) -> None:
        before = subject.reference.identity
        subject.reference.log_probs(subject.batch)
        take_optimizer_step(subject.policy)
        subject.reference.advance(1)
        subject.reference.release()
        assert subject.reference.identity == before and subject.reference.identity.digest == before.digest
        assert json.loads(json.dumps(before.describe())) == before.describe()

    def test_identity_is_that_of_the_weights_it_answers_with(self, subject: Subject, tmp_path: Path) -> None:
        again = self.make_subject(tmp_path / "again")
        assert again.reference.identity == subject.reference.identity
        if not subject.reference.traits.means_policy:
            return
        policy = self.make_policy()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.5)
        folder = tmp_path / "other"
        folder.mkdir()
        assert self.make_reference(policy, folder).identity.digest != subject.reference.identity.digest

    def test_counts_are_counts(self, subject: Subject) -> None:
        before = subject.reference.num_passes
        subject.reference.log_probs(subject.batch)
        assert 0 <= before <= subject.reference.num_passes
        assert isinstance(subject.reference.extra_bytes, int) and subject.reference.extra_bytes >= 0

    def test_release_may_come_twice_and_frees_what_it_frees(self, subject: Subject) -> None:
        before = subject.reference.extra_bytes
        subject.reference.release()
        subject.reference.release()
        assert 0 <= subject.reference.extra_bytes <= before

    # --------------------------------------------------------------------------------------------------------------

    def _assert_close(self, subject: Subject, found: Tensor, meant: Tensor) -> None:
        names = (compute_dtype_name(subject.policy, None), subject.reference.identity.compute_dtype)
        mean, largest = self.tolerance or _OTHER_CODE[coarser(*names)]
        difference = (found.to(meant.device) - meant).abs()
        assert float(difference.mean()) <= mean and float(difference.max()) <= largest


def turn_up_dropout(model: nn.Module) -> None:
    """Sets every dropout of a model to a noticeable rate: modules, and the numbers that layers store."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = _DROPOUT
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, _DROPOUT)


def take_optimizer_step(policy: nn.Module) -> None:
    """One optimizer step that moves every trainable tensor noticeably; the same on every call."""
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(7)
    for parameter in trainable:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.grad = noise * parameter.detach().float().square().mean().sqrt().clamp(min=0.3).to(parameter)
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    optimizer.step()
    optimizer.zero_grad()


class _Witness:
    """A snapshot of a policy and the random generators."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._traces, self._bits, self._random = traces(policy), bits(policy), random_state()

    def left_behind(self) -> list[str]:
        """The names of what has changed since."""
        before, now = self._traces | self._random, traces(self._policy) | random_state()
        found = [name for name in before if now[name] != before[name]]
        return found if same_bits(bits(self._policy), self._bits) else [*found, "weights or buffers"]


def _answer(subject: Subject) -> Tensor:
    return subject.reference.log_probs(subject.batch).values


def _gradient(policy: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    grads: Any = torch.autograd.grad(score(policy, batch).values.sum(), list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def _pair_of(batch: PairBatch, pair: int) -> PairBatch:
    prompts = batch.prompt_ids.split(list(batch.prompt_lengths))
    tokens = batch.response_ids.split(list(batch.response_lengths))

    def response(number: int) -> Response:
        prompt = prompts[batch.response_group[number]]
        known = batch.reference_sums[number] if batch.reference_sums else None
        return Response(tuple(prompt.tolist()), tuple(tokens[number].tolist()), batch.keys[number], known)

    pairs = [(response(batch.chosen[pair]), response(batch.rejected[pair]))]
    return PairBatch.of_pairs(pairs).to(batch.device)


def _random_pairs(vocab_size: int) -> PairBatch:
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (count,), generator=generator).tolist())

    def response(prompt: tuple[int, ...], count: int) -> Response:
        tokens = ids(count)
        return Response(prompt, tokens, content_key(prompt, tokens))

    first, second = ids(12), ids(3)
    shared = response(first, 13)
    pairs = [
        (shared, response(first, 5)),
        (response(first, 1), shared),
        (response(second, 7), response(second, 2)),
    ]
    return PairBatch.of_pairs(pairs)
