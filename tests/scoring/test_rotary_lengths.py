"""Rotary embeddings that look at the length (`dynamic`, `longrope`): each row is scored as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.ropes import LIMIT, ROPES
from support.runs import curve, facts_of, make_trainer, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs
from tether import DPOConfig
from tether.config.rules.run import refused_run
from tether.models.preparing import broadcasts_buffers
from tether.reference import ExplicitReference, PrecomputedReference
from tether.scoring import rotary_limit, score
from tether.store import LogProbStore, content_key
from tether.types import PairBatch, Response

pytestmark = pytest.mark.numerics


def model_of(rope: str) -> Any:
    """A new model each time: a `dynamic` one remembers the longest row it has seen."""
    return tiny_model("llama", **ROPES[rope])


def ids(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def response(prompt: tuple[int, ...], tokens: tuple[int, ...], fed: int | None = None) -> Response:
    return Response(prompt, tokens[:fed], content_key(prompt, tokens))


FIRST, SECOND = ids(0, 10), ids(1, 5)
# Rows of 14 and 42 tokens to one prompt, of exactly the limit, and of 8 and 35.
RESPONSES = [response(FIRST, ids(2, 4)), response(FIRST, ids(3, 32)), response(FIRST, ids(4, LIMIT - 10))]
RESPONSES += [response(SECOND, ids(5, 3)), response(SECOND, ids(6, 30))]
BATCH = PairBatch.of_pairs([(RESPONSES[0], RESPONSES[1]), (RESPONSES[2], RESPONSES[1]), (RESPONSES[3], RESPONSES[4])])


def alone(rope: str, one: Response) -> torch.Tensor:
    return naive_log_probs(model_of(rope), one.prompt_ids, one.token_ids)


@pytest.mark.parametrize("rope", ROPES)
def test_the_length_matters_in_this_model(rope: str) -> None:
    """Else nothing below would show anything."""
    whole, cut = alone(rope, RESPONSES[1])[:5], alone(rope, RESPONSES[1]._replace(token_ids=RESPONSES[1].token_ids[:5]))
    assert (whole - cut).abs().max() > 0.01
    assert rotary_limit(model_of(rope)) == LIMIT and rotary_limit(tiny_model()) is None


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("rope", ROPES)
def test_scores_are_those_of_each_row_alone(rope: str, layout: Any) -> None:
    model = model_of(rope)
    model(input_ids=torch.tensor([ids(9, 60)]), use_cache=False)  # what it has seen before must not matter
    found = score(model, BATCH, statistics=True, layout=layout)
    for log_probs, one in zip(found.split(), BATCH.responses(), strict=True):
        torch.testing.assert_close(log_probs, alone(rope, one), atol=2e-5, rtol=1e-5)
    assert found.statistics is not None and len(found.statistics.entropy) == len(found.values)


@pytest.mark.parametrize("rope", ROPES)
def test_a_row_of_one_token_more_is_fed_whole(rope: str) -> None:
    one = response(FIRST, ids(7, LIMIT + 1 - len(FIRST)))
    found = score(model_of(rope), PairBatch.of_pairs([(one, one)]), layout="packed")
    torch.testing.assert_close(found.values, alone(rope, one), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rope", ROPES)
def test_gradients_are_those_of_the_rows_alone(rope: str) -> None:
    model, plain = model_of(rope), model_of(rope)
    score(model, BATCH).values.sum().backward()
    # In plain forwards the short rows come first: a `dynamic` model would keep a longer row's frequencies.
    for one in sorted(BATCH.responses(), key=lambda one: len(one.prompt_ids) + len(one.token_ids)):
        naive_log_probs(plain, one.prompt_ids, one.token_ids).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        # Of a tensor's largest entry: 1e-6 by rounding here, 3e-5 under `OtherRounding(10)`.
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max()


@pytest.mark.parametrize("rope", ROPES)
def test_a_store_never_serves_a_row_at_another_length(rope: str, tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "s")
    lengths = (32, 28, 12, 20, 14, 32)  # tokens fed of one response of 32; the limit is 14 beyond the prompt
    passes = []
    for fed in lengths:
        reference = PrecomputedReference(store, ExplicitReference(model_of(rope)), mode="lazy")
        one = response(FIRST, ids(3, 32), fed)
        found = reference.log_probs(PairBatch.of_pairs([(one, one)]))
        torch.testing.assert_close(found.values, alone(rope, one).detach(), atol=2e-5, rtol=1e-5)
        passes.append(reference.num_passes)
    # Within the limit the longest serves; beyond it only the same length does.
    assert passes == [1, 1, 1, 1, 1, 0]
    again = PrecomputedReference(store, ExplicitReference(model_of(rope)), mode="require")
    assert again.log_probs(PairBatch.of_pairs([(one, response(FIRST, ids(3, 32), 9))])).num_responses == 2


@pytest.mark.parametrize("rope", ROPES)
def test_ddp_sends_no_buffers_where_a_row_may_have_a_forward_of_its_own(rope: str, tmp_path: Path) -> None:
    """With every forward it would; and the processes make different numbers of them (`test_uneven_forwards.py`)."""
    model, plain = model_of(rope), tiny_model()
    assert broadcasts_buffers(model, LIMIT + 1, None) is False
    assert broadcasts_buffers(model, None, False) is False
    for asked in (None, True, False):
        assert broadcasts_buffers(model, LIMIT, asked) is asked, "no row can be longer"
        assert broadcasts_buffers(plain, None, asked) is asked
    assert make_trainer(tmp_path, model, max_length=60).args.ddp_broadcast_buffers is False
    assert make_trainer(tmp_path, plain, max_length=60).args.ddp_broadcast_buffers is None


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("max_length", [LIMIT, LIMIT + 1, None])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_rows_that_processes_would_wait_for_are_refused(
    rope: str, max_length: int | None, num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPOConfig, "world_size", num_processes)
    waits = max_length != LIMIT and num_processes == 2
    facts = facts_of(tmp_path, policy=model_of(rope), max_length=max_length, ddp_broadcast_buffers=True)
    told = [refusal.problem for refusal in refused_run(facts)]
    assert told == ([] if not waits else [told[0]]) and all("`ddp_broadcast_buffers=True`" in one for one in told)
    sharded = [refusal.problem for refusal in refused_run(replace(facts, is_sharded=True))]
    assert len(sharded) == (max_length != LIMIT) and all(f"more than {LIMIT} tokens" in one for one in sharded)


@pytest.mark.parametrize("rope", ROPES)
def test_training_is_the_same_with_and_without_a_store(rope: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": tiny_pairs(8), "max_length": 60, "max_steps": 2}
    plain = trained(tmp_path / "1", model_of(rope), **options)
    stored = trained(tmp_path / "2", model_of(rope), **options, precompute_ref_log_probs=True)
    again = trained(tmp_path / "3", model_of(rope), **options, precompute_ref_log_probs=True)
    assert curve(stored) == pytest.approx(curve(plain), abs=1e-5) == curve(again)
    assert again.reference.num_passes == 0
