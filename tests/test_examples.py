"""The examples run: each is what a newcomer copies first."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest

from support.scoring_server import scoring_server
from tether.cli import main
from tether.reference import ExplicitReference

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STRATEGIES = ("explicit", "implicit", "precomputed", "synchronized", "vision")
OWN = ("own_reference", "http_reference", "ensemble_reference", "own_loop", "own_losses")
TOYS = ("toy", "toy_vision")


@pytest.fixture(autouse=True)
def beside_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They import what lies beside them, and write where they are run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*STRATEGIES, *OWN])
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = load(EXAMPLES / f"{name}.py")
    if name == "http_reference":
        with scoring_server(ExplicitReference(load(EXAMPLES / "toy.py").toy_model())) as url:
            example.main(url, max_steps=4)
    else:
        example.main(max_steps=4)
    out = capsys.readouterr().out
    said = {
        "explicit": r"holds 30\d,\d{3} bytes and made \d+ passes",
        "implicit": r"holds 0 bytes.*\n1 \+ 2 = \S+, says the policy; \S+, its reference",
        "precomputed": r"beta 0.1: [1-9]\d* reference passes, 0 bytes\n(.*\n)*beta 0.5: 0 reference passes",
        "synchronized": r"moved 2 times",
        "vision": r"held-out rewards/accuracies: \d",
        "own_reference": r"wrote down [1-9]\d* pairs",
        "http_reference": r"the server scored [1-9]\d* responses",
        "ensemble_reference": r"two models made [1-9]\d* passes",
        "own_losses": r"token_weighted: 0\.\d+\n(.*\n)*confidence_weighted: 0\.\d+\n(.*\n)*with_kl_term: 0\.\d+\n",
        "own_loop": r"step 4: loss 0\.\d+, rewards/margins .*\nthe reference moved 0 times",
    }
    assert re.search(said[name], out), out
    weights = {path.relative_to(f"out/{name}").as_posix() for path in Path(f"out/{name}").rglob("*.safetensors")}
    saved = {
        "explicit": {"model.safetensors"},
        "implicit": {"adapter_model.safetensors"},
        "precomputed": {"beta-0.1/model.safetensors", "beta-0.5/model.safetensors"},
        "synchronized": {"model.safetensors", "reference/model.safetensors"},
    }
    assert name not in saved or weights == saved[name]


def test_every_script_is_covered() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*STRATEGIES, *OWN, *TOYS, "demo_pairs"}


def test_example_scripts_stay_short() -> None:
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 45 for name in STRATEGIES)
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60 for name in OWN)


def test_the_recipe_trains_the_model_that_its_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--steps 2 --batch_size 1 --block 32 --vocab_size 512 --hidden_size 64 --layers 1"
    monkeypatch.setattr(sys, "argv", ["make_model.py", "--output", str(tmp_path / "base"), *small.split()])
    load(EXAMPLES / "real_pairs" / "make_model.py").main()
    assert "32 documents" in (out := capsys.readouterr().out) and "held-out loss" in out
    monkeypatch.chdir(EXAMPLES.parent)  # paths of the recipe start at the root of a clone
    changes = f"--model {tmp_path}/base --output_dir {tmp_path}/out --max_steps 1 --per_device_train_batch_size 2"
    assert main(["train", "examples/real_pairs/recipe.yaml", *changes.split()]) == 0
    out = capsys.readouterr().out
    assert "margin" in out and "rewards/chosen" in out


def test_demo_pairs_prefer_the_first_sentence_to_all_whole_ones() -> None:
    pair_of = load(EXAMPLES / "demo_pairs.py").pair_of
    row = pair_of("Why?", " Boats float on water, since they are light. Stones sink! They are cut o")
    assert {side: message["content"] for side, (message,) in row.items()} == {
        "prompt": "Why?",
        "chosen": "Boats float on water, since they are light.",
        "rejected": "Boats float on water, since they are light. Stones sink!",
    }
    assert pair_of("Why?", "Boats float on water, since they are light.") is None  # there is no second
    assert pair_of("Why?", "Because. Boats float on water, since they are light.") is None  # the first says nothing
