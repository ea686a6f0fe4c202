"""The demo: its task and rule, its steps one by one, and the whole line in its quick form."""

from __future__ import annotations

import io
import math
import random
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import tether.demo.run
from support.tiny import naive_log_probs
from tether.demo.pretrain import ModelSize, new_model, pretrain
from tether.demo.result import DemoResult
from tether.demo.run import run_demo
from tether.demo.sample import accuracy, likeliest_answers, preference_pairs, sample_answers, sequence_kl
from tether.demo.task import (
    MISTAKES,
    is_right,
    make_splits,
    prompt_of,
    right_answer,
    train_tokenizer,
    word_of,
    write_texts,
)
from tether.errors import ConfigurationError, DataError

PROMPTS = make_splits(500, 20, 20, word_lengths=(3, 4), seed=3)
TEXTS = write_texts(PROMPTS.pretraining, right_share=0.5, seed=3)
TOKENIZER = train_tokenizer(prompt + answer for prompt, answer in TEXTS)
SIZE = ModelSize(hidden_size=16, num_layers=1, num_heads=2)


# ------------------------------------------------------------------------------------------------- the task


def test_task_rule_agrees_with_python() -> None:
    for prompt in PROMPTS.pretraining:
        word = prompt.removeprefix("sort ").removesuffix(" = ")
        assert word_of(prompt) == word and prompt_of(word) == prompt
        assert right_answer(prompt) == "".join(sorted(word))
        assert is_right(prompt, "".join(sorted(word)))


@pytest.mark.parametrize("answer", ["", "banuko", "abknou ", "abknouu", "ABKNOU", "abkno"])
def test_task_rule_calls_everything_else_wrong(answer: str) -> None:
    assert not is_right(prompt_of("banuko"), answer)


def test_task_rule_refuses_a_prompt_that_is_not_its_own() -> None:
    with pytest.raises(DataError, match="reverse banuko"):
        is_right("reverse banuko = ", "okunab")


def test_task_prompts_are_disjoint_and_of_the_lengths_asked_for() -> None:
    parts = [set(PROMPTS.pretraining), set(PROMPTS.preference), set(PROMPTS.held_out)]
    assert [len(part) for part in parts] == [500, 20, 20] and len(set.union(*parts)) == 540
    assert {len(word_of(prompt)) for prompt in set.union(*parts)} == {3, 4}


def test_task_prompts_and_texts_follow_the_seed() -> None:
    assert make_splits(500, 20, 20, word_lengths=(3, 4), seed=3) == PROMPTS
    assert make_splits(500, 20, 20, word_lengths=(3, 4), seed=4) != PROMPTS
    assert write_texts(PROMPTS.pretraining, right_share=0.5, seed=3) == TEXTS


def test_task_held_out_prompts_stay_when_training_sets_grow() -> None:
    assert make_splits(300, 40, 20, word_lengths=(3, 4), seed=3).held_out == PROMPTS.held_out


def test_task_texts_are_right_as_often_as_asked_and_else_a_known_mistake() -> None:
    right = [is_right(prompt, answer) for prompt, answer in TEXTS]
    assert 0.5 <= sum(right) / len(right) < 0.7  # a mistake can be right by chance: "dolt" backwards, say
    for prompt, answer in TEXTS:
        assert answer in {right_answer(prompt), *(mistake(word_of(prompt)) for mistake in MISTAKES.values())}
    assert all(is_right(*text) for text in write_texts(PROMPTS.pretraining, right_share=1.0, seed=0))


def test_tokenizer_gives_one_token_per_character_and_everything_back() -> None:
    for prompt, answer in TEXTS[:50]:
        prompt_ids, ids = TOKENIZER(prompt)["input_ids"], TOKENIZER(prompt + answer + "<eos>")["input_ids"]
        assert len(prompt_ids) == len(prompt) and ids[: len(prompt_ids)] == prompt_ids
        assert ids[-1] == TOKENIZER.eos_token_id != TOKENIZER.pad_token_id
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == prompt + answer


# ------------------------------------------------------------------------------------------------ the steps


def test_pretraining_lowers_the_loss_and_follows_the_seed() -> None:
    def loss_after(num_steps: int) -> float:
        model = new_model(TOKENIZER, SIZE, seed=0)
        options = {"num_steps": num_steps, "batch_size": 32, "learning_rate": 1e-2, "seed": 0}
        return pretrain(model, TOKENIZER, TEXTS, **options)

    first, last = loss_after(1), loss_after(40)
    assert last < 2.8 < first == pytest.approx(math.log(len(TOKENIZER)), abs=0.3)
    assert loss_after(40) == last


