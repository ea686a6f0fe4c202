"""Installs the head in a model: while a request is open, its output projection returns log-probs.

The only file that touches a model. The projection's own `forward` then scores the requested positions instead of
projecting every position. Nothing is left behind when the request closes: class, `state_dict`, `save_pretrained` and
plain calls are as before. Because scoring happens inside the projection's own call, DDP, FSDP and ZeRO gather its
weight as in an ordinary forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tether.distributed import plain_class
from tether.scoring.head import LogitTransform, checkpointed_scores, token_scores
from tether.scoring.layout import ScoringRows
from tether.types import TokenStatistics


@dataclass
class HeadRequest:
    """What a projection computes while a request is open, and its results.

    Attributes:
        rows: The positions to score and their targets.
        statistics_wanted: Also compute the statistics for logging.
        head: The projection.
        plain_forward: What it does without a request.
        transform: What the model does to its logits afterwards.
        log_probs: The result, after the module's forward hooks.
        statistics: The statistics, if wanted.
    """

    rows: ScoringRows
    statistics_wanted: bool
    head: Any
    plain_forward: Callable[[Tensor], Tensor]
    transform: LogitTransform
    log_probs: Tensor | None = None
    statistics: TokenStatistics | None = None


_open: ContextVar[HeadRequest] = ContextVar("open_head_request")


@contextmanager
def scoring_head(base: nn.Module, rows: ScoringRows, statistics: bool) -> Iterator[HeadRequest]:
    """While open, the base model's output projection answers `rows` instead of projecting every position."""
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    request = HeadRequest(rows, statistics, head, head.forward, LogitTransform.of(base))
    had_own_forward = "forward" in vars(head)
    token = _open.set(request)
    head.forward = _answer
    hook = head.register_forward_hook(_capture)
    try:
        yield request
    finally:
        hook.remove()
        _open.reset(token)
        if had_own_forward:
            head.forward = request.plain_forward
        else:
            del head.forward


# The two functions below are the same objects for every model and request, and opaque, so that `torch.compile` sees
# a call that never changes.


@torch.compiler.disable
def _answer(hidden: Tensor) -> Tensor:
    """Replaces the projection's forward."""
    request = _open.get()
    rows, head, wanted = request.rows, request.head, request.statistics_wanted
    # Prompt-learning adapters prepend virtual tokens to each row.
    selected = hidden[rows.row, rows.column + (hidden.shape[1] - rows.width)]
    if plain_class(head) is nn.Linear:
        scores = token_scores(selected, rows.targets, head.weight, head.bias, request.transform, statistics=wanted)
    else:
        scores = checkpointed_scores(
            selected, rows.targets, request.plain_forward, request.transform, int(head.out_features), wanted
        )
    request.statistics = scores.statistics
    # The shape (rows, columns, vocabulary) that model code after the projection expects.
    return scores.log_probs.view(1, -1, 1)


@torch.compiler.disable
def _capture(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Takes the result after any hooks that a sharding library put on the module.

    The gradient then passes through theirs, and the weight is gathered when the backward needs it.
    """
    if (request := _open.get(None)) is not None:
        request.log_probs = output


def has_projection(base: nn.Module) -> bool:
    """Whether the model has an output projection in which scoring can be installed."""
    find: Any = getattr(base, "get_output_embeddings", lambda: None)
    return hasattr(find(), "out_features")


def base_model_of(model: nn.Module) -> nn.Module:
    """The causal language model inside DDP, `torch.compile` and PEFT wrappers."""
    while True:
        wrapped = (getattr(model, name, None) for name in ("module", "_orig_mod"))
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif inner := next((module for module in wrapped if isinstance(module, nn.Module)), None):
            model = inner
        else:
            return model
