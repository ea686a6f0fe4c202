"""What the documentation shows runs: examples in docstrings, and the python in README.md and docs/."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tether
from support.tiny import tiny_model, tiny_tokenizer
from support.tiny_vision import tiny_processor, tiny_vision_model
from support.trl_oracle import trl_tokens

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if "```python" in path.read_text())
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(tether.__path__, "tether.") if not module.name.endswith("__main__")
)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_there_are_examples_in_docstrings() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_the_pages_compiles(page: Path) -> None:
    for number, block in enumerate(python_blocks(page)):
        compile(block, f"{page.name}, python block {number}", "exec")


def test_the_first_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = python_blocks(ROOT / "README.md")[0]
    assert "DPOTrainer(" in block and "trainer.train()" in block and '"path/or/name"' in block
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block.replace("path/or/name", str(tmp_path / "model")), "README.md", "exec"), names)
    trainer = names["trainer"]
    assert isinstance(trainer, tether.DPOTrainer) and trainer.state.global_step == trainer.state.max_steps > 0


def test_each_format_of_the_data_page_trains_with_trls_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    names: dict[str, Any] = {}
    formats = 0
    for block in python_blocks(ROOT / "docs" / "data.md"):
        names.pop("rows", None)
        exec(compile(block, "data.md", "exec"), names)
        if "rows" in names:
            prompt_ids = names["train"](tiny_model(), tokenizer, names["rows"])
            expected = names["rows"] if "prompt_ids" in names["rows"][0] else trl_tokens(names["rows"], tokenizer)
            assert prompt_ids == expected[0]["prompt_ids"]
            formats += 1
    assert formats == 8  # the seven, and one with a margin


def test_the_rows_of_the_vision_page_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in python_blocks(ROOT / "docs" / "vision.md"):
        exec(compile(block, "vision.md", "exec"), names)
    trainer = names["train"](tiny_vision_model(), names["rows"], tiny_processor())
    assert trainer.state.global_step == 1 and trainer.reference.num_passes == 1


def test_completion_shows_the_public_names_and_no_others() -> None:
    in_a_fresh_interpreter = "import tether; print(*dir(tether))"
    command, environment = [sys.executable, "-c", in_a_fresh_interpreter], {"PYTHONPATH": str(ROOT / "src")}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert set(shown.stdout.split()) == set(tether.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    for name in tether.__all__:
        thing = getattr(tether, name)
        assert isinstance(thing, str) or (thing.__doc__ and len(thing.__doc__) > 40), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tether.nothing
