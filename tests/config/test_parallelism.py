"""Parallelism that cuts rows or weights is refused by name, before anything is loaded; sharding is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import ParallelismConfig
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from support.runs import facts_of, make_trainer
from support.tiny import tiny_model
from tether import DPOConfig
from tether.config.rules.launch import refused_launch
from tether.config.rules.run import refused_run
from tether.errors import ConfigurationError
from tether.refusals import refuse


def loading(**options: Any) -> dict[str, Any]:
    return {"model_init_kwargs": options}


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"parallelism_config": ParallelismConfig(cp_size=2)}, "`cp_size=2`.*context parallelism"),
    "sequence": ({"parallelism_config": ParallelismConfig(sp_size=2)}, "`sp_size=2`.*sequence parallelism"),
    "tensor": ({"parallelism_config": ParallelismConfig(tp_size=2)}, "`tp_size=2`.*tensor parallelism"),
    "a plan to load by": (loading(tp_plan="auto"), "`tp_plan='auto'`.*tensor parallelism"),
    "a size to load by": (loading(tp_size=2), "`tp_size=2`.*tensor parallelism"),
    "a mesh to load by": (loading(device_mesh="mesh"), "`device_mesh='mesh'`.*tensor parallelism"),
    "transformers' config": (loading(distributed_config={"pp_size": 2}), "`pp_size=2`.*pipeline parallelism"),
    "its plan": (loading(distributed_config=DistributedConfig(tp_plan="auto")), "`tp_plan`.*tensor parallelism"),
}


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_that_cuts_rows_or_weights_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=words):
        DPOConfig(str(tmp_path), **options)


@pytest.mark.parametrize(("size", "kind"), [("CP", "context"), ("SP", "sequence"), ("TP", "tensor")])
def test_a_launcher_that_cuts_rows_or_weights_is_refused(
    size: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --use_parallelism_config` sets variables, and no option."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    DPOConfig(str(tmp_path))
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}_SIZE", "2")
    with pytest.raises(ConfigurationError, match=f"--parallelism_config_{size.lower()}_size 2.*{kind} parallelism"):
        DPOConfig(str(tmp_path))


def test_tensor_parallelism_of_deepspeed_and_of_megatron_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = DPOConfig(str(tmp_path))
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"tensor_parallel": {"autotp_size": 2}})
    with pytest.raises(ConfigurationError, match=r"`autotp_size=2`.*tensor parallelism"):
        refuse(refused_launch(args))
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ConfigurationError, match="--use_megatron_lm"):
        DPOConfig(str(tmp_path))


@pytest.mark.parametrize("which", ["model", "ref_model"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_model_whose_weights_were_cut_when_it_was_loaded_is_refused(
    which: str, with_adapter: bool, tmp_path: Path
) -> None:
    cut = tiny_model()
    if hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
        cut._is_distributed_loading_by_transformers = True  # as transformers leaves it in two processes
        cut.config.distributed_config = DistributedConfig(tp_size=2)
    else:  # before 5.23
        cut._tp_size = 2
    given = get_peft_model(cut, LoraConfig(r=2, target_modules=["q_proj"])) if with_adapter else cut
    with pytest.raises(ConfigurationError, match=f"a `{which}` loaded with `tp_size=2`.*tensor parallelism"):
        make_trainer(tmp_path, **{"model": tiny_model()} | {which: given})


@pytest.mark.parametrize("which", ["model", "ref_model"])
@pytest.mark.parametrize("last", [1, "cpu", "disk"])
def test_a_model_on_several_devices_is_refused(which: str, last: Any, tmp_path: Path) -> None:
    spread = tiny_model()
    spread.hf_device_map = {"model": 0, "lm_head": last}  # as `device_map="auto"` leaves it
    with pytest.raises(ConfigurationError, match=f"a `{which}` that `device_map` has spread over 0 and {last}"):
        make_trainer(tmp_path, **{"model": tiny_model()} | {which: spread})


def test_a_device_map_of_one_device_is_not_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    make_trainer(tmp_path / "run", str(tmp_path / "model"), **loading(device_map="auto"))


def test_activations_are_not_offloaded_with_gathered_weights(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    facts.args.activation_offloading = True  # refused on a CPU
    assert not list(refused_run(facts))
    (sharded,) = refused_run(replace(facts, is_sharded=True))
    assert "gathered weights" in sharded.problem and sharded.option == "activation_offloading"


def test_sharding_and_sizes_of_one_are_not_refused(tmp_path: Path) -> None:
    for options in (
        {"parallelism_config": ParallelismConfig(dp_shard_size=2)},
        {"parallelism_config": ParallelismConfig(tp_size=1, cp_size=1, sp_size=1)},
        loading(tp_plan=None, tp_size=1),
        loading(distributed_config=DistributedConfig(tp_size=1)),
    ):
        DPOConfig(str(tmp_path), **options)
