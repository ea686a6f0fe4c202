"""What a reference shares is watched where it is sharded too: FSDP2 and ZeRO-3 in two processes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from support.launch import launch
from support.tiny import tiny_model

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="needs DeepSpeed: `pip install 'tether[deepspeed]' --no-build-isolation`",
    ),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("held_shards.py", tmp_path_factory.mktemp("held") / "run", num_processes=2)


def test_each_process_watches_its_shard_of_fsdp2(two: list[dict[str, Any]]) -> None:
    whole = sum(p.numel() * p.element_size() for p in tiny_model().parameters())
    for seen in (process["fsdp2"] for process in two):
        assert not any(seen["sound"])
        assert seen["bytes"] == pytest.approx(whole / 2, rel=0.01)
        assert seen["changed"] == ["model.layers.0.mlp.up_proj.weight"]


def test_a_changed_shard_of_zero_3_stops_the_run(two: list[dict[str, Any]]) -> None:
    for process in two:
        assert "these of its tensors did: `model.layers.0.mlp.up_proj.weight`" in process["changed"]


def test_a_sound_run_of_zero_3_is_not_stopped(two: list[dict[str, Any]]) -> None:
    assert all(process["sound"]["moved"] < 1e-5 and process["sound"]["kept_bytes"] == 0 for process in two)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_begins_to_train_under_zero_is_copied(stage: int, two: list[dict[str, Any]]) -> None:
    for seen in (process[f"unfrozen/{stage}"] for process in two):
        assert seen["moved"] < 1e-5 and seen["kept_bytes"] > 0
