"""What is known of packing without looking at numbers: adapters that act once per row, and images.

Knows configs; `proof` compares the rest.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tether.types import PairBatch

# Families whose text part treats image tokens like any other: no positions and no attention of their own.
PROVEN_WITH_IMAGES = frozenset({"idefics3", "llava", "llava_next"})


def why_unpacked(model: nn.Module, base: nn.Module, batch: PairBatch, auxiliary_loss: bool) -> str:
    """Why a batch is not scored in packed rows, whatever the numbers are; empty if it may be."""
    if any(map(reads_rows, getattr(model, "peft_config", {}).values())):
        return "its adapter acts once in each row"
    if not batch.images:
        return ""
    says_more = any(images is not None and images.token_inputs for images in batch.images)
    if says_more or auxiliary_loss or not packs_images(base):
        return "its images are not known to be read alike in packed rows"
    return ""


def packs_images(base: nn.Module) -> bool:
    """Whether prompts with images may be scored packed: each prompt and its images once."""
    config: Any = base.config
    return config.model_type in PROVEN_WITH_IMAGES


def reads_rows(adapter: Any) -> bool:
    """Whether an adapter, by its configuration, acts once per row, so that a row must be one sequence.

    Virtual tokens would precede the first prompt only; an activated LoRA looks for one invocation.
    """
    return bool(
        getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None) is not None
    )
