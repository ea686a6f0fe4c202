"""Every bad input is an error that says what cannot be, why, and what to write, before any step, with nothing done."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, VeraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import TrainingArguments
from trl import DPOConfig as TRLConfig

from support.observe import bits, same_bits, traces
from support.runs import DEFAULTS, make_trainer, stream
from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether import BEMACallback, DPOConfig, DPOTrainer
from tether.config.former_options import FORMER, written_today
from tether.config.rules.launch import refused_launch
from tether.errors import ArgumentTypeError, ConfigurationError, DataError, ReferenceModelError, StoreError, TetherError
from tether.store import default_store_path


def assert_told(error: TetherError, *names: str) -> None:
    """What cannot be and why, in one line; what to write instead; and the culprit named."""
    assert "\n" not in error.problem and re.match(r"(Cannot |Row |Process |The )", error.problem), error.problem
    assert error.problem.endswith(".") and error.instead.endswith((".", "?")) and not error.instead[0].islower()
    for name in names:
        assert name in str(error)


PAIRS = tiny_pairs(4)

# ---------------------------------------------------------------------------------------------------- options

OPTIONS: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.0},
    "beta below 0": {"beta": -0.1},
    "beta that is NaN": {"beta": float("nan")},
    "ref_model_mixup_alpha": {"ref_model_mixup_alpha": 1.5},
    "ref_model_mixup_alpha below 0": {"ref_model_mixup_alpha": -0.1},
    "ref_model_sync_steps": {"ref_model_sync_steps": 0},
    "ref_model_sync_rank": {"ref_model_sync_rank": 0, "sync_ref_model": True},
    "ref_model_sync_rank without sync": {"ref_model_sync_rank": 8},
    "ref_model_sync_rank of a copy": {"ref_model_sync_rank": 8, "ref_model_mixup_alpha": 1.0, "sync_ref_model": True},
    "label_smoothing": {"label_smoothing": 0.5},
    "label_smoothing below 0": {"label_smoothing": -0.1},
    "label_smoothing that no loss has": {"label_smoothing": 0.1, "loss_type": "ipo"},
    "loss_type": {"loss_type": "sigmod"},
    "loss_type that is empty": {"loss_type": []},
    "loss_weights": {"loss_weights": [1.0, 2.0]},
    "loss_weights that are NaN": {"loss_weights": [float("nan")]},
    "label_smoothing that exo_pair lacks": {"label_smoothing": 0.0, "loss_type": "exo_pair"},
    "f_divergence_type": {"f_divergence_type": "kl"},
    "f_divergence_type with a loss of single rewards": {
        "f_divergence_type": "forward_kl",
        "loss_type": ["sigmoid", "bco_pair"],
    },
    "f_divergence_type that no loss has": {"f_divergence_type": "forward_kl", "loss_type": "sft"},
    "f_alpha_divergence_coef that the divergence lacks": {"f_alpha_divergence_coef": 0.3},
    "f_alpha_divergence_coef": {
        "f_alpha_divergence_coef": float("inf"),
        "f_divergence_type": "alpha_divergence",
    },
    "ld_alpha": {"ld_alpha": 1.5},
    "ld_alpha below 0": {"ld_alpha": -0.1},
    "ld_alpha that no loss has": {"ld_alpha": 0.5, "loss_type": "sft"},
    "discopop_tau": {"discopop_tau": 0.0, "loss_type": "discopop"},
    "discopop_tau that no loss has": {"discopop_tau": 0.5},
    "use_weighting with a loss that sorts": {"use_weighting": True, "loss_type": ["sigmoid", "aot"]},
    "bco_reward_shift that no loss has": {"bco_reward_shift": False},
    "router_aux_loss_coef that is NaN": {"router_aux_loss_coef": float("nan")},
    "reference_free with sync_ref_model": {"reference_free": True, "sync_ref_model": True},
    "reference_free with ref_store": {"ref_store": "answers.sqlite", "reference_free": True},
    "reference_free with ref_store_mode": {"ref_store_mode": "lazy", "reference_free": True},
    "ref_store_verify": {"ref_store_verify": -1, "precompute_ref_log_probs": True},
    "ref_store_verify without precompute": {"ref_store_verify": 8},
    "reference_free with ref_store_verify": {"ref_store_verify": 8, "reference_free": True},
    "ref_store without a name": {"ref_store": "", "precompute_ref_log_probs": True},
    "ref_store without precompute": {"ref_store": "answers.sqlite"},
    "ref_store_mode without precompute": {"ref_store_mode": "lazy"},
    "max_length": {"max_length": 1},
    "truncation_mode": {"truncation_mode": "keep_middle"},
    "bad_rows": {"bad_rows": "keep"},
    "precompute_ref_batch_size": {"precompute_ref_batch_size": 0},
    "ref_dtype": {"ref_dtype": "int8"},
    "ref_columns": {"ref_columns": "mine"},
    "fp16 on a CPU": {"fp16": True, "use_cpu": True},
    "activation_offloading": {"activation_offloading": True, "use_cpu": True},
    "use_liger_kernel": {"use_liger_kernel": True},
    "beta with beta_column": {"beta": 0.2, "beta_column": "beta"},
    "beta_column with a loss that sorts": {"beta_column": "beta", "loss_type": "aot"},
    "eval_steps without a strategy": {"eval_steps": 10},
    "eval_steps at the ends of epochs": {"eval_steps": 10, "eval_strategy": "epoch"},
    "local_rank": {"local_rank": 1},
    "sync_ref_model with precompute_ref_log_probs": {"sync_ref_model": True, "precompute_ref_log_probs": True},
}


@pytest.mark.parametrize(
    ("name", "why"),
    [("", "it is a file"), ("sub/folder", "`.*` is a file"), ("link", "it is a link to nowhere, which")],
)
def test_an_output_folder_that_cannot_be_one_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("nowhere")
    path = tmp_path / name if name == "link" else tmp_path / "there" / name
    with pytest.raises(ConfigurationError, match=rf"Cannot use `output_dir='.*`: {why}"):
        DPOConfig(str(path), **DEFAULTS)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_out_of_range_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DPOConfig(str(tmp_path / "out"), **DEFAULTS | OPTIONS[name])
    assert_told(caught.value, next(iter(OPTIONS[name])))
    assert isinstance(caught.value, ValueError) and not (tmp_path / "out").exists()


KINDS: dict[str, Any] = {
    "max_length": "40",
    "max_length that is a fraction": 40.5,
    "beta": "1e-1",
    "beta that is None": None,
    "label_smoothing": "0.1",
    "precompute_ref_batch_size": "8",
    "ref_model_sync_steps": 1.5,
    "loss_weights": 1.0,
    "sync_ref_model": "False",
    "disable_dropout": 1,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_value_of_another_kind_is_refused_by_name(name: str, tmp_path: Path) -> None:
    option = name.partition(" ")[0]
    with pytest.raises(ArgumentTypeError) as caught:
        DPOConfig(str(tmp_path / "out"), **DEFAULTS | {option: KINDS[name]})
    assert_told(caught.value, f"`{option}={KINDS[name]!r}`")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, TypeError)


def test_numbers_of_other_kinds_are_numbers(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), **DEFAULTS, beta=np.float64(0.25), max_length=np.int64(40))
    assert (args.beta, args.max_length) == (0.25, 40)
    args = DPOConfig(
        str(tmp_path),
        **DEFAULTS | {"learning_rate": Fraction(1, 8), "max_steps": -1},
        beta=Decimal("0.25"),
        num_train_epochs=Decimal(2),
        loss_weights=[Fraction(1, 2)],
    )
    found = (args.beta, args.learning_rate, args.num_train_epochs, *args.loss_weights)
    assert found == (0.25, 0.125, 2.0, 0.5) and {type(one) for one in found} == {float}
    with pytest.raises(ConfigurationError, match="positive"):
        DPOConfig(str(tmp_path), **DEFAULTS, beta=Decimal("NaN"))


def test_a_store_that_is_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ref_store"):
        DPOConfig(str(tmp_path), **DEFAULTS, ref_store=str(tmp_path))


def test_all_options_that_are_wrong_are_told_at_once(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "beta": -1.0,
        "ref_dtype": "int8",
        "ref_store": "x",
        "max_length": 1,
        "loss_type": "simgoid",
    }
    with pytest.raises(ConfigurationError) as caught:
        DPOConfig(str(tmp_path), **wrong | {"ref_dtype": "float32", "reference_free": True})
    assert {refusal.option for refusal in caught.value.refusals} == set(wrong)
    with pytest.raises(ArgumentTypeError) as types:
        DPOConfig(str(tmp_path), **wrong | {"max_length": "long"})
    assert {refusal.option for refusal in types.value.refusals} == {"ref_dtype", "max_length"}
    assert "\n" not in caught.value.problem and "Did you mean `sigmoid`?" in str(caught.value)
    for refusal in (*caught.value.refusals, *types.value.refusals):
        assert refusal.subject in str(refusal.problem) and refusal.instead.endswith((".", "?")), refusal


def test_an_adapter_that_was_loaded_frozen_says_how_to_load_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing trains") as caught:
        refused(tmp_path, adapted().requires_grad_(False))
    assert "is_trainable=True" in caught.value.instead


def test_a_local_rank_of_the_launcher_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = DPOConfig(str(tmp_path), **DEFAULTS)
    args.local_rank = 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not list(refused_launch(args))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [refusal.option for refusal in refused_launch(args)] == ["local_rank"]


def test_all_that_is_wrong_with_a_run_is_told_at_once(tmp_path: Path) -> None:
    model = tiny_model().requires_grad_(False)
    options: dict[str, Any] = {
        "ref_model": model,
        "loss_type": "sft",
        "metric_for_best_model": "bleu",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    rows = [pair | {"margin": 1.0} for pair in PAIRS]
    with pytest.raises(ConfigurationError) as caught:
        refused(tmp_path, model, rows=rows, eval_dataset=Dataset.from_list(PAIRS), **options)
    told = [refusal.subject for refusal in caught.value.refusals]
    assert len(told) == 4
    for subject, named in zip(told, ("nothing trains", "`ref_model`", "`margin`", "bleu"), strict=True):
        assert named in subject


def test_options_that_changed_since_they_were_made_are_looked_at_again(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), **DEFAULTS, precompute_ref_log_probs=True)
    args.sync_ref_model, args.beta = True, -1.0
    with pytest.raises(ConfigurationError) as caught:
        DPOTrainer(tiny_model(), args=args, train_dataset=PAIRS, processing_class=tiny_tokenizer())
    assert {refusal.option for refusal in caught.value.refusals} == {"beta", "sync_ref_model"}


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"question": "prompt"}, "`question` is no column of ours"),
        ({"prompt": 3}, "a mapping of names"),
        ({"prompt": ["a", 3]}, "a mapping of names"),
        ({"prompt": "a", "chosen": "a"}, "one column is named twice"),
        ("prompt", "a mapping of names"),
        ({"margin": "score"}, "`margin` is no column of ours"),
    ],
)
def test_columns_that_map_nothing_of_ours_are_refused(columns: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="columns") as caught:
        DPOConfig(str(tmp_path), columns=columns)
    assert why in caught.value.problem and "ours: theirs" in caught.value.instead


def test_columns_are_read_in_every_set(tmp_path: Path) -> None:
    """As under our names, in the set to train on, those to evaluate on and those to predict."""
    theirs = [{"question": row["prompt"], "yes": row["chosen"], "rejected": row["rejected"]} for row in PAIRS]
    losses = []
    for rows, columns in ((PAIRS, None), (theirs, {"prompt": "question", "chosen": "yes"})):
        args = DPOConfig(str(tmp_path), **DEFAULTS | {"columns": columns, "max_steps": 2})
        trainer = DPOTrainer(
            tiny_model(),
            args=args,
            train_dataset=rows,
            eval_dataset={"one": rows},
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        predicted = trainer.predict(rows).metrics["test_loss"]
        losses.append((trainer.evaluate()["eval_one_loss"], predicted, trainer.state.log_history[0].get("loss")))
    assert losses[0] == losses[1]


def test_a_wrapped_constructor_may_take_other_names(tmp_path: Path) -> None:
    class Config(DPOConfig):
        @functools.wraps(DPOConfig.__init__)
        def __init__(self, *args: Any, extra: int = 0, **options: Any) -> None:
            super().__init__(*args, **options)

    assert Config(str(tmp_path), extra=3, beta=0.2).beta == 0.2


@pytest.mark.parametrize("name", sorted(FORMER))
def test_a_former_option_is_refused_with_what_it_is_called_today(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        DPOConfig(str(tmp_path), **{name: 1, "bta": 0.1})
    former, misspelt = caught.value.refusals
    assert former.subject == f"`{name}`" and former.instead == written_today(name, 1, in_python=True)[1]
    assert misspelt.instead == "Did you mean `beta`?"


def test_former_arguments_of_the_trainer_are_refused_at_once_with_what_to_write() -> None:
    class Subclass(DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    for trainer in (DPOTrainer, Subclass):
        with pytest.raises(ArgumentTypeError) as caught:
            trainer("model", beta=0.1, tokenizer=None, max_prompt_length=8, train_datset=[])
        assert [refusal.instead for refusal in caught.value.refusals] == [
            "Write `args=DPOConfig(beta=...)`.",
            "Write `processing_class`.",
            "Write `max_length`, for prompt and response together.",
            "Did you mean `train_dataset`?",
        ]


def test_a_constructor_of_ones_own_may_take_other_names(tmp_path: Path) -> None:
    class Config(DPOConfig):
        def __init__(self, folder: str, temperature: float, **options: Any) -> None:
            super().__init__(folder, **options)
            self.temperature = temperature

    config = Config(str(tmp_path), temperature=2.0, beta=0.3)
    assert (config.temperature, config.beta) == (2.0, 0.3)
    assert copy.deepcopy(config).beta == pickle.loads(pickle.dumps(DPOConfig(str(tmp_path), beta=0.3))).beta == 0.3


def test_options_at_the_ends_of_their_range_are_fine(tmp_path: Path) -> None:
    for options in ({"ref_model_mixup_alpha": 0.0}, {"ref_model_mixup_alpha": 1.0}, {"ref_model_sync_steps": 1}):
        DPOConfig(str(tmp_path), **DEFAULTS, sync_ref_model=True, **options)


# ------------------------------------------------------------------------------------------------------- rows

BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "without chosen": ({"prompt": "Why?", "chosen": None, "rejected": " No."}, "no `chosen`"),
    "without rejected": ({"prompt": "Why?", "chosen": " Yes.", "rejected": None}, "no `rejected`"),
    "empty response": ({"prompt": "Why?", "chosen": " Yes.", "rejected": ""}, "empty `rejected`"),
}


@pytest.mark.parametrize("where", ["train", "eval", "held_out"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_at_construction_by_set_and_index(name: str, where: str, tmp_path: Path) -> None:
    row, found = BAD_ROWS[name]
    good, bad = tiny_pairs(6), [*tiny_pairs(6), row]
    options: dict[str, Any] = {"rows": bad if where == "train" else good}
    if where != "train":
        options["eval_dataset"] = bad if where == "eval" else {"held_out": bad}
    with pytest.raises(DataError) as caught:
        refused(tmp_path, **options)
    assert_told(caught.value, f"Row 6 of the {where} set", found)


def test_a_bad_row_of_a_stream_is_refused_before_the_step_that_would_use_it(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = make_trainer(tmp_path, model, rows=stream([{"prompt": "Why?", "rejected": " No."}]))
    before = bits(model)
    with pytest.raises(DataError) as caught:
        trainer.train()
    assert_told(caught.value, "Row 0 of the train set", "`chosen`")
    assert trainer.state.global_step == 0 and same_bits(bits(model), before)


def test_a_set_without_usable_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        refused(tmp_path, max_length=2)
    assert_told(caught.value, "train set", "max_length=2")


@pytest.mark.parametrize("rows", [42, "pairs.jsonl", ("a", "b")])
def test_a_set_that_is_no_set_is_refused(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        refused(tmp_path, rows=rows)
    assert_told(caught.value, "datasets.Dataset", type(rows).__name__)


COLUMNS = {name: [" text"] for name in ("prompt", "chosen", "rejected")}


OTHER_FORMS: dict[str, tuple[Any, str]] = {
    "columns": (COLUMNS, "from_dict"),
    "a table": (pd.DataFrame(COLUMNS), "from_pandas"),
    "texts": (["a pair", "another"], "list of str"),
    "splits": (DatasetDict(train=Dataset.from_dict(COLUMNS)), "dataset['train']"),  # evaluation takes several sets
}


@pytest.mark.parametrize(
    ("which", "form"),
    [("train_dataset", form) for form in OTHER_FORMS] + [("eval_dataset", form) for form in list(OTHER_FORMS)[:-1]],
)
def test_a_set_of_another_form_is_refused_with_how_to_make_one(which: str, form: str) -> None:
    given, found = OTHER_FORMS[form]
    with pytest.raises(ArgumentTypeError) as caught:
        given_as = {"train_dataset": PAIRS, "eval_dataset": None, which: given}
        DPOTrainer(tiny_model(), args=args_of(), processing_class=tiny_tokenizer(), **given_as)
    assert_told(caught.value, found)


@pytest.mark.parametrize("rows", [None, {"some": PAIRS}], ids=["None", "several sets"])
def test_predict_takes_one_set(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        make_trainer(tmp_path).predict(rows)
    assert_told(caught.value, type(rows).__name__)


ARGUMENTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "args of transformers": ("`args`", lambda: {"args": TrainingArguments("out", report_to=[])}),
    "args of TRL": ("trl.", lambda: {"args": TRLConfig("out", report_to=[], bf16=False)}),
    "args as a dict": ("`args`", lambda: {"args": {"beta": 0.1}}),
    "a number as model": ("`model` of type int", lambda: {"model": 42}),
    "a module without config": ("`model` of type Linear", lambda: {"model": torch.nn.Linear(2, 2)}),
    "a model without head": ("LlamaModel", lambda: {"model": tiny_model().model}),
    "a reference without head": ("`ref_model` of type LlamaModel", lambda: {"ref_model": tiny_model().model}),
    "True as reference": ("`ref_model` of type bool", lambda: {"ref_model": True}),
    "one callback": ("`callbacks`", lambda: {"callbacks": BEMACallback()}),
    "a number as callback": ("3 in `callbacks`", lambda: {"callbacks": [3]}),
    "a tuple of callbacks": ("`callbacks` of type tuple", lambda: {"callbacks": (BEMACallback(),)}),
    "dtype that is none": ("bf61", lambda: {"model": "nowhere", "args": args_of(model_init_kwargs={"dtype": "bf61"})}),
    "the old name of dtype": (
        "`dtype='bfloat16'`",
        lambda: {"model": "nowhere", "args": args_of(model_init_kwargs={"torch_dtype": "bfloat16"})},
    ),
}


def args_of(**options: Any) -> DPOConfig:
    return DPOConfig("out", **DEFAULTS | options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_another_kind_is_refused_by_name(name: str) -> None:
    found, make_options = ARGUMENTS[name]
    given = {"model": tiny_model(), "args": args_of(), "processing_class": tiny_tokenizer(), "train_dataset": PAIRS}
    with pytest.raises(ConfigurationError) as caught:
        DPOTrainer(**given | make_options())
    assert_told(caught.value, found)


# -------------------------------------------------------------------------------------------- model, reference


def refused(folder: Path, model: Any = None, **options: Any) -> None:
    """Builds a trainer; whatever it raises, it must have left the models alone and stored nothing."""
    model = tiny_model() if model is None else model
    objects = [thing for thing in (model, options.get("ref_model")) if isinstance(thing, torch.nn.Module)]
    before = [look_at(thing) for thing in objects]
    try:
        make_trainer(folder, model, **options)
    finally:
        for thing, (trace, numbers) in zip(objects, before, strict=True):
            assert look_at(thing)[0] == trace and same_bits(bits(thing), numbers)
        assert not default_store_path().exists()


def look_at(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    trace = traces(model)
    trace.pop("config")  # transformers' own constructor writes the tokenizer's special tokens into it
    return trace, bits(model)


def with_tokenizer(folder: Path, tokenizer: Any, **options: Any) -> str:
    tiny_model(**options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def renumbered() -> Any:
    """A tokenizer of the same tokens in which two ids are exchanged."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    backend = Tokenizer.from_str(json.dumps(state))
    return type(tokenizer)(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def test_the_policy_as_its_own_reference_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    for options in ({}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}):
        with pytest.raises(ConfigurationError) as caught:
            refused(tmp_path, model, ref_model=model, **options)
        assert_told(caught.value, "Cannot use `ref_model`", "the same object as `model`")


