"""Saves an adapter as it is now, by itself or merged into its base, to be loaded like any other.

Knows PEFT's layers and configurations; knows no reference.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from tether.errors import ReferenceModelError
from tether.reference.updates.adapters import factors_of, lora_layers

# Starts that change the base in memory, so that an adapter does not fit the model it was loaded on any more.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def export_adapter(policy: PeftModel, folder: Path, *, merged: bool) -> None:
    """Saves the active adapters with the tensors that they have now, of whatever rank.

    Args:
        policy: The PEFT model; it is left as it is.
        folder: Where to save.
        merged: Save a plain model, with the adapters merged into its weights. Copies the whole model.

    Raises:
        ReferenceModelError: If the adapter cannot be saved in that form.
    """
    configs = [policy.peft_config[name] for name in policy.active_adapters]
    if merged and any(config.is_prompt_learning for config in configs):
        raise ReferenceModelError(
            problem="Cannot save a reference with learned prompts with `merged=True`: prompts are not part of a "
            "model's weights.",
            instead="Save it as an adapter, without `merged=True`.",
        )
    if not merged and any(_changes_base(config) for config in configs):
        raise ReferenceModelError(
            problem="Cannot save the reference as an adapter: its initialization (PiSSA, OLoRA, ...) changed the base "
            "model in memory.",
            details="The adapter alone would later be loaded onto another base.",
            instead="Save it as a complete model, with `merged=True`.",
        )
    if merged:
        _merged(policy).save_pretrained(folder)
        return
    with _with_its_ranks(policy):
        policy.save_pretrained(str(folder), selected_adapters=policy.active_adapters)


def _merged(policy: PeftModel) -> Any:
    """A copy of the model with the adapters in its weights.

    An adapter on one of two tied embeddings is one on that use of the weight alone: merged, they are two weights.
    """
    # With `ensure_weight_tying`, layers keep tensors of a graph, which cannot be copied and which nothing reads.
    tied = [getattr(layer, "kwargs", {}).get("tied_adapter") or {} for layer in policy.modules()]
    whole: Any = copy.deepcopy(policy, {id(tensor): None for tensors in tied for tensor in tensors.values()})
    configs = [whole.config, whole.config.get_text_config()]
    was_tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if was_tied:
        _untie(whole)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        model = whole.merge_and_unload()
    if was_tied:
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        still_tied = torch.equal(first.weight, last.weight)
        if still_tied:
            last.weight = first.weight
        for config in configs:
            config.tie_word_embeddings = still_tied
    return model


def _untie(model: nn.Module) -> None:
    """Gives every module its own copy of a parameter that it shares."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))


def _changes_base(config: Any) -> bool:
    """Whether making this adapter changed the weights of its base."""
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.startswith(_BASE_CHANGING)


@contextmanager
def _with_its_ranks(policy: PeftModel) -> Iterator[None]:
    """While open, the adapters' configurations have the ranks that their layers have now.

    The scaling of a layer does not change: its alpha grows with its rank.
    """
    before = dict(policy.peft_config)
    try:
        for adapter in policy.active_adapters:
            policy.peft_config[adapter] = _config_of(policy, adapter)
        yield
    finally:
        policy.peft_config.update(before)


def _config_of(policy: PeftModel, adapter: str) -> Any:
    config: Any = copy.deepcopy(policy.peft_config[adapter])
    found = [(path, layer) for path, layer, name in lora_layers(policy) if name == adapter]
    ranks = {_key(path, layer): _rank(layer, adapter) for path, layer in found}
    if not found or all(_rank(layer, adapter) == layer.r[adapter] for _, layer in found):
        return config
    alphas = {_key(path, layer): _alpha(layer.scaling[adapter], _rank(layer, adapter)) for path, layer in found}
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}
    config.use_rslora = False  # the scaling is alpha / rank, as written here
    config.init_lora_weights = True
    return config


def _rank(layer: Any, adapter: str) -> int:
    rows = factors_of(layer, adapter)[1].shape[0]
    return int(rows) // (int(layer.num_experts) if isinstance(layer, ParamWrapper) else 1)


def _alpha(scaling: float, rank: int) -> float:
    alpha = scaling * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _key(path: str, layer: Any) -> str:
    """The layer's name as patterns match it: without PEFT's own levels."""
    path = path.removeprefix("base_model.model.")
    while path.endswith(".base_layer"):  # parameters of one module are wrapped around one another
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else path
