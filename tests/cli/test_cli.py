"""The command: what its help says, how a recipe is read, what its verbs do, and how it refuses and stops."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, TrainingArguments

from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether import last_checkpoint
from tether.cli import main, progress
from tether.cli.library_errors import report_library_errors
from tether.cli.pairs import hold_out, load_pairs
from tether.cli.progress import ProgressLines
from tether.cli.recipe import Recipe, read_recipe
from tether.cli.summary import _describe_harm
from tether.cli.verbs import HELP, VERBS
from tether.config.dpo_config import DPOConfig
from tether.data.datasets import tokenize_pairs
from tether.data.rows import ROW_COLUMN
from tether.errors import ConfigurationError, DataError
from tether.losses import LossOptions
from tether.trainer.run_folder import RunFolder

SOURCE = Path(__file__).resolve().parents[2] / "src"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and 16 pairs."""
    folder = tmp_path_factory.mktemp("start")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer(pad=True).save_pretrained(folder / "model")
    rows = [json.dumps(row) for row in tiny_pairs(16, conversational=True)]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` converts out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def recipe(start: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe of a short run, with changes; an option set to None is left out."""

    def write(**changes: Any) -> str:
        options = {
            "model": str(start / "model"),
            "train_data": str(start / "pairs.jsonl"),
            "eval_fraction": 0.25,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
        } | changes
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def tether(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        return code, *capsys.readouterr()

    return run


def in_subprocess(words: Sequence[str], launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "tether", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read(text: str, tmp_path: Path, *flags: str) -> Recipe:
    path = tmp_path / "written.yaml"
    path.write_text("model: m\ntrain_data: d.jsonl\n" + text)
    return read_recipe("train", [str(path), *flags])


def last_logs(output_dir: Path) -> dict[str, float]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    logs: dict[str, float] = [entry for entry in state["log_history"] if "loss" in entry][-1]
    return logs


# -------------------------------------------------------------------------------------------------- help


def test_help_names_every_verb_and_loads_no_torch() -> None:
    check = (
        "import sys, tether.cli; code = tether.cli.main(sys.argv[1:]); assert 'torch' not in sys.modules; exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, "--help"], env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == HELP
    assert all(f"tether {verb}" in HELP for verb in VERBS)


def test_no_words_show_the_help(tether: Run) -> None:
    assert tether() == (0, HELP, "")


def test_the_command_runs_as_a_module() -> None:
    process = in_subprocess(["--version"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert re.fullmatch(r"tether (\d+\.\d+\.\d+|\(not installed\))\n", out)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_fits_a_page_wide(tether: Run, verb: str) -> None:
    code, out, err = tether(verb, "--help")
    assert (code, err) == (0, "")
    assert f"tether {verb}" in out and ("--output_dir" in out or verb in ("ask", "store", "schema", "env"))
    assert max(map(len, (out + HELP).splitlines())) <= 80


def test_the_help_of_train_has_every_option_and_says_which_reference_to_choose(tether: Run) -> None:
    _, out, _ = tether("train", "--help")
    missing = [field.name for field in dataclasses.fields(DPOConfig) if f"--{field.name}" not in out]
    assert missing == []
    assert "Which reference?" in out
    common, rest = out.split("everything else")
    assert all(f"--{name}" in common for name in ("model", "train_data", "beta", "learning_rate", "ref_store"))
    assert "--adam_beta1" in rest
    transformers_own = {field.name for field in dataclasses.fields(TrainingArguments)}
    transformers_own |= {"activation_checkpointing", "activation_checkpointing_kwargs"}  # so called since 5.23
    assert [name for name in re.findall(r"--(\w+)", rest) if name not in transformers_own] == []


# ------------------------------------------------------------------------------------------------ recipes


def test_a_flag_overrides_the_recipe(tmp_path: Path) -> None:
    recipe = read("beta: 0.3\nlearning_rate: 1e-5\nmax_length: 64", tmp_path, "--beta", "0.2", "--lora-r", "4")
    assert (recipe.config.beta, recipe.config.learning_rate, recipe.config.max_length) == (0.2, 1e-5, 64)
    assert recipe.script.lora_r == 4
    assert recipe.given["beta"] == 0.2 and "seed" not in recipe.given


def test_a_recipe_may_be_named_by_a_flag_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("model_name_or_path: m\ndataset: d.jsonl\nbeta: 0.3")
    by_flag = read_recipe("train", ["--config", str(path)])
    by_flags_alone = read_recipe("train", ["--model", "m", "--train_data", "d.jsonl", "--beta", "0.3"])
    assert by_flag.script == by_flags_alone.script
    assert by_flag.config.beta == by_flags_alone.config.beta == 0.3


def test_a_recipe_means_what_people_expect_of_yaml(tmp_path: Path) -> None:
    text = """
learning_rate: 1e-6        # text in YAML 1.1
save_strategy: no          # False in YAML 1.1
gradient_checkpointing: false
max_length: null
run_name: 2024
loss_type: sigmoid
loss_weights: [1]
model_init_kwargs: {attn_implementation: eager, rope_theta: 1e4}
warmup_steps: 10
"""
    config = read(text, tmp_path).config
    assert config.learning_rate == 1e-6 and config.warmup_steps == 10
    assert config.save_strategy == "no" and config.gradient_checkpointing is False
    assert config.max_length is None and config.run_name == "2024"
    assert config.loss_type == ["sigmoid"] and config.loss_weights == [1.0]
    assert config.model_init_kwargs == {"attn_implementation": "eager", "rope_theta": 1e4}


@pytest.mark.parametrize("word", ["yes", "on", "True", "true", "1", "'yes'"])
def test_truth_is_written_in_many_words_where_truth_is_asked_and_stays_a_word_elsewhere(
    word: str, tmp_path: Path
) -> None:
    recipe = read(f"sync_ref_model: {word}\nrun_name: {word}\noutput_dir: true_run\nseed: 0010", tmp_path)
    assert recipe.config.sync_ref_model is True and recipe.config.run_name == word.strip("'")
    assert recipe.config.output_dir == "true_run" and recipe.config.seed == 10


def test_flags_and_lines_are_told_apart_from_values_that_look_alike(tmp_path: Path) -> None:
    flags = ["--max_steps", "-1", "--run_name=--x", "--lora-target-modules", "q_proj", "v_proj", "--no_bf16"]
    recipe = read("report_to: [none]\nlora_r: 2", tmp_path, *flags)
    assert (recipe.config.max_steps, recipe.config.run_name, recipe.config.bf16) == (-1, "--x", False)
    assert recipe.script.lora_target_modules == ["q_proj", "v_proj"]


def test_a_recipe_and_flags_take_the_options_of_the_losses(tmp_path: Path) -> None:
    text = "loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1]\nld_alpha: 0.5\nbco_reward_shift: no"
    config = read(text, tmp_path, "--use_weighting", "--router_aux_loss_coef", "0", "--label_smoothing=0.1").config
    assert config.loss_type == ["sigmoid", "bco_pair", "sft"] and config.loss_weights == [0.8, 0.2, 1.0]
    assert config.loss_options == LossOptions(label_smoothing=0.1, ld_alpha=0.5)
    assert config.use_weighting and not config.bco_reward_shift and config.router_aux_loss_coef == 0
    flags = ["--f_divergence_type", "alpha_divergence", "--f_alpha_divergence_coef", "0.3", "--reference_free"]
    other = read("", tmp_path, *flags).config
    assert other.loss_options == LossOptions(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
    assert other.reference_free


@pytest.mark.parametrize("flags", [["--max_length", "none"], ["--max_length=none"], ["--max-length", "None"]])
def test_a_flag_may_say_none_where_a_number_is_optional(tmp_path: Path, flags: list[str]) -> None:
    assert read("", tmp_path, *flags).config.max_length is None


@pytest.mark.parametrize(
    ("flags", "value"),
    [(["--sync_ref_model"], True), (["--sync_ref_model", "false"], False), (["--sync_ref_model=yes"], True)],
)
def test_a_flag_that_is_true_or_false_needs_no_value(tmp_path: Path, flags: list[str], value: bool) -> None:
    assert read("", tmp_path, *flags).config.sync_ref_model is value


def test_a_flag_whose_default_is_neither_needs_no_value_either(tmp_path: Path) -> None:
    assert read("", tmp_path, "--bf16", "--beta", "0.2").config.bf16 is True
    assert read("bf16: true", tmp_path, "--bf16", "false").config.bf16 is False
    assert read("", tmp_path, "--resume_from_checkpoint").script.resume == "true"


def test_a_mapping_is_json_on_the_command_line(tmp_path: Path) -> None:
    flags = ["--lr_scheduler_kwargs", '{"min_lr": 1e-7}', "--model_init_kwargs", "none"]
    (tmp_path / "other.json").write_text('{"even_batches": false}')  # transformers takes some as files
    text = f"model_init_kwargs: {{a: 1}}\naccelerator_config: {tmp_path / 'other.json'}"
    config = read(text, tmp_path, *flags[:2]).config
    assert not config.accelerator_config.even_batches  # type: ignore[union-attr]
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-7} and config.model_init_kwargs == {"a": 1}
    assert read("model_init_kwargs: {a: 1}", tmp_path, *flags).config.model_init_kwargs is None


def test_a_whole_number_may_be_written_as_a_power_of_ten(tmp_path: Path) -> None:
    config = read("max_steps: 1e3\nper_device_train_batch_size: 4.0", tmp_path).config
    assert (config.max_steps, config.per_device_train_batch_size) == (1000, 4)


def test_an_empty_report_to_is_none(tmp_path: Path) -> None:
    assert read("report_to: null", tmp_path).config.report_to == []


def test_every_default_may_be_written_down(tmp_path: Path) -> None:
    """So that a recipe can be made of the options of an earlier run."""
    defaults = {}
    for field in dataclasses.fields(DPOConfig):
        value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        if field.init and value is not None:
            defaults[field.name] = getattr(value, "value", value)
    written = read(yaml.safe_dump(defaults), tmp_path).config
    plain = read("", tmp_path).config
    assert {name: getattr(written, name) for name in defaults} == {name: getattr(plain, name) for name in defaults}


def test_output_dir_is_named_after_the_model_unless_given(tmp_path: Path) -> None:
    assert read("", tmp_path).config.output_dir == "m-DPO"


# ------------------------------------------------------------------------------------------------ refusals

REFUSALS = [
    ("bata: 0.2", "no option `bata`", "`beta`"),
    ("beta: 0", "must be positive", "such as 0.1"),
    ("beta: two", "bad.yaml: it should be a valid number", "--help"),
    ("beta: [1, 2]", "it should be a valid number", "--help"),
    ("beta:", "`beta:` in line 3 of ", "--help"),
    ("beta: 1\nbeta: 2", "`beta` comes twice", "each option once"),
    (f"model_init_kwargs: {'[' * 1500}{']' * 1500}", "nested too deeply", "option: value"),
    ("? [a, b]\n: 1", "bad.yaml at line 3, column 3: a name is expected", "option: value"),
    ("env: {? [a] : 1}", "bad.yaml at line 3, column 9: a name is expected", "option: value"),
    ("env: {A: 1, B: [2]}", "`env: {'A': '1', 'B': [2]}`", "`NAME: value`"),
    ("max_steps: 2.5", "it should be a valid integer", "--help"),
    ("sync_ref_model: perhaps", "it should be a valid boolean", "--help"),
    ("eval_strategy: sometimes", "it should be 'no', 'steps' or 'epoch'", "--help"),
    ("eval_strategy: steps", "nothing to evaluate on", "eval_fraction"),
    ("do_eval: true", "the verb of the command decides what a run does", "eval_fraction"),
    (
        "eval_strategy: epoch\neval_fraction: 0.2\nload_best_model_at_end: true",
        "save and eval strategy to match",
        "Change the option that it names",
    ),
    ("loss_type: sigmoidal", "it should be 'sigmoid', 'hinge'", "Did you mean `sigmoid`?"),
    ("sync_ref_model: true\nprecompute_ref_log_probs: true", "stale", "one of the two"),
    ("lora_alpha: 8", "without a rank none is made", "lora_r"),
    ("lora_r: 8\nlora_dropout: 0.1", "all dropout is set to 0", "disable_dropout: false"),
    ("eval_fraction: 1.5", "share of the pairs", "0.1"),
    ("eval_fraction: 0.1\neval_data: x.jsonl", "which pairs are held out", "one of the two"),
    ("dataset: other.jsonl", "the same option", "one of the two"),
    ("resume: true", "there is none", "start a new run"),
    ("resume: ''", "from ''", "checkpoint"),
    ("resume: out/checkpoint-7", "no such folder", "checkpoint"),
    ("ref_model: ./nowhere", "no such folder", "save_pretrained"),
    ("tokenizer: ./nowhere", "no such folder", "save_pretrained"),
    ("- beta", "bad.yaml at line 3, column 1: expected <block end>, but found '-'.", "option: value"),
    ("model_init_kwargs: nonsense", "it should be a valid dictionary", "--help"),
    ("dry_run: true\nlr_scheduler_kwargs: {min_lr: 1.0}", "unexpected keyword argument 'min_lr'", "leave it out"),
    (
        "dry_run: true\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: x}",
        "Cannot use `lr_scheduler_kwargs",
        "Correct `lr_scheduler_kwargs`",
    ),
    ("lr_scheduler_kwargs: min_lr=1e-7", "it should be a valid dictionary", "--help"),
    ("dataset_test_split: test", "Unknown split", "a file has one split"),
    ("attn_implementation: nonsense", "Specified `attn_implementation", "Correct the one that this is about"),
    (
        "model_init_kwargs: {nonsense: 1}",
        "unexpected keyword argument 'nonsense'",
        "Correct the one that this is about",
    ),
    ("accelerator_config: absent.json", "No such file", "Correct `accelerator_config`"),
    ("report_to: nope", "nope is not supported", "Correct `report_to`"),
    ("lora_r: 2\nlora_target_modules: [q_prj]", "the model has no layer `q_prj`", "Did you mean `q_proj`?"),
]


