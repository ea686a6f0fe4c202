"""Rotary embeddings whose frequencies depend on the longest row of a forward: which models have them, from where on.

`dynamic` stretches its frequencies with the length beyond its threshold, and transformers' module goes on using them
for later, shorter rows; `longrope` changes to a second set. Knows configs and modules; knows no batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tether.errors import ConfigurationError

_known: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def rotary_limit(model: nn.Module) -> int | None:
    """Tokens of a row above which its log-probs depend on how long the forward's longest row is.

    Returns:
        The threshold: rows up to it are scored together, each longer one has a forward of its own. None for a model
        whose embeddings do not depend on the length.
    """
    if model not in _known:
        limits = [limit for module in model.modules() for limit in _limits(module)]
        _known[model] = min(limits, default=None)
    return _known[model]


def reset_rotary(model: nn.Module) -> None:
    """Makes `dynamic` embeddings forget the longest row they have seen, so that a forward depends on its rows alone."""
    for module in model.modules():
        for prefix, parameters in _kinds(module):
            if "dynamic" in parameters.get("rope_type", ""):
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone())
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def uneven_forwards(limit: int, length: int | None) -> ConfigurationError:
    """The refusal of rows above the limit where every forward needs every process."""
    return ConfigurationError(
        problem=f"Cannot shard this model for rows of {'any number of' if length is None else f'up to {length}'} "
        f"tokens: its rotary embeddings depend on the length beyond {limit}.",
        details="A longer row needs its own forward, so the processes would make different numbers of forwards and "
        "wait for each other forever.",
        instead=f"Set `max_length={limit}` or less, or train without ZeRO-3 and FSDP2.",
    )


def _limits(module: nn.Module) -> Iterator[int]:
    for _, parameters in _kinds(module):
        kind = parameters.get("rope_type", "")
        if kind == "longrope":
            yield int(parameters["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limit: Any = module.original_max_seq_len
            yield int(limit)


def _kinds(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parameters of a rotary module, with the prefix of its buffers: one set, or one for each type of layer."""
    if not hasattr(module, "rope_type") or not hasattr(module, "original_max_seq_len"):
        return
    parameters: Any = getattr(module.config, "rope_parameters", None) or {}
    if isinstance(module.rope_type, dict):
        for layer_type in module.rope_type:
            yield f"{layer_type}_", parameters.get(layer_type) or {}
    else:
        yield "", parameters
