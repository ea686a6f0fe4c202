"""The whole demo, from scratch to a report: texts, model, pairs, four trainings, one table.

Puts the steps in order and times them; each step itself is in another file.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tether.demo.compare import Bench, Row, four_strategies, make_trainer, measure, train_with
from tether.demo.pretrain import new_model, pretrain
from tether.demo.result import DemoResult
from tether.demo.sample import preference_pairs, sample_answers
from tether.demo.settings import FULL, QUICK, DemoSettings
from tether.demo.show import Narrator, print_result, write_demo_report
from tether.demo.task import is_right, make_splits, train_tokenizer, write_texts
from tether.errors import ConfigurationError


def run_demo(output_dir: str | Path, *, seed: int = 0, quick: bool = False) -> DemoResult:
    """Trains a tiny model from scratch, then trains it to prefer its right answers with each of four references.

    Offline and on a CPU, on one thread (the model is too small for a second one to help), so that the same seed
    gives the same numbers on any number of cores. Prints progress, a table and the path of the report.

    Args:
        output_dir: Folder for `report.html` and the precomputed reference's store; created if necessary.
        seed: Random seed.
        quick: A smoke test that takes seconds; its results mean nothing.

    Returns:
        The numbers, as measured.

    Raises:
        ConfigurationError: If `output_dir` is a file.
    """
    start = time.perf_counter()
    settings = QUICK if quick else FULL
    folder = _made_folder(Path(output_dir))
    console = Console()
    with _one_thread(), _quiet_libraries():
        bench = _prepare(settings, seed, folder, Narrator(console))
        result = _compare(bench, Narrator(console), start)
    write_demo_report(result, settings, seed=seed)
    print_result(console, result)
    return result


def _made_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(
            problem=f"Cannot use `output_dir={str(folder)!r}`: it is a file.",
            instead="Name a folder, existing or new.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prepare(settings: DemoSettings, seed: int, folder: Path, narrator: Narrator) -> Bench:
    """Makes what a user would bring: a model, a tokenizer and pairs."""
    splits = make_splits(
        settings.num_pretraining,
        settings.num_preference,
        settings.num_held_out,
        word_lengths=settings.word_lengths,
        seed=seed,
    )
    model, tokenizer = _initial_policy(splits.pretraining, settings, seed, narrator)

    def pairs(prompts: list[str], seed: int, advance: Callable[[int], None]) -> list[Row]:
        answers = sample_answers(
            model,
            tokenizer,
            prompts,
            num_samples=settings.samples_per_prompt,
            max_new_tokens=settings.max_new_tokens,
            seed=seed,
            on_batch=advance,
        )
        return preference_pairs(prompts, answers, is_right)

    num_answers = (len(splits.preference) + len(splits.held_out)) * settings.samples_per_prompt
    with narrator.step("Answers, right or wrong by the rule", num_answers, f"{num_answers:,} sampled") as advance:
        train_pairs = pairs(splits.preference, seed + 2, advance)
        held_out_pairs = pairs(splits.held_out, seed + 3, advance)
    return Bench(model, tokenizer, train_pairs, held_out_pairs, splits.held_out, is_right, settings, seed, folder)


def _initial_policy(
    prompts: list[str], settings: DemoSettings, seed: int, narrator: Narrator
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    texts = write_texts(prompts, right_share=settings.right_share, seed=seed)
    tokenizer = train_tokenizer(prompt + answer for prompt, answer in texts)
    model = new_model(tokenizer, settings.model_size, seed=seed)
    detail = f"{model.num_parameters():,} parameters, from scratch"
    with narrator.step("Language model on careless texts", settings.pretraining_steps, detail) as advance:
        pretrain(
            model,
            tokenizer,
            texts,
            num_steps=settings.pretraining_steps,
            batch_size=settings.pretraining_batch,
            learning_rate=settings.pretraining_learning_rate,
            seed=seed,
            on_step=advance,
        )
    return model, tokenizer


def _compare(bench: Bench, narrator: Narrator, start: float) -> DemoResult:
    """Trains with each reference, then builds one more trainer, which finds the log-probs on disk."""
    store = bench.output_dir / "reference-log-probs.sqlite"
    for file in store.parent.glob(f"{store.name}*"):  # so that only this run's passes are counted
        file.unlink()
    strategies = four_strategies(bench.settings, store)
    before = measure(bench, bench.model)
    outcomes = []
    for strategy in strategies:
        with narrator.step(f"DPO, {strategy.name} reference", bench.num_steps, strategy.about) as advance:
            outcomes.append(train_with(bench, strategy, advance))
    precomputed = next(strategy for strategy in strategies if strategy.options.get("precompute_ref_log_probs"))
    return DemoResult(
        held_out_prompts=bench.held_out_prompts,
        num_pairs=len(bench.train_pairs),
        num_parameters=bench.model.num_parameters(),
        before=before,
        outcomes=outcomes,
        num_passes_again=make_trainer(bench, precomputed).reference.num_passes,
        seconds=time.perf_counter() - start,
        report=bench.output_dir / "report.html",
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model is too small for a second thread to help, and one thread always adds in the same order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hides progress bars of `datasets` between ours, and warnings that users cannot act on."""
    were_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers for it
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
