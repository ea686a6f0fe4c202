"""What counts as a model of plain weights, and what is refused of files and of weights that are not plain.

The traces are put on a tiny model here; a real file is read in tests/real.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import GgufConfig, QuantizationMethod

from support.observe import bits, same_bits
from support.runs import make_trainer, trained
from support.tiny import tiny_model
from tether import ExplicitReference
from tether.config.rules import arguments
from tether.errors import ConfigurationError
from tether.models.gguf import gguf_option, is_unpacked, without_absent_file

LORA = {"r": 2, "target_modules": ["q_proj"]}


def from_file(*, packed: bool = False) -> Any:
    """A tiny model as transformers would leave it."""
    model: Any = tiny_model()
    model.config.quantization_config = GgufConfig(gguf_file="tiny.gguf")
    model.config._is_quantized = model.is_quantized = True
    model.quantization_method = QuantizationMethod.GGUF
    model.hf_quantizer = SimpleNamespace(quantization_config=model.config.quantization_config, is_trainable=False)
    if packed:
        weight = model.model.layers[0].mlp.up_proj.weight
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize("lora", ["full", "new adapter", "own adapter"])
def test_plain_weights_train_as_what_they_are(lora: str, tmp_path: Path) -> None:
    def run(folder: str, model: Any, ref_model: Any) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**LORA)) if lora == "own adapter" else model
        adapter = LoraConfig(**LORA) if lora == "new adapter" else None
        trainer = trained(tmp_path / folder, model, ref_model=ref_model, peft_config=adapter)
        trainer.save_model()
        return trainer

    ours, plain = run("gguf", from_file(), from_file()), run("plain", tiny_model(), tiny_model())
    assert same_bits(bits(ours.model), bits(plain.model))
    assert ours.reference.identity == plain.reference.identity
    for file in ("config.json", "adapter_config.json"):
        path = tmp_path / "gguf" / file
        assert not path.exists() or "quantization_config" not in path.read_text()
    base = ours.model.get_base_model() if lora != "full" else ours.model
    assert not base.is_quantized and not hasattr(base, "hf_quantizer") and not is_unpacked(ours.model)
    assert gguf_option(ours.model) == {"gguf_file": "tiny.gguf"}  # by which it is loaded again


def test_the_file_is_no_part_of_an_identity() -> None:
    assert ExplicitReference(from_file()).identity == ExplicitReference(tiny_model()).identity


def test_a_refusal_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = from_file()
    with pytest.raises(ConfigurationError):
        make_trainer(tmp_path, model, eval_strategy="steps", eval_steps=1)
    assert is_unpacked(model) and model.hf_quantizer and gguf_option(model) == {"gguf_file": "tiny.gguf"}


@pytest.mark.parametrize("adapter", [None, LoraConfig(**LORA)], ids=["full", "adapter"])
def test_packed_weights_are_refused_and_stay(adapter: Any, tmp_path: Path) -> None:
    model = from_file(packed=True)
    with pytest.raises(ConfigurationError, match=r"a quantized model for training \(gguf\)"):
        make_trainer(tmp_path, model, peft_config=adapter)
    assert model.is_quantized and model.config.quantization_config and not hasattr(model, "peft_config")


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_path_to_a_file_is_answered_with_the_option(name: str, tmp_path: Path) -> None:
    given = {"model": "some/model", "ref_model": None} | {name: "some/folder/tiny.gguf"}
    with pytest.raises(ConfigurationError, match="it is a GGUF file") as caught:
        make_trainer(tmp_path, **given)
    assert "some/folder'" in caught.value.instead and "{'gguf_file': 'tiny.gguf'}" in caught.value.instead


def test_a_file_that_cannot_be_read_is_refused_before_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model_init_kwargs": {"gguf_file": "tiny.gguf"}}
    with pytest.raises(ConfigurationError, match="a quantization with a `gguf_file`"):
        make_trainer(tmp_path, "folder", quantization_config=BitsAndBytesConfig(load_in_4bit=True), **options)
    monkeypatch.setattr(arguments, "is_gguf_available", lambda: False)
    with pytest.raises(ConfigurationError, match="needs the package `gguf`"):
        make_trainer(tmp_path, "folder", **options)


def test_a_folder_without_the_file_is_read_as_it_is(tmp_path: Path) -> None:
    options = {"gguf_file": "tiny.gguf", "revision": "main"}
    assert without_absent_file(str(tmp_path), options) == {"revision": "main"}
    assert without_absent_file("some/name", options) == options
    (tmp_path / "tiny.gguf").touch()
    assert without_absent_file(str(tmp_path), options) == options