@pytest.mark.parametrize(("text", "why", "instead"), REFUSALS)
def test_a_bad_recipe_is_refused_with_what_to_write(
    tether: Run, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str, instead: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(f"model: {start / 'model'}\ntrain_data: {start / 'pairs.jsonl'}\n{text}\n")
    code, out, err = tether("train", str(path))
    assert (code, out) == (2, "")
    *said, last = err.rstrip().splitlines()
    assert why in "\n".join(said) and instead in last, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "without `model`"),
        (["train", "nowhere.yaml"], "Cannot use the recipe nowhere.yaml: there is no such file."),
        (["train", "--bata", "0.2"], "Did you mean `--beta`?"),
        (["train", "--beta"], "`--beta`: it needs a value"),
        (["train", "--precompute_ref_log_probs", "recipe.yaml"], "Write the recipe first"),
        (["train", "a.yaml", "b.yaml"], "`b.yaml`: it belongs to no option"),
        (["train", "--model", "m"], "without `train_data`"),
        (["precompute", "--betta", "1"], "Did you mean `--beta`?"),
        (["train", "--model_init_kwargs", "nonsense"], "it should be a valid dictionary"),
        (["train", "--lr_scheduler_type", "cosin"], "Did you mean `cosine`?"),
        (["demo", "--sede", "1"], "Did you mean --model, --seed?"),
    ],
)
def test_bad_words_are_refused_with_what_to_write(tether: Run, words: list[str], said: str) -> None:
    code, out, err = tether(*words)
    assert (code, out) == (2, "")
    assert said in err and len(err.rstrip().splitlines()) > 1


