"""Who may import whom: the rules as tables, and a small checker that reads the source without importing it.

Every import counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING, through
`importlib.import_module("...")`, or as an attribute (`transformers.Trainer` after `import transformers`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"

# ---------------------------------------------------------------------------------------------- the rules

# A module may import from its own layer and from those above it in this list.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("tether.types", "tether.errors", "tether.option_types"),
    (
        "tether.distributed",
        "tether.scoring",
        "tether.losses",
        "tether.chat",
        "tether.rows",
        "tether.image_rows",
        "tether.tokenizing",
        "tether.data",
        "tether.collators",
        "tether.sampling",
        "tether.store",
    ),
    ("tether.reference",),
    (
        "tether.planner",
        "tether.metrics",
        "tether.config",
        "tether.config_checks",
        "tether.loading",
        "tether.models",
        "tether.batches",
        "tether.arguments",
        "tether.attributes",
        "tether.callbacks",
        "tether.checkpoints",
        "tether.checkpoint_weights",
        "tether.columns",
        "tether.collators",
        "tether.evaluation",
        "tether.model_card",
        "tether.offloading",
        "tether.sets",
        "tether.training_callback",
        "tether.trainer",
        "tether.testing",
        "tether.unread",
    ),
    ("tether.report", "tether.demo", "tether.cli"),
    ("tether", "tether.__main__"),  # the package's own __init__: inside, name the module that defines a thing
)

# Narrower than its layer: what may be imported besides the module itself and the standard library.
ONLY: Mapping[str, tuple[str, ...]] = {
    "tether.types": ("tether.types", "tether.errors", "torch", "jaxtyping"),
    "tether.errors": (),
    "tether.losses": ("tether.types", "tether.errors", "torch", "jaxtyping"),
}


@dataclass(frozen=True)
class Home:
    """A library has few homes in tether; elsewhere it is not imported."""

    library: str
    homes: tuple[str, ...]
    typing_only: tuple[str, ...] = ()  # where it may be imported under `if TYPE_CHECKING:`


HOMES: tuple[Home, ...] = (
    Home(
        "peft",
        (
            "tether.reference.adapter",
            "tether.reference.adapter_parts",
            "tether.reference.adapter_export",
            "tether.loading",
            "tether.models",
        ),
        typing_only=("tether.trainer",),
    ),
    Home("sqlite3", ("tether.store",)),
    Home("deepspeed", ("tether.distributed",)),
    Home("torch.distributed.fsdp", ("tether.distributed",)),
    Home("matplotlib", ("tether.report",)),
    Home("transformers.Trainer", ("tether.trainer",)),
    Home("transformers.trainer", ("tether.trainer",)),
    Home("pydantic", ("tether.option_types", "tether.cli.options")),
    Home("typer", ("tether.cli.verbs", "tether.cli.help", "tether.cli.store")),
    Home("pytest", ("tether.testing",)),
    Home("trl", ()),
)

# The store knows no model.
FORBIDDEN: Mapping[str, tuple[str, ...]] = {
    "tether.store": ("transformers", "peft", "accelerate"),
}

# -------------------------------------------------------------------------------------------- the checker


@dataclass(frozen=True)
class Import:
    """One import: the dotted name of what is imported, and where."""

    name: str
    line: int
    typing_only: bool = False


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def find_imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import in the source of `module`, absolute: `from a import b` counts as `a.b`."""
    tree = ast.parse(source)
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    bound: dict[str, str] = {}  # local name -> what it stands for
    for node in ast.walk(tree):
        for name in _imported_names(node, module, is_package, bound):
            yield Import(name, node.lineno, node in typing_only)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, bound)):
            yield Import(name, node.lineno, node in typing_only)


