"""What is known of packing without looking at numbers: adapters that act once per row, and inputs for padded rows only.

Knows configs; `proof` compares the rest.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tether.types import PairBatch


def why_unpacked(model: nn.Module, batch: PairBatch, auxiliary_loss: bool) -> str:
    """Why a batch is not scored in packed rows, whatever the numbers are; empty if it may be."""
    if any(map(reads_rows, getattr(model, "peft_config", {}).values())):
        return "its adapter acts once in each row"
    if any(images is not None and images.token_inputs for images in batch.images):
        return "its images come with positions or an attention of their own"
    if batch.images and auxiliary_loss:
        return "its router is not known to weigh images alike in packed rows"
    return ""


def reads_rows(adapter: Any) -> bool:
    """Whether an adapter, by its configuration, acts once per row, so that a row must be one sequence.

    Virtual tokens would precede the first prompt only; an activated LoRA looks for one invocation.
    """
    return bool(
        getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None) is not None
    )
