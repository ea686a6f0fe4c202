"""A recipe of `trl dpo` means the same to `tether train`, or is refused by name; and every source of pairs is read."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.scripts import dpo as trl_script

import tether
from support.tiny import ADAM_EPSILON, tiny_model, tiny_pairs, tiny_tokenizer
from tether.cli import launch, main, pairs, quantization
from tether.cli.assemble import build_trainer, held_out_split, load_sets
from tether.cli.launch import PRESETS, typed_words
from tether.cli.options import ALIASES, LAUNCHER, OPTIONS
from tether.cli.quantization import quantization_of
from tether.cli.recipe import Recipe, read_recipe
from tether.cli.scripts import adapter_of
from tether.cli.trl_options import REFUSED
from tether.config.former_options import FORMER, OTHER_TOOLS, SYNONYMS
from tether.data.rows import ROW_COLUMN
from tether.errors import ConfigurationError, DataError, MissingPackageError
from tether.trainer.dpo_trainer import DPOTrainer

TRL_OPTIONS = (ScriptArguments, ModelConfig, DatasetMixtureConfig)
START = "model_name_or_path: m\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` converts out of the user's cache, and starts in an empty folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def write(text: str) -> str:
    Path("recipe.yaml").write_text(text)
    return "recipe.yaml"


def read(text: str, *flags: str) -> Recipe:
    return read_recipe("train", ["--config", write(START + text), *flags])


def write_rows(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("\n".join(json.dumps(row) for row in rows))
    return rows


# ------------------------------------------------------------------------------------------ names and values


def trl_fields() -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for options in TRL_OPTIONS for field in dataclasses.fields(options)}


def test_every_option_of_trls_script_is_taken_or_refused_by_name() -> None:
    known = {*OPTIONS, *ALIASES}
    assert [name for name in trl_fields() if name not in known and name not in REFUSED] == []
    assert not set(REFUSED) & set(known)


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(trl_fields())))
def test_a_refused_option_may_say_what_is_done_anyway(name: str) -> None:
    default = trl_fields()[name].default
    text = "train_data: d.jsonl\n" + yaml.safe_dump({name: default})
    assert name not in read(text).given
    for other in (True, "other") if default is not True else (False,):
        with pytest.raises(ConfigurationError) as caught:
            read("train_data: d.jsonl\n" + yaml.safe_dump({name: other}))
        assert name in caught.value.problem and caught.value.instead
    with pytest.raises(ConfigurationError, match=name):
        read("train_data: d.jsonl\n", f"--{name}")


def test_quantization_is_that_of_trls_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config alone: bitsandbytes is not needed to write it down."""
    monkeypatch.setattr(quantization, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0.0")
    for options in (
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "dtype": "bfloat16"},
        {
            "load_in_4bit": True,
            "dtype": "float16",
            "bnb_4bit_quant_type": "fp4",
            "use_bnb_nested_quant": True,
            "bnb_4bit_quant_storage": "bfloat16",
        },
    ):
        theirs = get_quantization_config(ModelConfig(**options))
        ours = quantization_of(read("train_data: d.jsonl\n" + yaml.safe_dump(options)).script)
        assert ours is not None and ours.to_dict() == theirs.to_dict()


def test_quantization_needs_bitsandbytes_and_options_that_go_together() -> None:
    with pytest.raises(ConfigurationError, match="together with `load_in_8bit`"):
        read("train_data: d.jsonl\nload_in_4bit: true\nload_in_8bit: true")
    with pytest.raises(ConfigurationError, match="use_bnb_nested_quant"):
        read("train_data: d.jsonl", "--use_bnb_nested_quant")
    assert quantization_of(read("train_data: d.jsonl").script) is None
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(MissingPackageError, match="bitsandbytes"):
            build_trainer(read("train_data: d.jsonl\nload_in_4bit: true"))


@pytest.mark.parametrize(
    "flag", ["--lora_task_type CAUSAL_LM", "--lora-task-type=CAUSAL_LM", "--ignore_bias_buffers no"]
)
def test_a_refused_flag_may_say_what_is_done_anyway(flag: str) -> None:
    flags = flag.replace(" no", " false").split()
    assert read("train_data: d.jsonl", *flags, "--beta", "0.2").config.beta == 0.2


