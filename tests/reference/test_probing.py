"""A probe of a reference: what it is asked, what counts as another answer, and what is done without an answer."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from support import odd_models as odd
from support.kinds import BATCH
from support.runs import make_trainer, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs
from tether.errors import ResumeError, StoreError
from tether.reference import ExplicitReference, PrecomputedReference, Reference, Traits
from tether.reference.probing import Scope, length_for, make_probe
from tether.store import LogProbStore, merge
from tether.types import PairBatch, Response, ResponseLogProbs

IDS = (7, 8, 9, 10)


def prepared(store: LogProbStore, source: Any, batch: PairBatch = BATCH, **options: Any) -> PrecomputedReference:
    source = source if isinstance(source, Reference) else ExplicitReference(source)
    reference = PrecomputedReference(store, source, **options)
    reference.prepare({"train": lambda: [batch]})
    return reference


def row(length: int, seed: int = 0) -> PairBatch:
    ids = torch.randint(5, 250, (2 * length,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt = tuple(ids[:4])
    one, other = (Response(prompt, tuple(ids[start : start + length - 4])) for start in (4, length))
    return PairBatch.of_pairs([(one._replace(key=b"1" * 16), other._replace(key=b"2" * 16))])


@pytest.mark.parametrize(
    ("longest", "limit", "wanted"), [(40, 512, 256), (300, 512, 300), (40, 64, 64), (512, 512, 512)]
)
def test_a_probe_is_as_long_as_the_longest_row_and_256_tokens_where_the_model_reads_so_many(
    longest: int, limit: int, wanted: int
) -> None:
    reference = ExplicitReference(tiny_model("gpt2", n_positions=limit))
    assert length_for(reference, longest) == wanted
    probe = make_probe(reference, wanted, ())
    assert probe is not None and probe.length == wanted


def test_a_probe_holds_the_plain_log_probs_of_its_texts() -> None:
    probe = make_probe(ExplicitReference(tiny_model()), 256, ())
    assert probe is not None
    expected = torch.cat([naive_log_probs(tiny_model(), *text).detach() for text in probe.texts])
    torch.testing.assert_close(torch.from_numpy(probe.log_probs), expected, atol=2e-5, rtol=1e-5)


def test_a_probe_is_the_same_in_every_run_and_has_no_id_that_is_no_text() -> None:
    model = tiny_model()
    model.config.image_token_id = 77
    one, other = (
        make_probe(kind(model), 300, ids) for kind, ids in ((ExplicitReference, ()), (ExplicitReference, IDS))
    )
    assert one is not None and other is not None and one.texts == other.texts
    used = {token for text in one.texts for part in text for token in part}
    assert 77 not in used and not used & {0, 2} and len(used) > 100


class Sums(Reference):
    """Knows sums alone: of every token `-1`, but for a shift of each response."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    identity = property(lambda self: replace(ExplicitReference(tiny_model()).identity, weights="sums"))
    traits = property(lambda self: Traits(knows_tokens=False))

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        offsets = torch.tensor([0, *torch.tensor(batch.response_lengths).cumsum(0)])
        values = torch.zeros(int(offsets[-1]))
        values[offsets[:-1]] = -offsets.diff().float() * (1 + self.shift)
        return ResponseLogProbs(values, offsets)


def test_a_reference_that_knows_sums_is_compared_by_them(tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "s")
    prepared(store, Sums())
    prepared(store, Sums(0.00005))  # 0.0005 nats of a response of 10 tokens
    with pytest.raises(StoreError, match=r"mean gap 0\.1 nats per token"):
        prepared(store, Sums(0.1))
    (probe,) = store.probes(Sums().identity.digest)
    assert {token for text in probe.texts for part in text for token in part} <= set(Scope.of([BATCH]).token_ids)
    assert probe.length == max(BATCH.fed_lengths())  # it does not say that it reads longer ones


class Table(Sums):
    """Answers rows that it knows by their keys, and no other text."""

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        assert set(batch.keys) <= set(BATCH.keys), "unknown rows"
        return super().log_probs(batch)


def test_a_reference_that_answers_rows_alone_is_compared_by_its_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LogProbStore(tmp_path / "s")
    prepared(store, Table())
    assert "answers nothing but its rows (AssertionError: unknown rows" in caplog.text
    assert store.probes(Table().identity.digest) == []
    with pytest.raises(StoreError, match="differs from what the reference computes now"):
        prepared(store, Table(0.1))


@pytest.mark.parametrize("mode", ["fill", "lazy", "require"])
def test_a_source_that_answers_otherwise_is_refused_before_the_first_answer(mode: Any, tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "s")
    digest = prepared(store, tiny_model()).identity.digest
    steered = ExplicitReference(odd.with_behaviour("a steering hook"))
    reference = PrecomputedReference(store, steered, mode=mode)  # nothing runs in the constructor
    assert steered.num_passes == 0
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            reference.log_probs(BATCH)
    assert "mean gap" in caught.value.problem and "256 tokens" in caught.value.problem
    assert "ref_store" in caught.value.instead and f"--identity {digest[:12]}" in caught.value.instead
    assert steered.identity.digest == digest


def test_what_acts_on_late_positions_is_seen_by_short_rows_probe_and_by_that_of_longer_rows(tmp_path: Path) -> None:
    def late(start: int) -> Any:
        model = tiny_model()
        model.model.layers[0].register_forward_hook(
            lambda _, __, out: torch.cat([out[:, :start], out[:, start:] + torch.arange(32.0)], 1)
        )
        return model

    store = LogProbStore(tmp_path / "s")
    prepared(store, tiny_model())
    with pytest.raises(StoreError):
        prepared(store, late(200))
    prepared(store, late(260))  # right on these rows
    prepared(LogProbStore(tmp_path / "2"), tiny_model(), row(400))
    with pytest.raises(StoreError):
        prepared(LogProbStore(tmp_path / "2"), late(380))


