"""The demo: its pairs, the model it takes, and the whole line, with the tiny model and with the real one."""

from __future__ import annotations

import html
import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tether.demo.models
from support.real import needs_real_model
from support.tiny import tiny_model, tiny_tokenizer
from tether.demo.models import HUB, PACKAGE, TINY, find_model
from tether.demo.run import LONGEST, NUM_PAIRS, NUM_QUESTIONS, run_demo
from tether.demo.show import FIGURES, STEPS, Result, Run
from tether.errors import ConfigurationError

PAIRS = Path(tether.demo.models.__file__).parent


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PAIRS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------- pairs and models


def test_chosen_responses_are_the_beginning_of_the_rejected() -> None:
    for row in rows("train") + rows("held_out"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert rejected.startswith(chosen) and len(rejected) > len(chosen) and chosen[-1] in ".!?"


def test_held_out_questions_are_not_trained_on() -> None:
    train, held_out = ([row["prompt"][0]["content"] for row in rows(name)] for name in ("train", "held_out"))
    assert len(set(train)) == len(train) >= 200 and len(set(held_out)) == len(held_out) >= 60
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("has_package", "has_hub", "named", "expected"),
    [
        (True, True, None, PACKAGE),
        (False, True, None, HUB),
        (False, False, None, TINY),
        (True, True, "tiny", TINY),
        (True, True, "my/model", "my/model"),
    ],
)
def test_the_first_model_at_hand_is_taken_and_named(
    has_package: bool, has_hub: bool, named: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tether.demo.models, "_file_of_package", lambda: Path("x.gguf") if has_package else None)
    monkeypatch.setattr(tether.demo.models, "_can_reach", lambda name: has_hub)
    monkeypatch.setattr(tether.demo.models, "_check", lambda name: None)
    name, about = find_model(named)
    assert name == expected and (expected in about or (expected == TINY and "tiny" in about))


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_an_output_folder_that_cannot_be_is_refused_and_nothing_is_lost(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="it is no folder that can be written"):
        run_demo(tmp_path / place, quick=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("what", ["a file", "no folder", "an empty folder", "no chat model"])
def test_a_model_that_cannot_be_is_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if what == "a file":
        model.write_text("{}")
    elif what == "an empty folder":
        model.mkdir()
    elif what == "no chat model":
        tiny_model().save_pretrained(model)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(model)
    why = "has no chat template" if what == "no chat model" else "no language model can be loaded"
    with pytest.raises(ConfigurationError, match=f"--model .*{why}"):
        run_demo(tmp_path / "out", model=str(model))
    assert not (tmp_path / "out").exists()


def test_the_verdict_on_accuracy_and_margin_is_what_they_say() -> None:
    def result(accuracy: float, margin: float, kl: float = 1.0) -> str:
        same = dict.fromkeys((metric for _, metric, _ in FIGURES), 0.0)
        log = [same | {"eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin, "samples/kl": kl}]
        good = [same | {"eval_rewards/accuracies": 0.9, "eval_rewards/margins": 2.0}]
        first, second = (Run("implicit", entries, [], 0, 0, 0, 0, 0.0) for entries in (good, log))
        return Result(Path(), "", "", [], first, second, [], first, 0.0).verdict

    assert "as good or better" in result(0.9, 2.5) and "as good or better" not in result(0.8, 2.5) + result(0.9, 1.9)
    assert "other figures tell" in result(0.9, 2.5) and "other figures tell" not in result(0.9, 2.5, kl=0.0)


# ------------------------------------------------------------------------------------------------- the whole line


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, str]:
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, has nothing to say, as in the command
        result = run_demo(tmp_path_factory.mktemp("demo"), quick=True)
    return result, printed.getvalue()


def test_all_references_start_with_the_same_losses(quick: tuple[Result, str]) -> None:
    result, _ = quick
    runs = {run.kind: run.losses for run in (result.good, *result.others)}
    assert list(runs) == ["implicit", "explicit", "precomputed", "synchronized"]
    for kind, losses in runs.items():
        same = STEPS[1] if kind == "synchronized" else STEPS[-1]  # it moves after that step
        assert losses[:same] == pytest.approx(runs["explicit"][:same], abs=1e-3)
    assert abs(runs["synchronized"][-1] - runs["explicit"][-1]) > 1e-3
    assert result.too_far.losses[0] == pytest.approx(math.log(2), abs=1e-5)


def test_the_costs_are_those_of_each_reference(quick: tuple[Result, str]) -> None:
    result, _ = quick
    weights = AutoModelForCausalLM.from_pretrained(result.policy).num_parameters()
    explicit, precomputed, synchronized = result.others
    assert explicit.extra_bytes == 4 * weights and result.good.extra_bytes == precomputed.extra_bytes == 0
    assert 0 < synchronized.extra_bytes < 4 * weights
    assert explicit.passes == result.good.passes == STEPS[-1] and precomputed.passes == 0
    pairs = rows("train")[:NUM_PAIRS]
    assert precomputed.scored == 2 * len(pairs) and precomputed.found == 0
    assert result.again.scored == 0 and result.again.found == 2 * len(pairs)


def test_answers_are_the_likeliest_ones_of_the_saved_models(quick: tuple[Result, str]) -> None:
    result, _ = quick
    assert [row[0] for row in result.answers] == [
        row["prompt"][0]["content"] for row in rows("held_out")[:NUM_QUESTIONS]
    ]
    model, tokenizer = (kind.from_pretrained(result.policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for question, before, *_ in result.answers[:3]:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        made = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)[0, inputs["input_ids"].shape[1] :]
        assert before == (tokenizer.decode(made, skip_special_tokens=True).strip() or "(nothing)")


def test_the_terminal_fits_80_columns_and_names_what_was_found(quick: tuple[Result, str]) -> None:
    result, printed = quick
    lines = printed.splitlines()
    assert not [line for line in lines if len(line) > 80 and str(result.folder) not in line]
    for row in result.figures + result.references:
        assert any(line.split() == " ".join(row).split() for line in lines), row
    assert str(result.report) in printed and f"tether ask {result.folder / 'good'}" in printed
    assert f"tether train --model {result.policy}" in printed


def test_the_page_has_all_answers_and_is_small(quick: tuple[Result, str]) -> None:
    result, _ = quick
    page = result.report.read_text(encoding="utf-8")
    assert all(html.escape(question) in page for question, *_ in result.answers)
    assert "rewards/chosen" in page and page.count("<figure") >= 5 and len(page) < 1_000_000


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(*needs_real_model[1].args, **needs_real_model[1].kwargs)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_figures_tell_the_ruined_model_from_the_good_one(seed: int, tmp_path: Path) -> None:
    """Accuracy and margin do not. On the questions that the demo shows, by which no setting was chosen."""
    result = run_demo(tmp_path, seed=seed)
    before, good, ruined = (
        {name: float(value.rstrip("%")) for name, value in zip((row[0] for row in result.figures), column, strict=True)}
        for column in list(zip(*result.figures, strict=True))[1:]
    )
    assert ruined["accuracy"] >= good["accuracy"] >= 0.9 and ruined["margin"] > good["margin"] > 0.5
    assert good["rewards/chosen"] > 0 > ruined["rewards/chosen"]
    assert good["token accuracy"] > before["token accuracy"] - 0.15 > ruined["token accuracy"] + 0.1
    assert good["answers that end"] >= 75 and good["tokens of an answer"] < 0.7 * before["tokens of an answer"]
    assert before["KL, nats a token"] == 0 < good["KL, nats a token"] < 0.6 * ruined["KL, nats a token"]
    # Answers that repeat the question (seed 1) surprise the initial model little.
    assert before["surprise, nats a token"] < good["surprise, nats a token"] < ruined["surprise, nats a token"]
