"""The distributed pieces in one process and for whole tensors, and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support.runs import facts_of
from tether.config.rules.reference import refused_reference
from tether.distributed import (
    any_process,
    cast_as_training_will,
    check_alike,
    exchanged,
    full_shape,
    gather,
    local_shard,
    names_of_all,
    num_processes,
    on_main_process,
    raising_together,
    reduced,
    shard_like,
    sharding_of,
)
from tether.errors import ConfigurationError, DataError, ReferenceModelError
from tether.reference.identity import digest_tensors


def accelerator(**state: Any) -> Any:
    kind = "FSDP" if "fsdp_plugin" in state else "NO"
    return SimpleNamespace(state=SimpleNamespace(**state), distributed_type=kind)


def zero(**options: Any) -> Any:
    config = {"zero_optimization": {"stage": 3} | options}
    return accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config=config))


def fsdp(**options: Any) -> Any:
    return accelerator(fsdp_plugin=SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False} | options))


def test_one_process_speaks_for_itself() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert num_processes() == 1
    assert torch.equal(reduced(tensor, "sum"), tensor) and torch.equal(reduced(tensor, "max"), tensor)
    assert names_of_all(["b", "a", "b"]) == ["a", "b"]
    assert any_process(True) and not any_process(False)
    check_alike("whatever", "reference")


def test_a_failure_in_a_joint_block_is_raised_as_it_is() -> None:
    error = DataError(problem="a", details="b", instead="c")
    with pytest.raises(DataError) as caught, raising_together():
        raise error
    assert caught.value is error
    with pytest.raises(OSError, match="disk full"), raising_together():
        raise OSError("disk full")


def test_a_whole_tensor_is_its_own_part() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert full_shape(weight) == (2, 3)
    for view in (gather(weight), local_shard(weight), shard_like(weight, weight)):
        assert view.data_ptr() == weight.data_ptr() and not view.requires_grad


def test_a_tensor_without_content_is_refused_and_not_digested() -> None:
    empty = torch.empty(3, device="meta")
    with pytest.raises(ReferenceModelError, match="meta device"):
        gather(empty)
    with pytest.raises(ReferenceModelError, match="meta device"):
        digest_tensors({"weight": empty})


def test_answers_of_the_main_process_are_by_name() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    assert on_main_process(lambda name, tensor: (name, tensor.numel()), tensors) == {"a": ("a", 3), "b": ("b", 2)}


def test_exchanged_parameters_move_no_weight_and_come_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    before, frozen = model.weight.data_ptr(), torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match="in between"), exchanged(model, {"weight": frozen}):
        assert model.weight.data_ptr() == frozen.data_ptr()
        raise RuntimeError("in between")
    assert model.weight.data_ptr() == before and bool(model.weight.any())


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_policy_is_cast_as_deepspeed_will_cast_it(name: str, dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(2)
    config = {"zero_optimization": {"stage": 2}, name: {"enabled": True}}
    cast_as_training_will(model, accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=2, deepspeed_config=config)))
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {dtype, torch.int64}


def test_the_policy_keeps_its_precision_without_deepspeed() -> None:
    model = nn.Linear(2, 2)
    cast_as_training_will(model, accelerator())
    assert model.weight.dtype == torch.float32


def test_a_dtype_for_a_sharded_reference_is_refused(tmp_path: Path) -> None:
    (refusal,) = refused_reference(facts_of(tmp_path, ref_dtype="bfloat16", is_sharded=True))
    assert refusal.option == "ref_dtype" and "ZeRO-3" in refusal.subject


def test_models_that_stay_whole_are_not_sharded() -> None:
    assert sharding_of(accelerator()) is None
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"zero_optimization": {"stage": 2}})
    assert sharding_of(accelerator(deepspeed_plugin=plugin)) is None
    assert sharding_of(zero()) is not None and sharding_of(fsdp()) is not None


@pytest.mark.parametrize(
    ("refused", "names"),
    [
        (zero(offload_param={"device": "nvme"}), "offload_param to NVMe"),
        (zero(mics_shard_size=2), "mics_shard_size"),
        (zero(zero_hpz_partition_size=2), "zero_hpz_partition_size"),
        (zero(zero_quantized_weights=True), "zero_quantized_weights"),
        (fsdp(fsdp_version=1), "FSDP version 1"),
        (fsdp(cpu_ram_efficient_loading=True), "cpu_ram_efficient_loading"),
    ],
)
def test_a_way_of_sharding_that_is_not_known_to_be_right_is_refused_by_name(refused: Any, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        sharding_of(refused)