def test_traceback_shows_where_an_error_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError):
        main(["trian", "--traceback"])
    monkeypatch.setenv("TETHER_TRACEBACK", "1")
    with pytest.raises(ConfigurationError):
        main(["trian"])


def test_what_a_library_refuses_when_training_is_set_up_is_told_with_its_words(
    tether: Run, recipe: Callable[..., str]
) -> None:
    code, _, err = tether("train", recipe(lr_scheduler_type="cosine_with_min_lr"))
    assert (
        code == 2
        and "`lr_scheduler_type='cosine_with_min_lr'`: ValueError: One of min_lr or min_lr_rate should be set" in err
    )
    with pytest.raises(ConfigurationError, match="min_lr") as caught:
        main(["train", recipe(lr_scheduler_type="cosine_with_min_lr"), "--traceback"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_our_own_or_during_training_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), report_library_errors("tether train"):
        raise ZeroDivisionError
    with pytest.raises(OSError) as during, report_library_errors("tether train", lambda: False):
        AutoConfig.from_pretrained("./nowhere")
    assert not isinstance(during.value, ConfigurationError)
    with pytest.raises(ValueError) as own, report_library_errors("tether train"):
        raise ValueError
    assert not isinstance(own.value, ConfigurationError)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("absent.jsonl", None, "there is no such file"),
        ("pairs.txt", "a", "its name does not end in a known format"),
        ("broken.jsonl", '{"prompt": "a"', "broken.jsonl is not JSON: "),
        ("cut.jsonl", '{"prompt": "a', "cut.jsonl is not JSON: unterminated string."),
        ("twice.jsonl", '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}', "`chosen` comes twice"),
        (
            "list.json",
            '[{"chosen": "a b", "rejected": "a c"},\n{"chosen": [{"role": "a", "role": "b"}]}]',
            "Row 1 of PATH is not JSON: `role`",
        ),
        ("twice.csv", "prompt,chosen,rejected,chosen\na,b,c,d\n", "two columns `chosen`"),
        ("fake.parquet", "nothing of the kind", "to_parquet"),
        ("plain.jsonl", gzip.compress(b'{"prompt": "a"}', mtime=0), "Rename it to plain.jsonl.gz."),
        ("none.jsonl", '{"prompt": "a", "chosen": "b"}', "The train set has no column `rejected`: "),
        ("empty.jsonl", "", "empty.jsonl`: it has no rows"),
        ("null.json", "null", "null.json is null: a row is an object"),
        ("header.csv", "prompt,chosen,rejected\n", "header.csv`: it has no rows"),
        ("names.csv", "Prompt,Choosen,Rejected\na,b,c\n", '"chosen": "Choosen", "rejected": "Rejected"}` (in'),
        ("semicolons.csv", "prompt;chosen;rejected\na;b;c\n", "Its columns seem to be separated by ';'"),
    ],
)
def test_bad_data_are_refused_by_name(
    tether: Run,
    recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    text: str | bytes | None,
    said: str,
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    code, _, err = tether("train", recipe(train_data=str(tmp_path / name), eval_fraction=None))
    assert code == 2
    assert said.replace("PATH", str(tmp_path / name)) in err and len(err.rstrip().splitlines()) > 1
    assert ". ." not in err and "Failed to" not in caplog.text  # what `datasets` says of the same


# ---------------------------------------------------------------------------------------------------- data


def csv_text(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "tsv", "ndjson", "json.gz", "csv.bz2", "JSONL"])
def test_pairs_are_read_from_files_of_each_format(tmp_path: Path, suffix: str) -> None:
    rows = tiny_pairs(3)
    path = tmp_path / f"pairs.{suffix}"
    dataset = datasets.Dataset.from_list(rows)
    writers: dict[str, Callable[[], Any]] = {
        "json": lambda: path.write_text(json.dumps(rows)),
        "jsonl": lambda: dataset.to_json(path),
        "JSONL": lambda: dataset.to_json(path),
        "csv": lambda: dataset.to_csv(path),
        "parquet": lambda: dataset.to_parquet(path),
        "tsv": lambda: dataset.to_csv(path, sep="\t"),
        "ndjson": lambda: dataset.to_json(path),
        "json.gz": lambda: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
        "csv.bz2": lambda: path.write_bytes(bz2.compress(csv_text(rows).encode())),
    }
    writers[suffix]()
    found: Any = load_pairs(str(path), "train_data")
    assert found.remove_columns(ROW_COLUMN).to_list() == rows
    assert found[2][ROW_COLUMN] == f"2 of {path}"