@pytest.mark.numerics
def test_pretraining_counts_answers_only() -> None:
    model = new_model(TOKENIZER, SIZE, seed=0)
    prompt, answer = TEXTS[0]
    expected = -naive_log_probs(
        model, TOKENIZER(prompt)["input_ids"], TOKENIZER(answer + "<eos>")["input_ids"]
    ).mean()  # fmt: skip
    options = {"num_steps": 1, "batch_size": 1, "learning_rate": 0.0, "seed": 0}
    assert pretrain(model, TOKENIZER, [TEXTS[0]], **options) == pytest.approx(expected.item(), abs=1e-5)


def test_sampling_follows_its_seed_and_leaves_the_global_random_state_alone() -> None:
    model, options = new_model(TOKENIZER, SIZE, seed=0), {"num_samples": 3, "max_new_tokens": 6}
    before = torch.get_rng_state()
    answers = sample_answers(model, TOKENIZER, PROMPTS.held_out, seed=5, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(given) for given in answers] == [3] * 20
    assert sample_answers(model, TOKENIZER, PROMPTS.held_out, seed=5, **options) == answers
    assert sample_answers(model, TOKENIZER, PROMPTS.held_out, seed=6, **options) != answers


def test_sampling_follows_the_models_distribution() -> None:
    model = new_model(TOKENIZER, SIZE, seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)  # far from uniform
    prompt = PROMPTS.held_out[0]
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    # Padding on the left, caused by the longer prompt, must not change what the shorter one is answered.
    answers = sample_answers(
        model, TOKENIZER, [prompt, prompt_of("banuko")], num_samples=4000, max_new_tokens=1, seed=0
    )[0]  # fmt: skip
    for token, share in enumerate(expected.tolist()):
        if token not in (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id):
            found = answers.count(TOKENIZER.convert_ids_to_tokens(token)) / len(answers)
            assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000) + 1e-3)


def test_likeliest_answers_are_greedy() -> None:
    model, prompt = new_model(TOKENIZER, SIZE, seed=1), PROMPTS.held_out[0]
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    expected = TOKENIZER.decode(model(input_ids=ids).logits[0, -1].argmax(), skip_special_tokens=True)
    assert likeliest_answers(model, TOKENIZER, [prompt, prompt_of("banuko")], max_new_tokens=1)[0] == [expected]


def test_pairs_are_a_right_answer_and_the_commonest_wrong_one() -> None:
    prompts = [prompt_of(word) for word in ("bak", "cob", "dam", "elf")]
    answers = [
        ["kab", "abk", "bak", "kab", ""],
        ["bco", "bco", "bco", "bco", ""],  # nothing wrong: an empty answer is no answer
        ["mad", "dam", "mda", "mad", "dam"],  # nothing right
        ["", "", "", "efl", "fle"],
    ]
    assert preference_pairs(prompts, answers, is_right) == [
        {"prompt": prompts[0], "chosen": "abk", "rejected": "kab"},
        {"prompt": prompts[3], "chosen": "efl", "rejected": "fle"},
    ]
    assert accuracy(prompts, answers, is_right) == 6 / 20


def test_sequence_kl_of_a_model_to_itself_is_zero() -> None:
    model = new_model(TOKENIZER, SIZE, seed=0)
    answers = [["ab", "ba", "ab"] for _ in PROMPTS.held_out]
    kl = sequence_kl(model, model, TOKENIZER, PROMPTS.held_out, answers)
    assert (kl.mean, kl.standard_error) == (0.0, 0.0)


@pytest.mark.numerics
def test_sequence_kl_is_the_mean_log_ratio_of_whole_answers() -> None:
    policy, initial = new_model(TOKENIZER, SIZE, seed=0), new_model(TOKENIZER, SIZE, seed=1)
    prompts, answers = PROMPTS.held_out[:3], [["ab", "ab"], ["", "bca"], ["a", "u"]]

    def log_prob(model: torch.nn.Module, prompt: str, answer: str) -> float:
        ids = [TOKENIZER(text)["input_ids"] for text in (prompt, answer + "<eos>")]
        return naive_log_probs(model, *ids).sum().item()

    ratios = torch.tensor(
        [
            log_prob(policy, p, a) - log_prob(initial, p, a)
            for p, given in zip(prompts, answers, strict=True)
            for a in given
        ]
    )
    kl = sequence_kl(policy, initial, TOKENIZER, prompts, answers, batch_size=4)
    assert kl.mean == pytest.approx(ratios.mean().item(), abs=1e-5)
    assert kl.standard_error == pytest.approx(ratios.std().item() / math.sqrt(6), abs=1e-5)


