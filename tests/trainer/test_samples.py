"""`report_samples`: answers to held-out prompts, and the figures of them, against values computed by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from support.launch import launch
from support.runs import as_dataset, curve, facts_of, make_trainer, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer
from tether.config.rules.run import refused_run
from tether.errors import ConfigurationError
from tether.models.answering import answer, ends_of, same_random_state
from tether.reference import ExplicitReference, WrappingReference
from tether.trainer.samples import repetition
from tether.types import PairBatch, Response

HELD_OUT = tiny_pairs(8, seed=3)
NUM, LENGTH = 3, 10
SAMPLES: dict[str, Any] = {
    "report_samples": NUM,
    "report_samples_max_new_tokens": LENGTH,
    "eval_dataset": HELD_OUT,
    "learning_rate": 1e-2,
}


def lora() -> peft.LoraConfig:
    """A new one each time: PEFT writes the layers that it finds into it."""
    return peft.LoraConfig(task_type="CAUSAL_LM")


def by_hand(model: Any, prompt: Any, ends: list[int], length: int, seed: int | None = None) -> list[int]:
    """One answer by plain forwards, its tokens the most likely ones or drawn."""
    ids = list(prompt)
    with torch.no_grad(), same_random_state():
        if seed is not None:
            torch.manual_seed(seed)
        while len(ids) < len(prompt) + length:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            token = logits.argmax() if seed is None else torch.multinomial(logits.softmax(-1)[None], 1)
            ids.append(int(token))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


def prompts() -> list[list[int]]:
    """The first distinct held-out ones."""
    texts = dict.fromkeys(row["prompt"] for row in HELD_OUT)
    return [tiny_tokenizer()(text)["input_ids"] for text in texts][:NUM]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def figures(trainer: Any) -> dict[str, float]:
    """The last ones."""
    entry = next(entry for entry in reversed(trainer.state.log_history) if "samples/length" in entry)
    return {name: value for name, value in entry.items() if name.startswith("samples/")}


class Keeping(WrappingReference[ExplicitReference]):
    """Keeps the last batch of as many pairs as there are samples; the pairs watched for drift are two."""

    asked: PairBatch

    def log_probs(self, batch: PairBatch) -> Any:
        if batch.num_pairs == NUM:
            self.asked = batch
        return super().log_probs(batch)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_the_models_own_whatever_its_generation_config_says() -> None:
    model, asked = tiny_model(), prompts()
    model.generation_config.update(temperature=0.01, top_k=1, do_sample=True, repetition_penalty=5.0)
    config = model.generation_config
    assert len({len(prompt) for prompt in asked}) > 1
    assert answer(model, asked, [0], LENGTH) == [by_hand(model, prompt, [0], LENGTH) for prompt in asked]
    assert answer(model, asked[:1], [0], LENGTH, seed=7) == [by_hand(model, asked[0], [0], LENGTH, seed=7)]
    assert model.generation_config is config


def test_an_answer_ends_with_any_of_the_models_end_tokens() -> None:
    model, (prompt, *_) = tiny_model(), prompts()
    whole = by_hand(model, prompt, [0], LENGTH)
    model.generation_config.eos_token_id = [0, whole[3]]
    ends = ends_of(model, tiny_tokenizer())
    assert ends == [0, whole[3]]
    assert answer(model, [prompt], ends, LENGTH) == [whole[: whole.index(whole[3]) + 1]]


def test_repetition_is_the_share_of_trigrams_that_came_before() -> None:
    assert repetition([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(2 / 5)
    assert repetition([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repetition([1, 2, 3, 4]) == repetition([1, 2]) == 0.0


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_each_figure_is_that_of_plain_forwards(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [0, by_hand(model, prompts()[0], [0], LENGTH)[4]]
    trainer = trained(tmp_path, model, reference=lambda policy: Keeping(ExplicitReference.of_policy(policy)), **SAMPLES)
    ends, initial = ends_of(trainer.model, tiny_tokenizer()), tiny_model()
    greedy = [by_hand(trainer.model.eval(), prompt, ends, LENGTH) for prompt in prompts()]
    kept: Any = trainer.reference
    responses = kept.asked.responses()
    assert [responses[index] for index in kept.asked.chosen] == [
        Response(tuple(prompt), tuple(ids), responses[index].key)
        for prompt, ids, index in zip(prompts(), greedy, kept.asked.chosen, strict=True)
    ]
    drawn = [responses[index] for index in kept.asked.rejected]
    surprise = torch.cat([-naive_log_probs(initial, *pair) for pair in zip(prompts(), greedy, strict=True)])
    ratios = torch.cat(
        [
            naive_log_probs(trainer.model, one.prompt_ids, one.token_ids)
            - naive_log_probs(initial, one.prompt_ids, one.token_ids)
            for one in drawn
        ]
    )
    assert figures(trainer) == pytest.approx(
        {
            "samples/length": sum(map(len, greedy)) / NUM,
            "samples/ended": sum(ids[-1] in ends for ids in greedy) / NUM,
            "samples/repetition": sum(map(repetition, greedy)) / NUM,
            "samples/surprise": surprise.mean().item(),
            "samples/kl": ratios.mean().item(),
        },
        abs=1e-5,
    )
    assert figures(trainer)["samples/kl"] != 0
    decode = tiny_tokenizer().decode
    rows = samples(tmp_path)
    assert [row["policy"] for row in rows] == [decode(ids, skip_special_tokens=True) for ids in greedy]
    assert [row["prompt"] for row in rows] == [decode(prompt) for prompt in prompts()]
    theirs = [by_hand(initial, prompt, ends, LENGTH) for prompt in prompts()]
    assert [row["reference"] for row in rows] == [decode(ids, skip_special_tokens=True) for ids in theirs]
    assert sum(row["kl"] * len(one.token_ids) for row, one in zip(rows, drawn, strict=True)) / len(
        ratios
    ) == pytest.approx(ratios.mean().item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["explicit", "implicit", "lazy", "from its folder", "synchronized"])
def test_a_reference_with_a_model_answers_and_scores(kind: str, tmp_path: Path) -> None:
    stored = {"precompute_ref_log_probs": True, "ref_store": str(tmp_path / "store.sqlite")}
    options: dict[str, Any] = {
        "explicit": {},
        "implicit": {"peft_config": lora()},
        "lazy": stored | {"ref_store_mode": "lazy"},
        "from its folder": stored,
        "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 100},
    }[kind]
    model: Any = tiny_model()
    if kind == "from its folder":
        model.save_pretrained(tmp_path / "initial")
        model = str(tmp_path / "initial")
    trainer = trained(tmp_path / "run", model, **SAMPLES, **options)
    initial = tiny_model()
    theirs = [by_hand(initial, prompt, [0], LENGTH) for prompt in prompts()]
    decode = tiny_tokenizer().decode
    assert [row["reference"] for row in samples(tmp_path / "run")] == [
        decode(ids, skip_special_tokens=True) for ids in theirs
    ]
    greedy = [by_hand(trainer.model.eval(), prompt, [0], LENGTH) for prompt in prompts()]
    surprise = torch.cat([-naive_log_probs(initial, *pair) for pair in zip(prompts(), greedy, strict=True)])
    assert figures(trainer)["samples/surprise"] == pytest.approx(surprise.mean().item(), abs=1e-5)
    if kind == "from its folder":
        assert trainer.reference.module is None
        assert trainer.reference.num_computed == 64  # type: ignore[attr-defined]  # no answer is put into the store


@pytest.mark.parametrize("kind", ["released", "given"])
def test_a_reference_that_only_knows_the_rows_leaves_its_figures_out(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, options = tiny_pairs(24), dict(SAMPLES)
    if kind == "released":
        options |= {"precompute_ref_log_probs": True, "ref_store": str(tmp_path / "store.sqlite")}
    else:
        sums = {"ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0}
        rows, options["eval_dataset"] = ([row | sums for row in some] for some in (rows, HELD_OUT))
        options["ref_columns"] = "other"
    trainer = trained(tmp_path, rows=rows, eval_strategy="steps", eval_steps=1, **options)
    assert figures(trainer).keys() == {"samples/length", "samples/ended", "samples/repetition"}
    assert {(row["reference"], row["surprise"], row["kl"]) for row in samples(tmp_path)} == {("-", "-", "-")}
    assert caplog.text.count("has no model at hand to answer with") == 1
    assert caplog.text.count("cannot score the policy's answers") == 1


def test_a_reference_free_run_is_asked_like_any_other(tmp_path: Path) -> None:
    trainer = trained(tmp_path, reference_free=True, **SAMPLES)
    assert figures(trainer)["samples/surprise"] == 0.0
    assert figures(trainer)["samples/kl"] < 0.0
    assert {row["reference"] for row in samples(tmp_path)} == {"-"}


def test_each_evaluation_and_the_end_are_sampled_once(tmp_path: Path) -> None:
    sets = {"first": HELD_OUT, "second": tiny_pairs(4, seed=5)}
    trainer = trained(tmp_path, **SAMPLES | {"eval_dataset": sets}, eval_strategy="steps", eval_steps=2, max_steps=5)
    trainer.evaluate()
    steps = [entry["step"] for entry in trainer.state.log_history if "samples/length" in entry]
    assert steps == [2, 4, 5]
    assert [row["step"] for row in samples(tmp_path)] == [2] * NUM + [4] * NUM + [5] * NUM


def test_the_best_weights_are_sampled_under_their_step(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trained(tmp_path, load_best_model_at_end=True, **SAMPLES, **options)
    best = trainer.state.best_global_step
    assert best < 3
    trainer.evaluate()
    rows = samples(tmp_path)
    assert [row["step"] for row in rows] == [1] * NUM + [2] * NUM + [3] * NUM + [best] * NUM
    assert rows[-NUM:] == [row for row in rows[:-NUM] if row["step"] == best]


def test_without_a_held_out_set_the_training_prompts_are_answered(tmp_path: Path) -> None:
    trained(tmp_path, rows=HELD_OUT, **SAMPLES | {"eval_dataset": None})
    assert [row["prompt"] for row in samples(tmp_path)] == [tiny_tokenizer().decode(ids) for ids in prompts()]


def test_a_new_run_replaces_the_file_and_a_resumed_one_continues_it(tmp_path: Path) -> None:
    options = SAMPLES | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, **options)
    whole = samples(tmp_path)
    trainer = make_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert samples(tmp_path) == whole
    trained(tmp_path, **options)
    assert samples(tmp_path) == whole


def test_prompts_without_room_for_an_answer_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    longest = min(map(len, prompts())) + LENGTH
    trained(tmp_path / "some", max_length=longest, bad_rows="drop", **SAMPLES)
    assert all(
        len(tiny_tokenizer()(row["prompt"])["input_ids"]) + LENGTH <= longest for row in samples(tmp_path / "some")
    )
    trained(tmp_path / "none", **SAMPLES | {"report_samples_max_new_tokens": 2000})
    assert "No prompt leaves room for an answer" in caplog.text


# ---- what it leaves alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, lora], ids=["full", "lora"])
def test_losses_and_random_states_are_the_same_to_the_bit_as_without(adapter: Any, tmp_path: Path) -> None:
    seen = []
    for num in (0, 0, NUM):  # the first one proves how the model is scored: beartype draws numbers to check its lists
        options = SAMPLES | {"report_samples": num, "peft_config": adapter and adapter()}
        if num == 0:
            del options["report_samples_max_new_tokens"]
        model = tiny_model("gpt2", resid_pdrop=0.2, attn_pdrop=0.2)
        trainer = trained(
            tmp_path / str(len(seen)),
            model,
            disable_dropout=False,
            eval_strategy="steps",
            eval_steps=1,
            max_steps=4,
            **options,
        )
        states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        seen.append((curve(trainer), curve(trainer, "grad_norm"), states))
    assert seen[1] == seen[2]


def test_the_order_of_a_run_with_checkpointed_activations_is_kept(tmp_path: Path) -> None:
    options = SAMPLES | {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}
    plain = {name: value for name, value in options.items() if not name.startswith("report_")}
    assert curve(trained(tmp_path / "with", **options)) == curve(trained(tmp_path / "without", **plain))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_sharded_weights_and_images_are_refused(tmp_path: Path) -> None:
    (sharded,) = refused_run(facts_of(tmp_path, report_samples=2, is_sharded=True))
    assert sharded.option == "report_samples" and "ZeRO-3, FSDP2" in sharded.subject
    images = as_dataset([row | {"images": []} for row in tiny_pairs(2)])
    (shown,) = refused_run(facts_of(tmp_path, report_samples=2, sets={"train": images}))
    assert shown.option == "report_samples" and "images" in shown.subject


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_samples": -1}, "Cannot use `report_samples=-1`"),
        ({"report_samples": 1, "report_samples_max_new_tokens": 0}, "Cannot use `report_samples_max_new_tokens=0`"),
        ({"report_samples_max_new_tokens": 5}, "without `report_samples`"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path, **options)


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_two_processes_share_the_prompts(tmp_path: Path) -> None:
    (one,) = launch("samples.py", tmp_path / "one", "4")
    first, second = launch("samples.py", tmp_path / "two", "4", num_processes=2)
    for kind in ("explicit", "implicit"):
        assert first[kind] == second[kind]  # both log the figures of all
        for ours, theirs in zip(first[kind], one[kind], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"samples/kl"}:  # other draws
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        files = [
            {(r["prompt"], r["policy"], r["reference"]) for r in samples(tmp_path / n / kind)} for n in ("one", "two")
        ]
        assert files[0] == files[1] and len(files[0]) == NUM