@pytest.mark.parametrize("table", [FORMER, OTHER_TOOLS, SYNONYMS])
def test_an_option_of_earlier_versions_or_of_another_tool_is_refused_with_what_to_write(table: dict[str, str]) -> None:
    named = {option for text in table.values() for option in re.findall(r"`(\w+)", text)}
    assert named <= {*OPTIONS, *ALIASES, "env"}
    assert not {name.partition("=")[0] for name in table} & {*OPTIONS, *ALIASES}
    assert not {*OTHER_TOOLS, *SYNONYMS} & LAUNCHER.keys()
    lines = "\n".join(f"{name}: 7" for name in table if "=" not in name)
    with pytest.raises(ConfigurationError) as caught:
        read(lines)
    told = (caught.value.details or "").split("\n")
    assert len(told) == len(lines.split("\n"))
    for name, line in zip((name for name in table if "=" not in name), told, strict=True):
        assert f"`{name}: " in line and "there is no option" not in line
        assert "Remove it: " in line if table[name].startswith("nothing") else "Write " in line


# What a recipe of another tool has, and what to write for it, in a recipe and in Python.
OF_OTHER_TOOLS = {
    "cutoff_len: 1024": ("Write `max_length: 1024`.", "Write `max_length=1024`."),
    "lora_rank: 8": ("Write `lora_r: 8`.", "Write `DPOTrainer(peft_config=LoraConfig(r=8))`."),
    "pref_loss: hinge": ("Write `loss_type: hinge`.", "Write `loss_type='hinge'`."),
    "val_set_size: 0.1": ("Write `eval_fraction: 0.1`.", "Write `dataset.train_test_split(0.1)`"),
    "max_samples: 9": ("Write `dataset_train_split: train[:9]`.", "load_dataset(..., split='train[:9]')"),
    "micro_batch_size: 2": ("Write `per_device_train_batch_size: 2`.", "Write `per_device_train_batch_size=2`."),
    "finetuning_type: lora": (
        "Write `lora_r`, with the adapter's rank.",
        "LoraConfig(r=...))`, with the adapter's rank.",
    ),
    "tuner_type: full": ("Remove it: without `lora_r`", "Remove it: "),
    "base_model: a/b": ("Write `model: a/b`.", "Write `DPOTrainer('a/b')`."),
    "rl: dpo": ("Remove it: it is what Tether does.", "Remove it: it is what Tether does."),
    "double_quantization: true": ("Write `use_bnb_nested_quant: true`.", "bnb_4bit_use_double_quant=True"),
    "lora_model_dir:": ("Write `model`: an adapter", "Write `DPOTrainer(...)`: an adapter"),
    "lr: 1.0e-6": ("Write `learning_rate: 1.0e-06`.", "Write `learning_rate=1e-06`."),
    "bs: 2": ("Write `per_device_train_batch_size: 2`.", "Write `per_device_train_batch_size=2`."),
    "use_lora: true": ("Write `lora_r`, with", "LoraConfig(r=...))`, with the adapter's rank."),
    "use_lora: false": ("Remove it: without `lora_r`", "Remove it: "),
    "loss_type: dpo": ("Did you mean `sigmoid`?", "Did you mean `sigmoid`?"),
    "torch_dtype: bfloat16": ("Write `dtype: bfloat16`.", "Write `model_init_kwargs={'dtype': 'bfloat16'}`."),
}


@pytest.mark.parametrize("written", OF_OTHER_TOOLS)
def test_an_option_of_another_tool_keeps_its_value(written: str) -> None:
    in_recipe, in_python = OF_OTHER_TOOLS[written]
    with pytest.raises(ConfigurationError) as caught:
        read(written)
    assert caught.value.instead.startswith(in_recipe)
    with pytest.raises(ConfigurationError) as caught:
        tether.DPOConfig("out", **yaml.safe_load(written))
    assert in_python in caught.value.instead


