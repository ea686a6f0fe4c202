"""Who may import what: the rules that the contracts of import-linter in pyproject.toml cannot express.

Those know modules of Tether and whole libraries. Here are parts of a library that have one home, what a few modules may
import at all, and a question that has one home.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"

# Besides itself and the standard library.
ONLY = {
    "tether/types": ("tether.types", "tether.errors", "torch", "jaxtyping"),
    "tether/errors": ("tether.masking",),
    "tether/masking": (),
    "tether/losses": ("tether.losses", "tether.types", "tether.errors", "tether.refusals", "torch", "jaxtyping"),
}
# Part of a library -> its homes.
HOMES = {
    "torch.distributed.fsdp": ("tether/distributed",),
    "transformers.Trainer": ("tether/trainer", "tether/demo/models"),  # trains its tiny model
    "transformers.trainer": ("tether/trainer",),
}
# FSDP2 with CPU offload keeps its shards where it does not compute.
_SHARDS_DEVICE = re.compile(r"next\(.*\bparameters\(\)\)\.device(\.type)?")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imported_names(source: str) -> Iterator[str]:
    """Every import, wherever it stands, and every dotted name: `from a import b` and `a.b` both count as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def broken_rules(place: str, source: str) -> list[str]:
    """What a file at `place` (without its ending, below `src`) imports and may not."""
    names = list(imported_names(source))
    homeless = [
        f"{name} has its home in {home[0]}"
        for name in names
        for part, home in HOMES.items()
        if within(name, part) and not place.startswith(home)
    ]
    if not place.startswith(("tether/distributed", "tether/testing", "tether/demo")):
        homeless += ["ask `device_of(model)`, not a shard" for name in names if _SHARDS_DEVICE.fullmatch(name)]
    for subject, allowed in ONLY.items():
        if place.startswith(subject):
            top_levels = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))
            for name in (found for node in top_levels for found in imported_names(ast.unparse(node))):
                standard = name.partition(".")[0] in sys.stdlib_module_names
                if not standard and not any(within(name, module) for module in allowed):
                    homeless.append(f"{subject} may not import {name}")
    return homeless


def test_the_source_keeps_the_rules() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    places = {path.relative_to(SOURCE).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert [f"{place}: {rule}" for place, source in places.items() for rule in broken_rules(place, source)] == []


@pytest.mark.parametrize(
    ("place", "source", "rule"),
    [
        ("tether/errors", "import torch", "may not import torch"),
        ("tether/losses/table", "import numpy", "may not import numpy"),
        (
            "tether/losses/table",
            "def f():\n    from tether.data.datasets import rows",
            "may not import tether.data.datasets.rows",
        ),
        (
            "tether/trainer/dpo_trainer",
            "from torch.distributed.fsdp import fully_shard",
            "has its home in tether/distributed",
        ),
        ("tether/trainer/batches", "from torch.distributed import fsdp", "has its home in tether/distributed"),
        (
            "tether/trainer/dpo_trainer",
            "import torch\ntorch.distributed.fsdp.fully_shard",
            "has its home in tether/distributed",
        ),
        ("tether/config/dpo_config", "from transformers import Trainer", "has its home in tether/trainer"),
        ("tether/config/dpo_config", "import transformers\ntransformers.Trainer", "has its home in tether/trainer"),
        ("tether/scoring/score", "batch.to(next(model.parameters()).device)", "ask `device_of(model)`"),
        ("tether/data/rows", "from transformers.trainer import Trainer", "has its home in tether/trainer"),
    ],
)
def test_a_broken_rule_is_found(place: str, source: str, rule: str) -> None:
    assert any(rule in found for found in broken_rules(place, source))


def test_the_contracts_of_import_linter_find_what_they_forbid(tmp_path: Path) -> None:
    shutil.copytree(SOURCE / "tether", tmp_path / "tether", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    wrong = {
        "types/batch": "import tether.scoring.head",
        "scoring/score": "from ..reference.base import Reference",
        "reference/identity": "def f():\n    from tether.trainer.dpo_trainer import DPOTrainer",
        "losses/metrics": "from tether import DPOTrainer",
        "nowhere": "import tether.types",
        "store/key": "import torch",
        "reference/base": "import sqlite3",
        "reference/watch": "import pytest",
        "config/dpo_config": "import trl",
    }
    for place, source in wrong.items():
        with (tmp_path / "tether" / f"{place}.py").open("a") as file:
            file.write(f"\n{source}\n")
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "0 kept, 4 broken" in run.stdout, run.stdout
    found = " ".join(run.stdout.split())
    for said in (
        "tether.types.batch -> tether.scoring.head",
        "tether.scoring.score -> tether.reference.base",
        "tether.reference.identity -> tether.trainer.dpo_trainer",
        "tether.losses.metrics -> tether",
        "nowhere",
        "tether.store.key -> torch",
        "tether.reference.base -> sqlite3",
        "tether.reference.watch -> pytest",
        "tether.config.dpo_config -> trl",
    ):
        assert said in found, said