def test_the_base_of_the_adapter_as_reference_model_is_refused(tmp_path: Path) -> None:
    base = tiny_model()
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigurationError, match="same object"):
        refused(tmp_path, policy, ref_model=base)


def test_a_token_that_the_model_does_not_embed_is_refused_with_its_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    trainer = make_trainer(tmp_path, rows=PAIRS, processing_class=tokenizer)  # no row has the token
    rows = [PAIRS[0], PAIRS[1] | {"chosen": " <new> tokens"}, PAIRS[2] | {"rejected": " <new> too"}]
    with pytest.raises(ConfigurationError) as caught:
        refused(tmp_path, rows=rows, processing_class=tokenizer)
    assert_told(caught.value, "Row 1 of the train set", "256 tokens")
    with pytest.raises(ConfigurationError, match="Row 1 of the eval set"):
        trainer.evaluate(rows)
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    assert make_trainer(tmp_path, model, rows=rows, processing_class=tokenizer).train().global_step == 3


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_row_beyond_the_positions_that_a_model_learned_is_refused(family: str, tmp_path: Path) -> None:
    rows = [PAIRS[0], PAIRS[1] | {"chosen": " rain" * 600}]
    model = tiny_model(family)
    with pytest.raises(DataError) as caught:
        refused(tmp_path, model, rows=rows, max_length=None)
    assert_told(caught.value, "Row 1 of the train set", "more tokens than the 512", "`max_length=512`")
    with pytest.raises(DataError, match="Row 1 of the train set"):
        refused(tmp_path, ref_model=model, rows=rows)
    with pytest.raises(DataError, match="Row 1 of the train set"):
        make_trainer(tmp_path, model, rows=stream(rows)).train()
    for options in ({"max_length": 512}, {"bad_rows": "drop"}):
        assert make_trainer(tmp_path, model, rows=rows, max_steps=1, **options).train().global_step == 1


