"""One contract for every reference: what it says is the initial policy's word, and asking leaves no trace.

Each kind is built on a policy in training mode with dropout everywhere, asked, and asked again after training has
moved the policy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from observe import bits, same_bits, traces
from tether.errors import MissingLogProbsError, ReferenceModelError
from tether.reference import AdapterReference, FrozenReference, MovingReference, Reference, StoredReference
from tether.scoring import score
from tether.store import LogProbStore, content_key
from tether.types import PairBatch, Response
from tiny import tiny_model

CLOSE = {"atol": 5e-6, "rtol": 1e-6}


def draw(seed: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 256, (count,), generator=generator).tolist())


def response(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Response:
    return Response(prompt, tokens, content_key(prompt, tokens))


FIRST, SECOND = draw(0, 12), draw(1, 3)
BATCH = PairBatch.of_pairs(
    [
        (response(FIRST, draw(2, 13)), response(FIRST, draw(3, 5))),
        (response(FIRST, draw(4, 1)), response(FIRST, draw(2, 13))),
        (response(SECOND, draw(6, 7)), response(SECOND, draw(7, 2))),
    ]
)


def dropping_gpt2(**options: Any) -> Any:
    """GPT-2 with dropout as modules and, in its attention, as a number."""
    return tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, **options)


def dropping_llama() -> Any:
    return tiny_model("llama", attention_dropout=0.3)


def adapted(model: Any, config: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def naive_of(model: nn.Module, batch: PairBatch = BATCH) -> Tensor:
    """The naive oracle in evaluation mode, without gradient, read from the end (virtual tokens stand in front)."""
    modes = [module.training for module in model.modules()]
    model.eval()
    prompts = batch.prompt_ids.split(list(batch.prompt_lengths))
    parts = []
    for group, tokens in zip(batch.response_group, batch.response_ids.split(list(batch.response_lengths)), strict=True):
        ids = torch.cat([prompts[group], tokens])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        parts.append(logits[-len(tokens) - 1 : -1].log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------- the kinds


@dataclass
class Case:
    """A policy, its reference, and what the reference is meant to say of `BATCH`."""

    policy: Any
    reference: Reference
    expected: Tensor
    built_without_trace: bool = True


def explicit(policy: Any) -> Reference:
    return FrozenReference.of_policy(policy)


def of_policy(policy: Any, build: Callable[[Any], Reference]) -> Case:
    """A reference meant to be the policy as it is when the reference is built."""
    expected = naive_of(policy)
    before, numbers, random = traces(policy.train()), bits(policy), torch.get_rng_state()
    reference = build(policy)
    quiet = traces(policy) == before and same_bits(bits(policy), numbers) and torch.equal(torch.get_rng_state(), random)
    return Case(policy, reference, expected, quiet)


def partly_frozen() -> Any:
    policy = dropping_gpt2()
    policy.transformer.wte.requires_grad_(False)
    policy.transformer.h[0].requires_grad_(False)
    return policy


def other_model() -> Case:
    policy, other = dropping_gpt2(), dropping_gpt2(seed=1)
    return Case(policy.train(), FrozenReference.of_other_model(other, policy), naive_of(other))


LORA = {"r": 4, "lora_dropout": 0.3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
LLAMA_LORA = {"r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "down_proj"]}


def half_frozen_lora() -> Any:
    """PEFT would make both factors trainable when it switches the adapter back on."""
    policy = adapted(dropping_gpt2(), LoraConfig(**LORA))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return policy


SOURCES: dict[str, Callable[[], Case]] = {
    "explicit": lambda: of_policy(dropping_gpt2(), explicit),
    "explicit, partly frozen": lambda: of_policy(partly_frozen(), explicit),
    "explicit, tied embeddings": lambda: of_policy(tiny_model(tie_word_embeddings=True), explicit),
    "explicit, other model": other_model,
    "implicit, fresh LoRA": lambda: of_policy(adapted(dropping_gpt2(), LoraConfig(**LORA)), AdapterReference),
    "implicit, continued LoRA": lambda: of_policy(
        adapted(dropping_gpt2(), LoraConfig(**LORA, init_lora_weights=False)), AdapterReference
    ),
    "implicit, LoRA with a frozen factor": lambda: of_policy(half_frozen_lora(), AdapterReference),
    "implicit, LoRA with biases": lambda: of_policy(
        adapted(dropping_gpt2(), LoraConfig(**LORA, bias="all")), AdapterReference
    ),
    "implicit, LoRA with a trained head": lambda: of_policy(
        adapted(dropping_llama(), LoraConfig(**LLAMA_LORA, modules_to_save=["lm_head"])), AdapterReference
    ),
    "implicit, LoRA on the embedding": lambda: of_policy(
        adapted(dropping_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])), AdapterReference
    ),
    "implicit, DoRA": lambda: of_policy(
        adapted(dropping_llama(), LoraConfig(**LLAMA_LORA, use_dora=True)), AdapterReference
    ),
    "implicit, PiSSA": lambda: of_policy(
        adapted(dropping_llama(), LoraConfig(**LLAMA_LORA, init_lora_weights="pissa")), AdapterReference
    ),
    "implicit, IA3": lambda: of_policy(
        adapted(dropping_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])), AdapterReference
    ),
    "implicit, prompt tuning": lambda: of_policy(
        adapted(dropping_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), AdapterReference
    ),
    "moving": lambda: of_policy(
        dropping_gpt2(),
        lambda policy: MovingReference(FrozenReference.of_policy(policy), lambda: policy, alpha=0.5, every=100),
    ),
    "moving, LoRA": lambda: of_policy(
        adapted(dropping_llama(), LoraConfig(**LLAMA_LORA)),
        lambda policy: MovingReference(AdapterReference(policy, moves=True), lambda: policy, alpha=0.5, every=100),
    ),
}
STORED = {f"precomputed over {name}": name for name in SOURCES if not name.startswith("moving")}
KINDS = [*SOURCES, *STORED]


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param in SOURCES:
        return SOURCES[request.param]()
    source = SOURCES[STORED[request.param]]()
    reference = StoredReference(LogProbStore(tmp_path / "store.sqlite"), source.reference)
    reference.prepare({"train": lambda: [BATCH]})
    return Case(source.policy, reference, source.expected, source.built_without_trace)


def train(policy: nn.Module) -> None:
    """What training does to a policy: every trainable tensor moves, far enough to be seen; buffers too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# ------------------------------------------------------------------------------------------------ the contract


