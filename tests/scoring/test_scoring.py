"""`score` means `log_softmax(model(prompt + response).logits.float())` at the response tokens, for every model.

Both layouts, every family: values, gradients, precision; and that nothing is left on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from support.observe import LargestTensor, traces
from support.tiny import FAMILIES, naive_log_probs, tiny_model
from tether.errors import ConfigurationError
from tether.scoring import score
from tether.types import PairBatch, Response

pytestmark = pytest.mark.numerics

LAYOUTS = ("auto", "padded")
# Rounding in fp32, in nats: 8e-6 by the kernels of other processors, 7e-5 under `OtherRounding(3)`.
CLOSE = {"atol": 1e-4, "rtol": 1e-6}


def draw(seed: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 256, (count,), generator=generator).tolist())


LONG, SHORT = draw(0, 19), draw(1, 1)  # longer than the windows (8) of the tiny models, and a single token
ALIKE = LONG[:17] + draw(10, 4)  # in a packed row it shares the first 17
BATCH = PairBatch.of_pairs(
    [
        (Response(LONG, draw(2, 13)), Response(LONG, draw(3, 5))),
        (Response(LONG, draw(4, 1)), Response(LONG, draw(2, 13))),  # four responses to one prompt, one of them twice
        (Response(LONG, draw(4, 1)), Response(LONG, draw(5, 9))),
        (Response(SHORT, draw(6, 17)), Response(SHORT, draw(7, 2))),
        (Response(ALIKE, draw(8, 3)), Response(ALIKE, draw(9, 6))),
    ]
)


def sequences(batch: PairBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and response ids of every response of a batch, in its order."""
    prompts = [part.tolist() for part in batch.prompt_ids.split(list(batch.prompt_lengths))]
    for group, tokens in zip(batch.response_group, batch.response_ids.split(list(batch.response_lengths)), strict=True):
        yield prompts[group], tokens.tolist()


def naive(model: nn.Module, batch: PairBatch = BATCH) -> Tensor:
    return torch.cat([naive_log_probs(model, prompt, response) for prompt, response in sequences(batch)])


def gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    """The gradient of a sum of log-probs in which each token has a weight of its own."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((weights * values).sum(), list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of a tensor's largest entry: 1.5e-5 by the kernels of other processors, 5e-5 under `OtherRounding(3)`."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # the gradient of a key's bias is zero but for rounding: hence not the tensor's own size alone
        assert (found[name] - grad).abs().max() <= 1e-4 * max(1.0, grad.abs().max().item()), name


# ----------------------------------------------------------------------------------------------- the meaning


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_score_equals_the_naive_oracle(family: str, layout: Any) -> None:
    model = tiny_model(family)
    log_probs = score(model, BATCH, layout=layout)
    assert log_probs.values.dtype == torch.float32
    assert log_probs.lengths().tolist() == list(BATCH.response_lengths)
    torch.testing.assert_close(log_probs.values, naive(model), **CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_score_gradient_equals_that_of_the_naive_oracle(family: str, layout: Any) -> None:
    model = tiny_model(family)
    expected = gradients(model, naive(model))
    assert_same_gradients(gradients(model, score(model, BATCH, layout=layout).values), expected)


VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied embeddings": lambda: tiny_model("llama", tie_word_embeddings=True),
    "untied gpt2": lambda: tiny_model("gpt2", tie_word_embeddings=False),
    "sliding window": lambda: tiny_model("mistral", sliding_window=4),
    "eager attention": lambda: tiny_model("qwen3", attn_implementation="eager"),
    "eager window and softcap": lambda: tiny_model("gemma2", attn_implementation="eager"),
    "one key-value head": lambda: tiny_model("llama", num_key_value_heads=1),
    "odd vocabulary": lambda: tiny_model("llama", vocab_size=263),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_score_equals_the_naive_oracle_for_variants_of_a_family(variant: str, layout: Any) -> None:
    model = VARIANTS[variant]()
    expected = naive(model)
    values = score(model, BATCH, layout=layout).values
    torch.testing.assert_close(values, expected, **CLOSE)
    assert_same_gradients(gradients(model, values), gradients(model, expected))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_score_gradient_is_the_same_under_gradient_checkpointing(family: str) -> None:
    model = tiny_model(family)
    expected = gradients(model, naive(model))
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model.train(), score(model, BATCH).values), expected)


@torch.no_grad()
def test_score_of_a_pair_does_not_depend_on_its_batch() -> None:
    model = tiny_model()
    whole = score(model, BATCH)
    parts = dict(zip([str(s) for s in sequences(BATCH)], whole.split(), strict=True))
    for prompt, response in sequences(BATCH):
        alone = PairBatch.of_pairs([(Response(tuple(prompt), tuple(response)), Response((9,), (8,)))])
        torch.testing.assert_close(score(model, alone).split()[0], parts[str((prompt, response))], **CLOSE)


def test_score_records_a_gradient_only_where_the_caller_does() -> None:
    model = tiny_model()
    assert score(model, BATCH).values.requires_grad
    with torch.no_grad():
        assert not score(model, BATCH).values.requires_grad


def test_score_uses_dropout_in_training_mode_only() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    quiet = score(model, BATCH).values
    assert torch.equal(quiet, score(model, BATCH).values)
    torch.testing.assert_close(quiet, naive(model), **CLOSE)
    model.train()
    one, other = score(model, BATCH).values, score(model, BATCH).values
    assert (one - other).abs().mean() > 0.1 < (one - quiet).abs().mean()


# ------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
@torch.no_grad()
def test_score_in_bfloat16_is_no_further_from_fp32_than_the_naive_way(family: str) -> None:
    exact = naive(tiny_model(family))
    model = tiny_model(family, dtype=torch.bfloat16)
    ours, theirs = ((values - exact).abs().mean() for values in (score(model, BATCH).values, naive(model)))
    assert ours <= 1.25 * theirs, "the mean of 60 errors varies by about a tenth"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere2"])
def test_score_under_autocast_is_no_further_from_fp32_than_the_naive_way(family: str) -> None:
    model = tiny_model(family)
    exact = naive(model)
    exact_grads = gradients(model, exact)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = score(model, BATCH).values, naive(model)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() <= 1.25 * (theirs - exact).abs().mean()
    errors = [
        sum(((grads[name] - grad).norm() / grad.norm()).item() for name, grad in exact_grads.items())
        for grads in (gradients(model, ours), gradients(model, theirs))
    ]
    assert errors[0] <= 1.25 * errors[1]


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_score_statistics_are_those_of_the_naive_logits(family: str, layout: Any) -> None:
    model = tiny_model(family)
    found = score(model, BATCH, statistics=True, layout=layout).statistics
    assert found is not None and not found.entropy.requires_grad
    logits = []
    for prompt, response in sequences(BATCH):
        with torch.no_grad():
            logits.append(model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float())
    log_probs = torch.cat(logits).log_softmax(-1)
    torch.testing.assert_close(found.entropy, -(log_probs.exp() * log_probs).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.mean_logit, torch.cat(logits).mean(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.is_top1, torch.cat(logits).argmax(-1) == BATCH.response_ids)
    torch.testing.assert_close(found.log_expected_prob, log_probs.exp().square().sum(-1).log(), atol=1e-5, rtol=1e-5)


def test_score_has_statistics_only_where_they_are_asked_for() -> None:
    assert score(tiny_model(), BATCH).statistics is None


DISTINCT = PairBatch.of_pairs(
    [
        (Response(LONG, draw(2, 13)), Response(LONG, draw(3, 5))),
        (Response(SHORT, draw(6, 17)), Response(SHORT, draw(7, 2))),
        (Response(ALIKE, draw(8, 3)), Response(ALIKE, draw(9, 6))),
    ]
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@torch.no_grad()
def test_score_auxiliary_loss_is_that_of_the_padded_sequences(family: str, layout: Any) -> None:
    model = tiny_model(family)
    rows = [prompt + response for prompt, response in sequences(DISTINCT)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    expected = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    found = score(model, DISTINCT, auxiliary_loss=True, layout=layout).auxiliary_loss
    assert found is not None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert score(model, DISTINCT).auxiliary_loss is None


def naive_load_balance(model: nn.Module, batch: PairBatch, top_k: list[int]) -> Tensor:
    """Experts, times the sum over them of the share of tokens that each gets and the mean of its probabilities.

    Over the tokens of all layers, each sequence fed alone: a prompt counts once for each of its responses.
    """
    probabilities, sent = [], []
    for prompt, response in sequences(batch):
        ids = torch.tensor([prompt + response])
        outputs = model(input_ids=ids, output_router_logits=True, use_cache=False)
        for layer, logits in enumerate(outputs.router_logits):
            probabilities.append(torch.softmax(logits.double(), -1))
            order = probabilities[-1].argsort(-1, descending=True)
            sent.append(torch.zeros_like(probabilities[-1]).scatter(-1, order[:, : top_k[layer]], 1.0))
    p, f = torch.cat(probabilities), torch.cat(sent)
    return p.shape[-1] * (p.mean(0) * f.mean(0)).sum()


# family, its config, and the experts of a token in each layer
WITHOUT_A_LOSS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("glm4_moe", {}, [2, 2]),
    ("glm4_moe", {"first_k_dense_replace": 1}, [2]),
    ("hunyuan_v1_moe", {"moe_topk": [2, 1]}, [2, 1]),
    ("llama4_text", {}, [1, 1]),
]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("family", "config", "top_k"), WITHOUT_A_LOSS)
def test_score_auxiliary_loss_is_made_of_router_logits_where_the_model_has_none(
    family: str, config: dict[str, Any], top_k: list[int], layout: Any
) -> None:
    model = tiny_model(family, **config)
    outputs = model(input_ids=torch.tensor([LONG]), output_router_logits=True, use_cache=False)
    if "router_logits" not in outputs:
        pytest.skip("this version of transformers returns no router logits for the family")
    assert outputs.aux_loss is None
    expected = naive_load_balance(model, DISTINCT, top_k)
    found = score(model, DISTINCT, auxiliary_loss=True, layout=layout).auxiliary_loss
    assert found is not None
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    parameters = {name: p for name, p in model.named_parameters() if "lm_head" not in name}
    one, other = (torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) for loss in (found, expected))
    grads = [{n: g for n, g in zip(parameters, side, strict=True) if g is not None} for side in (one, other)]
    assert_same_gradients(*grads)
    assert any(grad.abs().max() > 1e-2 for grad in grads[1].values())


@torch.no_grad()
def test_score_auxiliary_loss_counts_the_virtual_tokens_of_an_adapter_once() -> None:
    """As the loss of the families that define one does, whose mask the adapter makes longer."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    own, made = (get_peft_model(tiny_model("mixtral"), config) for _ in range(2))
    made.load_state_dict(own.state_dict())
    made.get_base_model().register_forward_hook(lambda _, __, outputs: setattr(outputs, "aux_loss", None))
    one, other = (score(model, DISTINCT, auxiliary_loss=True).auxiliary_loss for model in (own, made))
    assert one is not None and other is not None
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_score_auxiliary_loss_of_a_model_without_a_router_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="router_aux_loss_coef"):
        score(tiny_model(), BATCH, auxiliary_loss=True)