def test_a_row_has_the_number_that_it_has_in_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps(row) for row in tiny_pairs(12)]
    lines[3], lines[7] = lines[3].replace('"chosen": "', '"chosen": null, "was": "'), "[" + lines[7]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    pairs: Any = load_pairs(str(path), "train_data")
    for part in hold_out(pairs, 0.5, seed=0):
        tokenize_pairs(part, tiny_tokenizer(), max_length=None, bad_rows="drop")
    assert "(row 3)" in caplog.text and "(row 7)" in caplog.text
    with pytest.raises(DataError, match=re.escape(f"Row 7 of {path} is not JSON: ")):
        tokenize_pairs(pairs.select([2, 7]), tiny_tokenizer(), max_length=None)


def test_text_of_a_csv_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,margin\n2 + 2 =,4,NA,1\n3 =,None,5,\n")
    rows = load_pairs(str(path), "train_data").remove_columns(ROW_COLUMN)
    assert list(rows) == [
        {"prompt": "2 + 2 =", "chosen": "4", "rejected": "NA", "margin": 1.0},
        {"prompt": "3 =", "chosen": "None", "rejected": "5", "margin": None},
    ]


def test_notes_of_another_program_in_a_parquet_file_do_not_matter(tmp_path: Path) -> None:
    table = pa.table({name: [row[name] for row in tiny_pairs(2)] for name in ("prompt", "chosen", "rejected")})
    for number, notes in enumerate(("5", "{", '{"info": {"features": {"prompt": {"_type": "Other"}}}}')):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table.replace_schema_metadata({"huggingface": notes}), path)
        assert len(load_pairs(str(path), "train_data")) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_file_may_have_text_in_some_rows_and_messages_in_others(form: str, tmp_path: Path) -> None:
    """Rows without a prompt come first, and texts that are JSON by themselves stay texts."""
    rows = [
        {"chosen": "The ship left.", "rejected": "The ship sank."},
        {"prompt": "2 + 2 =", "chosen": "4", "rejected": '"four"'},
        *tiny_pairs(2, conversational=True),
    ]
    path = tmp_path / f"pairs.{form}"
    path.write_text(json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)))
    found: Any = load_pairs(str(path), "train_data")
    found = found.remove_columns(ROW_COLUMN)
    assert [{name: value for name, value in row.items() if value is not None} for row in found] == rows
    if form == "json":  # a list is read as a whole
        streamed = list(load_pairs(str(path), "train_data", streaming=True))
        assert [{name: value for name, value in row.items() if value is not None} for row in streamed] == rows
        return
    with pytest.raises(DataError, match="messages in others can only be read from a whole"):
        load_pairs(str(path), "train_data", streaming=True)