def test_reference_says_what_the_initial_policy_says(case: Case) -> None:
    torch.testing.assert_close(case.reference.log_probs(BATCH).values, case.expected, **CLOSE)


def test_reference_still_says_it_after_training_moved_the_policy(case: Case) -> None:
    before = case.reference.log_probs(BATCH).values
    train(case.policy)
    after = case.reference.log_probs(BATCH).values
    assert torch.equal(after, before)
    assert (naive_of(case.policy) - case.expected).abs().mean() > 0.05, "training did not reach the answers"


def test_reference_answers_in_fp32_without_gradient_in_the_order_of_the_batch(case: Case) -> None:
    log_probs = case.reference.log_probs(BATCH)
    assert log_probs.values.dtype == torch.float32 and not log_probs.values.requires_grad
    assert log_probs.values.device == BATCH.device == log_probs.offsets.device
    assert log_probs.lengths().tolist() == list(BATCH.response_lengths)
    assert not log_probs.values.is_inference()  # a loss that multiplies by one would fail


def test_reference_answers_do_not_depend_on_the_batch(case: Case) -> None:
    whole = {key: part for key, part in zip(BATCH.keys, case.reference.log_probs(BATCH).split(), strict=True)}
    chosen, rejected = response(FIRST, draw(4, 1)), response(SECOND, draw(6, 7))
    other = PairBatch.of_pairs([(rejected, response(SECOND, draw(7, 2))), (chosen, chosen)])
    for key, values in zip(other.keys, case.reference.log_probs(other).split(), strict=True):
        torch.testing.assert_close(values, whole[key], **CLOSE)