def test_a_reference_whose_embedding_has_no_room_for_the_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        refused(tmp_path, ref_model=tiny_model(vocab_size=200))
    assert_told(caught.value, "255", "200 tokens")


@pytest.mark.parametrize("as_path", [True, False])
def test_a_reference_whose_tokenizer_gives_other_ids_is_refused(as_path: bool, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "other", renumbered())
    other: Any = folder if as_path else type(tiny_model()).from_pretrained(folder)
    with pytest.raises(ConfigurationError) as caught:
        refused(tmp_path / "out", ref_model=other)
    assert_told(caught.value, "another vocabulary", "2 ids")


def test_a_reference_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "other", tiny_tokenizer(384), vocab_size=384)
    with pytest.raises(ConfigurationError, match="another vocabulary"):
        refused(tmp_path / "out", ref_model=folder)


def test_a_reference_of_the_same_tokenizer_in_a_larger_embedding_is_fine(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "other", tiny_tokenizer(), vocab_size=320)
    make_trainer(tmp_path / "out", ref_model=folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["policy", "reference", "base of an adapter", "policy with a given reference"])
def test_weights_that_are_not_finite_are_refused_by_name(where: str, value: float, tmp_path: Path) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 3] = value
    options: dict[str, Any] = {
        "policy": {"model": broken},
        "reference": {"ref_model": broken},
        "base of an adapter": {"model": broken, "peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
        "policy with a given reference": {"model": broken, "ref_model": tiny_model()},
    }[where]
    with pytest.raises(ReferenceModelError) as caught:
        make_trainer(tmp_path, **options)
    assert_told(caught.value, "layers.0.mlp.up_proj", "NaN or infinite")
    assert not default_store_path().exists()


def test_several_gpus_without_a_launcher_are_refused_with_the_command_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(ConfigurationError) as caught:
        refused(tmp_path)
    assert_told(caught.value, "4 GPUs", "torchrun --nproc_per_node 4")


LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
VERA = {"peft_config": VeraConfig(target_modules=["q_proj"])}
FOLLOWED = BEMACallback(update_ref_model=True)
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
COMBINATIONS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "sync with VeRA": ("VERA", lambda: VERA | {"sync_ref_model": True}),
    "sync with a VeRA model": ("VERA", lambda: {"model": adapted(VERA), "sync_ref_model": True}),
    "sync with PEFT and a reference": ("ref_model", lambda: LORA | {"ref_model": tiny_model(), "sync_ref_model": True}),
    "sync rank without LoRA": ("ref_model_sync_rank", lambda: {"ref_model_sync_rank": 8, "sync_ref_model": True}),
    "sync rank below LoRA's": ("rank 2", lambda: LORA | {"ref_model_sync_rank": 1, "sync_ref_model": True}),
    "ref_dtype with PEFT": ("ref_dtype", lambda: LORA | {"ref_dtype": "bfloat16"}),
    "sync over another size": ("sync_ref_model", lambda: {"ref_model": tiny_model(hidden=48), "sync_ref_model": True}),
    "peft_config of another type": ("peft_config", lambda: {"peft_config": {"r": 2}}),
    "peft_config with an adapter": ("peft_config", lambda: LORA | {"model": adapted()}),
    "an adapter for inference": (
        "inference_mode",
        lambda: {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True)},
    ),
    "the best of no evaluation": ("load_best_model_at_end", lambda: {"load_best_model_at_end": True}),
    "evaluation of no set": (
        "eval_strategy",
        lambda: {"eval_strategy": "steps", "metric_for_best_model": "loss", "eval_dataset": {}},
    ),
    "a stream without an end": ("max_steps", lambda: {"rows": stream(PAIRS), "max_steps": -1}),
    "a half that an adapter copies": (
        "lm_head",
        lambda: {
            "model": tiny_model(dtype=torch.float16),
            "peft_config": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        },
    ),
    "no tokenizer for an instance": ("processing_class", lambda: {"processing_class": None}),
    "a tokenizer that is none": ("processing_class", lambda: {"processing_class": str}),
    "a quantization for an instance": ("quantization_config", lambda: {"quantization_config": object()}),
    "an average of an adapter for a reference model": (
        "update_ref_model",
        lambda: LORA | {"ref_model": tiny_model(), "callbacks": [FOLLOWED]},
    ),
    "a schedule of syncs without sync": ("ref_model_sync_steps", lambda: {"ref_model_sync_steps": 4}),
    "a weight of syncs without sync": ("ref_model_mixup_alpha", lambda: {"ref_model_mixup_alpha": 0.3}),
    "a pass that there is not": ("precompute_ref_batch_size", lambda: {"precompute_ref_batch_size": 4}),
    "smoothing of another loss": ("`label_smoothing=", lambda: {"label_smoothing_factor": 0.1}),
    "noise without padding": ("padding_free", lambda: {"padding_free": True, "neftune_noise_alpha": 5.0}),
    "a token budget for a stream": ("max_tokens_per", lambda: {"rows": stream(PAIRS), "max_tokens_per_micro_batch": 9}),
    "a stream by length": ("group_by_length", lambda: {"rows": stream(PAIRS), **BY_LENGTH}),
    "a token budget in order": (
        "sequential",
        lambda: {"max_tokens_per_micro_batch": 99, "train_sampling_strategy": "sequential"},
    ),
    "a last batch by length": ("dataloader_drop_last", lambda: BY_LENGTH | {"dataloader_drop_last": True}),
    "weights in float16": ("`float16`", lambda: {"model": tiny_model(dtype=torch.float16)}),
    "an adapter in float16": ("`float16`", lambda: {"model": adapted(LORA, "float16").half()}),
    "an adapter that is merged": ("`model.unmerge_adapter()`", lambda: {"model": merged(adapted())}),
    "an optimizer of another model": ("another model", lambda: {"optimizers": optimizer_of(tiny_model())}),
    "an optimizer of an adapter's base": ("fresh adapter", lambda: optimizer_of_base(tiny_model()) | LORA),
    "an optimizer of what is frozen": ("frozen", lambda: optimizer_of_base(adapted())),
    "arguments for an instance": ("model_init_kwargs", lambda: {"model_init_kwargs": {"dtype": "auto"}}),
}