def test_a_flag_of_another_tool_is_answered_with_a_flag() -> None:
    with pytest.raises(ConfigurationError) as caught:
        read("", "--lora_rank", "8")
    assert caught.value.instead == "Write `--lora_r 8`."


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigurationError) as caught:
        read("dataset_mixer: " + json.dumps({"x" * 200: 1.0}), "--frobnicate", "y" * 200)
    assert max(len(line) for line in str(caught.value).split("\n")) < 260 and "x" * 60 in str(caught.value)


def test_an_option_that_merely_looks_alike_is_not_suggested() -> None:
    for name in ("lora_ranks", "eval_set_size", "max_sample", "device_rank"):
        with pytest.raises(ConfigurationError) as caught:
            read(f"{name}: 1")
        assert caught.value.instead.startswith("Remove it."), name


# --------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that this process would become."""
    words: list[str] = []

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        assert program == command[0] == sys.executable
        words.extend(command[1:])
        os.environ.update(environment)  # this process goes on as the one that is started
        raise SystemExit(0)

    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"})
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(launch, "default_config_file", "absent")
    return words


def as_launcher_reads(words: list[str]) -> argparse.Namespace:
    assert words[:2] == ["-m", "tether.cli.launch"]
    return launch_command_parser().parse_args(words[2:])


def test_options_of_the_launcher_start_the_processes(started: list[str]) -> None:
    text = "train_data: d.jsonl\nnum_processes: 4\nmain_process_port: 29501\nbeta: 0.2"
    with pytest.raises(SystemExit):
        read(text, "--num_processes", "2", "--beta", "0.3")
    asked = as_launcher_reads(started)
    assert (asked.num_processes, asked.main_process_port, asked.multi_gpu) == (2, 29501, True)
    assert (asked.module, asked.training_script) == (True, "tether")
    assert asked.training_script_args == ["train", "--config", "recipe.yaml", "--beta", "0.3"]
    # In the processes that it starts, the recipe's options of the launcher have been heard.
    assert read(text, "--beta", "0.3").config.beta == 0.3
    assert typed_words([]) == ["--config", "recipe.yaml", "--num_processes", "2", "--beta", "0.3"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_named_configuration_is_one_that_the_launcher_reads(started: list[str], name: str) -> None:
    with pytest.raises(SystemExit):
        read("train_data: d.jsonl", "--accelerate_config", name)
    asked = as_launcher_reads(started)
    assert asked.zero_stage == (int(name[-1]) if name.startswith("zero") else None)
    assert (asked.use_deepspeed, asked.use_fsdp) == (name.startswith("zero"), name == "fsdp2")
    assert not asked.use_fsdp or asked.fsdp_version == "2"


def test_a_configuration_of_the_launcher_may_be_a_file(started: list[str]) -> None:
    Path("mine.yaml").write_text("num_processes: 2")
    with pytest.raises(SystemExit):
        read("train_data: d.jsonl\naccelerate_config: mine.yaml\nuse_fsdp: false")
    asked = as_launcher_reads(started)
    assert (asked.config_file, asked.use_fsdp, asked.num_processes) == ("mine.yaml", False, None)


def test_precompute_hands_its_shard_on(started: list[str]) -> None:
    assert main(["precompute", "--model=m", "--train_data=d.jsonl", "--shard", "2/3", "--num_processes=2"]) == 0
    assert as_launcher_reads(started).training_script_args[-2:] == ["--shard", "2/3"]


def test_what_a_launcher_cannot_do_is_refused(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no configuration of that name"):
        read("train_data: d.jsonl\naccelerate_config: zero4")
    with pytest.raises(ConfigurationError, match="`--zero_stage` without `--use_deepspeed`"):
        read("train_data: d.jsonl", "--zero_stage", "3")
    with pytest.raises(ConfigurationError, match="must be positive"):  # told once, by the process that starts others
        read("train_data: d.jsonl\nnum_processes: 2\nbeta: -1")
    with pytest.raises(ConfigurationError, match="`num_processes=two`: it is how many"):
        read("train_data: d.jsonl", "--num_processes", "two")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    with pytest.raises(ConfigurationError, match="in a process that a launcher has started"):
        read("train_data: d.jsonl\nnum_processes: 2")
    assert started == []


def test_trls_names_mean_the_options_of_the_command() -> None:
    theirs = read("dataset_name: a/b\ntest_split_size: 0.2\nuse_peft: true")
    ours = read_recipe("train", ["--model=m", "--train_data=a/b", "--eval_fraction=0.2", "--use_peft", "--lora_r=16"])
    assert theirs.script.train_data == "a/b" and theirs.script.eval_fraction == 0.2
    assert ours.script == theirs.script
    assert read("dataset_name: a/b\nstreaming: true\nmax_steps: 1").script.dataset_streaming is True


def test_arguments_of_loading_reach_the_model() -> None:
    text = "dataset_name: a/b\nmodel_revision: v2\ndtype: bfloat16\nattn_implementation: eager\n"
    expected = {"revision": "v2", "dtype": "bfloat16", "attn_implementation": "eager"}
    assert read(text).config.model_init_kwargs == expected
    assert read(text + "model_init_kwargs: {subfolder: x}").config.model_init_kwargs == expected | {"subfolder": "x"}
    assert read("dataset_name: a/b").config.model_init_kwargs is None


def test_env_sets_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    read("dataset_name: a/b\nenv:\n  TETHER_TEST_ONE: 1\n  TETHER_TEST_TWO: two")
    assert (os.environ["TETHER_TEST_ONE"], os.environ["TETHER_TEST_TWO"]) == ("1", "two")


# ---------------------------------------------------------------------------------------------------- adapters

ADAPTERS = [
    "use_peft: true",
    "use_peft: true\nlora_r: 32",
    "use_peft: true\nlora_r: 4\nlora_alpha: 8\nlora_dropout: 0.1\nlora_target_modules: [q_proj, v_proj]",
    "use_peft: true\nlora_target_modules: [all-linear]\nuse_rslora: true\nuse_dora: true",
    "use_peft: true\nlora_modules_to_save: [lm_head]\nlora_target_parameters: [experts.gate]",
    "use_peft: false",
]


@pytest.mark.parametrize("text", ADAPTERS)
def test_an_adapter_is_the_one_that_trl_makes(text: str) -> None:
    path = write(START + f"dataset_name: a/b\noutput_dir: out\nbf16: false\ndisable_dropout: false\n{text}\n")
    script = read_recipe("train", [path]).script
    ours = None if script.lora_r is None else adapter_of(script)
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig))
    theirs = get_peft_config(parser.parse_args_and_config(["--config", path])[2])
    assert (ours and ours.to_dict()) == (theirs and theirs.to_dict())