# ------------------------------------------------------------------------------------- adapters, other heads


PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "LoRA on the head": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "LoRA with biases": lambda: LoraConfig(r=4, target_modules=["fc1"], bias="all", init_lora_weights=False),
    "a trained head": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    ),
    "IA3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def naive_behind_virtual_tokens(model: nn.Module) -> Tensor:
    """The naive oracle, read from the end: adapters may put virtual tokens in front of the logits."""
    parts = []
    for prompt, response in sequences(BATCH):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        predictions = logits[-len(response) - 1 : -1].log_softmax(-1)
        parts.append(predictions.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_score_equals_the_naive_oracle_for_adapters(kind: str) -> None:
    base = tiny_model("opt") if kind == "LoRA with biases" else tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, PEFT_CONFIGS[kind]()).eval()
    expected = naive_behind_virtual_tokens(model)
    values = score(model, BATCH).values
    torch.testing.assert_close(values, expected, **CLOSE)
    assert_same_gradients(gradients(model, values), gradients(model, expected))


class Rescaled(LlamaForCausalLM):
    """Does something to its logits that no config says: scoring inside the projection would miss it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.temperature
        return outputs


class Headless(LlamaForCausalLM):
    """Has a projection that is no `nn.Linear` and says nothing of its size."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        weight = self.lm_head.weight
        self.lm_head = nn.Module()
        self.lm_head.weight = weight
        self.lm_head.forward = lambda hidden: hidden @ self.lm_head.weight.T


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [Rescaled, Headless])
def test_score_of_an_unknown_head_falls_back_and_is_right(kind: type[LlamaForCausalLM], layout: Any) -> None:
    torch.manual_seed(0)
    model = kind(tiny_model().config).eval()
    expected = naive(model)
    expected_grads = gradients(model, expected)
    for _ in range(2):  # the first call finds out, the second one knows
        log_probs = score(model, BATCH, statistics=True, layout=layout)
        torch.testing.assert_close(log_probs.values, expected, **CLOSE)
        assert log_probs.statistics is not None
        assert_same_gradients(gradients(model, log_probs.values), expected_grads)


