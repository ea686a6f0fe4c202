"""No answer is trusted unseen: every model is scored as its own plain forwards say, whatever was changed about it."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import CPTConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    MptConfig,
)
from transformers.models.llama import modeling_llama

from support import odd_models as odd
from support.real import loading, needs_real_model, real_model, real_pairs
from support.tiny import naive_log_probs, tiny_model
from tether.errors import ConfigurationError
from tether.scoring import attention, proof, score, trial
from tether.scoring.attention import UnsupportedAttentionError, packed_attention_of
from tether.scoring.chains import Link, PackedRow
from tether.scoring.forward import Way
from tether.types import PairBatch, Response

pytestmark = pytest.mark.numerics
CLOSE = {"atol": 1e-4, "rtol": 1e-6}


def batch_of(longest: int = 30, groups: int = 3, seed: int = 0, shortest: int = 1) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> tuple[int, ...]:
        length = int(torch.randint(shortest, longest, (1,), generator=generator))
        return tuple(torch.randint(5, 256, (length,), generator=generator).tolist())

    return PairBatch.of_pairs([(Response(p, ids()), Response(p, ids())) for p in (ids() for _ in range(groups))])


BATCH = batch_of()


@torch.no_grad()
def naive(model: Any, batch: PairBatch = BATCH) -> torch.Tensor:
    return torch.cat([naive_log_probs(model, one.prompt_ids, one.token_ids) for one in batch.responses()])


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_proofs", {})


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every proof that is made."""
    made: list[int] = []
    plain = proof.trial_of

    def counted(model: Any, base: Any, batch: Any, length: int, limit: int | None, seed: int) -> Any:
        made.append(length)
        return plain(model, base, batch, length, limit, seed)

    monkeypatch.setattr(proof, "trial_of", counted)
    return made


def layout() -> str:
    """The layout that was found last."""
    return list(proof._proofs.values())[-1].way.layout


def mpt() -> Any:
    torch.manual_seed(0)
    config = MptConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=4, max_seq_len=512)
    return AutoModelForCausalLM.from_config(config).eval()


def switched_off_adapter() -> Any:
    model = odd.activated()
    model.disable_adapter_layers()
    return model


DOGE_SEES_LATER_TOKENS = Version(transformers.__version__) < Version("5.23")  # and is refused

CHANGED: dict[str, tuple[Callable[[], Any], str]] = {
    "attention registered under a name of its own": (odd.own_attention, "padded"),
    "another class of attention": (odd.own_attention_class, "padded"),
    "attention patched on the instance": (odd.patched_on_the_instance, "padded"),
    "a module that mixes positions": (odd.mixes_neighbours, "padded"),
    "a module that will mix positions": (lambda: odd.mixes_neighbours(0.0), "padded"),
    "a hook on late tokens": (odd.late_tokens_steered, "padded"),
    "a hook that counts columns": (odd.position_added, "padded"),
    "a hook that is lost where prompts begin alike": (odd.lost_in_a_tree, "padded"),
    "a hook that cools the logits": (odd.cooled_logits, "packed"),
    "a hook that bars a token": (odd.shifted_on_the_head, "packed"),
    "a layer that reads another config": (
        lambda: _with_layer_of(tiny_model(), tiny_model(seed=1)),
        "padded",
    ),
    "a forward without a mask that raises": (mpt, "padded"),
    "keys by rank, and padding takes part: Doge": (lambda: odd.small("doge", keep_window_size=8), "rows"),
    "keys by rank, and padding takes part: DeepSeek": (lambda: odd.small("deepseek_v32", index_topk=20), "rows"),
    "keys by rank, and padding takes part: GLM": (lambda: odd.small("glm_moe_dsa", index_topk=20), "rows"),
}


if DOGE_SEES_LATER_TOKENS:
    del CHANGED["keys by rank, and padding takes part: Doge"]


