"""Which models are scored in packed rows, and that packing survives what training does to a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GptOssConfig,
    Qwen3NextConfig,
)

from support.tiny import FAMILIES, naive_log_probs, tiny_model
from tether.scoring import packed_rows, restore_attention, score
from tether.scoring.chains import PackedRow
from tether.scoring.equality import exact_difference
from tether.scoring.score import can_pack
from tether.types import PairBatch, Response

pytestmark = pytest.mark.numerics

TESTED = [family for family in FAMILIES if family != "mamba"]
TABLE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def random_batch(pairs: int = 3, seed: int = 0, longest: int = 12) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return tuple(torch.randint(3, 250, (length,), generator=generator).tolist())

    def pair() -> tuple[Response, Response]:
        prompt = ids()
        return Response(prompt, ids()), Response(prompt, ids())

    return PairBatch.of_pairs([pair() for _ in range(pairs)])


def naive(model: Any, batch: PairBatch) -> torch.Tensor:
    prompts = batch.prompt_ids.split(list(batch.prompt_lengths))
    responses = batch.response_ids.split(list(batch.response_lengths))
    parts = [
        naive_log_probs(model, prompts[group].tolist(), response.tolist())
        for group, response in zip(batch.response_group, responses, strict=True)
    ]
    return torch.cat(parts)


def gradients(model: Any, batch: PairBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    values = score(model, batch).values
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    return values.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", TESTED)
def test_families_of_the_table_pack(family: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    expected = family != "gemma2" or not sdpa_forgets_softcap()
    assert can_pack(tiny_model(family, dtype=dtype)) is expected
    assert bool([record for record in caplog.records if record.levelno >= logging.WARNING]) is not expected


@cache
def sdpa_forgets_softcap() -> bool:
    """Whether the model's own attention differs from its eager one, as in transformers 5.17; packed rows do not."""
    model, ids = tiny_model("gemma2"), torch.arange(24)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        return not torch.allclose(own, model(input_ids=ids).logits, atol=1e-4)


# --- falling back -------------------------------------------------------------------------------------------------


def gpt_oss() -> Any:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def qwen3_next() -> Any:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "make", [lambda: tiny_model("mamba"), gpt_oss, qwen3_next], ids=["state space", "attention sinks", "hybrid"]
)
def test_models_that_cannot_pack_fall_back_and_say_so_once(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    batch = random_batch()
    with caplog.at_level(logging.WARNING, "tether"), torch.no_grad():
        values = score(model, batch).values
        score(model, batch)
        torch.testing.assert_close(values, naive(model, batch), atol=2e-4, rtol=1e-4)
    assert [record.message for record in caplog.records if "padded layout" in record.message] != []
    assert sum("padded layout" in record.message for record in caplog.records) == 1


def test_comparing_ways_does_not_trust_a_model_that_ignores_its_context() -> None:
    plain = torch.randn(50)
    assert exact_difference(plain + 1e-7, plain, effect=1.0).is_rounding
    assert not exact_difference(plain + 1e-4, plain, effect=1e-3).is_rounding
    assert not exact_difference(plain * float("nan"), plain, effect=1.0).is_rounding


# --- what is fed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_token_of_a_response_is_not_fed(family: str) -> None:
    model = tiny_model(family)
    long, short = tuple(range(5, 13)), (7, 8)
    batch = PairBatch.of_pairs(
        [(Response(long, (1, 2, 3)), Response(long, (4,))), (Response(short, (5,)), Response(short, (6,)))]
    )
    fed: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].tolist()))
    found = score(model, batch).values
    assert fed[-1] == [[*long, 1, 2, *short]], "after the rows of the proof"
    torch.testing.assert_close(found, naive(model, batch), atol=1e-4, rtol=1e-6)


