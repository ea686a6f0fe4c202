"""What an install holds: a plain one trains, and what is left out of it is missed with a clear line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OF_EXTRAS = ("matplotlib", "bitsandbytes", "deepspeed", "trl", "pytest", "PIL", "rich")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_trainer_imports_without_extras_and_a_report_says_what_it_lacks(tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules.update(dict.fromkeys({OF_EXTRAS!r}))
from tether import DPOTrainer
from tether.errors import MissingPackageError
try:
    import tether.report
except MissingPackageError as error:
    print(error)
"""
    found = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT / "src"))
    assert found.returncode == 0, found.stderr
    assert "Cannot draw a report: matplotlib, which draws its curves, is not installed.\n" in found.stdout
    assert "pip install matplotlib" in found.stdout


@pytest.mark.parametrize(
    "line",
    [
        "from tether import DPOConfig, DPOTrainer",
        "from tether.trainer import BEMACallback, DPOConfig, DPOTrainer",
        "from tether.trainer.dpo_trainer import DPOTrainer",
        "from tether.data import DataCollatorForPreference, PairCollator, as_dataset, batch_of, tokenize_pairs",
        "from tether.losses import LOSSES, LossOptions, Objective",
        "from tether.reference import ExplicitReference, Reference, WrappingReference",
        "from tether.scoring import score",
        "from tether.store import LogProbStore",
        "from tether.types import PairBatch, PairScores, Response, ResponseLogProbs",
        "from tether.errors import ConfigurationError, TetherError",
        "from tether.testing import ReferenceContract",
    ],
)
def test_a_documented_import_path_works(line: str) -> None:
    exec(line, {})


def test_every_dependency_has_a_floor_and_a_tested_version_and_the_readme_names_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = [word for words in (project["dependencies"], *extras.values()) for word in words if "tether[" not in word]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    known = {name.lower().replace("_", "-") for name in pinned} | {
        "psutil",
        "setuptools",
        "tqdm",
        "xxhash",
    }  # not felt by us
    for word in own:
        name = re.match(r"[\w.-]+", word)
        assert name and re.search(r"[>=]=\d", word), word
        assert name[0].lower().replace("_", "-") in known, word
    table = (ROOT / "README.md").read_text().partition("| extra | for |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", table.replace("`tether demo`", "").replace("`make dev`", ""))) == set(extras)


@pytest.mark.slow  # downloads, and installs torch once more
@pytest.mark.timeout(1800)
def test_a_fresh_install_without_extras_trains(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"
    assert run(sys.executable, "-m", "venv", environment, cwd=tmp_path).returncode == 0
    install = run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", ROOT, cwd=tmp_path)
    assert install.returncode == 0, install.stderr
    trained = run(python, ROOT / "examples" / "explicit.py", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "the reference holds" in trained.stdout
    assert (tmp_path / "out" / "explicit" / "README.md").is_file(), "the card's template is in the wheel"
    demo = run(environment / "bin" / "tether", "demo", cwd=tmp_path)
    assert demo.returncode != 0 and "pip install matplotlib" in demo.stderr
    megabytes = run("du", "-sm", environment, cwd=tmp_path).stdout.split()[0]
    print(f"a fresh install without extras: {megabytes} MB")
