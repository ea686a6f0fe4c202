"""The one engine that scores responses, for the policy and for every reference, so that they agree by construction.

Knows layouts and heads; does not know whether it scores a policy or a reference.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.scoring.head import has_known_head, judge_head, scoring_head, token_statistics
from tether.scoring.layout import ScoringRows, padded_rows
from tether.types import PairBatch, ResponseLogProbs, TokenStatistics, offsets_of

# Part of every reference's identity: raised when a change here alters the numbers beyond rounding.
SCORING_VERSION = 1


def score(
    model: nn.Module, batch: PairBatch, *, statistics: bool = False, auxiliary_loss: bool = False
) -> ResponseLogProbs:
    """Per-token log-probabilities of every response of the batch under `model`.

    Means, for each response `y` to prompt `x`, with full logits never built::

        log_softmax(model(x + y).logits.float(), -1).gather(response tokens)

    Args:
        model: A causal language model, plain or wrapped (PEFT, DDP, `torch.compile`). Its mode, hooks and weights
            are left as they are: dropout is active if the caller left it in training mode.
        batch: The pairs. Moved to the model's device if it is elsewhere.
        statistics: Also return entropy, mean logit and top-1 hits of each token (one more pass over the head).
        auxiliary_loss: Also return the model's router loss, for mixtures of experts.

    Returns:
        Values in nats, fp32, in the batch's order of responses; with gradient if the caller's mode records one.

    Example:
        >>> log_probs = score(model, batch)          # doctest: +SKIP
        >>> chosen, rejected = batch.of_responses(log_probs.sums())  # doctest: +SKIP
    """
    batch = batch.to(next(model.parameters()).device)
    rows = padded_rows(batch)
    options: dict[str, Any] = {"output_router_logits": True} if auxiliary_loss else {}
    values, found, outputs = _run(model, rows, statistics, options)
    return ResponseLogProbs(
        values=values,
        offsets=offsets_of(batch.response_lengths, batch.device),
        statistics=found,
        auxiliary_loss=getattr(outputs, "aux_loss", None) if auxiliary_loss else None,
    )


def _run(
    model: nn.Module, rows: ScoringRows, statistics: bool, options: dict[str, Any]
) -> tuple[Float[Tensor, " tokens"], TokenStatistics | None, Any]:
    verdict = has_known_head(model)
    if verdict is False:
        return _run_with_logits(model, rows, statistics, options)
    with scoring_head(model, rows, statistics) as request:
        outputs = model(**rows.inputs, **options, use_cache=False)
    if request.log_probs is None:  # the model did not call its output projection
        return _run_with_logits(model, rows, statistics, options)
    if verdict is None and not judge_head(model, request.log_probs, outputs):
        return _run_with_logits(model, rows, statistics, options)
    return request.log_probs.flatten(), request.statistics, outputs


def _run_with_logits(
    model: nn.Module, rows: ScoringRows, statistics: bool, options: dict[str, Any]
) -> tuple[Float[Tensor, " tokens"], TokenStatistics | None, Any]:
    """The fallback for heads that are not a projection and a known transform: full logits, from the model itself."""
    outputs = model(**rows.inputs, **options, use_cache=False)
    logits = outputs.logits
    selected = logits[rows.row, rows.column + (logits.shape[1] - rows.width)].float()
    values = selected.log_softmax(-1).gather(-1, rows.targets[:, None])[:, 0]
    found = token_statistics(selected, rows.targets, lambda part: part, logits.shape[-1]) if statistics else None
    return torch.as_tensor(values), found, outputs