def test_a_prompt_that_the_proof_would_make_up_is_proven_apart() -> None:
    """Of one token repeated, as many times as the probe's own short prompt has."""
    batch = PairBatch.of_pairs([(Response((7,) * 6, (7,) * 5), Response((7,) * 6, (7,) * 9))])
    model = tiny_model()
    torch.testing.assert_close(score(model, batch).values, naive(model, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_every_token_follows_its_sequence_whatever_prompts_begin_alike(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.types.batch._WORTH_SHARING", 1)
    for seed in range(20):
        draw = Random(seed)
        prompts = [tuple(draw.choices((5, 6), k=draw.randint(1, 6))) for _ in range(8)]
        ids = [tuple(draw.choices((5, 6), k=draw.randint(1, 4))) for _ in range(16)]
        pairs = [(Response(p, ids[i]), Response(p, ids[i + 8])) for i, p in enumerate(prompts)]
        batch = PairBatch.of_pairs(pairs)
        rows = packed_rows(batch, whole=whole)
        starts = {prompt[: num + 1] for prompt in prompts for num in range(len(prompt))}
        assert rows.width == len(starts) + sum(batch.response_lengths) - batch.num_responses * (not whole)
        each = zip(batch.responses(), rows.column.split(list(batch.response_lengths)), strict=True)
        for response, columns in each:
            for num, column in enumerate(columns.tolist()):
                sequence = sequence_until(column, rows.inputs["packed_row"])
                before = response.prompt_ids + response.token_ids[:num]
                assert rows.inputs["input_ids"][0, sequence].tolist() == list(before)
                assert rows.inputs["position_ids"][0, sequence].tolist() == list(range(len(before)))


def sequence_until(column: int, row: PackedRow) -> list[int]:
    """The places that the token in a column attends to."""
    (chain,) = [chain for chain in row.chains if chain.own.start <= column < chain.own.stop]
    before = [place for part in chain.before for place in range(part.start, part.stop)]
    return before + list(range(chain.own.start, column + 1))


# --- what training does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_packed_gradients_are_the_same_under_activation_checkpointing(family: str, reentrant: bool) -> None:
    model, batch = tiny_model(family).train(), random_batch()
    implementation = model.config._attn_implementation
    values, expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed, found = gradients(model, batch)
    assert torch.equal(checkpointed, values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    restore_attention(model)
    assert model.config._attn_implementation == implementation


def test_plain_calls_are_the_same_while_packed_attention_stays_on() -> None:
    model, batch = tiny_model("mistral", sliding_window=4).train(), random_batch()
    ids = torch.arange(3, 21)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    model.gradient_checkpointing_enable()
    gradients(model, batch)
    assert "tether" in model.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_plain_calls_reach_a_flash_attention_under_the_name_that_it_loads_its_kernel_by(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash(query: Tensor, key: Tensor, value: Tensor, mask: Any, *, attn_implementation: str, **_: Any) -> Tensor:
        assert attn_implementation == name, f"Could not find the flash attention implementation {attn_implementation}"
        parts = (part.transpose(1, 2) for part in (query, key, value))
        return scaled_dot_product_attention(*parts, is_causal=query.shape[1] > 1, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", flash)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setitem(interface._global_mapping, name, interface()["flash_attention_2"])
    model, batch = tiny_model("llama").train(), random_batch()
    values, expected = gradients(model, batch)
    model.config._attn_implementation = name
    model.gradient_checkpointing_enable()
    ids = torch.arange(3, 21)[None]
    scored = score(model, batch).values
    assert name != model.config._attn_implementation
    with torch.no_grad():
        model.eval().generate(ids, max_new_tokens=2, do_sample=False)
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, tiny_model("llama")(input_ids=ids).logits)
    model.train()
    weights = torch.linspace(-1, 1, len(values))
    found = torch.autograd.grad((scored * weights).sum(), list(model.parameters()))  # runs the packed layers again
    torch.testing.assert_close(scored, values)
    torch.testing.assert_close(found, tuple(expected))


def test_saved_config_does_not_name_our_attention(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    gradients(model, random_batch())
    model.save_pretrained(tmp_path)
    assert "tether" not in (tmp_path / "config.json").read_text()
    restore_attention(model)


def test_compiled_models_compile_once_for_thirty_layouts() -> None:
    model = tiny_model("qwen2").train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for number in range(30):
        batch = random_batch(pairs=1 + number % 5, seed=number, longest=20)
        values, found = gradients(compiled, batch)
        expected_values, expected = gradients(model, batch)
        torch.testing.assert_close(values, expected_values, atol=1e-5, rtol=1e-5)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_scoring_under_autocast_is_as_near_as_padded(dtype: torch.dtype) -> None:
    model, batch = tiny_model("llama"), random_batch(pairs=8)
    with torch.no_grad():
        exact = naive(model, batch)
        with torch.autocast("cpu", dtype):
            packed, padded = (score(model, batch, layout=layout).values for layout in ("packed", "padded"))
    error, usual = ((values - exact).square().mean().sqrt() for values in (packed, padded))
    assert packed.dtype == torch.float32
    assert error <= 1.5 * usual + 1e-4


# --- the table in the documentation ----------------------------------------------------------------------------------


def test_table_of_models_is_what_is_measured(request: pytest.FixtureRequest) -> None:
    """With `TETHER_WRITE_DOCS=1` writes docs/models.md anew; it must name all that are tested."""
    if os.environ.get("TETHER_WRITE_DOCS"):
        TABLE.write_text(_table())
    text = TABLE.read_text()
    assert [family for family in sorted(TESTED) if f"| `{family}` |" in text] == sorted(TESTED)


def _table() -> str:
    lines = [
        "# Models",
        "",
        "Families that Tether scores in packed rows (each prompt once, no padding), with the largest difference from",
        "separate naive forwards in fp32, measured on tiny random models by `tests/scoring/test_packing.py`. The tests",
        "repeat the comparison for every family, forward and gradients, packed and padded, in fp32 and bf16.",
        "",
        "| family | largest difference of a token's log-prob | largest relative difference of a gradient |",
        "| --- | --- | --- |",
    ]
    for family in sorted(TESTED):
        model, batch = tiny_model(family), random_batch(pairs=4, longest=24)
        values, found = gradients(model, batch)
        model.zero_grad()
        expected_values = naive(model, batch)
        (expected_values * torch.linspace(-1, 1, len(values))).sum().backward()
        # A gradient that is zero in exact arithmetic (the bias of keys) is only rounding on both sides.
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        largest = max(gradient.norm() for gradient in expected)
        relative = max(
            float((one - other).norm() / other.norm())
            for one, other in zip(found, expected, strict=True)
            if other.norm() > 1e-5 * largest
        )
        difference = float((values - expected_values.detach()).abs().max())
        lines.append(f"| `{family}` | {difference:.0e} nats | {relative:.0e} |")
    return "\n".join([*lines, "", "".join(_WAYS[1:])])


_WAYS = TABLE.read_text().partition("Any model is scored")
