"""Settings that hold for every test, and the fixtures that several files share.

The environment is set before torch and transformers are imported. TETHER_TYPECHECK=0 switches off the
checking of shapes and types (jaxtyping with beartype) in the modules named below; it is on otherwise. TETHER_ROUNDING
and OMP_NUM_THREADS are what `make numerics` varies.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_DISABLED"] = "true"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

from support.rounding import OtherRounding

CHECKED_MODULES = [
    "tether.types",
    "tether.losses",
    "tether.scoring.head",
    "tether.scoring.images",
    "tether.scoring.layout",
    "tether.scoring.router",
    "tether.scoring.score",
]
ROOT = Path(__file__).resolve().parent.parent

if os.environ.get("TETHER_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook(CHECKED_MODULES, "beartype.beartype")

# The models are tiny: a second thread only waits (on busy cores 20 times longer). More are for `make numerics`.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

# No deadline: how long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("tether", deadline=None)
hypothesis.settings.load_profile("tether")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Accelerate collects garbage in each `train()`, which takes 0.3 s where it looks at all imported modules again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def tether_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TETHER_HOME for each test, so that none reads or writes the user's store."""
    home = tmp_path_factory.mktemp("tether-home")
    monkeypatch.setenv("TETHER_HOME", str(home))
    return home


@pytest.fixture(scope="session", autouse=True)
def other_rounding() -> Iterator[None]:
    """All tests under the rounding of another processor, TETHER_ROUNDING times as coarse, where that is set."""
    times = float(os.environ.get("TETHER_ROUNDING", 0))
    with OtherRounding(times) if times else nullcontext():
        yield
