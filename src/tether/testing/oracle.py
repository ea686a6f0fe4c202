"""Scoring as naive code: one plain forward per response. Shares no code with the scoring engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tether.types import PairBatch


def naive_log_probs_of(model: nn.Module, batch: PairBatch) -> Tensor:
    """The log-probability of every response token, in the batch's order, in evaluation mode and without gradient.

    For each response `y` to a prompt `x`::

        log_softmax(model(x + y).logits.float())[len(x) - 1 : -1].gather(y)

    counted from the end, because the virtual tokens of a prompt adapter come first.

    Args:
        model: A causal language model.
        batch: The pairs.

    Returns:
        `[tokens]`, in nats, fp32, on the model's device.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return torch.cat(list(_of_each_response(model, batch)))
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _of_each_response(model: nn.Module, batch: PairBatch) -> list[Tensor]:
    batch = batch.to(next(model.parameters()).device)
    prompts = batch.prompt_ids.split(list(batch.prompt_lengths))
    parts = []
    for group, tokens in zip(batch.response_group, batch.response_ids.split(list(batch.response_lengths)), strict=True):
        ids = torch.cat([prompts[group], tokens])[None]
        outputs: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        predictions = outputs.logits[0].float()[-len(tokens) - 1 : -1].log_softmax(-1)
        parts.append(predictions.gather(-1, tokens[:, None])[:, 0])
    return parts