def test_a_lazy_store_is_compared_again_when_longer_rows_come(tmp_path: Path) -> None:
    store, source = LogProbStore(tmp_path / "s"), ExplicitReference(tiny_model())
    reference = PrecomputedReference(store, source, mode="lazy")
    for length in (20, 240, 400, 410):
        reference.log_probs(row(length, seed=length))
    assert [probe.length for probe in store.probes(reference.identity.digest)] == [256, 400]


def test_an_old_store_gets_a_probe_once_its_rows_are_found_right(tmp_path: Path) -> None:
    store, source = LogProbStore(tmp_path / "s"), ExplicitReference(tiny_model())
    values = [value.numpy() for value in source.log_probs(BATCH).split()]
    store.put(source.identity.digest, BATCH.keys, values)
    assert prepared(store, tiny_model()).num_passes == 0
    assert len(store.probes(source.identity.digest)) == 1


def test_a_merged_store_is_compared_with_the_probes_of_both(tmp_path: Path) -> None:
    one, other = LogProbStore(tmp_path / "1"), LogProbStore(tmp_path / "2")
    prepared(one, tiny_model())
    prepared(other, odd.with_behaviour("an activation"), row(30))
    merge(one, other.path)
    with pytest.raises(StoreError):
        prepared(one, tiny_model())


def test_more_rows_are_scored_again_on_request(tmp_path: Path) -> None:
    """One stored response is wrong, of a row that is longer than those looked at by default."""
    options: dict[str, Any] = {
        "precompute_ref_log_probs": True,
        "ref_store": str(tmp_path / "s"),
        "rows": tiny_pairs(16),
    }
    identity = make_trainer(tmp_path / "1", **options).reference.identity.digest
    store = LogProbStore(tmp_path / "s")
    kept = dict(record for batch in store.batches(identity) for record in batch)
    longest = max(kept, key=lambda key: len(kept[key]))
    store.remove(identity)
    store.put(identity, list(kept), [values - 0.5 * (key == longest) for key, values in kept.items()])
    for number in (0, 2):
        make_trainer(tmp_path / "2", **options, ref_store_verify=number)
    with pytest.raises(StoreError, match="differs from what the reference computes"):
        make_trainer(tmp_path / "3", **options, ref_store_verify=16)


def test_a_change_of_source_code_that_changes_no_answer_voids_no_store_and_no_checkpoint(tmp_path: Path) -> None:
    plain = odd.with_remote_code(tmp_path / "plain", 1.0)
    layout = odd.with_remote_code(tmp_path / "layout", 1.0, comment="# Other lines\n\n\nUNUSED = 7\n")
    assert type(plain) is not type(layout)
    store = LogProbStore(tmp_path / "s")
    prepared(store, plain)
    assert prepared(store, layout).num_computed == 0
    run: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(tmp_path / "run", ref_model=plain, **run)
    make_trainer(tmp_path / "run", ref_model=layout, **run).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )


KINDS: dict[str, Any] = {
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "implicit": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_against_a_reference_that_answers_otherwise_is_refused(kind: str, tmp_path: Path) -> None:
    def options(store: str) -> dict[str, Any]:
        stored = {"ref_store": str(tmp_path / store)} if kind == "precomputed" else {}
        return copy.deepcopy(KINDS[kind]) | stored | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    trained(tmp_path, **options("1"))
    checkpoint = str(tmp_path / "checkpoint-2")
    make_trainer(tmp_path, **options("1")).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ResumeError, match=r"answers differently now \(on a probe of 256 tokens, mean gap"):
        make_trainer(tmp_path, odd.with_behaviour("norm epsilon"), **options("2")).train(
            resume_from_checkpoint=checkpoint
        )


def test_the_probe_of_a_reference_that_moves_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    run = KINDS["synchronized"] | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 0.03}
    trainer = trained(tmp_path, **run)
    files = [tmp_path / f"checkpoint-{step}" / "reference" / "probe.json" for step in (1, 2)]
    first, last = (torch.tensor(json.loads(file.read_text())[0]["log_probs"]) for file in files)
    texts = json.loads(files[1].read_text())[0]["texts"]
    expected = torch.cat([naive_log_probs(trainer.reference.module, *text).detach() for text in texts])
    torch.testing.assert_close(last, expected, atol=2e-5, rtol=1e-5)
    assert float((first - last).abs().mean()) > 0.01


def test_a_checkpoint_without_a_probe_is_resumed(tmp_path: Path) -> None:
    run: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trained(tmp_path, **run)
    for name in ("reference/probe.json", "manifest.json"):
        (tmp_path / "checkpoint-2" / name).unlink()
    resumed = make_trainer(tmp_path, resume_changes=["manifest"], **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_refusal_says_what_has_changed_about_the_machine(tmp_path: Path) -> None:
    one, other = LogProbStore(tmp_path / "1"), LogProbStore(tmp_path / "2")
    digest = prepared(one, tiny_model()).identity.digest
    (probe,) = one.probes(digest)
    other.put_probe(digest, probe._replace(made_with={"torch": "1.0", "abacus": "7"}))
    with pytest.raises(StoreError) as caught:
        prepared(other, odd.with_behaviour("norm epsilon"))
    assert f"torch 1.0 then, {version('torch')} now)" in caught.value.details