def test_dropout_that_would_be_disabled_is_none() -> None:
    assert read("dataset_name: a/b\nuse_peft: true").script.lora_dropout is None


def test_lora_r_alone_makes_an_adapter() -> None:
    """TRL makes none: it asks for `use_peft` too."""
    script = read("dataset_name: a/b\nlora_r: 8").script
    assert (script.lora_r, script.lora_alpha) == (8, None)


# ---------------------------------------------------------------------------------------------------- sources


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `load_dataset` is asked for; it answers with two rows."""
    calls: list[dict[str, Any]] = []

    def load_dataset(**options: Any) -> datasets.Dataset:
        calls.append(options)
        return datasets.Dataset.from_list(tiny_pairs(2))

    monkeypatch.setattr(pairs, "load_dataset", load_dataset)
    return calls


def test_a_name_on_the_hub_is_passed_on(asked: list[dict[str, Any]]) -> None:
    load_sets(read("dataset_name: owner/name"))
    load_sets(read("train_data: owner/name:train_prefs"))
    load_sets(
        read(
            "dataset_name: owner/name\ndataset_config: en\ndataset_train_split: train[:5%]\ndataset_test_split: valid\n"
            "dataset_streaming: true\nmax_steps: 3\neval_strategy: steps"
        )
    )
    plain = {"path": "owner/name", "split": "train", "streaming": False}
    full = {"path": "owner/name", "name": "en", "streaming": True}
    assert asked == [
        plain,
        plain | {"split": "train_prefs"},
        full | {"split": "train[:5%]"},
        full | {"split": "valid"},
    ]


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("dataset_name: a/b", None),
        ("dataset_name: a/b\neval_strategy: no", None),
        ("dataset_name: a/b\neval_strategy: epoch", "test"),
        ("dataset_name: a/b\neval_strategy: epoch\ndataset_test_split: valid", "valid"),
        ("dataset_name: a/b\ndataset_test_split: valid", "valid"),
        ("dataset_name: a/b\neval_strategy: epoch\neval_data: c.jsonl", None),
        ("dataset_name: a/b\neval_strategy: epoch\neval_fraction: 0.1", None),
        ("dataset_name: a.jsonl\neval_strategy: epoch", None),
    ],
)
def test_the_held_out_split_is_trls(text: str, split: str | None) -> None:
    assert held_out_split(read(text)) == split


def plain(rows: Any) -> list[dict[str, Any]]:
    """The rows without their numbers."""
    return [{name: value for name, value in row.items() if name != ROW_COLUMN} for row in rows]


def test_a_folder_is_read_with_its_splits() -> None:
    train, test = write_rows("data/train.jsonl", tiny_pairs(6)), write_rows("data/test.jsonl", tiny_pairs(3, seed=1))
    found = load_sets(read("dataset_name: data\neval_strategy: steps"))
    assert [plain(part) for part in found if part is not None] == [train, test]
    assert plain(load_sets(read("dataset_name: data\ndataset_train_split: test"))[0]) == test
    with pytest.raises(DataError, match=r"data`, split `valid`: "):
        load_sets(read("dataset_name: data\ndataset_test_split: valid"))


def test_a_file_is_streamed() -> None:
    rows = write_rows("pairs.jsonl", tiny_pairs(6))
    found, held_out = load_sets(read("train_data: pairs.jsonl\ndataset_streaming: true\nmax_steps: 2"))
    assert isinstance(found, datasets.IterableDataset) and held_out is None
    assert list(found) == rows


# ---------------------------------------------------------------------------------------------------- mixtures


def drawn_entry(draw: random.Random, number: int) -> dict[str, Any]:
    """A part of a mixture, of rows of its own in a file of its own."""
    write_rows(f"part{number}.jsonl", tiny_pairs(draw.randint(4, 9), seed=number))
    entry: dict[str, Any] = {"path": "json", "data_files": f"part{number}.jsonl"}
    if draw.random() < 0.5:
        entry["split"] = f"train[{draw.randint(0, 1)}:{draw.randint(3, 4)}]"
    if draw.random() < 0.5:
        entry["columns"] = ["rejected", "prompt", "chosen"]
    return entry


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_fractions", [False, True])
def test_a_mixture_has_the_rows_of_trls(seed: int, with_fractions: bool) -> None:
    draw = random.Random(seed)
    entries = [drawn_entry(draw, number) for number in range(3)]
    if with_fractions:
        entries = [entry | {"fraction": draw.choice([0.2, 1, 2.5])} for entry in entries]
    found, _ = load_sets(read(yaml.safe_dump({"datasets": entries})))
    expected = get_dataset(DatasetMixtureConfig(datasets=[dict(entry) for entry in entries]))["train"]
    assert plain(found) == expected.to_list() and len(expected) > 3


def test_a_mixture_takes_paths_folders_and_streams() -> None:
    one, two = write_rows("one.jsonl", tiny_pairs(2)), write_rows("folder/train.jsonl", tiny_pairs(3, seed=1))
    text = "datasets:\n  - one.jsonl\n  - path: folder\n"
    assert plain(load_sets(read(text))[0]) == one + two
    assert plain(load_sets(read("", "--datasets", "one.jsonl", "folder"))[0]) == one + two
    assert list(load_sets(read(text + "streaming: true\nmax_steps: 1"))[0]) == one + two


def test_a_mixture_may_name_the_splits_that_trl_makes_of_it() -> None:
    write_rows("one.jsonl", tiny_pairs(12))
    text = "datasets: [one.jsonl]\ntest_split_size: 0.25\ndataset_train_split: train\ndataset_test_split: test"
    train, test = load_sets(read(text + "\neval_strategy: epoch"))
    assert test is not None and len(train) + len(test) == 12 and 3 <= len(test) <= 5  # type: ignore[arg-type]


def test_a_part_on_the_hub_is_passed_on(asked: list[dict[str, Any]]) -> None:
    load_sets(read("datasets:\n- {path: a/b, name: en, data_dir: d, split: test, columns: [chosen, rejected]}"))
    assert asked == [{"path": "a/b", "name": "en", "data_dir": "d", "split": "test", "streaming": False}]


# ---------------------------------------------------------------------------------------------------- refusals

REFUSALS = [
    ("datasets: []", "without `train_data`|should be a valid list"),
    ("datasets: one.jsonl", "should be a valid list"),
    ("datasets: [3]", r"`datasets: \[3\]`.*`datasets\[0\]`: a part of a mixture has a path"),
    ("datasets: [{name: en}]", r"`datasets\[0\]`: a part of a mixture has a path"),
    ("datasets: [{path: a, colums: [b]}]", "did you mean `columns`"),
    ("datasets: [{path: a, fraction: 1}, {path: b}]", "Give every part a fraction"),
    ("datasets: [{path: a, fraction: -1}]", "Give every part a fraction"),
    ("datasets: [{path: a, fraction: 1}]\nstreaming: true\nmax_steps: 1", "a share of a stream"),
    ("datasets: [a.jsonl]\ndataset_name: a/b", "`train_data` together with `datasets`"),
    ("datasets: [a.jsonl]\ndataset_test_split: test", "`dataset_test_split` together with `datasets`"),
    ("datasets: [a.jsonl]\ndataset_train_split: train_prefs", "`dataset_train_split` together with `datasets`"),
    ("dataset_name: a/b\ndataset_streaming: true", "without `max_steps`"),
    ("dataset_name: a/b\ndataset_streaming: true\nmax_steps: 1\ntest_split_size: 0.1", "`eval_fraction` together with"),
    ("dataset_name: a/b\neval_fraction: 0.1\ndataset_test_split: x", "`eval_fraction` together with"),
    ("dataset_name: a/b\nmodel_revision: v1\nref_model: other", "`model_revision` together with `ref_model`"),
    ("dataset_name: a/b\ndtype: float8", "should be 'auto', 'bfloat16'"),
    ("dataset_name: a/b\ndtype: bfloat16\nmodel_init_kwargs: {dtype: float16}", "the same argument"),
    ("dataset_name: a/b\nuse_peft: false\nlora_r: 8", "`use_peft: false` together with `lora_r`"),
    ("dataset_name: a/b\nuse_dora: true", "`use_dora` without `lora_r`"),
    ("dataset_name: a/b\nenv: [1]", "each with one value"),
]


@pytest.mark.parametrize(("text", "said"), REFUSALS)
def test_a_recipe_that_contradicts_itself_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(text)
    assert re.search(said, str(caught.value)), str(caught.value)
    assert all(part.endswith((".", "?")) for part in (caught.value.problem, caught.value.instead))


BAD_PARTS = [
    ([{"path": "one.jsonl", "data_files": "two.jsonl"}], "together with `data_files`"),
    ([{"path": "one.jsonl", "columns": ["prompt", "answer"]}], "it has no column `answer`.\n.*It has prompt"),
    ([{"path": "one.jsonl"}, {"path": "talk.jsonl"}], "their columns differ"),
    ([{"path": "absent.jsonl"}], r"`datasets\[0\].path: absent.jsonl`"),
]


@pytest.mark.parametrize(("entries", "said"), BAD_PARTS)
def test_a_part_that_cannot_be_read_is_named(entries: list[dict[str, Any]], said: str) -> None:
    write_rows("one.jsonl", tiny_pairs(2))
    write_rows("talk.jsonl", tiny_pairs(2, conversational=True))
    with pytest.raises(DataError, match=said):
        load_sets(read(yaml.safe_dump({"datasets": entries})))


def test_precompute_refuses_a_stream() -> None:
    with pytest.raises(ConfigurationError, match="scored when training reads them"):
        read_recipe("precompute", ["--model=m", "--train_data=a/b", "--streaming", "--max_steps=2"])


# -------------------------------------------------------------------------------------------------------- runs

RUN = {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(**options: Any) -> str:
        path = write(
            yaml.safe_dump({"gradient_checkpointing": False, "per_device_train_batch_size": 4} | RUN | options)
        )
        code = main(["train", "--config", path])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def losses(folder: str) -> list[float]:
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_recipe_of_trls_runs_as_the_commands_own(run: Callable[..., str]) -> None:
    tiny_model().save_pretrained("model")
    tiny_tokenizer(pad=True).save_pretrained("model")
    write_rows("data/train.jsonl", tiny_pairs(12))
    write_rows("data/test.jsonl", tiny_pairs(4, seed=1))
    theirs = run(
        model_name_or_path="model",
        dataset_name="data",
        eval_strategy="steps",
        eval_steps=1,
        use_peft=True,
        load_in_4bit=False,
        output_dir="theirs",
    )
    run(
        model="model",
        train_data="data/train.jsonl",
        eval_data="data/test.jsonl",
        lora_r=16,
        output_dir="ours",
    )
    assert "12 to train on, 4 held out" in theirs and losses("theirs") == losses("ours")
    streamed = run(model="model", train_data="data/train.jsonl", dataset_streaming=True, output_dir="streamed")
    assert "a stream to train on, 0 held out" in streamed and len(losses("streamed")) == 2


PARITY = {
    "full": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5], "lr_scheduler_type": "cosine"},
    "lora, precomputed": {
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "precompute_ref_log_probs": True,
    },
}


@pytest.mark.numerics
@pytest.mark.parametrize("name", PARITY)
def test_a_recipe_trains_as_under_trls_own_script(name: str, run: Callable[..., str]) -> None:
    tiny_model().save_pretrained("model")
    tiny_tokenizer(pad=True).save_pretrained("model")
    write_rows("data/train.jsonl", tiny_pairs(24))
    write_rows("data/test.jsonl", tiny_pairs(8, seed=1))
    options = {
        "model_name_or_path": "model",
        "dataset_name": "data",
        "max_steps": 6,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "warmup_steps": 2,
        "adam_epsilon": ADAM_EPSILON,
        "gradient_accumulation_steps": 2,
        "bf16": False,
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
    } | PARITY[name]
    run(output_dir="ours", **options)
    parsed = trl_script.make_parser().parse_args_and_config(["--config", "recipe.yaml", "--output_dir", "theirs"])
    trl_script.main(*parsed)
    logs = [json.loads(Path(folder, "checkpoint-6/trainer_state.json").read_text()) for folder in ("ours", "theirs")]
    ours, theirs = ([entry for entry in log["log_history"] if "loss" in entry or "eval_loss" in entry] for log in logs)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == [1, 2, 3, 3, 4, 5, 6, 6]
    figures = ("loss", "learning_rate", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/margins")
    for one, other in zip(ours, theirs, strict=True):
        shown = [figure for figure in figures if figure in other]
        assert len(shown) == (4 if "loss" in other else 2)
        for figure in shown:
            assert one[figure] == pytest.approx(other[figure], rel=1e-4, abs=1e-4), (one["step"], figure)


def test_a_run_that_is_pushed_names_its_data(
    run: Callable[..., str], asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained("model")
    tiny_tokenizer(pad=True).save_pretrained("model")
    pushed: list[Any] = []
    monkeypatch.setattr(DPOTrainer, "init_hf_repo", lambda self, **options: None)
    monkeypatch.setattr(DPOTrainer, "push_to_hub", lambda self, **options: pushed.append(options.get("dataset_name")))
    run(model="model", train_data="owner/name:train", push_to_hub=True, output_dir="out")
    assert pushed[-1] == "owner/name"
    pushed.clear()
    run(model="model", train_data="owner/name:train", output_dir="out")
    assert pushed == []


# --------------------------------------------------------------------------------------------------------- columns


def test_columns_are_read_from_a_recipe_and_a_flag_and_hold_out_by_prompt(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in tiny_pairs(8)]
    write_rows("d.jsonl", [row for row in rows for _ in range(2)])
    text = "train_data: d.jsonl\neval_fraction: 4\n"
    for recipe in (read(text + "columns: {prompt: question}"), read(text, "--columns", '{"prompt": "question"}')):
        assert recipe.config.columns == {"prompt": "question"}
        train, held = load_sets(recipe)
        assert held is not None and len(held) == 4
        assert not set(train["question"]) & set(held["question"])
