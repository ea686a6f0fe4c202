"""When the store is filled, how the pass goes, who is asked again later, and what is refused at the door."""

from __future__ import annotations

import logging
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from support.runs import as_dataset, curve, make_trainer, stream, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer
from tether import DPOConfig, DPOTrainer
from tether.data.collators import PairsOfPadded
from tether.data.datasets import PairCollator, batch_of
from tether.errors import ConfigurationError, DataError, MissingLogProbsError, ReferenceModelError
from tether.reference import ExplicitReference, PrecomputedReference, Reference
from tether.store import LogProbStore, content_key, prune
from tether.trainer.batches import RowsToScore
from tether.types import PairBatch, Response, ResponseLogProbs, offsets_of

pytestmark = pytest.mark.numerics

PRECOMPUTE: dict[str, Any] = {"precompute_ref_log_probs": True}
LAZY, REQUIRE = PRECOMPUTE | {"ref_store_mode": "lazy"}, PRECOMPUTE | {"ref_store_mode": "require"}
LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
ROWS = tiny_pairs(12)


def distinct_responses(trainer: DPOTrainer) -> int:
    rows = trainer.train_dataset
    return len(
        {(tuple(row["prompt_ids"]), tuple(row[side])) for row in rows for side in ("chosen_ids", "rejected_ids")}
    )


def stored_of(trainer: DPOTrainer) -> PrecomputedReference:
    assert isinstance(trainer.reference, PrecomputedReference)
    return trainer.reference


# ---------------------------------------------------------------------------------------------------- the modes


def test_fill_scores_each_response_once_before_training_and_never_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "1", rows=ROWS, num_train_epochs=2, max_steps=-1, **PRECOMPUTE)
    reference = stored_of(trainer)
    passes = reference.num_passes
    assert reference.num_computed == distinct_responses(trainer) and passes > 0
    trainer.train()
    assert reference.num_passes == passes and reference.num_computed == distinct_responses(trainer)


def damage_records(store: LogProbStore, which: str) -> None:
    """Zeros the values of some records behind the store's back."""
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute(f"UPDATE records SET log_probs = zeroblob(length(log_probs)) {which}")


