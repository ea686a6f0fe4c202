"""The layout a model is scored in: packed if that is proven equal, padded otherwise.

Knows model families and how to compare the two layouts.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tether.distributed import full_shape
from tether.types import PairBatch, Response

logger = logging.getLogger(__name__)

# Families whose packed log-probs and gradients the tests prove equal to separate forwards (docs/models.md).
PROVEN_FAMILIES = frozenset(
    {
        "cohere2",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "opt",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
    }
)

# Families whose text part treats image tokens like any other: no positions and no attention of their own.
PROVEN_WITH_IMAGES = frozenset({"idefics3", "llava", "llava_next"})

_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def known_to_pack(model: nn.Module, base: nn.Module) -> bool | None:
    """Whether a model is scored packed; None if an unknown family has not been compared yet."""
    if _adapter_reads_rows(model):
        return False
    if base in _packs:
        return _packs[base]
    if _is_proven(base):
        _packs[base] = True
    return _packs.get(base)


def packs_images(model: nn.Module, base: nn.Module) -> bool:
    """Whether prompts with images are scored packed: each prompt and its images once."""
    config: Any = base.config
    if config.model_type not in PROVEN_WITH_IMAGES or _adapter_reads_rows(model):
        return False
    return _is_made_of(base, config.get_text_config(), (config, config.vision_config))


def remember(base: nn.Module, packs: bool, why: str = "") -> bool:
    """Stores the verdict on a model; logs once, with the reason, that it falls back."""
    if not packs and _packs.get(base) is not False:
        logger.warning(
            "%s is scored in the padded layout (one row per response), which is correct but slower: %s.",
            type(base).__name__,
            why,
        )
    _packs[base] = packs
    return packs


def probe_batch(base: nn.Module) -> PairBatch:
    """Pairs that expose differences between the layouts: a shared prompt, several groups, rows beyond any window."""
    config: Any = base.config
    text: Any = config.get_text_config()
    reaches = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    longest = max([reach for reach in reaches if isinstance(reach, int)], default=0)
    limit = getattr(text, "max_position_embeddings", None) or 1 << 20
    length = min(longest + 8, limit - 16) if longest else 12
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    embeddings: Any = base.get_input_embeddings()  # type: ignore[operator]

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(full_shape(embeddings.weight)[0], (count,), generator=generator).tolist())

    first, second = ids(length), ids(7)
    pairs = [(first, 9, 5), (first, 9, 3), (second, 4, 8)]
    batch = [(Response(prompt, ids(chosen)), Response(prompt, ids(rejected))) for prompt, chosen, rejected in pairs]
    return PairBatch.of_pairs(batch).to(embeddings.weight.device)


def layouts_agree(packed: torch.Tensor, padded: torch.Tensor, other_context: torch.Tensor) -> bool:
    """Whether two scorings of the same tokens differ by rounding only.

    The yardstick is the effect of another context: a randomly initialised model hardly depends on its context, so an
    absolute tolerance would let a wrong mask pass.
    """
    gap = (packed - padded).abs().mean()
    effect = (other_context - padded).abs().mean()
    share = 1e-2 if packed.dtype == torch.float32 else 0.1
    return bool(torch.isfinite(packed).all() and gap <= share * effect)


def reads_rows(adapter: Any) -> bool:
    """Whether an adapter, by its configuration, acts once per row, so that a row must be one sequence.

    Virtual tokens would precede the first prompt only; an activated LoRA looks for one invocation.
    """
    return bool(
        getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None) is not None
    )


def _adapter_reads_rows(model: nn.Module) -> bool:
    return any(map(reads_rows, getattr(model, "peft_config", {}).values()))


def _is_proven(base: nn.Module) -> bool:
    config: Any = base.config
    return _is_made_of(base, config, ())


def _is_made_of(base: nn.Module, text: Any, others: tuple[Any, ...]) -> bool:
    """Whether a model's text part is of a proven family, and all its modules come from transformers."""
    if text.model_type not in PROVEN_FAMILIES or not type(base).__module__.startswith("transformers.models."):
        return False
    # A layer taken from another model reads that model's config, and would not notice that the attention is switched.
    known = {id(config) for config in (text, *others)}
    if any(id(getattr(module, "config", text)) not in known for module in base.modules()):
        return False
    # With this flag, GPT-2 has a second attention implementation of its own.
    return not getattr(text, "reorder_and_upcast_attn", False)
