"""`WrappingReference`: nothing of the contract is lost in a wrapper, whatever it is around."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from support.kinds import BATCH, KINDS, Kind, OfKind, dropping_gpt2, synchronized
from tether.errors import ConfigurationError
from tether.reference import ExplicitReference, PrecomputedReference, Reference, WrappingReference
from tether.store import LogProbStore

MEMBERS = sorted(name for name in vars(Reference) if not name.startswith("_"))
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "log_probs": ((BATCH,), {}),
    "changed_tensors": ((), {}),
    "held_by_others": ((), {}),
    "keep": ((["weight"],), {}),
    "in_policy": ((), {}),
    "figures": ((), {}),
    "export": ((Path("folder"),), {"merged": True}),
    "prepare": (({"train": list},), {"show_progress": True}),
    "advance": ((3,), {}),
    "save": ((Path("folder"),), {}),
    "load": ((Path("folder"),), {}),
    "release": ((), {}),
}
RETURNS_NOTHING = {"export", "prepare", "save", "load", "release"}


def test_wrapping_reference_has_every_member_of_the_contract() -> None:
    own = {name for name in vars(WrappingReference) if not name.startswith("_")}
    assert own == {*MEMBERS, "wrapped"}


@pytest.mark.parametrize("name", MEMBERS)
def test_wrapping_reference_forwards(name: str) -> None:
    source = MagicMock(spec=Reference)
    found = getattr(WrappingReference(source), name)
    if not inspect.isfunction(getattr(Reference, name)):
        assert found is getattr(source, name)
        return
    arguments, options = CALLS[name]
    returned = found(*arguments, **options)
    getattr(source, name).assert_called_once_with(*arguments, **options)
    assert returned is (None if name in RETURNS_NOTHING else getattr(source, name).return_value)


def wrapped(kind: Kind) -> Kind:
    return replace(kind, reference=lambda policy, folder: WrappingReference(kind.reference(policy, folder)))


WRAPPED = {
    f"a wrapper around {name}": wrapped(KINDS[name])
    for name in (
        "explicit",
        "implicit, fresh LoRA",
        "precomputed over explicit",
        "synchronized",
        "synchronized, LoRA truncated",
        "bema, after taking weights",
        "none",
        "given by the rows",
    )
}


class TestAroundEveryKind(OfKind):
    @pytest.fixture(params=WRAPPED, autouse=True)
    def of_kind(self, request: pytest.FixtureRequest) -> None:
        self.kind = WRAPPED[request.param]


def test_a_wrapper_around_a_synchronized_reference_moves_with_it() -> None:
    policy = dropping_gpt2()
    source = synchronized()(policy, Path())
    reference = WrappingReference(source)
    assert reference.traits.moves and not reference.advance(1) and reference.advance(2)
    assert reference.figures() == {"reference/syncs": 1.0}


def test_a_reference_that_moves_is_not_precomputed(tmp_path: Path) -> None:
    policy = dropping_gpt2()
    with pytest.raises(ConfigurationError, match="Cannot precompute the log-probs of a synchronized reference"):
        PrecomputedReference(LogProbStore(tmp_path / "store.sqlite"), synchronized()(policy, tmp_path))
    PrecomputedReference(LogProbStore(tmp_path / "store.sqlite"), ExplicitReference.of_policy(policy))