def test_score_of_an_unknown_family_is_right() -> None:
    class Unknown(LlamaForCausalLM):
        """Llama, but not by its module's name: nobody proved that it packs."""

    Unknown.__module__ = "somewhere.else"
    model = Unknown(tiny_model().config)
    model.load_state_dict(tiny_model().state_dict())
    torch.testing.assert_close(score(model.eval(), BATCH).values, naive(model), **CLOSE)


# --------------------------------------------------------------------------------------- nothing left behind


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "LoRA"])
def test_score_leaves_nothing_on_the_model(wrap: bool, layout: Any) -> None:
    model: Any = tiny_model()
    if wrap:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    ids = torch.tensor([LONG])
    before, logits, forward = traces(model), model(ids).logits, model.lm_head.forward
    gradients(model, score(model, BATCH, statistics=True, layout=layout).values)
    assert traces(model) == before
    assert model.lm_head.forward == forward and torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_score_leaves_nothing_on_the_model_when_the_forward_raises(layout: Any) -> None:
    model = tiny_model()
    before, forward = traces(model), model.lm_head.forward

    def fail(*_: Any) -> None:
        raise MemoryError("in the last layer")

    hook = model.model.norm.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        score(model, BATCH, layout=layout)
    hook.remove()
    assert traces(model) == before and model.lm_head.forward == forward
    torch.testing.assert_close(score(model, BATCH).values, naive(model), **CLOSE)


def test_score_respects_a_forward_that_the_caller_put_on_the_head() -> None:
    model = tiny_model()
    calls = []
    plain = model.lm_head.forward

    def counted(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape)
        return plain(hidden)

    model.lm_head.forward = counted
    score(model, BATCH)
    assert model.lm_head.forward is counted


def test_score_leaves_the_random_state_alone() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    score(model, BATCH)
    score(copy.deepcopy(tiny_model("mamba")), BATCH)
    assert torch.equal(before, torch.get_rng_state())


def test_score_keeps_the_mode_of_the_model_while_it_finds_out_about_it() -> None:
    for family in ("llama", "mamba"):
        model = tiny_model(family).train()
        model.get_input_embeddings().eval()
        before = [module.training for module in model.modules()]
        score(model, BATCH)
        assert before == [module.training for module in model.modules()]


# ------------------------------------------------------------------------------------------- no full logits


@contextmanager
def few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch, limit: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("tether.scoring.head.LOGITS_AT_A_TIME", {"cpu": limit, "cuda": limit})
        yield


def largest_tensor_of(model: nn.Module, batch: PairBatch, **options: Any) -> int:
    score(model, batch).values.sum()  # what is found out once is found out
    with LargestTensor() as largest:
        score(model, batch, **options).values.sum().backward()
    return largest.num_elements


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["trained head", "frozen head", "adapted head"])
def test_score_never_builds_the_full_logits(kind: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, num_tokens = 4096, 400
    model: Any = tiny_model(vocab_size=vocab_size, hidden=16)
    if kind == "frozen head":
        model.lm_head.requires_grad_(False)
    if kind == "adapted head":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    pair = Response((5, 6), draw(0, num_tokens // 2)), Response((5, 6), draw(1, num_tokens // 2))
    with few_logits_at_a_time(monkeypatch, 16 * vocab_size):
        largest = largest_tensor_of(model, PairBatch.of_pairs([pair]), statistics=True, layout=layout)
    # the attention of the padded layout and the embedding's gradient are allowed; the logits are not
    assert largest <= max(16 * vocab_size, 4 * 4 * num_tokens**2 // 2, vocab_size * 16) < num_tokens * vocab_size


def test_score_in_several_tiles_equals_score_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    one = score(model, BATCH, statistics=True)
    expected = gradients(model, one.values)
    with few_logits_at_a_time(monkeypatch, 7 * 256):
        many = score(model, BATCH, statistics=True)
        found = gradients(model, many.values)
    torch.testing.assert_close(many.values, one.values, **CLOSE)
    torch.testing.assert_close(many.statistics.entropy, one.statistics.entropy)  # type: ignore[union-attr]
    assert_same_gradients(found, expected)