# ------------------------------------------------------------------------------------------- the whole line


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    printed = io.StringIO()
    with redirect_stdout(printed):
        result = run_demo(tmp_path_factory.mktemp("demo"), seed=0, quick=True)
    return result, printed.getvalue()


def test_demo_quick_runs_all_four_references(quick: tuple[DemoResult, str]) -> None:
    result, _ = quick
    assert [outcome.strategy.name for outcome in result.outcomes] == [
        "explicit",
        "implicit",
        "precomputed",
        "synchronized",
    ]
    for outcome in result.outcomes:
        assert 0 <= outcome.reward_accuracy <= 1 and 0 <= outcome.after.sampled_accuracy <= 1
        assert math.isfinite(outcome.kl.mean) and outcome.seconds > 0
        assert outcome.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_demo_references_that_own_no_weights_hold_none(quick: tuple[DemoResult, str]) -> None:
    extra = {outcome.strategy.name: outcome.extra_bytes for outcome in quick[0].outcomes}
    whole = 4 * quick[0].num_parameters
    assert extra == {"explicit": whole, "implicit": 0, "precomputed": 0, "synchronized": whole}


def test_demo_store_spares_a_second_run_all_passes(quick: tuple[DemoResult, str]) -> None:
    result, _ = quick
    precomputed = result.outcomes[2]
    assert precomputed.num_passes > 0 and result.num_passes_again == 0


@pytest.mark.numerics
def test_demo_precomputed_trains_as_explicit_does(quick: tuple[DemoResult, str]) -> None:
    explicit, precomputed = quick[0].outcomes[0], quick[0].outcomes[2]
    losses = [[entry["loss"] for entry in o.log_history if "loss" in entry] for o in (explicit, precomputed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(losses[0]) > 3


def test_demo_prints_the_table_within_80_columns(quick: tuple[DemoResult, str]) -> None:
    result, printed = quick
    for outcome in result.outcomes:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{outcome.strategy.name} ")]
        assert f"{outcome.extra_bytes:,}" in line and f" {outcome.num_passes} " in line and "…" not in line
        assert f"{result.before.sampled_accuracy:.1%} → {outcome.after.sampled_accuracy:.1%}" in line
        assert len(line) <= 80
    assert str(result.report) in printed


def test_demo_writes_the_report(quick: tuple[DemoResult, str]) -> None:
    result, _ = quick
    page = result.report.read_text(encoding="utf-8")
    assert result.report.name == "report.html" and page.count('role="img"') == 7
    for outcome in result.outcomes:
        assert outcome.strategy.name in page and f"{outcome.kl.mean:.2f} ± " in page


@pytest.mark.slow
def test_demo_is_the_same_for_the_same_seed(quick: tuple[DemoResult, str], tmp_path: Path) -> None:
    random.seed(1)
    torch.manual_seed(1)
    again = run_demo(tmp_path, seed=0, quick=True)
    assert again.before == quick[0].before
    for first, second in zip(quick[0].outcomes, again.outcomes, strict=True):
        assert (first.after, first.kl, first.reward_accuracy) == (second.after, second.kl, second.reward_accuracy)


def test_demo_stopped_by_the_user_leaves_no_half_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tether.demo.run, "pretrain", stop)
    num_threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, quick=True)
    assert list(tmp_path.iterdir()) == [] and torch.get_num_threads() == num_threads


def test_demo_refuses_a_file_as_output_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigurationError, match=r"`output_dir=.*it is a file"):
        run_demo(tmp_path / "taken", quick=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_raises_held_out_accuracy_with_every_reference(tmp_path: Path) -> None:
    result = run_demo(tmp_path, seed=0)
    before = result.before.sampled_accuracy
    assert 0.2 < before < 0.6
    for outcome in result.outcomes:
        assert outcome.after.sampled_accuracy > before + 0.2, outcome.strategy.name
        assert outcome.reward_accuracy > 0.9 and 0 < outcome.kl.mean < 5
