"""From a recipe to a `DPOTrainer`: loads what it names, in the order that finds mistakes earliest.

Shared by the verbs, so that `precompute` and `train` see the same rows and the same reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from tether.cli.mixture import load_mixture
from tether.cli.options import ScriptOptions
from tether.cli.pairs import absent_file, hold_out, is_file, load_pairs, take_shard
from tether.cli.quantization import quantization_of
from tether.cli.quiet import quiet_deepspeed
from tether.cli.recipe import Recipe, refuse_as_written
from tether.cli.scripts import adapter_of
from tether.config.rules.arguments import refused_gguf
from tether.data.columns import named_as_ours
from tether.data.datasets import PairDataset
from tether.errors import ConfigurationError
from tether.models.gguf import without_absent_file
from tether.models.loading import absent_folder, load_processing_class_of, naming_model
from tether.refusals import of_option, refuse
from tether.trainer.dpo_trainer import DPOTrainer


def build_trainer(
    recipe: Recipe, callbacks: Sequence[TrainerCallback] = (), shard: tuple[int, int] | None = None
) -> DPOTrainer:
    """The trainer of a recipe, its reference ready.

    Args:
        recipe: The recipe.
        callbacks: The trainer's callbacks.
        shard: Use part `i` of `n` of each set's rows, `i` counted from 1; None for all.

    Raises:
        TetherError: If the recipe names something that does not exist, or has contradicting options.
    """
    script, config = recipe.script, recipe.config
    _quiet_libraries(recipe)
    _check_evaluation(recipe)
    quantization = quantization_of(script)
    with _as_written(recipe):
        _check_models(recipe, quantization)
        processing_class = _load_processing_class(recipe)
    train_pairs, eval_pairs = load_sets(recipe)
    if shard is not None:
        train_pairs, eval_pairs = take_shard(train_pairs, *shard), eval_pairs and take_shard(eval_pairs, *shard)
        eval_pairs = eval_pairs or None
    assert script.model is not None
    with _as_written(recipe):
        trainer = DPOTrainer(
            script.model,
            ref_model=script.ref_model,
            args=config,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            processing_class=processing_class,
            callbacks=list(callbacks),
            quantization_config=quantization,
            peft_config=None if script.lora_r is None else adapter_of(script),
        )
    transformers_logging.disable_progress_bar()  # of each save, in the middle of the table
    for theirs in (ProgressCallback, PrinterCallback):  # every metric in one line; ours says what people look at
        trainer.remove_callback(theirs)
    return trainer


@contextmanager
def _as_written(recipe: Recipe) -> Iterator[None]:
    """While open, refusals of the library name options as they were written, each with its line."""
    try:
        yield
    except ConfigurationError as error:
        refuse_as_written(error, recipe.request)
        raise


def load_sets(recipe: Recipe) -> tuple[PairDataset, PairDataset | None]:
    """The pairs to train on, and those held out, if any."""
    script = recipe.script
    if script.datasets:
        pairs = load_mixture(script.datasets, script.dataset_streaming)
    else:
        pairs = _load_split(script, script.dataset_train_split)
    if script.eval_fraction is not None:
        assert isinstance(pairs, Dataset)
        named = named_as_ours(pairs, recipe.config.columns, "train")
        return hold_out(pairs, script.eval_fraction, script.split_seed, named)
    if script.eval_data is not None:
        return pairs, load_pairs(script.eval_data, "eval_data")
    split = held_out_split(recipe)
    return pairs, None if split is None else _load_split(script, split)


def held_out_split(recipe: Recipe) -> str | None:
    """The held-out split of `train_data`: the one named, or `test` if the recipe evaluates."""
    script = recipe.script
    if script.dataset_test_split is not None:
        return script.dataset_test_split
    evaluates = str(recipe.given.get("eval_strategy", "no")) != "no"
    elsewhere = script.eval_data is not None or script.eval_fraction is not None
    if not evaluates or elsewhere or script.train_data is None or is_file(script.train_data):
        return None
    return "test"


def _load_split(script: ScriptOptions, split: str | None) -> PairDataset:
    assert script.train_data is not None
    return load_pairs(
        script.train_data,
        "train_data",
        config=script.dataset_config,
        split=split,
        streaming=script.dataset_streaming,
    )


def _quiet_libraries(recipe: Recipe) -> None:
    """Hides progress bars where they are unwanted, notices from one library to another, and what one process of several
    says already.
    """
    quiet_deepspeed()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 still calls it
    is_first = recipe.config.local_process_index == 0
    if not is_first:
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
    if recipe.config.disable_tqdm or not is_first:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def _check_evaluation(recipe: Recipe) -> None:
    """Refuses options without effect in a command that evaluates whenever it has held-out pairs."""
    script, given = recipe.script, recipe.given
    held_out = (script.eval_data, script.eval_fraction, held_out_split(recipe))
    has_eval = any(source is not None for source in held_out)
    if str(given.get("eval_strategy", "no")) != "no" and not has_eval:
        raise ConfigurationError(
            problem=f"Cannot use `eval_strategy={given['eval_strategy']}` without held-out pairs: there is nothing to "
            "evaluate on.",
            instead="Add `eval_fraction: 0.1`, `eval_data` with a file, or `dataset_test_split` with a split.",
        )
    for name, does in (("do_train", True), ("do_eval", has_eval), ("do_predict", False)):
        if given.get(name, does) != does:
            raise ConfigurationError(
                problem=f"Cannot use `{name}={given[name]}`: the verb of the command decides what a run does.",
                details="`train` trains, and evaluates when there are held-out pairs.",
                instead=f"Remove `{name}`"
                + (", and name held-out pairs with `eval_data` or `eval_fraction`." if name == "do_eval" else "."),
            )


def _check_models(recipe: Recipe, quantization: Any) -> None:
    script = recipe.script
    models, sets = [("model", script.model), ("ref_model", script.ref_model)], ("train_data", "eval_data")
    refuse(
        (
            *refused_gguf(recipe.config, script.model, script.ref_model, quantization),
            *(one for option, name in models if name for one in absent_folder(option, name)),
            *(one for option in sets if (name := getattr(script, option)) for one in absent_file(option, name)),
        )
    )
    for option, name in models:
        _check_model(option, name, recipe)


def _check_model(option: str, name: str | None, recipe: Recipe) -> None:
    """Finds a wrong name before any data is read."""
    if name is None:
        return
    config, rank = recipe.config, recipe.script.lora_r
    if (Path(name) / "adapter_config.json").is_file():
        if option == "model" and rank is not None:
            why = "the model is an adapter already, and it would be unclear whether that belongs to the reference"
            instead = "Leave `lora_r` out to go on training the adapter, or merge it into its base first."
            refuse([of_option("lora_r", rank, why, instead, f"with `model={name!r}`")])
        return
    kwargs = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    passed: dict[str, Any] = {
        key: kwargs[key] for key in ("revision", "token", "subfolder", "cache_dir", "gguf_file") if key in kwargs
    }
    if option == "ref_model":
        passed = without_absent_file(name, passed)
    with naming_model(option, name):
        AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **passed)


def _load_processing_class(recipe: Recipe) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer, or the processor of a model that reads images."""
    script = recipe.script
    name = script.tokenizer or script.model
    assert name is not None
    options: dict[str, Any] = {}
    if not script.tokenizer:
        kwargs = recipe.config.model_init_kwargs if isinstance(recipe.config.model_init_kwargs, dict) else {}
        passed = {"revision": script.model_revision, "gguf_file": kwargs.get("gguf_file")}
        options = without_absent_file(name, {key: value for key, value in passed.items() if value})
    option = "tokenizer" if script.tokenizer else "model"
    remedy = "Name a folder or a name on the hub that holds a tokenizer: `tokenizer: Qwen/Qwen2.5-0.5B-Instruct`."
    with naming_model(option, name, "tokenizer", remedy):
        return load_processing_class_of(name, recipe.config.trust_remote_code, **options)
