"""An adapter's tensors, and the tensors of its base under the names of a plain model.

Knows PEFT's layers; knows no reference.
"""

from __future__ import annotations

import re
from typing import TypeGuard

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tether.distributed import forget_gathered
from tether.reference.updates.groups import Tensors


def is_adapter_model(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether a model is wrapped by PEFT."""
    return isinstance(model, PeftModel)


def saves_adapter_alone(model: nn.Module) -> bool:
    """Whether `save_pretrained` writes adapters and not the model: one wrapped by PEFT, or with `model.add_adapter`."""
    return is_adapter_model(model) or bool(getattr(model, "_hf_peft_config_loaded", False))


def base_tensors(base: nn.Module) -> dict[str, Tensor]:
    """The base model's weights and persistent buffers under the names they had before PEFT wrapped its layers."""
    of_adapter: set[str] = set()
    renamed: dict[str, str] = {}
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            renamed[f"{path}.base_layer."] = f"{path}."
            names = (*module.adapter_layer_names, *module.other_param_names, "lora_magnitude_vector")
            of_adapter.update(f"{path}.{name}." for name in names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            renamed[f"{path}.original_module."] = f"{path}."
            of_adapter.update((f"{path}.modules_to_save.", f"{path}.token_adapter."))
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in base.state_dict(keep_vars=True).items():
        prefixes = [name[: dot.end()] for dot in re.finditer(r"\.", name)]
        if not of_adapter.isdisjoint(prefixes) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        # Innermost wrapper first: a trained-tokens wrapper may sit inside a tuner layer.
        for wrapped in reversed(prefixes):
            name = renamed.get(wrapped, wrapped) + name[len(wrapped) :]
        tensors[name] = tensor
    return tensors


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that stands still: of an adapter too, beside those of its base under their plain names."""
    base = base_tensors(model.get_base_model() if is_adapter_model(model) else model)
    return base | beside_base(model, base)


def beside_base(model: nn.Module, base: Tensors) -> dict[str, Tensor]:
    """The tensors of a model's state that are not among the given ones of its base."""
    of_base = {id(tensor) for tensor in base.values()}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if id(tensor) not in of_base}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that an adapter adds to its base or trains in it, by its name in the model, and each once.

    Frozen ones too: a projection that was drawn at random belongs to the factors that train.
    """
    forget_gathered(model)
    base = model.get_base_model() if is_adapter_model(model) else model
    live = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}  # quantized layers make further entries
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = beside_base(model, base_tensors(base) | trained)
    once = {id(tensor): name for name, tensor in added.items() if id(tensor) in live}
    return trained | {name: added[name] for name in once.values()}
