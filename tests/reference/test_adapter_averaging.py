"""TR-DPO for adapters: the average of the weights that an adapter makes, against dense float64 written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor, nn

from support.observe import bits, same_bits, traces
from support.tiny import tiny_model
from tether.errors import ConfigurationError, ReferenceModelError
from tether.reference import ImplicitReference, SynchronizedReference
from tether.reference.updates.adapters import LINEAR_TYPES, adapter_groups, refused_followers
from tether.reference.updates.averaging import LowRank
from tether.reference.updates.groups import DenseGroup, UpdateRule
from tether.reference.updates.low_rank import LowRankGroup, convolution, experts
from tether.refusals import refuse

pytestmark = pytest.mark.numerics

ALPHAS = [0.005, 0.01, 0.05, 0.6, 1.0]
QV = ["q_proj", "v_proj"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": QV} | options)


def other(name: str, **options: Any) -> peft.PeftConfig:
    config: peft.PeftConfig = getattr(peft, name)(task_type="CAUSAL_LM", **options)
    return config


def adapted(
    config: peft.PeftConfig, family: str = "llama", *, seed: int = 0, continued: bool = False, **options: Any
) -> Any:
    torch.manual_seed(seed)
    policy = peft.get_peft_model(tiny_model(family, **options), config)
    if continued:
        train(policy, seed + 100)
    return policy


def train(policy: nn.Module, seed: int, size: float = 0.05) -> None:
    """A stand-in for an optimizer step: the same noise for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def synchronized(policy: Any, *, alpha: float = 0.6, every: int = 1, **options: Any) -> SynchronizedReference:
    source = ImplicitReference(policy, moves=True)
    return SynchronizedReference(source, lambda: policy, alpha=alpha, every=every, **options)


def effective(policy: Any) -> dict[str, Tensor]:
    """Every weight of the policy with its adapter merged into it, in float64: PEFT's own arithmetic."""
    whole = copy.deepcopy(policy)
    for parameter in whole.parameters():
        parameter.data = parameter.data.double()
    for module in whole.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.double())
    merged = whole.merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items() if tensor.is_floating_point()}


def seen(policy: Any, reference: SynchronizedReference) -> dict[str, Tensor]:
    """The same of the reference."""
    with reference.in_policy():
        return effective(policy)


def mixed(alpha: float, policy: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: alpha * policy[name] + (1 - alpha) * reference[name] for name in policy}


