"""A checkpoint's weights back into the model that trains: all of them, or an error.

transformers reads a checkpoint's files as they are. Where that is not all that trains, it goes on from what happens to
be in memory, with a warning at most:

- An adapter's files hold what inference needs. Prompt encoders leave out what trains (they save what it computed), and
  an adapter that is not called `default` lies in a folder where the best checkpoint is not looked for. So a checkpoint
  keeps a file of Tether's own beside them, with every tensor of the adapters under its name in memory.
- `save_pretrained` writes some families under older names, or cut into other tensors (mixtures of experts,
  vision-language models, GPT-NeoX's head); `from_pretrained` reads them back.

Knows files and models; knows no trainer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tether.distributed import full_shape, gather, has_shards, local_shard, raising_together, shard_like
from tether.errors import ResumeError
from tether.reference.adapter_tensors import adapter_tensors, saves_adapter_alone

_ADAPTERS = "adapter_tensors.safetensors"


def save_adapters(model: nn.Module, checkpoint: Path, *, writes: bool) -> None:
    """Writes every tensor of a model's adapters, bit for bit; nothing for a model that is saved whole.

    Every process calls it, because sharded tensors are gathered; the one with `writes` writes.
    """
    if not saves_adapter_alone(model):
        return
    kept: dict[str, Tensor] = {}
    for name, tensor in sorted(adapter_tensors(model).items()):
        gathered = gather(tensor)
        if writes:
            kept[name] = gathered.to("cpu", copy=True).contiguous()  # a file can't hold two views of one storage
    if writes:
        save_file(kept, checkpoint / _ADAPTERS)


def load_weights(model: nn.Module, checkpoint: Path) -> bool:
    """Loads the weights where transformers would not load them all; says whether it did.

    Every process calls it. A full model that is sharded is left to FSDP, which loads what it saved.

    Raises:
        ResumeError: On every process, if on any of them the checkpoint does not hold all that trains.
    """
    if saves_adapter_alone(model):
        _load_adapters(model, checkpoint)
        return True
    if has_shards(model):
        return False
    names = _names_in(checkpoint)
    if names <= model.state_dict().keys():
        with raising_together():
            _refuse_missing(_without_file(model, names), model, checkpoint)
        return False
    _load_renamed(model, checkpoint)
    return True


def _load_adapters(model: nn.Module, checkpoint: Path) -> None:
    own = adapter_tensors(model)
    with raising_together():
        saved = _read_adapters(own, model, checkpoint)
    with torch.no_grad():
        for name in sorted(own):
            local_shard(own[name]).copy_(shard_like(saved[name], own[name]))


def _read_adapters(own: Mapping[str, Tensor], model: nn.Module, checkpoint: Path) -> dict[str, Tensor]:
    path = checkpoint / _ADAPTERS
    saved = load_file(path) if path.is_file() else {}
    _refuse_missing(own.keys() - saved.keys(), model, checkpoint)
    other = [name for name in sorted(own) if saved[name].shape != full_shape(own[name])]
    if other or saved.keys() - own.keys():
        name = (other or sorted(saved.keys() - own.keys()))[0]
        raise ResumeError(
            problem=f"Cannot load the adapters of {checkpoint}: `{name}` has the shape {tuple(saved[name].shape)} "
            "there, and this model has " + (f"{tuple(full_shape(own[name]))}." if name in own else "no such tensor."),
            instead="Build the model with the adapters that the run began with: the same names, types and ranks.",
        )
    return saved


def _load_renamed(model: nn.Module, checkpoint: Path) -> None:
    assert isinstance(model, PreTrainedModel)
    kind: Any = type(model)
    loaded, info = kind.from_pretrained(checkpoint, config=model.config, dtype="auto", output_loading_info=True)
    _refuse_missing(info["missing_keys"], model, checkpoint)
    model.load_state_dict(loaded.state_dict())


def _without_file(model: nn.Module, names: Collection[str]) -> set[str]:
    """The parameters that train and are in a file of these names under none of their own (tied ones have several)."""
    held = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in names}
    return {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}


def _refuse_missing(names: Collection[str], model: nn.Module, checkpoint: Path) -> None:
    if names:
        first = ", ".join(sorted(names)[:3]) + " and others" * (len(names) > 3)
        raise ResumeError(
            problem=f"Cannot load the weights of {checkpoint}: it has no weights for {first} of the "
            f"{type(model).__name__}.",
            details="These weights would keep their present values, so the model would be a mixture of two.",
            instead="Use a complete checkpoint of the same model, written by this version of Tether.",
        )


def _names_in(checkpoint: Path) -> set[str]:
    """The names of the tensors in a checkpoint of whole models; none where there is no such file."""
    index, single = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if single.is_file():
        with safe_open(single, "pt") as file:
            opened: Any = file
            return set(opened.keys())
    return set()