def _imported_names(node: ast.AST, module: str, is_package: bool, bound: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            local = alias.asname or alias.name.partition(".")[0]
            bound[local] = alias.name if alias.asname else local
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        origin = _origin(node, module, is_package)
        for alias in node.names:
            bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
            yield f"{origin}.{alias.name}"
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def _origin(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _dotted(node: ast.expr, bound: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute) and (value := _dotted(node.value, bound)):
        return f"{value}.{node.attr}"
    return None


def layer_of(name: str) -> int | None:
    """The layer of a module of tether (or of something in it); None for a module that no layer names."""
    for number, modules in enumerate(LAYERS):
        if any(within(name, module) for module in modules if module != "tether"):
            return number
    return len(LAYERS) - 1 if name == "tether" else None


def broken_rules(module: str, imported: Import, modules: frozenset[str]) -> Iterator[str]:
    """What the import breaks, in words. `modules` are all modules of tether."""
    name = imported.name
    if within(name, "tether"):
        target = name if any(within(name, m) for m in modules if m != "tether") else "tether"
        own, other = layer_of(module), layer_of(target)
        if own is None:
            yield f"{module} is in no layer: add it to LAYERS"
        elif other is None:
            yield f"{target} is in no layer: add it to LAYERS"
        elif other > own:
            yield f"layer {own} may not know layer {other}"
    for subject, allowed in ONLY.items():
        standard = name.partition(".")[0] in sys.stdlib_module_names
        if within(module, subject) and not standard and not any(within(name, a) for a in (subject, *allowed)):
            yield f"{subject} may import only {', '.join(allowed) or 'the standard library'}"
    for home in HOMES:
        allowed = home.homes + (home.typing_only if imported.typing_only else ())
        if within(name, home.library) and not any(within(module, a) for a in allowed):
            yield f"{home.library} has its home in {', '.join(home.homes) or 'no file of tether'}"
    for subject, libraries in FORBIDDEN.items():
        for library in libraries:
            if within(module, subject) and within(name, library):
                yield f"{subject} may not know {library}"


def violations(sources: Mapping[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """All broken rules in `sources`: module name -> source; `packages` are the `__init__` files."""
    modules = frozenset(sources)
    known = modules | {module for layer in LAYERS for module in layer}
    return sorted(
        {
            f"{module}:{imported.line} imports {imported.name}: {reason}"
            for module, source in sources.items()
            for imported in find_imports(source, module, module in packages)
            for reason in broken_rules(module, imported, known)
        }
    )


def read_sources(root: Path) -> tuple[dict[str, str], frozenset[str]]:
    """The source of every module under `root`, and the names of those that are packages."""
    sources, packages = {}, set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
        if parts[-1] == "__init__":
            packages.add(name)
    return sources, frozenset(packages)


# ---------------------------------------------------------------------------------------------- the tests


def test_layering_of_the_source_holds() -> None:
    found = violations(*read_sources(SOURCE))
    assert not found, "imports that DESIGN's layering forbids:\n  " + "\n  ".join(found)


def test_every_module_has_its_layer() -> None:
    sources, _ = read_sources(SOURCE)
    assert [module for module in sources if layer_of(module) is None] == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("tether.types", "import tether.scoring.head", "layer 0 may not know layer 1"),
        ("tether.scoring.score", "from tether.reference import base", "layer 1 may not know layer 2"),
        ("tether.scoring.score", "from ..reference.base import Reference", "layer 1 may not know layer 2"),
        ("tether.reference.build", "from tether.trainer import DPOTrainer", "layer 2 may not know layer 3"),
        ("tether.reference.build", "from .. import trainer", "layer 2 may not know layer 3"),
        ("tether.reference.build", "from tether import DPOTrainer", "layer 2 may not know layer 5"),
        ("tether.trainer", "def f():\n    from tether.report import page", "layer 3 may not know layer 4"),
        ("tether.trainer", "import importlib\nimportlib.import_module('tether.cli')", "may not know layer 4"),
        ("tether.utils", "import tether.types", "is in no layer"),
        ("tether.losses", "import numpy", "losses may import only"),
        ("tether.losses", "from tether.data import rows", "losses may import only"),
        ("tether.errors", "import torch", "only the standard library"),
        ("tether.store.key", "def f():\n    import transformers", "store may not know transformers"),
        ("tether.reference.base", "import sqlite3", "sqlite3 has its home in tether.store"),
        ("tether.reference.frozen", "from peft import PeftModel", "peft has its home"),
        ("tether.trainer", "from peft import PeftModel", "peft has its home"),
        ("tether.trainer", "from torch.distributed.fsdp import fully_shard", "fsdp has its home"),
        ("tether.trainer", "from torch.distributed import fsdp", "fsdp has its home"),
        ("tether.trainer", "import torch\ntorch.distributed.fsdp.fully_shard", "fsdp has its home"),
        ("tether.cli.plan", "import matplotlib.pyplot as plt", "matplotlib has its home in tether.report"),
        ("tether.config", "from transformers import Trainer", "Trainer has its home in tether.trainer"),
        ("tether.config", "import transformers as tf\ntf.Trainer", "Trainer has its home in tether.trainer"),
        ("tether.metrics", "from transformers.trainer import Trainer", "has its home in tether.trainer"),
        ("tether.config", "import trl", "trl has its home in no file"),
        ("tether.reference.checks", "import pytest", "pytest has its home in tether.testing"),
        ("tether.testing.contract", "import trl", "trl has its home in no file"),
    ],
)
def test_the_checker_catches_a_violation(module: str, source: str, reason: str) -> None:
    found = violations({module: source})
    assert len(found) >= 1 and any(reason in line for line in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tether.losses", "import math\nimport torch\nfrom tether.types import PairBatch"),
        ("tether.losses", "from .types import PairBatch\nimport torch.nn.functional as F\nF.logsigmoid"),
        ("tether.store.log_prob_store", "import sqlite3, torch\nfrom tether.store.key import key"),
        ("tether.reference.adapter", "import peft\nfrom tether.scoring.score import score"),
        ("tether.trainer", "if TYPE_CHECKING:\n    from peft import PeftConfig"),
        ("tether.trainer", "from transformers import Trainer\nfrom tether.reference.build import build"),
        ("tether.config", "from transformers import TrainingArguments"),
        ("tether.config", "from transformers.trainer_utils import IntervalStrategy"),
        ("tether.cli", "from tether.demo import run_demo\nfrom tether.report import page"),
        ("tether", "from tether.trainer import DPOTrainer"),
    ],
)
def test_the_checker_lets_the_allowed_pass(module: str, source: str) -> None:
    assert violations({module: source}) == []


def test_the_checker_resolves_relative_imports_of_a_package() -> None:
    sources = {"tether.store": "from .key import key", "tether.store.key": "from .. import reference"}
    assert violations(sources, frozenset({"tether.store"})) == [
        "tether.store.key:1 imports tether.reference: layer 1 may not know layer 2"
    ]