def test_rows_without_a_prompt_are_held_out_by_their_text() -> None:
    rows = [{"prompt": None, "chosen": f"{number}", "rejected": "no"} for number in range(40)]
    kept, held = hold_out(datasets.Dataset.from_list([*rows, *tiny_pairs(4)]), 0.25, seed=0)
    assert len(held) == 11 and len(kept) == 33


def test_held_out_pairs_share_no_prompt_with_the_others_and_do_not_depend_on_their_order() -> None:
    rows = tiny_pairs(40)
    kept, held = hold_out(datasets.Dataset.from_list(rows), 0.25, seed=0)
    assert hold_out(datasets.Dataset.from_list(rows), len(held), seed=0)[1].to_list() == held.to_list()
    _, held_of_reversed = hold_out(datasets.Dataset.from_list(rows[::-1]), 0.25, seed=0)
    _, held_by_another_seed = hold_out(datasets.Dataset.from_list(rows), 0.25, seed=1)
    as_texts = [{json.dumps(row) for row in part} for part in (kept, held, held_of_reversed, held_by_another_seed)]
    assert not set(kept["prompt"]) & set(held["prompt"])
    assert 10 <= len(held) <= 13 and len(kept) + len(held) == 40
    assert as_texts[1] == as_texts[2] != as_texts[3]


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(DataError, match="none would be left"):
        hold_out(datasets.Dataset.from_list(tiny_pairs(1)), 0.5, seed=0)


# --------------------------------------------------------------------------------------------------- verbs


