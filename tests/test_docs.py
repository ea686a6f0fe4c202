"""What the documentation shows runs, its links lead somewhere, and what stands twice is the same.

`TETHER_WRITE_DOCS=1` copies the table of references from docs/choose-a-reference.md into README.md.
"""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tether
from support.tiny import tiny_model, tiny_tokenizer
from support.tiny_vision import tiny_processor, tiny_vision_model
from support.trl_oracle import trl_tokens
from tether.cli.help import REFERENCE_TABLE

ROOT = Path(__file__).resolve().parent.parent
TEXTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")))
PAGES = [path for path in TEXTS if "```python" in path.read_text()]
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


def _run(page: Path, names: dict[str, Any], model: Path) -> None:
    """Runs the blocks of a page one after the other, as one script."""
    for block in python_blocks(page):
        exec(compile(block.replace("path/or/name", str(model)), page.name, "exec"), names)


def test_the_ten_lines_of_the_readme_log_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    from toy import toy_model, toy_tokenizer  # type: ignore[import-not-found, unused-ignore]

    toy_model().save_pretrained("model")
    toy_tokenizer().save_pretrained("model")
    block = python_blocks(ROOT / "README.md")[0]
    assert '"path/or/name"' in block and len([line for line in block.splitlines() if line]) == 9
    names: dict[str, Any] = {}
    _run(ROOT / "README.md", names, tmp_path / "model")
    assert names["trainer"].state.global_step == 20
    printed = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    shown = re.findall(r"^\{'loss'.*\}$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(shown) == len(printed) == 2
    for expected, line in zip(shown, printed, strict=True):
        logged = dict(re.findall(r"'(\S+)': '(\S+)'", line))
        for name, value in re.findall(r"'(\S+)': '(\S+)'", expected):
            assert float(logged[name]) == pytest.approx(float(value), rel=0.02), name


@pytest.mark.parametrize("name", ["without-the-trainer", "your-own-reference"])
def test_the_blocks_of_the_page_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    _run(ROOT / "docs" / f"{name}.md", {"__name__": "page"}, tmp_path / "model")


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


# ------------------------------------------------------------------------------------ what stands twice, and links

REFERENCES = re.compile(r"(?<=<!-- references -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)


def test_the_table_of_references_is_the_same_everywhere() -> None:
    readme = ROOT / "README.md"
    found = REFERENCES.search((ROOT / "docs" / "choose-a-reference.md").read_text())
    assert found
    if os.environ.get("TETHER_WRITE_DOCS"):
        readme.write_text(REFERENCES.sub(lambda _: found[0], readme.read_text()))
    assert found[0] in readme.read_text(), "write it anew with TETHER_WRITE_DOCS=1"
    kinds = set(re.findall(r"\*\*(.+?)\*\*", found[0]))
    assert {kind for kind in kinds if kind not in str(tether.DPOTrainer.__doc__)} == set()
    assert {kind for kind in kinds if kind not in REFERENCE_TABLE} == {"BEMA", "given"}, "have no option"


def test_the_measured_numbers_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "write them anew with `python benchmarks/readme.py`"
    evidence = (ROOT / "docs" / "evidence-references.md").read_text()
    gaps = re.findall(r"^\| .* \| (\d\S*) \| \S+ \|$", evidence, flags=re.MULTILINE)
    assert set(gaps) == {"0"}
    assert f"For each of the {len(gaps)} models and adapters" in (ROOT / "README.md").read_text()


MEASURED = """
A step is <!-- measured:real-model-cpu least --><!-- end --> to <!-- measured:real-model-cpu most --><!-- end --> times.
<!-- measured:real-model-cpu -->
<!-- end -->
<!-- measured:real-model-cpu explicit -->
<!-- end -->
<!-- measured:real-model-cpu scoring -->
<!-- end -->
<!-- measured:real-model-cpu building -->
<!-- end -->
"""
LINES = """
A step is 2.5 to 4.0 times.
| pairs | in a step | threads | dtype | reference | Tether | TRL | times faster | of the limit | peak memory, Tether / TRL |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| short | 2 | 2 | float32 | explicit | 1.25 s | 5.00 s | 4.0 | 80% | 2.0 / 3.5 GiB |
| short | 2 | 1 | bfloat16 | implicit | 2.00 s | 5.00 s | 2.5 |  |  |

Measured 2026-01-02 on a chip, 2 threads; trl 1.

| pairs | in a step | Tether | TRL | times faster | peak memory, Tether / TRL |
| --- | --- | --- | --- | --- | --- |
| short | 2 | 1.2 s | 5.0 s | 4.0 | 2.0 / 3.5 GiB |

| pairs | in a batch | reference | Tether | TRL | times faster |
| --- | --- | --- | --- | --- | --- |
| short | 2 | explicit | 20.0 s | 60.0 s | 3.0 |

| reference | loading the model | trainer, Tether | trainer, TRL |
| --- | --- | --- | --- |
| implicit | 0.10 s | 1.50 s | 0.50 s |
"""


def test_the_tables_of_the_real_model_have_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(tether: float, trl: float) -> dict[str, Any]:
        return {"median_seconds": {"tether": tether, "trl": trl}, "times_faster": {"trl": trl / tether}}

    kept = {"peak_bytes": {"tether": 2 * 2**30, "trl": 3.5 * 2**30}, "scoring_100_pairs": compared(20, 60)}
    short = {"pairs": "short", "batch": 2}
    two = short | {"threads": 2, "reference": "explicit", "dtype": "float32"} | compared(1.25, 5) | kept
    two["times_faster"]["limit"] = 0.8
    one = short | {"threads": 1, "reference": "implicit", "dtype": "bfloat16"} | compared(2, 5)
    record = {
        "benchmark": "real-model",
        "date": "2026-01-02",
        "machine": {"device": "cpu", "name": "a chip", "threads": 2},
        "versions": {"trl": "1"},
        "settings": {},
        "results": {
            "steps": [two, one],
            "building": [{"reference": "implicit", "load_seconds": 0.1} | compared(1.5, 0.5)],
        },
    }
    (tmp_path / "real-model-cpu.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text(MEASURED)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    readme.main()
    written = re.sub("<!-- .*? -->\n?", "", (tmp_path / "README.md").read_text())
    assert written.split() == LINES.split()


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_the_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(other), f"{page.name}: {target}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_the_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # names what was
    for name in re.findall(r"`((?:docs|tests|benchmarks|recipes|examples|src)/[\w./-]*\w)`", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="the site needs the extra `docs`: pip install '.[docs]'")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    for page in (ROOT / "docs").glob("**/*.md"):
        made = tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix("") / "index.html"
        assert made.is_file() or page.name == "index.md", page.name
