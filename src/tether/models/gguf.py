"""Models that transformers reads from a GGUF file.

It unpacks the weights where no kernel computes with packed ones, and still calls the model quantized, which its trainer
and `save_pretrained` refuse. Here such a model becomes what its weights are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod


def is_unpacked(model: Any) -> bool:
    """Whether a model was read from a GGUF file into plain weights."""
    return getattr(model, "quantization_method", None) == QuantizationMethod.GGUF and all(
        parameter.is_floating_point() for parameter in model.parameters()
    )


def use_as_plain(model: Any) -> None:
    """Takes the traces of the file off a model of plain weights, with an adapter or without; leaves others alone."""
    if not is_unpacked(model):
        return
    file = gguf_option(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("hf_quantizer", "quantization_method"):
        vars(base).pop(name, None)
    base.is_quantized = False
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("quantization_config", "_is_quantized"):
                vars(module.config).pop(name, None)
    base._loaded_with = file


def gguf_option(model: Any) -> dict[str, str]:
    """The argument of `from_pretrained` that reads a model's file in its folder; empty for other models."""
    if is_unpacked(model):
        file = getattr(model.config.quantization_config, "gguf_file", None)
        return {} if file is None else {"gguf_file": file}
    option: dict[str, str] = getattr(model, "_loaded_with", {})
    return option


def without_absent_file(folder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained`, without a `gguf_file` that is not in this folder."""
    kept, file = dict(options), options.get("gguf_file")
    if file is not None and os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, file)):
        del kept["gguf_file"]
    return kept
