"""Bases in 4 and 8 bits under an adapter, with bitsandbytes on a CPU: as TRL trains them, and no layer left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from support.observe import bits, same_bits
from support.runs import curve, make_trainer, steps, trained
from support.tiny import ADAM_EPSILON, tiny_model, tiny_pairs, tiny_tokenizer
from tether.errors import ConfigurationError, DriftError

pytestmark = pytest.mark.numerics

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")

FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
EIGHT = BitsAndBytesConfig(load_in_8bit=True)
NESTED = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
BITS = {"4 bits": FOUR, "8 bits": EIGHT}
ADAPTER = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
RUN: dict[str, Any] = {"learning_rate": 1e-2, "adam_epsilon": ADAM_EPSILON, "max_steps": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose layers are as wide as a block of 4-bit weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(hidden=64).save_pretrained(folder)
    tiny_tokenizer(pad=True).save_pretrained(folder)
    return str(folder)


def quantized(folder: str, config: Any = FOUR) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def run(tmp_path: Path, folder: str, config: Any = FOUR, **options: Any) -> Any:
    given = {"quantization_config": config, "peft_config": LoraConfig(**ADAPTER), **RUN}
    return trained(tmp_path, folder, **given | options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_trains_as_it_does_in_trl(bits: str, folder: str, tmp_path: Path) -> None:
    ours = run(tmp_path / "ours", folder, BITS[bits])
    args = trl.DPOConfig(
        str(tmp_path / "theirs"), bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=4, **RUN,
    )  # fmt: skip
    theirs = trl.DPOTrainer(
        folder,
        args=args,
        train_dataset=Dataset.from_list(tiny_pairs(24)),
        quantization_config=BITS[bits],
        peft_config=LoraConfig(**ADAPTER),
    )
    theirs.train()
    assert curve(ours)[0] == pytest.approx(math.log(2), abs=1e-6), "reference and policy are computed alike"
    expected = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert max(expected) - min(expected) > 0.03, "nothing was learnt: the curves say little"
    assert curve(ours) == pytest.approx(expected, abs=0.01)  # the adapter's own bfloat16


@pytest.mark.parametrize("bits", BITS)
def test_evaluating_between_the_steps_changes_nothing(bits: str, folder: str, tmp_path: Path) -> None:
    """After a forward in evaluation mode, bitsandbytes would go on with weights that let no gradient through."""
    plain = run(tmp_path / "1", folder, BITS[bits])
    options = {"eval_dataset": tiny_pairs(4, seed=1), "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    assert curve(run(tmp_path / "2", folder, BITS[bits], **options)) == curve(plain)


def test_references_of_a_base_in_4_bits_give_the_same_curve(folder: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "1", folder)
    stored = run(tmp_path / "2", folder, precompute_ref_log_probs=True)
    named = run(tmp_path / "3", folder, ref_model=quantized(folder))
    # The adapter is in bfloat16: a weight that is rounded the other way is off by 0.4%, and the curve by 1e-4.
    assert curve(stored) == pytest.approx(curve(plain), abs=1e-3) and curve(named) == pytest.approx(curve(plain))
    assert plain.ref_model is stored.ref_model is None and named.ref_model is not None


def test_a_resumed_run_on_4_bits_equals_the_uninterrupted_one(folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path, folder, **options)
    given = {"quantization_config": FOUR, "peft_config": LoraConfig(**ADAPTER), **RUN, **options}
    resumed = make_trainer(tmp_path, folder, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert curve(resumed) == curve(whole)
    trainable = [
        {name: p.detach() for name, p in t.model.named_parameters() if p.requires_grad} for t in (whole, resumed)
    ]
    assert same_bits(*trainable)


def test_an_adapter_that_is_there_already_trains_in_bfloat16_too(folder: str, tmp_path: Path) -> None:
    model = get_peft_model(quantized(folder), LoraConfig(**ADAPTER))
    trainer = trained(tmp_path, model, **RUN)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert steps(trainer)[0]["reference/initial_gap"] == 0.0


@pytest.mark.parametrize("bits", BITS)
def test_quantized_weights_are_refused_without_an_adapter(bits: str, folder: str, tmp_path: Path) -> None:
    model = quantized(folder, BITS[bits])
    with pytest.raises(ConfigurationError, match="a quantized model for training") as caught:
        make_trainer(tmp_path, model)
    assert "peft_config" in caught.value.instead and model.is_quantized


def test_a_reference_in_4_bits_is_left_as_it_was(folder: str, tmp_path: Path) -> None:
    reference = quantized(folder)
    before, ids = bits(reference), torch.tensor([[5, 6, 7, 8]])
    logits = quantized(folder).train()(ids).logits
    trained(tmp_path, folder, ref_model=reference, **RUN)
    assert same_bits(bits(reference), before) and torch.equal(reference.train()(ids).logits, logits)


TOUCHED: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "packed bytes": (FOUR, lambda layer: layer.weight),
    "scales of blocks": (FOUR, lambda layer: layer.weight.quant_state.absmax),
    "scales of scales": (NESTED, lambda layer: layer.weight.quant_state.state2.absmax),
    "8 bits": (EIGHT, lambda layer: layer.weight),
    "scales of rows": (EIGHT, lambda layer: layer.state.SCB),
}


class Touches(TrainerCallback):
    """Writes to a tensor at the end of the second step, without a trace."""

    def __init__(self, tensor: Callable[[Any], Any]) -> None:
        self.tensor = tensor

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.tensor(model.get_base_model().model.layers[0].mlp.up_proj).data[0] += 1


@pytest.mark.parametrize("name", TOUCHED)
@pytest.mark.parametrize("continued", [False, True])
def test_a_quantized_base_that_changes_stops_the_run(name: str, continued: bool, folder: str, tmp_path: Path) -> None:
    """In 8 bits the first forward moves the scales: a fresh adapter is tried before the run, a continued one is not."""
    config, tensor = TOUCHED[name]
    options: dict[str, Any] = {"peft_config": LoraConfig(**ADAPTER, init_lora_weights=not continued)}
    with pytest.raises(DriftError, match=r"up_proj.weight"):
        run(tmp_path, folder, config, callbacks=[Touches(tensor)], **options)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_base_with_biases_stops_no_run(bits: str, tmp_path: Path) -> None:
    """bitsandbytes casts biases in the forward."""
    tiny_model("qwen2", hidden=64, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer(pad=True).save_pretrained(tmp_path / "model")
    adapter = LoraConfig(**ADAPTER, init_lora_weights=False)
    looks: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    looks["eval_dataset"] = tiny_pairs(4, seed=1)
    trainer = run(tmp_path / "run", str(tmp_path / "model"), BITS[bits], peft_config=adapter, **looks)
    assert trainer.state.global_step == 6


def test_weights_that_were_packed_for_inference_are_refused(folder: str, tmp_path: Path) -> None:
    model = quantized(folder)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks it, on processors that can
    with pytest.raises(ConfigurationError, match="q_proj") as caught:
        make_trainer(tmp_path, model, peft_config=LoraConfig(**ADAPTER))
    assert "anew" in caught.value.instead