def away(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Frobenius norm of the difference, over all tensors."""
    return math.sqrt(sum(float((one[name] - two[name]).square().sum()) for name in one))


def norm(one: dict[str, Tensor]) -> float:
    return away(one, {name: torch.zeros_like(tensor) for name, tensor in one.items()})


# Every LoRA variant that can follow, and the types that follow tensor by tensor. What trains outside an adapter is in.
CASES: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **o: adapted(lora(), **o),
    "LoRA, gaussian": lambda **o: adapted(lora(init_lora_weights="gaussian"), **o),
    "LoRA, random start": lambda **o: adapted(lora(init_lora_weights=False), **o),
    "rsLoRA": lambda **o: adapted(lora(use_rslora=True), **o),
    "LoRA, alpha": lambda **o: adapted(lora(lora_alpha=11), **o),
    "LoRA, patterns": lambda **o: adapted(
        lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 7}), **o
    ),
    "LoRA on embeddings and head": lambda **o: adapted(lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), **o),
    "LoRA, modules_to_save": lambda **o: adapted(lora(modules_to_save=["lm_head"]), **o),
    "LoRA, trainable tokens": lambda **o: adapted(lora(trainable_token_indices=[3, 5, 8]), **o),
    "LoRA, GPT-2": lambda **o: adapted(lora(target_modules=["c_attn"], fan_in_fan_out=True), "gpt2", **o),
    "LoRA, all biases": lambda **o: adapted(
        lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all"), "gpt2", **o
    ),
    "LoRA, bias of its own": lambda **o: adapted(
        lora(target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True), "gpt2", **o
    ),
    "LoRA, layer replication": lambda **o: adapted(lora(layer_replication=[[0, 2], [0, 2]]), **o),
    "LoRA, experts": lambda **o: adapted(
        lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), "mixtral", **o
    ),
    "PiSSA": lambda **o: adapted(lora(init_lora_weights="pissa"), **o),
    "OLoRA": lambda **o: adapted(lora(init_lora_weights="olora"), **o),
    "DoRA": lambda **o: adapted(lora(use_dora=True, lora_alpha=9), **o),
    "DoRA, GPT-2": lambda **o: adapted(
        lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True), "gpt2", **o
    ),
    "DoRA on embeddings": lambda **o: adapted(lora(target_modules=["q_proj", "embed_tokens"], use_dora=True), **o),
    "IA3": lambda **o: adapted(
        other("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), **o
    ),
    "LN tuning": lambda **o: adapted(other("LNTuningConfig", target_modules=["input_layernorm", "norm"]), **o),
    "FourierFT": lambda **o: adapted(other("FourierFTConfig", target_modules=QV, n_frequency=10), **o),
    "WaveFT": lambda **o: adapted(other("WaveFTConfig", target_modules=QV, n_frequency=10), **o),
    "C3A": lambda **o: adapted(other("C3AConfig", target_modules=QV, block_size=8), **o),
    "SHiRA": lambda **o: adapted(other("ShiraConfig", target_modules=QV, r=4), **o),
    "MiSS": lambda **o: adapted(other("MissConfig", target_modules=QV, r=4), **o),
    "MiSS, bat": lambda **o: adapted(other("MissConfig", target_modules=QV, r=4, init_weights="bat"), **o),
    "trainable tokens": lambda **o: adapted(other("TrainableTokensConfig", token_indices=[3, 5, 8]), **o),
}
IS_OLD = Version(peft.__version__) < Version("0.20")
if not IS_OLD:
    CASES["MiCA"] = lambda **o: adapted(lora(init_lora_weights="mica"), **o)
else:  # a policy that has trained cannot be copied, which is what the oracle does
    del CASES["trainable tokens"]
PROMPTS: dict[str, Callable[..., Any]] = {
    "prompt tuning": lambda **o: adapted(other("PromptTuningConfig", num_virtual_tokens=4), **o),
    "prefix tuning": lambda **o: adapted(other("PrefixTuningConfig", num_virtual_tokens=4), **o),
}
_SINGLE_PRECISION = ("FourierFT", "WaveFT", "C3A")  # PEFT computes their update through a transform in float32


def test_every_type_that_follows_tensor_by_tensor_is_proven_here() -> None:
    policies = [make() for make in (*CASES.values(), *PROMPTS.values())]
    proven = {str(policy.peft_config["default"].peft_type.value) for policy in policies}
    assert proven >= LINEAR_TYPES - ({"TRAINABLE_TOKENS"} if IS_OLD else set())


# -------------------------------------------------------------------------------- the average is the weights' average


@pytest.mark.parametrize("continued", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("name", CASES)
def test_the_average_is_that_of_the_dense_weights_while_the_stack_fits(name: str, continued: bool) -> None:
    policy = CASES[name](continued=continued)
    reference = synchronized(policy, alpha=0.3)
    exact = start = effective(policy)
    # A fresh LoRA takes two syncs at twice the rank, a continued one takes one: it has a rank to begin with.
    for step in range(1, 2 if continued or name in ("PiSSA", "OLoRA", "LoRA, random start") else 3):
        train(policy, step)
        reference.advance(step)
        exact = mixed(0.3, effective(policy), exact)
    tolerance = 3e-6 if name in _SINGLE_PRECISION else 3e-7
    assert away(seen(policy, reference), exact) < tolerance * norm(exact)
    assert away(exact, start) > 100 * tolerance * norm(exact), "the oracle itself moved"
    assert reference.figures().get("reference/truncation", 0.0) == 0.0


@pytest.mark.parametrize("name", ["LoRA", "LoRA, patterns", "LoRA, experts", "LoRA on embeddings and head", "DoRA"])
def test_the_average_stays_within_the_logged_truncation(name: str) -> None:
    policy = CASES[name]()
    reference = synchronized(policy, alpha=0.2)
    base = {name: torch.zeros_like(tensor) for name, tensor in effective(policy).items()}
    exact, largest = effective(policy), 0.0
    start = exact
    for step in range(1, 9):
        train(policy, step, size=0.1)
        reference.advance(step)
        exact = mixed(0.2, effective(policy), exact)
        found = seen(policy, reference)
        error, size = away(found, exact), away(found, start)
        logged = reference.figures()["reference/truncation"]
        # DoRA's bound is relative to its update before the rows are scaled.
        assert error <= (logged + 1e-5) * size * (1.5 if name == "DoRA" else 1.0)
        largest = max(largest, error / size)
        assert base.keys() == exact.keys()
    assert largest > 1e-3, "the rank was never short, so nothing was seen"


def test_a_larger_rank_makes_the_average_exact() -> None:
    policy = CASES["LoRA"]()
    reference = synchronized(policy, alpha=0.2, max_rank=20)
    exact = effective(policy)
    for step in range(1, 6):
        train(policy, step, size=0.1)
        reference.advance(step)
        exact = mixed(0.2, effective(policy), exact)
    assert away(seen(policy, reference), exact) < 3e-7 * norm(exact)
    assert reference.figures() == {"reference/syncs": 5.0, "reference/truncation": 0.0}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_averaged_as_they_are(name: str) -> None:
    policy = PROMPTS[name]()
    reference = synchronized(policy, alpha=0.3)
    exact = {n: p.detach().double() for n, p in policy.named_parameters() if p.requires_grad}
    for step in (1, 2):
        train(policy, step)
        reference.advance(step)
        exact = {n: 0.3 * policy.get_parameter(n).detach().double() + 0.7 * t for n, t in exact.items()}
    with reference.in_policy():
        for n, tensor in exact.items():
            torch.testing.assert_close(policy.get_parameter(n).detach().double(), tensor, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------- 200 syncs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_200_syncs_follow_the_oracle_within_the_logged_truncation(alpha: float, dtype: torch.dtype) -> None:
    part = LowRankGroup("B", "A", scaling=2.0, alpha=alpha, max_rank=4)
    reference = {"B": torch.zeros(10, 2, dtype=dtype), "A": normal(2, 8, seed=0).to(dtype)}
    state = part.start(reference)
    exact = torch.zeros(10, 8, dtype=torch.float64)
    drift = {"B": normal(10, 2, seed=1), "A": reference["A"].float()}
    for sync in range(200):
        drift = {name: t + 0.05 * normal(*t.shape, seed=10 + 2 * sync + (name == "A")) for name, t in drift.items()}
        policy = {name: tensor.to(dtype) for name, tensor in drift.items()}
        moved = part.move(policy, reference, state)
        reference, state = reference | moved.tensors, state | moved.state
        exact = alpha * product(policy) + (1 - alpha) * exact
    held = {name: state.get(f"master.{name}", tensor) for name, tensor in reference.items()}
    assert all(tensor.dtype == dtype for tensor in reference.values())
    if alpha == 1:
        assert torch.equal(product(held), exact) and all(torch.equal(reference[n], policy[n]) for n in "BA")
        return
    bound = float(state["truncation.A"][0]) / 2.0  # the state's is of the update, scaling and all
    assert (product(held) - exact).norm() <= bound + 2e-6 * exact.norm()
    assert (product(held) - exact).norm() < 0.5 * exact.norm()
    rounded = (product(reference) - product(held)).norm()
    assert rounded <= (0 if dtype == torch.float32 else 2**-7) * product(held).norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [0.005, 0.01, 0.05, 0.6])
def test_a_fixed_gap_closes_in_any_precision(alpha: float, dtype: torch.dtype) -> None:
    part = LowRankGroup("B", "A", scaling=1.0, alpha=alpha, max_rank=4)
    reference = {"B": normal(10, 2, seed=3).to(dtype), "A": normal(2, 8, seed=4).to(dtype)}
    policy = {"B": normal(10, 2, seed=5).to(dtype), "A": normal(2, 8, seed=6).to(dtype)}
    gap = (product(policy) - product(reference)).norm()
    state = part.start(reference)
    for _ in range(math.ceil(math.log(1e-5) / math.log(1 - alpha))):
        moved = part.move(policy, reference, state)
        reference, state = reference | moved.tensors, state | moved.state
    assert (product(policy) - product(reference)).norm() < 0.05 * gap


@pytest.mark.parametrize("name", ["LoRA", "LoRA, experts", "LoRA on embeddings and head", "PiSSA", "DoRA"])
def test_syncing_equal_weights_changes_them_by_a_millionth_at_most(name: str) -> None:
    policy = CASES[name](continued=True)
    reference = synchronized(policy, alpha=0.05)
    before = effective(policy)
    for step in range(1, 201 if name == "LoRA" else 21):
        reference.advance(step)
    assert away(seen(policy, reference), before) < 1e-6 * norm(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["B"].double() @ tensors["A"].double()


# ------------------------------------------------------------------------------------------------ the exchange


@pytest.mark.parametrize("name", [*CASES, *PROMPTS])
def test_a_hard_sync_copies_the_adapter_bit_for_bit_and_the_pass_leaves_no_trace(name: str) -> None:
    policy = (CASES | PROMPTS)[name](continued=True).train()
    reference = synchronized(policy, alpha=1.0)
    train(policy, 1)
    before, numbers = traces(policy), bits(policy)
    reference.advance(1)
    with reference.in_policy():
        assert same_bits(bits(policy), numbers)
    train(policy, 2)
    numbers = bits(policy)
    with reference.in_policy():
        assert not same_bits(bits(policy), numbers)
    assert same_bits(bits(policy), numbers) and traces(policy) == before


def test_a_reference_of_larger_rank_leaves_gradients_and_their_hooks_alone() -> None:
    """A swap in the middle of gradient accumulation: of another shape, and nothing of it is felt."""

    def gradients(swaps: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        policy = adapted(lora(), dtype=dtype)
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(dtype)  # PEFT keeps adapters in fp32
        counted = []
        for parameter in policy.parameters():
            if parameter.requires_grad:  # as DDP does: on the accumulator, not on the tensor
                node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
                node.register_hook(lambda *_: counted.append(1))
                keep.append(node)
        reference = synchronized(policy, alpha=0.5)
        for step in (1, 2):
            train(policy, step)
            reference.advance(step)
        for _ in range(2):
            if swaps:
                with reference.in_policy(), torch.no_grad():
                    policy(input_ids=IDS)
            policy(input_ids=IDS).logits.float().square().mean().backward()
        found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        assert len(counted) == 2 * len(found)
        return found

    keep: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16):
        assert same_bits(gradients(True, dtype), gradients(False, dtype))


def test_the_reference_is_the_model_that_its_weights_make() -> None:
    """Its logits, at a larger rank than the policy's, against the merged average in a plain model."""
    for name in ("LoRA", "LoRA, experts", "LoRA on embeddings and head", "DoRA", "rsLoRA", "LoRA, bias of its own"):
        policy = CASES[name]()
        reference = synchronized(policy, alpha=0.4)
        for step in (1, 2):
            train(policy, step)
            reference.advance(step)
        with reference.in_policy(), torch.no_grad():
            found = policy.eval()(input_ids=IDS).logits
            merged = copy.deepcopy(policy).merge_and_unload()
        torch.testing.assert_close(found, merged(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- layouts


@given(rank=st.integers(1, 4), seed=st.integers(0, 30))
@settings(max_examples=25)
def test_a_convolution_is_read_and_written_as_a_matrix(rank: int, seed: int) -> None:
    layout = convolution((3,))
    b, a = normal(6, rank, 1, seed=seed).double(), normal(rank, 5, 3, seed=seed + 1).double()
    pair = layout.read(b, a)
    exact = torch.nn.functional.conv1d(a.transpose(0, 1), b).transpose(0, 1)  # PEFT's own `get_delta_weight`
    torch.testing.assert_close((pair.B @ pair.A).reshape(6, 5, 3), exact)
    written = layout.write(pair)
    assert torch.equal(written[0], b) and torch.equal(written[1], a)


@given(rank=st.integers(1, 4), num=st.integers(2, 4), seed=st.integers(0, 30))
@settings(max_examples=25)
def test_experts_are_read_and_written_as_matrices(rank: int, num: int, seed: int) -> None:
    layout = experts(num)
    b, a = normal(6, rank * num, seed=seed).double(), normal(num * rank, 5, seed=seed + 1).double()
    pair = layout.read(b, a)
    exact = torch.einsum("ore,eri->eoi", b.reshape(6, rank, num), a.reshape(num, rank, 5))  # as PEFT does
    torch.testing.assert_close(pair.B @ pair.A, exact)
    written = layout.write(pair)
    assert torch.equal(written[0], b) and torch.equal(written[1], a)


class Net(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=groups)
        self.config = None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


def test_lora_on_a_convolution_follows() -> None:
    torch.manual_seed(0)
    policy: Any = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False))
    (part,) = adapter_groups(policy, UpdateRule(alpha=0.3))
    layer = policy.base_model.model.conv
    old = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    before = layer.get_delta_weight("default").detach().double()
    train(policy, 1, size=0.5)
    new = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    exact = 0.3 * layer.get_delta_weight("default").detach().double() + 0.7 * before
    moved = part.move(new, old, part.start(old)).tensors
    for name, tensor in moved.items():
        policy.get_parameter(name).data = tensor
    torch.testing.assert_close(layer.get_delta_weight("default").detach().double(), exact, rtol=1e-5, atol=1e-5)
    x = normal(2, 4, 9, seed=1)
    expected = torch.nn.functional.conv1d(x.double(), layer.weight.double() + exact, layer.bias.double())
    torch.testing.assert_close(policy(x).double(), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ properties of the rule


@given(alpha=st.floats(0, 1), seed=st.integers(0, 50), syncs=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_part_is_the_average_of_products(alpha: float, seed: int, syncs: int) -> None:
    part = LowRankGroup("B", "A", scaling=-1.5, alpha=alpha, max_rank=2 * (syncs + 1))
    reference = {"B": normal(7, 2, seed=seed), "A": normal(2, 9, seed=seed + 1)}
    state, exact = part.start(reference), product(reference)
    for sync in range(syncs):
        policy = {"B": normal(7, 2, seed=seed + 2 + sync), "A": normal(2, 9, seed=seed + 90 + sync)}
        moved = part.move(policy, reference, state)
        reference, state = reference | moved.tensors, state | moved.state
        exact = alpha * product(policy) + (1 - alpha) * exact
    torch.testing.assert_close(product(reference), exact, rtol=0, atol=2e-5)


@given(alpha=st.floats(0.001, 0.999), seed=st.integers(0, 50), low=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_dense_part_of_equal_weights_changes_no_bit(alpha: float, seed: int, low: bool) -> None:
    weight = {"w": normal(40, seed=seed).to(torch.bfloat16 if low else torch.float32)}
    part = DenseGroup("w", alpha)
    moved = part.move(weight, weight, part.start(weight))
    assert torch.equal(moved.tensors["w"], weight["w"]) and all(not bool(t.any()) for t in moved.state.values())


# ---------------------------------------------------------------------------------------------------- refusals


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "VERA": ("VERA", lambda: other("VeraConfig", target_modules=["q_proj", "o_proj"])),
    "LoHa": ("LOHA", lambda: other("LoHaConfig", target_modules=QV)),
    "LoKr": ("LOKR", lambda: other("LoKrConfig", target_modules=QV)),
    "OFT": ("OFT", lambda: other("OFTConfig", target_modules=QV, oft_block_size=4)),
    "BOFT": ("BOFT", lambda: other("BOFTConfig", target_modules=QV, boft_block_size=4)),
    "HRA": ("HRA", lambda: other("HRAConfig", target_modules=QV, r=4)),
    "VB-LoRA": ("VBLORA", lambda: other("VBLoRAConfig", target_modules=QV, num_vectors=20, vector_length=8, r=4)),
    "RandLora": ("RANDLORA", lambda: other("RandLoraConfig", target_modules=QV, r=4)),
    "AdaLoRA": ("ADALORA", lambda: other("AdaLoraConfig", target_modules=QV, total_step=9, tinit=1, tfinal=1)),
    "P-tuning": ("P_TUNING", lambda: other("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16)),
    "prefix network": (
        "prefix_projection",
        lambda: other("PrefixTuningConfig", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16),
    ),
    "aLoRA": ("alora_invocation_tokens", lambda: lora(alora_invocation_tokens=[1])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_without_an_average_is_refused_by_name(name: str) -> None:
    found, make = REFUSED[name]
    with pytest.raises(ConfigurationError, match=found) as caught:
        refuse(refused_followers([make()]))
    assert "sync_ref_model" in caught.value.problem and caught.value.instead


RULES_REFUSED: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "a rank below the policy's": ("rank 4", CASES["LoRA"], {"max_rank": 3}),
    "a rank without LoRA": ("ref_model_sync_rank", CASES["IA3"], {"max_rank": 8}),
    "a rank for a copy": ("ref_model_sync_rank", CASES["LoRA"], {"max_rank": 8, "alpha": 1.0}),
    "alpha out of range": ("ref_model_mixup_alpha", CASES["LoRA"], {"alpha": 1.1}),
    "rank 0": ("ref_model_sync_rank", CASES["LoRA"], {"max_rank": 0}),
}


@pytest.mark.parametrize("name", RULES_REFUSED)
def test_a_rule_without_a_meaning_is_refused(name: str) -> None:
    found, make, options = RULES_REFUSED[name]
    with pytest.raises(ConfigurationError, match=found) as caught:
        synchronized(make(), **options)
    assert caught.value.instead


def test_layers_that_no_average_is_known_for_are_refused_by_name() -> None:
    grouped: Any = peft.get_peft_model(
        Net(groups=2), peft.LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
    )
    with pytest.raises(ConfigurationError, match=r"`base_model\.model\.conv` \(Conv1d\)"):
        adapter_groups(grouped, UpdateRule())
    half = CASES["DoRA"]()
    next(p for n, p in half.named_parameters() if "lora_magnitude" in n).requires_grad_(False)
    with pytest.raises(ConfigurationError, match="DoRA"):
        synchronized(half)


def test_a_source_whose_adapter_is_off_cannot_move() -> None:
    policy = CASES["LoRA"]()
    with pytest.raises(ConfigurationError, match="moves=True"):
        SynchronizedReference(ImplicitReference(policy), lambda: policy, every=1)


# ---------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoRA, experts", "LoRA, patterns", "IA3", "prompt tuning"])
def test_it_goes_on_from_its_saved_state_bit_for_bit(name: str, alpha: float, tmp_path: Path) -> None:
    def run(policy: Any, reference: SynchronizedReference, steps: range) -> dict[str, Tensor]:
        for step in steps:
            train(policy, step)
            reference.advance(step)
        with reference.in_policy():
            return bits(policy)

    make = (CASES | PROMPTS)[name]
    policy = make()
    whole = synchronized(policy, alpha=alpha, every=2)
    run(policy, whole, range(1, 8))
    whole.save(tmp_path)  # between two syncs, and after the rank has grown
    then = bits(policy)
    expected = run(policy, whole, range(8, 13))

    again = make()
    resumed = synchronized(again, alpha=alpha, every=2)
    assert resumed.identity == whole.identity
    again.load_state_dict(then, strict=False)
    resumed.load(tmp_path)
    assert same_bits(run(again, resumed, range(8, 13)), expected)
    assert resumed.figures() == whole.figures()


# ------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("PiSSA", "OLoRA")] + list(PROMPTS))
def test_an_exported_adapter_is_the_reference(name: str, tmp_path: Path) -> None:
    if name == "LoRA, experts" and IS_OLD:
        pytest.skip("this version of PEFT cannot load such an adapter with this transformers")
    policy = (CASES | PROMPTS)[name]()
    reference = synchronized(policy, alpha=0.4)
    for step in (1, 2, 3):
        train(policy, step)
        reference.advance(step)
    configs = copy.deepcopy(policy.peft_config)
    reference.export(tmp_path)
    assert policy.peft_config == configs, "the policy's own configuration is not touched"
    family = policy.get_base_model().config.model_type
    base = tiny_model("llama" if "replication" in name else family)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        with reference.in_policy():
            expected = policy.eval()(input_ids=IDS).logits
        own = policy(input_ids=IDS).logits
        found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (own - expected).abs().max() > 1e-3, "the policy is elsewhere"


@pytest.mark.parametrize("name", ["LoRA", "PiSSA", "OLoRA", "DoRA", "IA3"])
def test_an_exported_model_is_the_reference(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = CASES[name]()
    reference = synchronized(policy, alpha=0.4)
    for step in (1, 2):
        train(policy, step)
        reference.advance(step)
    before, numbers = traces(policy), bits(policy)
    reference.export(tmp_path, merged=True)
    assert traces(policy) == before and same_bits(bits(policy), numbers)
    with reference.in_policy(), torch.no_grad():
        expected = policy.eval()(input_ids=IDS).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match="merged=True"):
        synchronized(CASES["PiSSA"]()).export(tmp_path)
    with pytest.raises(ReferenceModelError, match="not part of a model"):
        synchronized(PROMPTS["prompt tuning"]()).export(tmp_path, merged=True)
    with pytest.raises(ReferenceModelError, match="adapter off"):
        ImplicitReference(CASES["LoRA"]()).export(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_low_rank_is_what_the_layers_hold() -> None:
    """The factors found are the layer's own, so that what is averaged is what computes."""
    policy = CASES["LoRA, experts"](continued=True)
    num = 0
    for group in ImplicitReference(policy, moves=True).update_groups(policy, UpdateRule()):
        if isinstance(group, LowRankGroup):
            pair: LowRank = group.layout.read(policy.get_parameter(group.b), policy.get_parameter(group.a))
            assert pair.A.shape[-2] == pair.B.shape[-1] == 4
            num += 1
    assert num == 2 * (2 + 2)