def test_reference_has_no_dropout_and_repeats_itself(case: Case) -> None:
    assert case.policy.training
    first = case.reference.log_probs(BATCH).values
    assert torch.equal(case.reference.log_probs(BATCH).values, first)


def test_reference_is_built_without_a_trace_on_policy_and_random_state(case: Case) -> None:
    assert case.built_without_trace


def test_reference_leaves_policy_and_random_state_as_they_were(case: Case) -> None:
    before, numbers, random = traces(case.policy), bits(case.policy), torch.get_rng_state()
    case.reference.log_probs(BATCH)
    assert traces(case.policy) == before
    assert same_bits(bits(case.policy), numbers)
    assert torch.equal(torch.get_rng_state(), random)


def test_reference_leaves_the_policy_as_it_was_when_its_pass_fails(case: Case) -> None:
    before, numbers = traces(case.policy), bits(case.policy)
    broken = PairBatch.of_pairs([(response((5,), (10_000,)), response((5,), (10_001,)))])  # ids beyond the vocabulary
    with pytest.raises((IndexError, RuntimeError, MissingLogProbsError)):
        case.reference.log_probs(broken)
    assert traces(case.policy) == before and same_bits(bits(case.policy), numbers)


def test_reference_pass_does_not_disturb_the_gradient_of_the_policy(case: Case) -> None:
    case.policy.eval()  # dropout would draw other numbers
    parameters = [parameter for parameter in case.policy.parameters() if parameter.requires_grad]

    def gradient() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(score(case.policy, BATCH).values.sum(), parameters, allow_unused=True)

    expected = gradient()
    case.reference.log_probs(BATCH)
    for ours, theirs in zip(gradient(), expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or torch.equal(ours, theirs)


def test_reference_identity_is_constant_and_can_be_written_down(case: Case) -> None:
    before = case.reference.identity
    case.reference.log_probs(BATCH)
    train(case.policy)
    case.reference.release()
    assert case.reference.identity == before and case.reference.identity.digest == before.digest
    assert json.loads(json.dumps(before.describe())) == before.describe()


def test_reference_counts_the_batches_a_model_was_run_for(case: Case) -> None:
    before = case.reference.num_passes
    for _ in range(3):
        case.reference.log_probs(BATCH)
    stored = isinstance(case.reference, StoredReference)
    assert before == (1 if stored else 0)
    assert case.reference.num_passes == (1 if stored else 3)


def test_reference_state_saved_and_loaded_gives_the_same_answers(case: Case, tmp_path: Path) -> None:
    before = case.reference.log_probs(BATCH).values
    case.reference.save(tmp_path)
    train(case.policy)
    case.reference.load(tmp_path)
    assert torch.equal(case.reference.log_probs(BATCH).values, before)


def test_reference_that_is_not_due_stays_where_it_is(case: Case) -> None:
    before = case.reference.log_probs(BATCH).values
    train(case.policy)
    assert case.reference.advance(1) is False
    assert torch.equal(case.reference.log_probs(BATCH).values, before)


def test_reference_in_the_policy_is_the_policy_in_another_state_or_an_error(case: Case) -> None:
    train(case.policy)
    kind = case.reference.identity.kind
    over_adapter = kind == "moving" and case.reference.module is None
    if kind != "adapter" and not over_adapter:
        with pytest.raises(ReferenceModelError, match="null_ref_context"), case.reference.in_policy():
            pass
        return
    before, numbers = traces(case.policy), bits(case.policy)
    with case.reference.in_policy():
        torch.testing.assert_close(naive_of(case.policy), case.expected, **CLOSE)
    assert traces(case.policy) == before and same_bits(bits(case.policy), numbers)


# --------------------------------------------------------------------------------------- explicit: what it holds


def storages(model: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_frozen_reference_copies_what_trains_and_shares_what_does_not() -> None:
    policy = partly_frozen()
    reference = FrozenReference.of_policy(policy)
    module = reference.module
    assert module is not None and not any(parameter.requires_grad for parameter in module.parameters())
    for (name, own), (_, theirs) in zip(module.named_parameters(), policy.named_parameters(), strict=True):
        assert (own.data_ptr() == theirs.data_ptr()) == (not theirs.requires_grad), name
    trainable = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    assert reference.extra_bytes == trainable


def test_frozen_reference_before_training_holds_nothing_and_is_an_error_once_released() -> None:
    reference = FrozenReference.before_training(dropping_gpt2().train())
    assert reference.extra_bytes == 0
    reference.log_probs(BATCH)
    reference.release()
    assert reference.module is None and reference.extra_bytes == 0
    with pytest.raises(MissingLogProbsError, match="released"):
        reference.log_probs(BATCH)


@pytest.mark.parametrize("options", [{}, {"moves": True}, {"dtype": torch.bfloat16}], ids=str)
def test_frozen_reference_never_changes_the_model_it_was_given(options: dict[str, Any]) -> None:
    policy, other = dropping_gpt2().train(), dropping_gpt2(seed=1).train()
    before, numbers = traces(other), bits(other)
    reference: Reference = FrozenReference.of_other_model(other, policy, **options)
    reference.log_probs(BATCH)
    if options.get("moves"):
        assert isinstance(reference, FrozenReference)
        reference = MovingReference(reference, lambda: policy, alpha=0.5, every=1)
        assert reference.advance(1)
    reference.release()
    assert traces(other) == before and same_bits(bits(other), numbers)


def test_frozen_reference_shares_another_model_without_a_copy() -> None:
    policy, other = dropping_gpt2(), dropping_gpt2(seed=1)
    module = FrozenReference.of_other_model(other, policy).module
    assert module is not None and storages(module) == storages(other)


def test_frozen_reference_of_the_base_under_a_trained_policy_keeps_its_own_copy() -> None:
    """`ref_model` may share tensors with the policy: those that train are copied, so that it stands still."""
    policy = dropping_gpt2()
    other = copy.copy(policy)
    reference = FrozenReference.of_other_model(other, policy)
    before = reference.log_probs(BATCH).values
    train(policy)
    assert torch.equal(reference.log_probs(BATCH).values, before)


def test_frozen_reference_in_another_dtype_scores_in_it_and_says_so() -> None:
    policy = dropping_gpt2()
    reference = FrozenReference.of_policy(policy, dtype=torch.bfloat16)
    assert reference.module is not None
    assert {parameter.dtype for parameter in reference.module.parameters()} == {torch.bfloat16}
    expected = naive_of(tiny_model("gpt2", dtype=torch.bfloat16))
    assert reference.log_probs(BATCH).values.dtype == torch.float32
    torch.testing.assert_close(reference.log_probs(BATCH).values, expected, atol=0.05, rtol=0.05)
    assert reference.identity.compute_dtype == "bfloat16"
    assert reference.identity.digest != FrozenReference.of_policy(policy).identity.digest


def test_frozen_reference_keeps_rotary_frequencies_in_fp32_when_its_weights_are_cast() -> None:
    policy = tiny_model("llama")
    module = FrozenReference.of_policy(policy, dtype=torch.bfloat16).module
    assert module is not None
    frequencies = {name: buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    assert frequencies and all(torch.equal(buffer, policy.get_buffer(name)) for name, buffer in frequencies.items())


def test_reference_runs_under_the_autocast_of_the_policy() -> None:
    policy = dropping_gpt2()
    reference = FrozenReference.of_policy(policy, autocast_dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = score(policy.eval(), BATCH).values
    assert torch.equal(reference.log_probs(BATCH).values, expected)
    assert reference.identity.compute_dtype == "bfloat16"


# ------------------------------------------------------------------------------------ implicit: what it exchanges


def test_adapter_reference_is_the_base_alone_for_a_fresh_adapter_and_holds_nothing() -> None:
    base = dropping_gpt2()
    expected = naive_of(base)
    reference = AdapterReference(adapted(base, LoraConfig(**LORA)))
    assert reference.adapter_is_off and reference.extra_bytes == 0
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
def test_adapter_reference_holds_the_tensors_that_train_and_reach_it(name: str, held: str) -> None:
    case = SOURCES[name]()
    assert isinstance(case.reference, AdapterReference)
    bytes_held = sum(p.numel() * 4 for n, p in case.policy.named_parameters() if p.requires_grad and held in n)
    assert case.reference.extra_bytes == bytes_held > 0


def test_adapter_reference_of_a_trained_adapter_differs_from_its_base() -> None:
    case = SOURCES["implicit, continued LoRA"]()
    with case.policy.disable_adapter():
        assert (naive_of(case.policy) - case.expected).abs().mean() > 0.05
    assert isinstance(case.reference, AdapterReference) and not case.reference.adapter_is_off


# ------------------------------------------------------------------------------------------- precomputed: the store


def test_stored_reference_computes_what_is_missing_once_and_no_more(tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "store.sqlite")
    source = FrozenReference.of_policy(dropping_gpt2())
    reference = StoredReference(store, source, release_when_filled=False)
    first = reference.log_probs(BATCH).values
    assert reference.num_passes == 1
    assert torch.equal(reference.log_probs(BATCH).values, first) and reference.num_passes == 1
    reference.prepare({"train": lambda: [BATCH, BATCH]})
    assert reference.num_passes == 1


def test_stored_reference_is_reused_by_any_reference_that_would_say_the_same(tmp_path: Path) -> None:
    """Full fine-tuning fills the store; a fresh adapter on the same base finds everything there, and vice versa."""
    StoredReference(LogProbStore(tmp_path / "s"), FrozenReference.before_training(dropping_gpt2())).prepare(
        {"train": lambda: [BATCH]}
    )
    other = StoredReference(
        LogProbStore(tmp_path / "s"), AdapterReference(adapted(dropping_gpt2(), LoraConfig(**LORA)))
    )
    other.prepare({"train": lambda: [BATCH]})
    assert other.num_passes == 0


def test_stored_reference_is_not_reused_by_another_model_or_dtype(tmp_path: Path) -> None:
    sources = [
        FrozenReference.before_training(dropping_gpt2()),
        FrozenReference.before_training(dropping_gpt2(seed=1)),
        FrozenReference.of_policy(dropping_gpt2(), dtype=torch.bfloat16),
        FrozenReference.before_training(dropping_gpt2(), autocast_dtype=torch.bfloat16),
    ]
    for source in sources:
        reference = StoredReference(LogProbStore(tmp_path / "s"), source)
        reference.prepare({"train": lambda: [BATCH]})
        assert reference.num_passes == 1


def test_stored_reference_serves_shorter_responses_of_the_same_key(tmp_path: Path) -> None:
    reference = StoredReference(LogProbStore(tmp_path / "s"), FrozenReference.of_policy(dropping_gpt2()))
    reference.prepare({"train": lambda: [BATCH]})
    whole = response(FIRST, draw(2, 13))
    cut = whole._replace(token_ids=whole.token_ids[:4])
    found = reference.log_probs(PairBatch.of_pairs([(cut, response(FIRST, draw(3, 5)))]))
    assert torch.equal(found.split()[0], reference.log_probs(BATCH).split()[0][:4]) and reference.num_passes == 1


def test_stored_reference_without_source_reads_and_says_clearly_what_it_lacks(tmp_path: Path) -> None:
    store, source = LogProbStore(tmp_path / "s"), FrozenReference.of_policy(dropping_gpt2())
    StoredReference(store, source).prepare({"train": lambda: [BATCH]})
    reader = StoredReference(store, identity=source.identity)
    assert reader.log_probs(BATCH).num_responses == BATCH.num_responses and reader.num_passes == 0
    unknown = PairBatch.of_pairs([(response((9,), (8,)), response((9,), (7,)))])
    with pytest.raises(MissingLogProbsError, match="does not hold"):
        reader.log_probs(unknown)
    with pytest.raises(ValueError, match="source or the identity"):
        StoredReference(store)


def test_stored_reference_over_an_adapter_goes_on_answering_new_rows_after_its_release(tmp_path: Path) -> None:
    case = SOURCES["implicit, fresh LoRA"]()
    reference = StoredReference(LogProbStore(tmp_path / "s"), case.reference)
    reference.prepare({})
    train(case.policy)
    torch.testing.assert_close(reference.log_probs(BATCH).values, case.expected, **CLOSE)
