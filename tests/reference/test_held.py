"""What of a reference others hold: a change is found by its trace, or when its bytes have their turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.tiny import tiny_model
from tether.reference import held as held_tensors
from tether.reference.held import ROTATION_STEPS, HeldTensors, slots_of
from tether.reference.twin import frozen_twin

TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "float32": lambda: torch.ones(7, 3),
    "bfloat16, of a size that is no multiple of eight bytes": lambda: torch.ones(5, dtype=torch.bfloat16),
    "one number": lambda: torch.tensor(1.0),
    "bytes at an odd place": lambda: torch.ones(41, dtype=torch.int8)[3:],
    "booleans": lambda: torch.ones(9, dtype=torch.bool),
    "not contiguous": lambda: torch.ones(4, 6).T,
    "larger than a part": lambda: torch.ones((1 << 20) + 3, dtype=torch.int8),
}


def held(tensor: torch.Tensor) -> tuple[nn.Module, HeldTensors]:
    module = nn.Module()
    module.register_buffer("first", torch.zeros(8))
    module.register_buffer("last", tensor)
    return module, HeldTensors(slots_of(module, dict(module.named_buffers())))


@pytest.mark.parametrize("kind", TENSORS)
def test_any_number_that_changes_without_a_trace_is_found_within_the_rotation(kind: str) -> None:
    for place in (0, -1):
        module, watched = held(TENSORS[kind]())
        last: Any = module.last
        assert not any(watched.changed_at_step() for _ in range(ROTATION_STEPS))
        index = tuple(place for _ in last.shape)
        last.data[index] = 0
        assert watched.changed() == ["last"]
        found = [watched.changed_at_step() for _ in range(ROTATION_STEPS)]
        assert ["last"] in found


def test_a_change_that_leaves_a_trace_is_found_at_once() -> None:
    for change in (
        lambda module: module.last.mul_(2),
        lambda module: setattr(module, "last", module.last * 2),
        lambda module: setattr(module.last, "data", module.last * 2),
        lambda module: setattr(module, "last", None),
    ):
        module, watched = held(torch.ones(3 << 20, dtype=torch.int8))
        change(module)
        assert watched.changed_at_step() == ["last"]


def test_on_a_device_no_step_waits_for_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read at the next one. Run on the host, where an event would be of no use."""

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
            return func(*args, **(kwargs or {}))

    module, watched = held(torch.ones(3))
    made = held_tensors._Sums.__init__

    def on_a_device(self: Any, values: Any) -> None:
        made(self, values)
        self.are_on_host, self._copied = False, Event()

    monkeypatch.setattr(held_tensors._Sums, "__init__", on_a_device)
    module.last.data[0] = 0
    module.last.mul_(1)  # a trace, so that it is looked at now
    with Watched():
        assert watched.changed_at_step() == []
        assert watched.changed_at_step() == ["last"]
    assert watched.changed() == ["last"]


def test_the_same_numbers_are_no_change() -> None:
    module, watched = held(torch.ones(5))
    last: Any = module.last
    last.mul_(1)
    assert watched.changed_at_step() == []
    module.last = last.clone()
    assert watched.changed_at_step() == watched.changed() == []


def test_what_an_optimizer_trains_is_named_and_what_it_only_holds_is_not() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    watched = HeldTensors(slots_of(module, dict(module.named_parameters())))
    assert watched.trained_by(torch.optim.SGD(module.parameters(), lr=0.1)) == {"weight": 16}
    assert watched.trained_by(None) == {}
    module.bias.requires_grad_(True)
    assert watched.trained_by(None) == {"bias": 8}


def test_a_function_that_has_nothing_to_do_with_the_model_is_kept_as_it_is() -> None:
    model, seen = tiny_model(), []

    def looks(module: Any, inputs: Any, output: Any) -> None:
        seen.append(type(module))

    model.lm_head.register_forward_hook(looks)
    twin: Any = frozen_twin(model, lambda parameter: True)
    assert list(twin.lm_head._forward_hooks.values()) == [looks]
