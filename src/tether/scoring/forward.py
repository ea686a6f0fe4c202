"""One forward of a batch in a given way: its layout, whose head turns hidden states into log-probs, and the kernel.

Does as it is told; `proof` finds out which ways give a model's own log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.distributed import modules_of
from tether.scoring.attention import Kernel, packed_attention_of
from tether.scoring.head import LOGITS_AT_A_TIME, logits_scores
from tether.scoring.layout import ScoringRows, packed_rows, padded_rows
from tether.scoring.projection import scoring_head
from tether.scoring.rotary import rotary_limit
from tether.types import PairBatch, TokenStatistics


class Way(NamedTuple):
    """A way to score a model.

    Attributes:
        layout: `packed` (one row, each prompt once), `padded` (a row for each response), or `rows` (a forward for each
            response).
        own_head: Read the model's own full logits, instead of scoring inside its output projection.
        kernel: How packed rows are attended to on CUDA.
    """

    layout: Literal["packed", "padded", "rows"]
    own_head: bool = False
    kernel: Kernel = "pairwise"


# What scoring means. The padded layout of a single response has no padding.
PLAIN = Way("padded", own_head=True)


class Answer(NamedTuple):
    """What a forward gave: log-probs of the response tokens, statistics if asked for, and the model's own outputs."""

    values: Float[Tensor, " tokens"]
    statistics: TokenStatistics | None
    outputs: Any


def rows_of(
    model: nn.Module, batch: PairBatch, way: Way, *, router_weights: bool = False, spare: int = 0
) -> ScoringRows:
    """The rows of a batch in the layout of a way that makes a single forward; `spare` as in `padded_rows`."""
    if way.layout == "packed":
        # One token less could be below a length at which frequencies change.
        return packed_rows(batch, router_weights, whole=rotary_limit(model) is not None)
    return padded_rows(batch, spare=spare)


def run(
    model: Callable[..., Any],
    base: nn.Module,
    rows: ScoringRows,
    way: Way,
    *,
    statistics: bool = False,
    auxiliary_loss: bool = False,
    keep: bool = False,
) -> Answer:
    """Runs the model on rows and reads its response tokens.

    Args:
        model: What to call.
        base: The causal language model inside.
        rows: The rows, in the layout of `way`.
        way: How to score them.
        statistics: Also compute entropy, mean logit and top-1 hits.
        auxiliary_loss: Also let the model return its router's logits.
        keep: The backward will run layers again (`packed_attention_of`).

    Raises:
        RuntimeError: If the model does not call its output projection.
    """
    options: dict[str, Any] = {"use_cache": False}
    if auxiliary_loss:
        options["output_router_logits"] = True
    attention = packed_attention_of(base, way.kernel, keep) if way.layout == "packed" else nullcontext()
    with attention:
        if way.own_head:
            return _answer_of_logits(model(**rows.inputs, **options), rows, statistics)
        with scoring_head(base, rows, statistics) as request:
            outputs = model(**rows.inputs, **options)
    if request.log_probs is None:
        raise RuntimeError("its forward does not call its output projection")
    return Answer(request.log_probs.flatten(), request.statistics, outputs)


def _answer_of_logits(outputs: Any, rows: ScoringRows, statistics: bool) -> Answer:
    logits: Tensor = outputs.logits
    row, column = rows.row, rows.column + (logits.shape[1] - rows.width)  # adapters may put virtual tokens in front
    if torch.is_grad_enabled() or statistics:
        scores = logits_scores(logits[row, column], rows.targets, statistics)
        return Answer(scores.log_probs, scores.statistics, outputs)
    num = max(1, LOGITS_AT_A_TIME["cuda"] // logits.shape[-1])  # tokens at a time: in fp32 they need much memory
    each = zip(row.split(num), column.split(num), rows.targets.split(num), strict=True)
    values = [logits_scores(logits[a, b], targets, False).log_probs for a, b, targets in each]
    return Answer(torch.cat(values), None, outputs)


def replays_forward(model: nn.Module) -> bool:
    """Whether activation checkpointing will run layers again during the backward."""
    # Switching it on puts it into a module's own dict; asking a module for what it lacks takes eight times as long.
    return torch.is_grad_enabled() and any(
        module.__dict__.get("gradient_checkpointing") and module.training for module in modules_of(model)
    )
