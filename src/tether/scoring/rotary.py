"""Rotary embeddings whose frequencies depend on a forward's longest row: which models have them, above which length.

`dynamic` stretches its frequencies with lengths beyond its threshold, and transformers' module keeps them for later,
shorter rows; `longrope` switches to a second set. Knows configs and modules; knows no batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tether.refusals import Refusal

_known: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def rotary_limit(model: nn.Module) -> int | None:
    """Length of a row above which its log-probs depend on the forward's longest row, in tokens.

    Returns:
        The threshold: rows up to it are scored together, and each longer one has its own forward. None for a model
        whose embeddings do not depend on the length.
    """
    if model not in _known:
        limits = [limit for module in model.modules() for limit in _limits(module)]
        _known[model] = min(limits, default=None)
    return _known[model]


def reset_rotary(model: nn.Module) -> None:
    """Resets `dynamic` embeddings to their original state, so that a forward depends on its own rows alone."""
    for module in model.modules():
        for prefix, parameters in _kinds(module):
            if "dynamic" in parameters.get("rope_type", ""):
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone())
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def uneven_forwards(limit: int, length: int | None) -> Refusal:
    """Rows that a sharded model may not have: a longer one would need its own forward.

    Args:
        limit: Length above which the rotary embeddings depend on the length, in tokens.
        length: Length of the longest row; None if there is no bound.
    """
    return Refusal(
        "a sharded model whose rotary embeddings depend on the length",
        f"a row of more than {limit} tokens has a forward of its own, rows may have "
        f"{'any number' if length is None else f'up to {length}'}, and the processes would wait for each other forever",
        f"Write `max_length={limit}` or less, or train without ZeRO-3 and FSDP2.",
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