def _with_layer_of(model: Any, other: Any) -> Any:
    model.model.layers[0] = other.model.layers[0]
    return model


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_model_is_scored_as_its_plain_forwards_say(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, expected = CHANGED[name]
    model = make()
    with caplog.at_level(logging.INFO, "tether"):
        values = score(model, BATCH).values
        score(copy.deepcopy(model), BATCH)
    torch.testing.assert_close(values.detach(), naive(model), **CLOSE)
    assert layout() == expected
    (said,) = [record for record in caplog.records if "is scored" in record.message]
    assert (said.levelno == logging.WARNING and "log-probs" in said.message) or "failed" in said.message


@pytest.mark.parametrize(("fault", "expected"), [(1.0, "varlen"), (1.01, "pairwise"), (None, "pairwise")])
def test_the_first_kernel_of_a_card_is_used_that_gives_the_models_own_answers(
    fault: float | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "kernels_for", lambda device, half: ("varlen", "pairwise"))
    attend = attention.packed_attention

    def on_a_card(*args: Any, kernel: str, **options: Any) -> Any:
        if kernel == "varlen" and fault is None:
            raise RuntimeError("no kernel image is available for execution on the device")
        return attend(*args, **options) * (fault if kernel == "varlen" else 1.0)

    monkeypatch.setattr(attention, "packed_attention", on_a_card)
    model = tiny_model()
    torch.testing.assert_close(score(model, BATCH).values.detach(), naive(model), **CLOSE)
    (found,) = proof._proofs.values()
    assert found.way == Way("packed", kernel=expected)


@pytest.mark.parametrize(
    "error",
    [ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError, NotImplementedError,
     LookupError, ZeroDivisionError, StopIteration],
)  # fmt: skip
def test_whatever_a_forward_raises_without_a_mask_it_is_padded(error: type[Exception]) -> None:
    model = odd.needs_mask(error)
    torch.testing.assert_close(score(model, BATCH).values.detach(), naive(tiny_model()), **CLOSE)
    assert layout() == "padded"


@pytest.mark.skipif(DOGE_SEES_LATER_TOKENS, reason="a Doge is refused with this transformers")
def test_gradients_of_one_response_at_a_time_are_those_of_plain_forwards() -> None:
    model = odd.small("doge", keep_window_size=8)
    weights = torch.linspace(-1, 1, sum(BATCH.response_lengths))
    found = torch.autograd.grad((score(model, BATCH).values * weights).sum(), list(model.parameters()))
    values = torch.cat([naive_log_probs(model, one.prompt_ids, one.token_ids) for one in BATCH.responses()])
    expected = torch.autograd.grad((values * weights).sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_that_reads_its_row_is_found_before_and_after_it_trains(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its numbers, not by the name of its option."""
    monkeypatch.setattr("tether.scoring.packing.reads_rows", lambda adapter: False)
    model = odd.activated()
    batch = PairBatch.of_pairs([(Response((9, 5, 6), (8, 9, 7)), Response((9, 5, 6), (8, 5, 6, 4, 3)))])
    before = [parameter.clone() for parameter in model.parameters()]
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
        before = [parameter.clone() for parameter in model.parameters()]
    score(model, batch)
    assert layout() == "padded"
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_an_adapter_is_proven_on_and_off(looks: list[int]) -> None:
    model = odd.activated()
    score(model, BATCH)
    with model.disable_adapter():
        score(model, BATCH)
    score(model, BATCH)
    assert len(looks) == 2


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_a_model_and_its_copies_are_proven_once(looks: list[int]) -> None:
    model = tiny_model()
    for one in (model, copy.deepcopy(model), tiny_model(seed=1), model.train()):
        score(one, BATCH)
    assert len(looks) == 1


def test_another_run_is_told_as_well(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        model = odd.mixes_neighbours()
        score(model, BATCH)
        del model
        gc.collect()
    assert [record.levelno for record in caplog.records if "padded layout" in record.message] == [logging.WARNING] * 2


def _hooked(model: Any) -> Callable[[], None]:
    handle = model.model.layers[1].register_forward_hook(lambda _, __, out: out + out.cumsum(1))
    return handle.remove  # type: ignore[no-any-return]


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _summing(self: Any, *args: Any, **kwargs: Any) -> Any:
    output, weights = _PLAIN(self, *args, **kwargs)
    return output + 0.1 * output.cumsum(1), weights


_PLAIN, _ROTATE = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb


def _by_column(query: Any, key: Any, cos: Any, sin: Any, **kwargs: Any) -> Any:
    """Rotates by the column in the row instead of the position: the same in a row of one sequence."""
    angles = torch.arange(query.shape[2])[:, None] * 0.1 ** torch.arange(4).repeat(2)
    return _ROTATE(query, key, angles.cos()[None], angles.sin()[None], **kwargs)


def _registered_anew(model: Any) -> Callable[[], None]:
    plain = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", odd._half_scaled)
    return lambda: AttentionInterface.register("sdpa", plain)


LATER: dict[str, Callable[[Any], Callable[[], None]]] = {
    "a hook": _hooked,
    "attention patched on the class": lambda _: _set(modeling_llama.LlamaAttention, "forward", _summing),
    "a function of the model's file": lambda _: _set(modeling_llama, "apply_rotary_pos_emb", _by_column),
    "attention registered anew under its name": _registered_anew,
    "a module": lambda model: _set(model.model.layers[0], "mlp", odd.Neighbours(model.model.layers[0].mlp, 0.5)),
}


@pytest.mark.parametrize("change", LATER)
def test_a_change_after_the_proof_is_noticed(change: str, looks: list[int]) -> None:
    model = tiny_model()
    before = score(model, BATCH).values.detach()
    undo = LATER[change](model)
    try:
        expected = naive(model)
        torch.testing.assert_close(score(model, BATCH).values.detach(), expected, **CLOSE)
    finally:
        undo()
    num = len(looks)
    torch.testing.assert_close(score(model, BATCH).values.detach(), before, **CLOSE)
    assert len(looks) == num, "what was proven before is still known"


def test_a_field_that_steers_attention_is_part_of_what_is_remembered(looks: list[int]) -> None:
    model = tiny_model("mistral", sliding_window=64)
    score(model, BATCH)
    model.config.sliding_window = 4
    score(model, BATCH)
    assert len(looks) == 2


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [odd.windowed_beyond_64, odd.sparse_beyond_96])
def test_attention_that_changes_beyond_a_length_is_found_when_such_rows_come(make: Callable[[], Any]) -> None:
    model = make()
    for longest in (10, 130):
        batch = batch_of(longest, groups=2, seed=1, shortest=longest // 2)
        torch.testing.assert_close(score(model, batch).values.detach(), naive(model, batch), **CLOSE)
    assert layout() == "padded"


def test_lengths_that_grow_by_and_by_ask_for_few_proofs(looks: list[int]) -> None:
    model = tiny_model()
    for length in range(3, 400, 7):
        ids = tuple(range(5, 5 + length % 200)) + (7,) * (length - length % 200)
        score(model, PairBatch.of_pairs([(Response((3,), ids), Response((3,), (4,)))]))
    assert looks == [64, 128, 256, 512]


def test_a_proof_is_no_longer_than_the_model_reads(looks: list[int]) -> None:
    model = tiny_model("opt", max_position_embeddings=70)
    ids = tuple(range(5, 70))
    score(model, PairBatch.of_pairs([(Response((3,), ids), Response((3,), (4,)))]))
    assert looks == [70]


# --- refused ----------------------------------------------------------------------------------------------------------


def bert() -> Any:
    config = BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return AutoModelForCausalLM.from_config(config).eval()


def bart() -> Any:
    config = BartConfig(
        vocab_size=256, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [bert, bart])
def test_a_model_that_sees_later_tokens_is_refused(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigurationError, match=r"Cannot train a \w+ on preferences: it is not causal"):
        score(make(), BATCH)


def test_a_model_that_later_sees_later_tokens_is_refused() -> None:
    model = tiny_model()
    score(model, BATCH)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ConfigurationError, match="it is not causal"):
        score(model, BATCH)


def test_an_own_forward_that_fails_is_the_users_and_named() -> None:
    model = tiny_model()
    model.model.layers[1].register_forward_hook(lambda *_: {}["missing"])
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM: its own forward fails") as caught:
        score(model, BATCH)
    assert isinstance(caught.value.__cause__, KeyError)


def test_one_response_at_a_time_is_refused_where_processes_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd.small("deepseek_v32", index_topk=20)
    score(model, BATCH)
    scoring = importlib.import_module("tether.scoring.score")
    monkeypatch.setattr(scoring, "has_shards", lambda _: True)
    monkeypatch.setattr(scoring, "num_processes", lambda: 2)
    with pytest.raises(ConfigurationError, match="wait for each other forever"):
        score(model, BATCH)


# --- in the middle of a run -------------------------------------------------------------------------------------------


def test_attention_that_cannot_be_packed_later_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()

    class Sinks(modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs | ({"s_aux": torch.ones(4)} if self.training else {}))

    model.model.layers[0].self_attn.__class__ = Sinks
    score(model, BATCH)
    assert layout() == "packed"
    for _ in range(2):
        torch.testing.assert_close(score(model.train(), BATCH).values.detach(), naive(model), **CLOSE)
    assert layout() == "padded"
    assert sum("attention sinks" in record.message for record in caplog.records) == 1


def test_a_tower_that_is_handed_packed_rows_keeps_its_own_attention() -> None:
    class Tower(torch.nn.Module):
        is_causal = False

    seen = []
    AttentionInterface.register("seen", lambda *args, **kwargs: (seen.append(kwargs), None))
    model = tiny_model()
    model.config._attn_implementation = "seen"
    with packed_attention_of(model, "pairwise", keep=False):
        ours = AttentionInterface()[model.config._attn_implementation]
    ours(Tower(), *torch.zeros(3, 1, 1, 5, 8), None, packed_row=PackedRow([Link(0, 0, 5)]), scaling=1.0)
    assert seen == [{"scaling": 1.0}]


# --- nothing is left behind -------------------------------------------------------------------------------------------


def test_a_proof_under_autocast_leaves_no_cast_weight_behind() -> None:
    """What does nothing yet is moved while it is compared; autocast would keep the moved weight."""
    model = odd.activated()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first = score(model, BATCH).values
        assert torch.equal(first, score(model, BATCH).values)


def test_a_proof_between_forward_and_backward_does_not_disturb_the_backward() -> None:
    model = odd.mixes_neighbours(0.0)
    loss = model(torch.tensor([[5, 6, 7]])).logits.sum()
    with torch.no_grad():
        score(model, BATCH)
    loss.backward()
    assert model.model.layers[0].mlp.gate.item() == 0.0


# --- half precision on a real model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Any, PairBatch]]:
    folder, options = loading()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)

    def ids(said: Any) -> tuple[int, ...]:
        return tuple(tokenizer(said if isinstance(said, str) else said[-1]["content"])["input_ids"])

    pairs = [
        tuple(Response(ids(row["prompt"]), ids(row[side])) for side in ("chosen", "rejected")) for row in real_pairs(1)
    ]
    yield real_model().to(torch.bfloat16), PairBatch.of_pairs(pairs)  # type: ignore[arg-type]


@pytest.mark.real
@needs_real_model[1]
@pytest.mark.parametrize(
    ("shift", "trains"),
    [
        pytest.param(0.0, True, id="none, against fp32"),
        pytest.param(0.02, True, id="up, against fp32", marks=pytest.mark.slow),
        pytest.param(-0.02, True, id="down, against fp32", marks=pytest.mark.slow),
        pytest.param(0.02, False, id="up, against bf16"),
        pytest.param(-0.02, False, id="down, against bf16", marks=pytest.mark.slow),
    ],
)
def test_a_shift_of_two_hundredths_of_a_nat_in_bf16_is_caught(
    shift: float, trains: bool, real: tuple[Any, PairBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = real
    honest = trial.run

    def shifted(call: Any, base: Any, rows: Any, way: Any, **options: Any) -> Any:
        answer = honest(call, base, rows, way, **options)
        moved = way.layout == "packed" and call is model
        return answer._replace(values=answer.values + shift) if moved else answer

    monkeypatch.setattr(trial, "run", shifted)
    model.requires_grad_(trains)
    with torch.no_grad():
        score(model, batch)
    assert layout() == ("padded" if shift else "packed")


def test_unsupported_attention_is_an_error_where_packed_rows_are_demanded() -> None:
    model = odd.small("gpt_oss", sliding_window=8, layer_types=["full_attention"] * 2)
    with pytest.raises(UnsupportedAttentionError):
        score(model, BATCH, layout="packed")


def test_a_tensor_that_a_forward_replaces_is_left_as_it_was() -> None:
    """PEFT's CPT puts another tensor into its parameter; the one of before may be a reference's."""
    config = CPTConfig(cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    (delta,) = (parameter for name, parameter in model.named_parameters() if "delta_embedding" in name)
    before = delta.data
    score(model, BATCH)
    assert not before.any() and not delta.any()
