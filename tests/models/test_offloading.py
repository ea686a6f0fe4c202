"""Activations in host memory: the same numbers, and only what waits for the backward moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.observe import bits, same_bits
from support.runs import curve, make_trainer, trained
from support.tiny import tiny_model
from tether.errors import ConfigurationError
from tether.models.offloading import OffloadedActivations

pytestmark = pytest.mark.numerics


class Counted(OffloadedActivations):
    """As on a CPU, with a count of what was moved and where it came from."""

    def __init__(self, model: torch.nn.Module, source: str = "cpu") -> None:
        self.num_bytes, self.moved = 0, set[int]()
        super().__init__(model, source)

    def _to_host(self, tensor: torch.Tensor) -> Any:
        kept = super()._to_host(tensor)
        if isinstance(kept, tuple):
            assert kept[1].data_ptr() != tensor.data_ptr() and torch.equal(kept[1], tensor)
            self.num_bytes += tensor.nbytes
            self.moved.add(tensor.untyped_storage().data_ptr())
        return kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_moved_activations_has_the_same_numbers(checkpointing: bool, tmp_path: Path) -> None:
    plain = trained(tmp_path / "1", gradient_checkpointing=checkpointing)
    moving = make_trainer(tmp_path / "2", gradient_checkpointing=checkpointing)
    counted = moving._activations = Counted(moving.model)
    moving.train()
    assert curve(moving) == curve(plain) and same_bits(bits(moving.model), bits(plain.model))
    assert counted.num_bytes > 10_000


def test_weights_small_tensors_and_those_of_other_devices_stay() -> None:
    model = tiny_model()
    hidden = torch.randn(8, 64, 32, requires_grad=True)
    for source, min_bytes, moves in (("cpu", 1024, True), ("cpu", 10**9, False), ("cuda", 1024, False)):
        counted = Counted(model, source)
        counted._min_bytes = min_bytes
        with counted:
            layer: Any = model.model.layers[0]
            loss = layer.mlp(hidden).square().sum()
        loss.backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert bool(counted.moved) == moves and not counted.moved & weights


def test_it_is_refused_where_there_is_no_other_memory(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    with pytest.raises(ConfigurationError, match="activation_offloading") as caught:
        make_trainer(tmp_path, activation_offloading=True)
    assert "gradient_checkpointing" in caught.value.instead


@pytest.mark.gpu
def test_activations_leave_the_gpu_and_the_numbers_stay(tmp_path: Path) -> None:
    curves, peaks = [], []
    for offloaded in (False, True):
        torch.cuda.reset_peak_memory_stats()
        model = tiny_model(hidden=256, layers=4)
        trainer = trained(tmp_path / str(offloaded), model, activation_offloading=offloaded, bf16=False)
        curves.append(curve(trainer))
        peaks.append(torch.cuda.max_memory_allocated())
    assert curves[1] == pytest.approx(curves[0], abs=1e-6) and peaks[1] < peaks[0]
