"""Which texts a model can be asked that are no rows of a run: its token ids, and how long they may be.

Knows configs and embeddings; knows no batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from tether.distributed import full_shape
from tether.scoring.projection import base_model_of

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


class Reads(NamedTuple):
    """What a model reads.

    Attributes:
        vocabulary: Number of token ids.
        special: Ids among them that are no text: they stand for an image, or begin or end something.
        max_tokens: Tokens of a row, if known.
    """

    vocabulary: int
    special: frozenset[int]
    max_tokens: int | None

    @property
    def token_ids(self) -> list[int]:
        """The ids of text, ascending."""
        return [token for token in range(self.vocabulary) if token not in self.special]


def reads_of(model: nn.Module) -> Reads | None:
    """What a language model reads; None if it does not show its embeddings."""
    base: Any = base_model_of(model)
    try:
        vocabulary = full_shape(base.get_input_embeddings().weight)[0]
    except (AttributeError, NotImplementedError):
        return None
    configs = (base.config, base.config.get_text_config())
    special = frozenset(
        token
        for config in configs
        for name, value in vars(config).items()
        if name.endswith(("token_id", "token_index"))
        for token in (value if isinstance(value, list) else [value])
    )
    return Reads(vocabulary, special, max_tokens_of(model, base))


def max_tokens_of(model: nn.Module, base: nn.Module) -> int | None:
    """Tokens of the longest row that a model reads by its config, without the virtual ones of an adapter.

    Args:
        model: The model, in any wrappers.
        base: The causal language model inside.
    """
    config: Any = base.config.get_text_config()  # type: ignore[union-attr, operator]
    limits = [getattr(config, name, None) for name in _LIMITS]
    adapters = getattr(model, "peft_config", {}).values()
    virtual = max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0)
    return min((limit - virtual for limit in limits if isinstance(limit, int) and limit > 0), default=None)