def test_train_saves_a_model_and_sums_the_run_up(tether: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    code, out, err = tether("train", recipe(), "--beta", "0.2")
    assert code == 0, err
    assert re.search(r"11 to train on, 5 held out", out)
    titles = "loss +margin +accuracy +rewards/chosen +token accuracy"
    figures = r"0\.\d{4} +[+-]\d\.\d{4} +(\d\.\d{3}|-) +[+-]\d\.\d{4} +\d\.\d{3}"
    assert re.search(rf" +step +{titles}\n +2/4 +{figures} +\d+ s\n +4/4 +{figures} +\d+ s\n", out)
    assert max(map(len, out.split("4 steps, ")[0].splitlines()[3:])) <= 80
    summary = out.split("4 steps, ")[1]
    assert re.search(r"steps 1-2 .*\nsteps 3-4 .*\nheld out at the end +0\.\d{4}", summary)
    assert re.search(rf" {titles}\nsteps 1-2 +{figures}\n", summary)
    assert re.search(r"explicit [0-9a-f]{12}, .*\n +\d+ passes", summary)
    assert f"saved      {tmp_path / 'out'}" in summary
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json", "checkpoint-4"} <= files
    assert "%|" not in err  # no bars where there is no terminal


@pytest.mark.parametrize(
    ("changes", "cost"),
    [
        ({}, "a pass in every step"),
        ({"reference_free": True}, "no pass at all"),
        ({"precompute_ref_log_probs": True}, r"0 of the \d+ responses to train on are in the store"),
    ],
)
def test_a_dry_run_shows_what_would_be_trained_and_changes_nothing(
    tether: Run, recipe: Callable[..., str], start: Path, tmp_path: Path, changes: dict[str, Any], cost: str
) -> None:
    limit = 50
    path = recipe(eval_fraction=None, max_length=limit, max_steps=1, **changes)
    before = {file.name for file in tmp_path.iterdir()}
    code, out, err = tether("train", path, "--dry_run")
    assert code == 0, err
    assert {file.name for file in tmp_path.iterdir()} - before <= {"datasets"}  # no output, no checkpoint

    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    rows = [json.loads(line) for line in (start / "pairs.jsonl").read_text().splitlines()]

    def length(messages: list[Any], **options: Any) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    kept = [row for row in rows if length(row["prompt"], add_generation_prompt=True) < limit]
    cut = [row for row in kept if any(length(row["prompt"] + row[side]) > limit for side in ("chosen", "rejected"))]
    assert 0 < len(cut) < len(kept)
    assert f"{len(kept)} to train on" in out and f"max_length {limit} cuts {len(cut)} of {len(kept)} pairs" in out
    prompt = tokenizer.apply_chat_template(kept[0]["prompt"], add_generation_prompt=True, tokenize=False)
    assert f"first prompt, {length(kept[0]['prompt'], add_generation_prompt=True)} tokens:\n  {prompt!r}" in out
    assert re.search(cost, out) and f"output     {tmp_path / 'out'}" in out
    code, _, err = tether("precompute", path, "--dry_run")
    assert code == 2 and "only `tether train` can stop before its first step" in err


def test_train_makes_an_adapter_and_goes_on_with_one(tether: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    path = recipe(lora_r=2, lora_target_modules=["all-linear"], eval_fraction=None, save_strategy="no")
    code, out, err = tether("train", path)
    assert code == 0, err
    assert re.search(r"reference  implicit [0-9a-f]{12}, 0\.0 MB", out)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4
    path = recipe(model=str(tmp_path / "out"), output_dir=str(tmp_path / "more"), max_steps=2)
    code, out, err = tether("train", path)
    assert code == 0, err
    assert "reference  implicit" in out and (tmp_path / "more" / "adapter_model.safetensors").is_file()


def test_train_makes_no_pass_after_precompute(tether: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    code, out, err = tether("precompute", recipe(ref_store=str(tmp_path / "store.sqlite")))
    assert code == 0, err
    found, computed = map(int, re.search(r"(\d+) responses found, (\d+) computed", out).groups())  # type: ignore[union-attr]
    digest = re.search(r"reference  precomputed explicit ([0-9a-f]+)", out).group(1)  # type: ignore[union-attr]
    assert found == 0 and 16 < computed <= 32
    assert str(tmp_path / "store.sqlite") in out and not (tmp_path / "out").exists()
    code, out, err = tether(
        "train", recipe(ref_store=str(tmp_path / "store.sqlite"), precompute_ref_log_probs=True, beta=0.3, seed=7)
    )
    assert code == 0, err
    assert f"{computed} responses found, 0 computed" in out
    assert digest in out and " 0 passes" in out


def test_precompute_computes_only_what_is_new(tether: Run, recipe: Callable[..., str], start: Path) -> None:
    assert tether("precompute", recipe())[0] == 0
    code, out, _ = tether("precompute", recipe(beta=0.5))
    assert code == 0 and ", 0 computed" in out and " 0 passes" in out


def test_resume_ends_where_the_uninterrupted_run_ends(tether: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    assert tether("train", recipe())[0] == 0
    whole = last_logs(tmp_path / "out")
    code, out, err = tether("train", recipe(), "--resume", str(tmp_path / "out" / "checkpoint-2"))
    assert code == 0, err
    assert " 2/4 " not in out and " 4/4 " in out
    assert last_logs(tmp_path / "out")["loss"] == whole["loss"]


def test_resume_passes_over_a_checkpoint_that_was_not_written_to_its_end(
    tether: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    assert tether("train", recipe())[0] == 0
    whole = last_logs(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text('{"log_history": [')  # killed here
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    code, out, err = tether("train", recipe(), "--resume")
    assert code == 0, err
    assert f"resuming   {tmp_path / 'out' / 'checkpoint-2'}" in out and " 2/4 " not in out and " 4/4 " in out
    assert last_logs(tmp_path / "out")["loss"] == whole["loss"]


def test_resume_goes_on_with_the_run_that_was_started_last(
    tether: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    assert tether("train", recipe())[0] == 0
    earlier = last_logs(tmp_path / "out")
    assert tether("train", recipe(max_steps=2, seed=1))[0] == 0  # anew, into the folder that has checkpoint-4
    code, _, err = tether("train", recipe(seed=1), "--resume")
    assert code == 0, err
    assert last_logs(tmp_path / "out")["loss"] != earlier["loss"]


def test_resume_names_the_checkpoint_of_an_earlier_run_where_the_last_has_none(
    tether: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    assert tether("train", recipe())[0] == 0
    assert tether("train", recipe(learning_rate=1e30, save_steps=3, eval_fraction=None))[0] == 2  # NaN at step 2
    code, _, err = tether("train", recipe(), "--resume")
    assert code == 2 and "the run that was last started there has written none yet" in err
    assert f"Name {tmp_path / 'out' / 'checkpoint-4'} to go on with it" in err


def test_a_finished_run_that_is_resumed_is_done(tether: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    assert tether("train", recipe())[0] == 0
    model = tmp_path / "out" / "model.safetensors"
    before = model.stat()
    for _ in range(2):
        code, out, err = tether("train", recipe(), "--resume")
        assert code == 0, err
        assert f"done       the model of step 4 is in {tmp_path / 'out'}" in out
        assert (model.stat().st_ino, model.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    weights = model.read_bytes()
    for lost in ([model], [model, tmp_path / "out" / "_tether_run.json"]):  # killed before the model's file
        for path in lost:
            path.unlink()
        assert tether("train", recipe(), "--resume")[0] == 0 and model.read_bytes() == weights
    code, out, _ = tether("train", recipe(max_steps=6, save_steps=2), "--resume")
    assert code == 0 and " 6/6 " in out


def test_a_run_shorter_than_logging_steps_shows_its_end(tether: Run, recipe: Callable[..., str]) -> None:
    code, out, err = tether("train", recipe(max_steps=1, logging_steps=10, eval_fraction=None))
    assert code == 0, err
    assert re.search(r" 1/1 +0\.69", out)
    assert re.search(r"1 step, .* [1-9][\d,]* tokens/s\n.*\nstep 1 +0\.69", out)
    code, out, err = tether("train", recipe(max_steps=1, logging_strategy="no", eval_fraction=None))
    assert code == 0, err
    assert " 1/1" not in out and "tokens/s" not in out and "rewards/chosen" not in out


def test_a_run_that_becomes_nan_is_one_message_and_leaves_the_last_checkpoint(
    tether: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    """A learning rate that leaves finite weights after the first step, and no finite loss after them."""
    path = recipe(learning_rate=1e30, save_steps=1, logging_steps=2, eval_fraction=None)
    code, out, err = tether("train", path)
    assert code == 2
    assert err.startswith("tether: Cannot continue training: the loss of step 2 is NaN or infinite.\n  ")
    assert "Traceback" not in err and " 2/4" not in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["checkpoint-1"]
    weights = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_float16_is_refused_before_anything_is_written(tether: Run, recipe: Callable[..., str], tmp_path: Path) -> None:
    code, _, err = tether("train", recipe(dtype="float16"))
    assert code == 2 and err.startswith("tether: Cannot use weights in `float16`")
    assert not (tmp_path / "out").exists()


def test_accuracy_of_pairs_that_are_all_tied_is_no_figure(tether: Run, recipe: Callable[..., str]) -> None:
    code, out, err = tether("train", recipe(max_steps=2, logging_steps=1))
    assert code == 0, err
    for row in (" 1/2", "step 1"):
        assert re.search(row + r" +0\.6931 +\+0\.0000 +- +\+0\.0000 ", out)
    for row in (" 2/2", "step 2"):
        assert re.search(row + r" +0\.\d{4} +[+-]\d\.\d{4} +\d\.\d{3} +[+-]\d\.\d{4} ", out)


def test_rows_of_figures_fit_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    logs = {
        "loss": 12345.67891, "rewards/margins": -1234567890.0, "rewards/accuracies": 1.0, "rewards/chosen": -1234.5678,
        "mean_token_accuracy": 1.0, "pairs/total": 4.0, "pairs/tied": 0.0,
    }  # fmt: skip
    lines = ProgressLines()
    state = SimpleNamespace(global_step=20000, max_steps=20000, is_world_process_zero=True)
    lines.on_train_begin(SimpleNamespace(disable_tqdm=True), state, None)
    lines.on_log(None, state, None, logs)
    lines.on_log(None, state, None, {f"eval_{name}": value for name, value in logs.items()})
    lines.on_log(None, state, None, {"eval_loss": 0.5})
    header, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 and rows[1].split() == ["held", "out", "20000", *rows[0].split()[1:6]]
    assert rows[0].split()[1:3] == ["12345.7", "-1e+09"], "shorter where they would touch the column before"
    assert rows[2].split()[3:] == ["0.5000", "-", "0.000", "-", "-"]
    assert max(map(len, (header, *rows))) <= 80


def test_the_speed_of_a_resumed_run_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 103.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    lines = ProgressLines()
    state = SimpleNamespace(global_step=4, max_steps=8, is_world_process_zero=True)
    args = SimpleNamespace(disable_tqdm=True)
    lines.on_train_begin(args, state, None)
    lines.on_log(args, state, None, {"loss": 1.0, "learning_rate": 0.0, "num_tokens": 5000.0})
    assert lines.tokens_per_second is None
    lines.on_log(args, state, None, {"loss": 1.0, "learning_rate": 0.0, "num_tokens": 5400.0})
    assert lines.tokens_per_second == 200.0


def test_the_speed_leaves_out_evaluations_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 9.0, 10.0, 10.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    lines, args = ProgressLines(), SimpleNamespace(disable_tqdm=True, logging_strategy="no")
    state = SimpleNamespace(global_step=0, max_steps=8, is_world_process_zero=True)
    lines.on_train_begin(args, state, None)
    lines.on_step_end(args, state, None)  # at second 1
    lines.on_evaluate(args, state, None)  # at 5
    lines.on_save(args, state, None)  # at 9
    lines.on_step_end(args, state, None)  # at 10
    lines.on_log(args, state, None, {"loss": 1.0, "num_tokens": 500.0})
    assert lines.tokens_per_second == 250.0


def test_a_held_out_loss_that_is_noisily_above_its_start_is_not_called_worse() -> None:
    traits = SimpleNamespace(means_policy=True, moves=False)
    trainer: Any = SimpleNamespace(
        reference=SimpleNamespace(traits=traits), args=SimpleNamespace(loss_type=["sigmoid"])
    )
    assert not _describe_harm(trainer, {"eval_loss": 0.6932}) and not _describe_harm(trainer, {"eval_loss": 0.703})
    assert _describe_harm(trainer, {"eval_loss": 0.7035})


def test_a_folder_in_which_a_process_trains_is_refused_before_anything_is_loaded(
    tether: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    written = recipe(model="nobody/nothing")  # not asked for
    with RunFolder(tmp_path / "out").held(None, take_over=False):
        code, out, err = tether("train", written)
    assert code == 2 and not out and f"Cannot train in {tmp_path / 'out'}: process " in err


def test_a_model_and_data_that_are_not_there_are_named_at_once(
    tether: Run, recipe: Callable[..., str], tmp_path: Path
) -> None:
    code, _, err = tether("train", recipe(model=str(tmp_path / "m"), train_data="absent.jsonl"))
    assert code == 2 and "2 options are wrong" in err and "there is no such folder" in err and "no such file" in err
    code, _, err = tether("train", recipe(model="nobody/nothing", train_data="absent.jsonl"))
    assert code == 2 and "absent.jsonl` in line" in err and "there is no such file" in err  # before the hub is asked


def test_a_run_that_made_the_model_worse_says_so(tether: Run, recipe: Callable[..., str]) -> None:
    code, out, err = tether("train", recipe(learning_rate=0.05, max_steps=2))
    assert code == 0, err
    loss = re.search(r"held out at the end +(\d\.\d{4})", out).group(1)  # type: ignore[union-attr]
    assert float(loss) > 0.6931
    assert f"worse      the held-out loss, {loss}, is above 0.6931, where it was before training" in out


def test_the_best_weights_are_named_where_they_are_saved(tether: Run, recipe: Callable[..., str]) -> None:
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.03}
    # It falls throughout; which loss is lower, the last digits of a processor's products would decide.
    changes |= {"metric_for_best_model": "eval_rewards/chosen", "greater_is_better": True}
    code, out, err = tether("train", recipe(**changes))
    assert code == 0, err
    assert re.findall(r"^ +held out (\d)", out, re.MULTILINE) == ["2", "4", "2"]
    assert re.search(r"saved .*/out: the weights of checkpoint-2, the best", out)


def test_a_new_run_over_an_old_one_says_so(tether: Run, recipe: Callable[..., str]) -> None:
    assert tether("train", recipe(max_steps=2))[0] == 0
    _, out, _ = tether("train", recipe(max_steps=2))
    assert "checkpoint-2 is there from an earlier run" in out


def interrupt_at(step: int) -> Callable[..., None]:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)

    return on_step_end


def test_ctrl_c_names_its_own_checkpoint_beside_later_ones_of_an_earlier_run(
    tether: Run, recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tether("train", recipe())[0] == 0
    monkeypatch.setattr(ProgressLines, "on_step_end", interrupt_at(1))
    code, out, _ = tether("train", recipe(save_strategy="no"))
    own = str(tmp_path / "out" / "checkpoint-1")
    assert code == 130 and f"The last checkpoint is {own}." in out
    assert shlex.split(out.strip().splitlines()[-1])[-1] == "--resume"


def test_ctrl_c_keeps_the_step_and_resume_goes_on(
    tether: Run, recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tether("train", recipe(output_dir=str(tmp_path / "whole"), save_strategy="no"))[0] == 0
    path = recipe(save_strategy="no")
    with monkeypatch.context() as patched:
        patched.setattr(ProgressLines, "on_step_end", interrupt_at(3))
        before = signal.getsignal(signal.SIGINT)
        code, out, err = tether("train", path)
    assert code == 130 and "stopping after this step" in err
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 3 of 4" in out and not (tmp_path / "out" / "model.safetensors").exists()
    command = shlex.split(out.strip().splitlines()[-1])
    assert command == ["tether", "train", path, "--resume"]
    assert tether(*command[1:])[0] == 0
    whole, resumed = last_logs(tmp_path / "whole"), last_logs(tmp_path / "out")
    assert resumed["rewards/margins"] != 0 and resumed["step"] == whole["step"]
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_ctrl_c_stops_a_process_with_130(recipe: Callable[..., str], tether: Run, tmp_path: Path) -> None:
    path = recipe(max_steps=500, logging_steps=1, save_strategy="no")
    process = in_subprocess(["train", path])
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:1] == ["2/500"]:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    stopped = int(re.search(r"stopped after step (\d+) of 500", out).group(1))  # type: ignore[union-attr]
    assert 2 <= stopped < 500
    code, out, err = tether("train", path, "--resume", "--max_steps", str(stopped + 1))
    assert code == 0, err
    assert re.findall(r"^ +(\d+)/\d+ ", out, re.MULTILINE) == [str(stopped + 1)]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "words"),
    [([], ["--num_processes", "2"]), pytest.param(TORCHRUN, [], marks=pytest.mark.slow)],
    ids=["own launcher", "torchrun"],
)
def test_two_processes_train_one_policy_and_speak_once(
    recipe: Callable[..., str], tmp_path: Path, launcher: list[str], words: list[str]
) -> None:
    path = recipe(per_device_train_batch_size=2, max_steps=2, precompute_ref_log_probs=True)
    process = in_subprocess(["train", path, *words], launcher)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("\nsaved ") == 1 and out.count("11 to train on") == 1
    assert "real_accelerator" not in out + err  # DeepSpeed, where it is installed, has nothing to say
    assert last_logs(tmp_path / "out")["epoch"] == pytest.approx(2 / 3)  # 2 steps of 2 x 2 of 11 pairs: 3 make an epoch


def test_demo_hands_its_options_on(tether: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pytest.importorskip("tether.demo.run")
    asked: list[Any] = []
    monkeypatch.setattr(run, "run_demo", lambda output_dir, **options: asked.append((output_dir, options)))
    assert tether("demo", "--output_dir", "x", "--seed", "3", "--model", "m", "--quick")[0] == 0
    assert asked == [("x", {"model": "m", "seed": 3, "quick": True})]
