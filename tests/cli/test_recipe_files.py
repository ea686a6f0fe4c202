"""The recipes of the repository are read as they stand, and the pairs that come with them train."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from support.tiny import tiny_model, tiny_tokenizer
from tether.cli import launch, main
from tether.cli.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAIRS = ROOT / "examples" / "pairs.jsonl"


@pytest.fixture(autouse=True)
def from_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []  # a launcher would take this process's place
    monkeypatch.setattr(launch, "launch", lambda given, *_: started.append(dict(given)))
    recipe = read_recipe("train", [str(path.relative_to(ROOT))])
    script, config = recipe.script, recipe.config
    assert recipe.given["output_dir"] == f"out/{path.stem.replace('_', '-')}"
    assert script.train_data == "examples/pairs.jsonl" or path.stem == "vision"
    said = {
        "lora": script.lora_r == 16,
        "qlora": script.load_in_4bit and script.lora_r == 16,
        "full_zero3": started == [{"num_processes": "8", "accelerate_config": "zero3"}] and script.lora_r is None,
        "tr_dpo": config.sync_ref_model,
        "vision": config.precompute_ref_log_probs and config.max_length is None,
    }
    assert said[path.stem]
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"tether train recipes/{path.name}" in first, "how to run it"


def test_the_first_recipe_trains_from_a_clone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    small = f"--model {tmp_path}/model --output_dir {tmp_path}/out --max_steps 1 --save_strategy no --max_length none"
    assert main(["train", "recipes/lora.yaml", *small.split()]) == 0, capsys.readouterr().err
    assert "rewards/chosen" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_pairs_are_conversations_whose_answers_differ() -> None:
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 32
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"} and row["prompt"][-1]["role"] == "user"
        assert [turn["role"] for turn in (*row["chosen"], *row["rejected"])] == ["assistant", "assistant"]
        assert row["chosen"] != row["rejected"]