def test_a_copy_that_an_adapter_trains_in_float16_is_refused(tmp_path: Path) -> None:
    """PEFT makes LoRA's own factors float32, and leaves what `modules_to_save` copies in the dtype of the base."""
    whole_head = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConfigurationError, match="float16") as caught:
        refused(tmp_path, tiny_model(dtype=torch.float16), peft_config=whole_head)
    assert_told(caught.value, "`lm_head.weight`")


def test_float16_of_a_model_given_by_name_is_refused(tmp_path: Path) -> None:
    folder = str(with_tokenizer(tmp_path / "model", tiny_tokenizer()))
    with pytest.raises(ConfigurationError, match="float16"):
        make_trainer(tmp_path / "out", folder, model_init_kwargs={"dtype": "float16"})


def adapted(config: dict[str, Any] = LORA, dtype: str = "float32") -> Any:
    return get_peft_model(tiny_model(dtype=getattr(torch, dtype)), config["peft_config"])


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def optimizer_of(model: Any) -> tuple[Any, None]:
    return torch.optim.AdamW(model.parameters(), lr=1e-2), None


def optimizer_of_base(model: Any) -> dict[str, Any]:
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    return {"model": model, "optimizers": (torch.optim.AdamW(base, lr=1e-2), None)}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_an_impossible_combination_is_refused_before_any_step(name: str, tmp_path: Path) -> None:
    found, make_options = COMBINATIONS[name]
    with pytest.raises((ConfigurationError, ReferenceModelError)) as caught:
        refused(tmp_path, **make_options())
    assert_told(caught.value, found)


def test_a_file_that_is_no_store_is_refused_before_any_step(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Not a database, but long enough to look at. " * 100)
    with pytest.raises(StoreError, match=r"notes\.txt"):
        refused(tmp_path, precompute_ref_log_probs=True, ref_store=str(tmp_path / "notes.txt"))
    assert (tmp_path / "notes.txt").read_text().startswith("Not a database")
