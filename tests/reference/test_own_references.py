"""The references of the examples pass the contract, as a reader's own should."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.kinds import dropping_gpt2, other_model, synchronized
from support.scoring_server import scoring_server
from tether.reference import ExplicitReference, Reference
from tether.testing import ReferenceContract

pytestmark = pytest.mark.numerics
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OfExample(ReferenceContract):
    tolerance = (1e-5, 5e-5)

    def make_policy(self) -> Any:
        return dropping_gpt2()


class TestOwnReference(OfExample):
    def make_reference(self, policy: Any, folder: Path) -> Reference:
        source = ExplicitReference.of_policy(policy)
        reference: Reference = example("own_reference").LoggedReference(source, folder / "pairs.jsonl")
        return reference


class TestOwnReferenceAroundOneThatMoves(OfExample):
    def make_reference(self, policy: Any, folder: Path) -> Reference:
        source = synchronized()(policy, folder)
        reference: Reference = example("own_reference").LoggedReference(source, folder / "pairs.jsonl")
        return reference


class TestHTTPReference(OfExample):
    @pytest.fixture(autouse=True)
    def servers(self) -> Iterator[None]:
        with ExitStack() as self.running:
            yield

    def make_reference(self, policy: Any, folder: Path) -> Reference:
        url = self.running.enter_context(scoring_server(ExplicitReference.of_policy(policy)))
        reference: Reference = example("http_reference").HTTPReference(url, "gpt2")
        return reference


class TestEnsembleReference(OfExample):
    def make_reference(self, policy: Any, folder: Path) -> Reference:
        members = ExplicitReference.of_policy(policy), ExplicitReference(other_model())
        reference: Reference = example("ensemble_reference").EnsembleReference(*members)
        return reference

    def meant_model(self, policy: Any) -> Any:
        return GeometricMean(policy, other_model())


class GeometricMean(nn.Module):
    """Gives the following token the mean of the models' log-probs, and all other tokens what is left."""

    def __init__(self, *models: Any) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, input_ids: Any, **options: Any) -> Any:
        outputs = [model(input_ids=input_ids) for model in self.models]
        mean = torch.stack([output.logits.double().log_softmax(-1) for output in outputs]).mean(0)
        following = input_ids.roll(-1, -1)[..., None]
        known = mean.gather(-1, following)
        others = torch.log(-torch.expm1(known) / (mean.shape[-1] - 1)).expand(mean.shape)
        outputs[0].logits = others.scatter(-1, following, known)
        return outputs[0]
