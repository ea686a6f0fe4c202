"""What the command says of typical mistakes: one sentence first that names the option and what is wrong with it.

The whole text of each is in `tests/cli_mistakes.txt`; `TETHER_WRITE_MISTAKES=1` writes it anew, to be read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from support.tiny import tiny_model, tiny_pairs, tiny_tokenizer
from tether.cli import main

SNAPSHOTS = Path(__file__).with_name("cli_mistakes.txt")

# Name of the mistake -> lines of the recipe after model and data (None: no recipe), and words after the verb.
MISTAKES: dict[str, tuple[str | None, list[str]]] = {
    # names
    "a misspelt option": ("bta: 0.2", []),
    "a misspelt flag": ("", ["--learning-rat", "1e-5"]),
    "an option of nothing": ("frobnicate: 1", []),
    "an option of an earlier TRL": ("rpo_alpha: 1.0", []),
    "an option of an earlier transformers": ("", ["--torch_dtype", "bfloat16"]),
    "an option that TRL's script has": ("lora_task_type: SEQ_CLS", []),
    "an option twice": ("beta: 0.1\nbeta: 0.2", []),
    "an option under two names": ("dataset_name: other.jsonl", []),
    # values
    "a word for a number": ("beta: strong", []),
    "a fraction for a whole number": ("max_steps: 2.5", []),
    "a word for a truth value": ("sync_ref_model: perhaps", []),
    "a list for one value": ("learning_rate: [1e-5, 1e-6]", []),
    "no value": ("learning_rate:", []),
    "a flag without its value": ("", ["--beta"]),
    "a misspelt choice": ("truncation_mode: keep_strat", []),
    "a misspelt loss": ("", ["--loss_type", "sigmoyd"]),
    "a misspelt scheduler": ("lr_scheduler_type: cosin", []),
    "a word for a mapping": ("", ["--model_init_kwargs", "attn=eager"]),
    "a value out of range": ("beta: -1", []),
    "a share above one": ("eval_fraction: 1.5", []),
    # several
    "two at once": ("bta: 0.2\nmax_steps: many", []),
    "recipe and flags at once": ("bta: 0.2", ["--lora_r", "two", "--ouput_dir", "x"]),
    "two contradictions at once": ("lora_alpha: 8\neval_data: a.jsonl\neval_fraction: 0.1", []),
    "an option of tokens": ("label_smoothing_factor: 0.1", []),
    "a row cut over processes": ("model_init_kwargs: {tp_size: 2}", []),
    # YAML and words
    "a control character": ("beta: \x01", []),
    "a folder as the recipe": (None, ["model"]),
    "YAML that is none": ("beta: [0.1", []),
    "a colon without a space": ("beta:0.1\nseed: 1", []),
    "a recipe that is a list": ("- beta: 0.1", []),
    "variables that are a list": ("env: [A]", []),
    "a part without a path": ("datasets: [{name: en}]", []),
    "a misspelt option of a part": ("datasets: [{path: a.jsonl, colums: [chosen]}]", []),
    "a recipe behind the flags": (None, ["--precompute_ref_log_probs", "recipe.yaml"]),
    "two recipes": ("", ["other.yaml"]),
    "a recipe that is not there": (None, ["nowhere.yaml"]),
    "nothing at all": (None, []),
    # what does not go together
    "sync and precompute": ("sync_ref_model: true\nprecompute_ref_log_probs: true", []),
    "an adapter's option without one": ("lora_target_modules: [q_proj]", []),
    "evaluation without held-out pairs": ("eval_strategy: steps", []),
    "a store without precompute": ("ref_store: store.sqlite", []),
    "a stream without an end": ("streaming: true", []),
    "sharding that was not chosen": ("zero_stage: 3", []),
    "a configuration that is not there": ("accelerate_config: zero4", []),
    # files
    "a model that is not there": ("", ["--model", "./modle"]),
    "a GGUF file as the model": ("", ["--model", "model/weights.gguf"]),
    "a GGUF file that is not there": ("", ["--model_init_kwargs", '{"gguf_file": "weights.gguf"}']),
    "pairs that are not there": ("", ["--train_data", "pears.jsonl"]),
    "a file of another kind": ("", ["--train_data", "recipe.yaml"]),
    "wrong columns": ("", ["--train_data", "columns.jsonl"]),
    "a checkpoint that is not there": ("", ["--resume", "out/checkpoint-7"]),
    # verbs
    "a misspelt verb": (None, ["trian"]),
    "a misspelt verb of the store": (None, ["store", "inof"]),
    "a misspelt option of the demo": (None, ["demo", "--sede", "1"]),
    "a store that is not there": (None, ["store", "info", "--store", "nowhere.sqlite"]),
    "precompute without a reference": (
        None,
        ["precompute", "--model", "m", "--train_data", "x.jsonl", "--reference_free", "--beta", "-1"],
    ),
    "a part of no whole": (None, ["precompute", "--shard", "3/2"]),
}
OTHER_VERBS = ("trian", "store", "demo", "precompute")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The texts as they were read and approved."""
    blocks = re.split(r"^## (.*)\n", SNAPSHOTS.read_text() if SNAPSHOTS.is_file() else "", flags=re.MULTILINE)[1:]
    return {name: text.strip("\n") for name, text in zip(blocks[::2], blocks[1::2], strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer(pad=True).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny_pairs(8))))
    renamed: list[dict[str, Any]] = [{"question": row["prompt"], **row} for row in tiny_pairs(4)]
    for row in renamed:
        row["good"], row["bad"] = row.pop("chosen"), row.pop("rejected")
    (folder / "columns.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_these_words(
    name: str, folder: Path, told: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"})
    recipe, words = MISTAKES[name]
    if recipe is not None:
        Path("recipe.yaml").write_text(f"model: model\ntrain_data: pairs.jsonl\n{recipe}\n")
        words = ["recipe.yaml", *words]
    command = words if words[:1] and words[0] in OTHER_VERBS else ["train", *words]
    assert main(command) == 2
    text = capsys.readouterr().err.replace(str(folder), "FOLDER").rstrip()
    if os.environ.get("TETHER_WRITE_MISTAKES"):
        told[name] = text
        SNAPSHOTS.write_text("".join(f"## {known}\n{told[known]}\n\n" for known in MISTAKES if known in told))
    assert text == told.get(name), "read it, and write it anew with TETHER_WRITE_MISTAKES=1"


def test_every_text_of_the_file_is_of_a_mistake_that_is_tried(told: dict[str, str]) -> None:
    assert set(told) == set(MISTAKES) and len(told) >= 40