class CopiesToDevices(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_a_stored_answer_is_one_copy_to_the_device_however_many_responses(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "1", rows=ROWS, **PRECOMPUTE)
    batch = batch_of(trainer.data_collator(list(trainer.train_dataset)))
    batch = batch.to("meta")
    with CopiesToDevices() as copies:
        answer = stored_of(trainer).log_probs(batch)
    assert answer.num_responses > 2 and answer.values.is_meta
    assert copies.num == 2  # the values, and where each response starts


def test_a_damaged_record_is_scored_again_before_training(tmp_path: Path) -> None:
    kept = stored_of(make_trainer(tmp_path / "1", rows=ROWS, **PRECOMPUTE))
    damage_records(kept.store, "WHERE id % 5 = 0")
    trainer = make_trainer(tmp_path / "2", rows=ROWS, num_train_epochs=1, max_steps=-1, **PRECOMPUTE)
    assert stored_of(trainer).num_computed == kept.num_computed // 5
    trainer.train()
    damage_records(kept.store, "WHERE id = 1")
    with pytest.raises(MissingLogProbsError, match=r"1 responses, one of them the (chosen|rejected) response of row"):
        make_trainer(tmp_path / "3", rows=ROWS, **REQUIRE)


class DamagesAll(TrainerCallback):
    """Damages every record after the first step."""

    def __init__(self, store: LogProbStore) -> None:
        self.store = store

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            damage_records(self.store, "")


@pytest.mark.parametrize("where", ["lora", "folder", "memory"])
def test_a_record_damaged_while_training_is_answered_by_a_proven_source_or_stops_with_the_cure(
    where: str, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model") if where == "folder" else tiny_model()
    options = PRECOMPUTE | {"rows": ROWS, "max_steps": 3} | (LORA if where == "lora" else {})
    trainer = make_trainer(tmp_path / "1", model, **options)
    trainer.add_callback(DamagesAll(stored_of(trainer).store))
    if where == "memory":
        with pytest.raises(MissingLogProbsError, match=r"has other weights by now(.|\n)*`tether precompute"):
            trainer.train()
        return
    trainer.train()
    clean = trained(
        tmp_path / "2", tiny_model() if where == "lora" else model, **options | {"precompute_ref_log_probs": False}
    )
    assert curve(trainer) == pytest.approx(curve(clean), rel=1e-4, abs=1e-5)


def test_a_pass_is_noted_with_its_model_and_rows_and_a_checkpoint_knows_how_many_there_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = PRECOMPUTE | LORA | {"rows": ROWS, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    first = stored_of(trained(tmp_path / "1", **options))
    again = make_trainer(tmp_path / "1", **options | {"max_steps": 2})  # scores nothing, so it notes nothing
    (noted,) = first.store.passes(first.identity.digest)
    about = {"set": "train", "rows": len(ROWS), "max_length": 1024, "run": str(tmp_path / "1")}
    assert noted.ended is not None and noted.about.items() >= about.items()
    prune(first.store, identity=first.identity.digest)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-1"))
    assert (
        f"had {first.num_computed} records of this reference when the checkpoint was written, and has 0" in caplog.text
    )


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_lazy_scores_in_the_first_epoch_and_reads_in_later_ones_and_in_later_runs(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = options | {"rows": ROWS, "max_steps": -1, "per_device_train_batch_size": 4}
    first = make_trainer(tmp_path / "1", num_train_epochs=3, **options, **LAZY)
    assert stored_of(first).num_passes == 0
    first.train()
    assert stored_of(first).num_computed == distinct_responses(first)
    assert 3 <= first.reference.num_passes <= 3 + 2  # one epoch, and the rows looked at before it
    again = trained(tmp_path / "2", num_train_epochs=1, seed=5, **options, **LAZY)
    assert again.reference.num_passes == 0
    plain = trained(tmp_path / "3", num_train_epochs=3, **options)
    assert curve(first) == pytest.approx(curve(plain), abs=1e-5)


def test_a_store_filled_lazily_serves_a_run_that_fills_and_one_that_requires(tmp_path: Path) -> None:
    trained(tmp_path / "1", rows=ROWS, max_steps=-1, num_train_epochs=1, **LAZY)
    for mode in ("fill", "require", "auto"):
        options = PRECOMPUTE | {"ref_store_mode": mode}
        assert trained(tmp_path / mode, rows=ROWS, max_steps=2, **options).reference.num_passes == 0


def test_lazy_scores_only_what_a_batch_lacks(tmp_path: Path) -> None:
    store, source = LogProbStore(tmp_path / "s"), ExplicitReference(tiny_model())
    prompt = (7, 8, 9)
    known, new = (Response(prompt, ids, content_key(prompt, ids)) for ids in ((10, 11), (12, 13, 14)))
    reference = PrecomputedReference(store, source, mode="lazy")
    reference.log_probs(PairBatch.of_pairs([(known, known)]))
    found = reference.log_probs(PairBatch.of_pairs([(new, known)]))
    assert reference.num_computed == 2 and reference.num_passes == 2
    for log_probs, response in zip(found.split(), (new, known), strict=True):
        expected = naive_log_probs(tiny_model(), prompt, response.token_ids).detach()
        torch.testing.assert_close(log_probs, expected, atol=5e-6, rtol=1e-6)


def test_a_reference_behind_a_store_is_saved_as_a_model_while_its_weights_are_held(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "1", rows=ROWS, learning_rate=1e-2, **LAZY)
    trainer.export_reference(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, tiny_model()(ids).logits)
    filled = trained(tmp_path / "2", rows=ROWS, **PRECOMPUTE)
    with pytest.raises(ReferenceModelError, match="no weights of its own"):
        filled.export_reference(tmp_path / "given up")
    assert not (tmp_path / "given up").exists()


def test_require_reads_and_holds_no_reference_weights(tmp_path: Path) -> None:
    filled = trained(tmp_path / "1", rows=ROWS, **PRECOMPUTE)
    trainer = trained(tmp_path / "2", rows=ROWS, **REQUIRE)
    assert (trainer.reference.num_passes, trainer.reference.extra_bytes, trainer.ref_model) == (0, 0, None)
    assert curve(trainer) == curve(filled)


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_require_names_the_missing_row_and_the_command_that_fills_it(options: dict[str, Any], tmp_path: Path) -> None:
    make_trainer(tmp_path / "1", rows=[*ROWS[:5], *ROWS[6:]], **options, **PRECOMPUTE)
    with pytest.raises(MissingLogProbsError) as caught:
        make_trainer(tmp_path / "2", rows=ROWS, ref_store=None, max_length=99, **options, **REQUIRE)
    assert "row 5 of the train set" in caught.value.problem and ROWS[5]["prompt"][:20] in caught.value.problem
    assert "tether precompute" in caught.value.instead and "--max_length 99" in caught.value.instead
    assert "ref_store_mode='fill'" in caught.value.instead


def test_require_names_a_missing_row_of_a_stream_when_it_is_read(tmp_path: Path) -> None:
    trained(tmp_path / "1", rows=ROWS[:8], **PRECOMPUTE)
    trainer = make_trainer(tmp_path / "2", rows=stream(ROWS), max_steps=3, **REQUIRE)
    with pytest.raises(MissingLogProbsError) as caught:
        trainer.train()
    assert trainer.state.global_step == 2  # two batches of four are known
    assert any(row["prompt"][:20] in caught.value.problem for row in ROWS[8:])


def test_require_refuses_a_new_evaluation_set_by_its_name(tmp_path: Path) -> None:
    trained(tmp_path / "1", rows=ROWS, **PRECOMPUTE)
    trainer = trained(tmp_path / "2", rows=ROWS, **REQUIRE)
    assert trainer.evaluate(as_dataset(ROWS[:4]))["eval_loss"] > 0
    with pytest.raises(MissingLogProbsError, match="of the eval set"):
        trainer.evaluate(as_dataset(tiny_pairs(4, seed=3)))


def test_a_stream_reads_through_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tether"):
        trained(tmp_path, rows=stream(ROWS), eval_dataset=stream(ROWS[:4]), **PRECOMPUTE)
    assert sum("ref_store_mode='lazy'" in record.getMessage() for record in caplog.records) == 1


def test_filling_a_stream_beforehand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="lazy"):
        make_trainer(tmp_path, rows=stream(ROWS), **PRECOMPUTE, ref_store_mode="fill")


@pytest.mark.parametrize("mode", ["fill", "lazy", "require"])
def test_a_mode_without_a_store_is_refused(mode: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="precompute_ref_log_probs=True"):
        DPOConfig(str(tmp_path), ref_store_mode=mode)


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'lazy'"):
        DPOConfig(str(tmp_path), ref_store_mode="eager", precompute_ref_log_probs=True)


# --------------------------------------------------------------------------------------------- what is found again


def num_scored(folder: Path, rows: Any = None, **options: Any) -> int:
    """Responses that a run of one epoch has to score; the store is shared within a test."""
    trainer = trained(folder, rows=ROWS if rows is None else rows, max_steps=3, **PRECOMPUTE | options)
    return stored_of(trainer).num_computed


def test_a_store_is_reused_whatever_way_the_rows_come(tmp_path: Path) -> None:
    assert num_scored(tmp_path / "1") > 0
    tokens = tokenized(ROWS, tmp_path).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    tokens.save_to_disk(tmp_path / "disk")
    split = {"rows": ROWS[:8], "eval_dataset": {"a": as_dataset(ROWS[8:10]), "b": as_dataset(ROWS[10:])}}
    ways: dict[str, dict[str, Any]] = {
        "tokenized": {"rows": tokens},
        "disk": {"rows": load_from_disk(tmp_path / "disk")},
        "stream": {"rows": stream(ROWS)},
        "stream of tokens": {"rows": tokens.to_iterable_dataset()},
        "split": split,
    }
    assert {name: num_scored(tmp_path / name, **way) for name, way in ways.items()} == dict.fromkeys(ways, 0)


def test_a_longer_max_length_scores_the_rows_that_were_cut(tmp_path: Path) -> None:
    num_scored(tmp_path / "1", max_length=50)
    rows = tokenized(ROWS, tmp_path)
    cut = [row[s] for row in rows for s in ("chosen_ids", "rejected_ids") if len(row["prompt_ids"] + row[s]) > 50]
    assert num_scored(tmp_path / "2", max_length=512) == len(cut) > 0
    assert num_scored(tmp_path / "3", max_length=50) == num_scored(tmp_path / "4", max_length=40) == 0


def test_keeping_the_end_is_stored_by_what_was_fed(tmp_path: Path) -> None:
    rows = tokenized(ROWS, tmp_path)
    lengths = [len(row["prompt_ids"] + row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    keep_end = {"truncation_mode": "keep_end"}
    num_scored(tmp_path / "1", max_length=512)
    assert num_scored(tmp_path / "2", max_length=512, **keep_end) == 0  # nothing is cut: the same was fed
    assert num_scored(tmp_path / "3", max_length=40, **keep_end) == sum(length > 40 for length in lengths) > 0
    assert num_scored(tmp_path / "4", max_length=40, **keep_end) == 0


# ------------------------------------------------------------------------------------------------------ the pass


class Counting(Reference):
    """A source that gives every token `-1`, and counts what it was asked."""

    def __init__(self, fail_at: int = -1, error: BaseException | None = None, value: float = -1.0) -> None:
        self.batches: list[PairBatch] = []
        self._fail_at, self._error, self._value = fail_at, error, value

    @property
    def identity(self) -> Any:
        return ExplicitReference(tiny_model()).identity

    @property
    def num_passes(self) -> int:
        return len(self.batches)

    def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
        if self._error is not None and len(self.batches) == self._fail_at:
            self._fail_at = -1
            raise self._error
        self.batches.append(batch)
        values = torch.full((sum(batch.response_lengths),), -1.0)
        values[-1] = self._value
        return ResponseLogProbs(values, offsets_of(batch.response_lengths))

    def scored(self, reference: PrecomputedReference) -> list[PairBatch]:
        """The batches that it was asked to fill the store, after those that checked it."""
        return self.batches[len(self.batches) - reference.num_passes :]


def responses_of(batches: list[PairBatch]) -> list[Response]:
    return [response for batch in batches for response in batch.responses()]


def tokenized(rows: list[dict[str, Any]], tmp_path: Path) -> Any:
    return make_trainer(tmp_path / "tokens", rows=rows).train_dataset


def config(tmp_path: Path, **options: Any) -> DPOConfig:
    return DPOConfig(str(tmp_path), use_cpu=True, report_to=[], precompute_ref_log_probs=True, **options)


def row_set(rows: list[dict[str, Any]], tmp_path: Path, **options: Any) -> RowsToScore:
    return RowsToScore(tokenized(rows, tmp_path), PairCollator(512), config(tmp_path, max_length=512, **options))


def test_pass_scores_the_longest_first_within_the_budget_and_each_prompt_once_a_batch(tmp_path: Path) -> None:
    rows = row_set([*ROWS, *ROWS[:6]], tmp_path, precompute_ref_batch_size=2)
    source = Counting()
    reference = PrecomputedReference(LogProbStore(tmp_path / "s"), source)
    reference.prepare({"train": lambda: rows})
    batches = source.scored(reference)
    asked = responses_of(batches)
    assert len(asked) == len(set(asked)) == len({r for batch in rows for r in batch.responses()})
    tokens = [sum(batch.prompt_lengths) + sum(batch.response_lengths) for batch in batches]
    assert max(tokens) <= rows.max_tokens
    # Full batches: no two neighbours would have fitted together.
    assert all(one + other > rows.max_tokens for one, other in pairwise(tokens))
    rows_first = max(batch.num_row_tokens() for row in ROWS for batch in row_set([row], tmp_path))
    longest = next(iter(rows))
    first = longest.responses()[longest.chosen[0]]
    assert sum(map(len, (first.prompt_ids, first.token_ids, longest.responses()[longest.rejected[0]].token_ids))) == (
        rows_first
    )
    assert first in batches[0].responses()
    assert all(len(set(r.prompt_ids for r in batch.responses())) == batch.num_groups for batch in batches)


def test_pass_takes_more_at_once_than_training_unless_a_size_is_given(tmp_path: Path) -> None:
    longest = max(batch.num_row_tokens() for batch in [b for b in row_set([max(ROWS, key=_letters)], tmp_path)])
    by_itself = row_set(ROWS, tmp_path, per_device_train_batch_size=2).max_tokens
    given = row_set(ROWS, tmp_path, per_device_train_batch_size=2, precompute_ref_batch_size=3).max_tokens
    budget = row_set(ROWS, tmp_path, max_tokens_per_micro_batch=500).max_tokens
    large = row_set(ROWS, tmp_path, max_tokens_per_micro_batch=50_000).max_tokens
    assert given == 3 * longest and by_itself == 8 * longest
    assert (budget, large) == (2000, 50_000)


def _letters(row: dict[str, Any]) -> int:
    return len(row["prompt"] + row["chosen"] + row["rejected"])


def test_a_few_new_rows_among_many_make_few_forwards(tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "s")
    rows = tiny_pairs(200)
    old = [row for index, row in enumerate(rows) if index % 20]
    PrecomputedReference(store, Counting()).prepare({"train": lambda: row_set(old, tmp_path)})
    source = Counting()
    reference = PrecomputedReference(store, source)
    reference.prepare({"train": lambda: row_set(rows, tmp_path)})
    assert reference.num_passes == 1
    assert len(responses_of(source.scored(reference))) == reference.num_computed <= 20
    assert reference.num_found > 300


def test_processes_share_the_rows_evenly_and_each_row_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tokenized(tiny_pairs(50), tmp_path)
    shares, tokens = [], []
    for process in range(3):
        monkeypatch.setattr(DPOConfig, "process_index", property(lambda self, process=process: process))
        monkeypatch.setattr(DPOConfig, "world_size", property(lambda self: 3))
        rows = RowsToScore(data, PairCollator(512), config(tmp_path))
        shares.append([row for batch in rows for row in batch.rows])
        tokens.append(rows.num_tokens)
        assert rows.num_rows == len(shares[-1])
    assert sorted(row for share in shares for row in share) == list(range(50))
    assert max(tokens) - min(tokens) <= max(len(row["prompt_ids"]) * 8 for row in data)
    prompts = [{tuple(data[row]["prompt_ids"]) for row in share} for share in shares]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_ctrl_c_says_how_many_rows_are_kept_and_the_next_pass_goes_on(tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "s")
    sets = {"train": lambda: row_set(ROWS, tmp_path, precompute_ref_batch_size=1)}
    stopped = PrecomputedReference(store, Counting(fail_at=3, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as caught:
        stopped.prepare(sets)
    kept, total = [int(word) for word in str(caught.value).split() if word.isdigit()]
    assert str(caught.value) == f"{kept} of {total} rows of the train set are kept" and 0 < kept < total == len(ROWS)
    in_store = [
        not store.missing(stopped.identity.digest, batch.keys, batch.response_lengths)
        for row in ROWS
        for batch in row_set([row], tmp_path)
    ]
    assert sum(in_store) == kept
    again = PrecomputedReference(store, Counting())
    again.prepare(sets)
    assert again.num_found == stopped.num_computed > 0
    assert again.num_found + again.num_computed == store.count()


def test_pass_halves_a_batch_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    source = Counting(fail_at=1, error=torch.OutOfMemoryError("CUDA out of memory"))  # after the probe
    reference = PrecomputedReference(LogProbStore(tmp_path / "s"), source)
    reference.prepare({"train": lambda: row_set(ROWS, tmp_path)})
    asked = responses_of(source.scored(reference))
    assert reference.num_passes >= 2 and len(asked) == len(set(asked)) == reference.num_computed


def test_a_pass_that_did_not_fit_is_freed_before_the_next(tmp_path: Path) -> None:
    held: list[weakref.ref[Any]] = []

    class Full(Counting):
        def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
            if batch.num_responses > 4:
                activations = torch.zeros(8)
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert not any(tensor() is not None for tensor in held)
            return super().log_probs(batch)

    PrecomputedReference(LogProbStore(tmp_path / "s"), Full()).prepare({"train": lambda: row_set(ROWS, tmp_path)})
    assert held


def test_a_single_row_that_does_not_fit_into_memory_is_an_error(tmp_path: Path) -> None:
    class Full(Counting):
        def log_probs(self, batch: PairBatch) -> ResponseLogProbs:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        PrecomputedReference(LogProbStore(tmp_path / "s"), Full()).prepare({"train": lambda: row_set(ROWS, tmp_path)})


class Terminal:
    """Standard error as a terminal, for tqdm; keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("show", [True, False])
def test_progress_shows_tokens_a_second_and_the_time_left_and_is_off_where_asked(
    show: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, terminal = row_set(ROWS, tmp_path, precompute_ref_batch_size=1), Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.delenv("COLUMNS", raising=False)  # older versions of tqdm cut the line there
    reference = PrecomputedReference(LogProbStore(tmp_path / "s"), Counting())
    reference.prepare({"train": lambda: rows}, show_progress=show)
    if not show:
        assert terminal.text == ""
        return
    last = terminal.text.split("\r")[-1]
    assert "100%" in last and "tokens/s" in last and "<00:00" in last
    reference.prepare({"train": lambda: rows}, show_progress=True)
    assert f"complete, {reference.num_computed} responses found" in terminal.text.split("\r")[-1]


# ----------------------------------------------------------------------------------------- what is refused at the door


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_log_prob_that_is_not_finite_is_refused_with_its_row(value: float, tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "s")
    reference = PrecomputedReference(store, Counting(value=value), decode=tiny_tokenizer().decode)
    with pytest.raises(DataError) as caught:
        reference.prepare({"train": lambda: row_set(ROWS[:1], tmp_path)})
    assert "response of row 0 of the train set" in caught.value.problem and str(value) in caught.value.problem
    assert ROWS[0]["prompt"][:20] in caught.value.problem
    assert store.count() == 0


def test_a_log_prob_that_is_not_finite_is_refused_while_training_too(tmp_path: Path) -> None:
    store = LogProbStore(tmp_path / "s")
    (batch,) = row_set(ROWS[:1], tmp_path)
    with pytest.raises(DataError, match=r"pair 0 of a batch|row 0"):
        PrecomputedReference(store, Counting(value=float("inf")), mode="lazy").log_probs(batch)
    assert store.count() == 0


# ----------------------------------------------------------------------------- new sets after the weights were released

NEW = tiny_pairs(5, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def expected_on_new(model: Any, tmp_path: Path, **options: Any) -> Iterator[tuple[str, float]]:
    """What a run that keeps its reference says of the new rows."""
    metrics = trained(tmp_path / "kept", model, rows=ROWS, **options).evaluate(as_dataset(NEW))
    return ((name, value) for name, value in metrics.items() if "rewards" in name or name == "eval_loss")


@pytest.mark.parametrize("given", ["policy by path", "policy in memory, from a path", "reference by path"])
def test_a_released_reference_is_brought_back_from_where_it_came(given: str, folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ref_model": folder} if given == "reference by path" else {}

    def model() -> Any:
        if given == "policy by path":
            return folder
        return tiny_model(seed=1) if options else type(tiny_model()).from_pretrained(folder)

    trainer = trained(tmp_path / "1", model(), rows=ROWS, **options, **PRECOMPUTE)
    passes = trainer.reference.num_passes
    metrics = trainer.evaluate(as_dataset(NEW))
    for name, value in expected_on_new(model(), tmp_path, **options):
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    assert trainer.reference.num_passes == passes + 1
    assert trainer.ref_model is None and trainer.reference.extra_bytes == 0  # and released again
    assert trainer.evaluate(as_dataset(NEW))["eval_loss"] == metrics["eval_loss"]
    assert trainer.reference.num_passes == passes + 1


def test_before_training_the_policy_itself_answers_for_a_new_set(tmp_path: Path) -> None:
    metrics = make_trainer(tmp_path, rows=ROWS, **PRECOMPUTE).evaluate(as_dataset(NEW))
    assert metrics["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_a_model_that_is_no_longer_what_its_folder_says_is_not_brought_back(folder: str, tmp_path: Path) -> None:
    model = type(tiny_model()).from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    trainer = trained(tmp_path, model, rows=ROWS, **PRECOMPUTE)
    with pytest.raises(MissingLogProbsError) as caught:
        trainer.evaluate(as_dataset(NEW))
    assert "response of row" in caught.value.problem
    assert f"{folder} has other weights by now" in caught.value.details
    assert "the policy in memory has other weights by now" in caught.value.details


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    model = tiny_model()
    model.config._name_or_path = str(tmp_path / "gone")
    trainer = trained(tmp_path / "out", model, rows=ROWS, **PRECOMPUTE)
    with pytest.raises(MissingLogProbsError, match="gone cannot be read"):
        trainer.evaluate(as_dataset(NEW))


# -------------------------------------------------------------------------------------------------------- the keys


def masked(start: int) -> Any:
    """A collator of the padded layout whose responses begin at that token of the sequence."""

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows])
        marks = (torch.arange(ids.shape[1]) >= start).long().expand_as(ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": marks}

    return PairsOfPadded(collate)


COLLATORS: dict[str, Any] = {
    "a mask from token 3 on": masked(3),
    "a mask from token 5 on": masked(5),
    "a mask from token 1 on": masked(1),
    "whole": PairCollator(),
    "its start": PairCollator(6),
    "its end": PairCollator(6, "keep_end"),
    "less of its end": PairCollator(4, "keep_end"),
}


@pytest.mark.parametrize("order", [1, -1])
def test_what_decides_where_a_response_stands_is_part_of_its_key(order: int, tmp_path: Path) -> None:
    """Masks and truncations of one row, one store; a shorter start of the same response may be served by a longer."""
    row = {"prompt_ids": [9, 8, 7], "chosen_ids": [5, 6, 11, 12, 13], "rejected_ids": [6, 5, 14, 15, 16]}
    model = tiny_model()
    reference = PrecomputedReference(LogProbStore(tmp_path / "s"), ExplicitReference(model), mode="lazy")
    for name in list(COLLATORS)[::order]:
        batch = batch_of(COLLATORS[name]([row]))
        for response, values in zip(batch.responses(), reference.log_probs(batch).split(), strict=True):
            expected = naive_log_probs(model, response.prompt_ids, response.token_ids).detach()
            torch.testing.assert_close(values, expected, atol=5e-6, rtol=1e-6)


def test_two_chat_templates_have_records_of_their_own(tmp_path: Path) -> None:
    options = PRECOMPUTE | {"ref_store": str(tmp_path / "s"), "rows": tiny_pairs(6, conversational=True)}
    for number, mark in enumerate((": ", " says ")):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("'\\n' + message", f"'{mark}' + message").replace(
            "assistant\\n", f"assistant{mark}"
        )
        trainer = make_trainer(tmp_path / str(number), **options, processing_class=tokenizer)
        assert stored_of(trainer).num_found == 0
        batch = batch_of(trainer.data_collator(list(trainer.train_dataset)))
        for response, values in zip(batch.responses(), trainer.reference.log_probs(batch).split(), strict=True):
            expected = naive_log_probs(tiny_model(), response.prompt_ids, response.token_ids).detach()
            torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-5)
