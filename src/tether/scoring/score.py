"""The one engine that scores responses, for the policy and every reference, so that they agree by construction.

Chooses the layout and the head; does not know whether it scores a policy or a reference.
"""

from __future__ import annotations

from random import Random
from typing import Any, Literal

import torch
from torch import nn

from tether.distributed import device_of, full_shape, has_shards, num_processes
from tether.refusals import Refusal, refuse
from tether.scoring.attention import UnsupportedAttentionError, restore
from tether.scoring.chains import PackedRow
from tether.scoring.forward import Way, replays_forward, rows_of, run
from tether.scoring.images import check_even_images
from tether.scoring.layout import ScoringRows
from tether.scoring.packing import why_unpacked
from tether.scoring.projection import base_model_of
from tether.scoring.proof import way_of
from tether.scoring.rotary import reset_rotary, rotary_limit, uneven_forwards
from tether.scoring.router import router_loss
from tether.types import PairBatch, Response, ResponseLogProbs, join_log_probs, offsets_of

# Part of every reference's identity: raise it when a change here alters the numbers beyond rounding.
SCORING_VERSION = 2

Layout = Literal["auto", "packed", "padded"]


def score(
    model: nn.Module,
    batch: PairBatch,
    *,
    statistics: bool = False,
    auxiliary_loss: bool = False,
    layout: Layout = "auto",
) -> ResponseLogProbs:
    """Per-token log-probabilities of every response of the batch under `model`.

    Equivalent, for each response `y` to prompt `x`, but without building full logits::

        log_softmax(model(x + y).logits.float(), -1).gather(response tokens)

    Args:
        model: A causal language model, plain or wrapped (PEFT, DDP, `torch.compile`). Its mode, hooks and weights
            are left as they are: dropout is active if the caller left it in training mode.
        batch: The pairs. Moved to the model's device if necessary.
        statistics: Also return entropy, mean logit and top-1 hits of each token.
        auxiliary_loss: Also return the load-balancing loss of a mixture of experts (`router.load_balancing_loss`), its
            model's own where that has one.
        layout: `packed` (one row, each prompt once) and `padded` (one row per response) give the same numbers;
            `auto` packs where that is proven to give the model's own log-probs, before its first answer (`proof`); else
            it pads, or scores one response at a time.

    Returns:
        Values in nats, fp32, in the batch's order of responses; with gradient if the caller records one.

    Example:
        >>> log_probs = score(model, batch)          # doctest: +SKIP
        >>> chosen, rejected = batch.of_responses(log_probs.sums())  # doctest: +SKIP
    """
    batch = batch.to(device_of(model))
    limit = rotary_limit(model)
    if limit is not None:
        reset_rotary(model)
        if batch.num_responses > 1 and max(batch.fed_lengths()) > limit:
            return _score_apart(model, batch, limit, statistics, auxiliary_loss, layout)
    base = base_model_of(model)
    check_even_images(base, batch)
    way = _way_of(model, base, batch, auxiliary_loss, layout)
    try:
        return _score_in(way, model, base, batch, statistics, auxiliary_loss)
    except UnsupportedAttentionError as error:
        if layout != "auto":
            raise
        way = _way_of(model, base, batch, auxiliary_loss, layout, failed=way, why_not=f"in a later batch, {error}")
        return _score_in(way, model, base, batch, statistics, auxiliary_loss)


def _way_of(
    model: nn.Module,
    base: nn.Module,
    batch: PairBatch,
    auxiliary_loss: bool,
    layout: Layout,
    *,
    why_not: str = "",
    failed: Way | None = None,
) -> Way:
    if layout != "auto":
        return way_of(model, base, batch, [layout])
    why_unpacked_at_all = why_unpacked(model, batch, auxiliary_loss)
    layouts = ["padded", "rows"] if why_unpacked_at_all else ["packed", "padded", "rows"]
    return way_of(model, base, batch, layouts, why_not or why_unpacked_at_all, failed)


def _score_in(
    way: Way, model: nn.Module, base: nn.Module, batch: PairBatch, statistics: bool, auxiliary_loss: bool
) -> ResponseLogProbs:
    """Scores in a way that is given."""
    if way.layout == "rows" and batch.num_responses > 1:
        if has_shards(model) and num_processes() > 1:
            refuse([_one_by_one(base)])
        parts = [
            _score_in(way, model, base, batch.only([index]), statistics, auxiliary_loss)
            for index in range(batch.num_responses)
        ]
        return join_log_probs(parts, range(batch.num_responses))
    rows = rows_of(model, batch, way, router_weights=auxiliary_loss)
    if hasattr(model, "_orig_mod"):
        _expect_other_sizes(rows)
    answer = run(
        model,
        base,
        rows,
        way,
        statistics=statistics,
        auxiliary_loss=auxiliary_loss,
        keep=way.layout == "packed" and replays_forward(model),
    )
    return ResponseLogProbs(
        values=answer.values,
        offsets=offsets_of(batch.response_lengths, batch.device),
        statistics=answer.statistics,
        auxiliary_loss=router_loss(base, answer.outputs, rows.inputs["attention_mask"]) if auxiliary_loss else None,
    )


def _one_by_one(base: nn.Module) -> Refusal:
    return Refusal(
        f"a sharded {type(base).__name__}",
        "only one response at a time gives its own log-probs, processes may have different numbers of them, and would "
        "wait for each other forever",
        "Train without ZeRO-3 and FSDP2.",
    )


def _score_apart(
    model: nn.Module, batch: PairBatch, limit: int, statistics: bool, auxiliary_loss: bool, layout: Layout
) -> ResponseLogProbs:
    """Scores rows above the limit of length-dependent rotary embeddings one by one, all others together."""
    if has_shards(model) and num_processes() > 1:
        refuse([uneven_forwards(limit, max(batch.fed_lengths()))])
    lengths = batch.fed_lengths()
    within = [index for index, length in enumerate(lengths) if length <= limit]
    parts = [within] if within else []
    parts += [[index] for index, length in enumerate(lengths) if length > limit]
    scores = [
        score(model, batch.only(part), statistics=statistics, auxiliary_loss=auxiliary_loss, layout=layout)
        for part in parts
    ]
    order = [index for part in parts for index in part]
    return join_log_probs(scores, order)


def can_pack(model: nn.Module) -> bool:
    """Whether packed rows give a model's own log-probs on short rows of random tokens, before there are others."""
    base = base_model_of(model)
    embeddings: Any = base.get_input_embeddings()  # type: ignore[operator]
    vocabulary, draw = full_shape(embeddings.weight)[0], Random(0)
    prompt, chosen, rejected = (tuple(draw.choices(range(vocabulary), k=num)) for num in (12, 9, 5))
    batch = PairBatch.of_pairs([(Response(prompt, chosen), Response(prompt, rejected))])
    return _way_of(model, base, batch.to(device_of(model)), False, "auto").layout == "packed"


def restore_attention(model: nn.Module) -> None:
    """Restores a model's own attention implementation, which checkpointed training leaves replaced."""
    restore(base_model_of(model))


def _expect_other_sizes(rows: ScoringRows) -> None:
    """Tells `torch.compile` that row lengths vary, so that it compiles once and not for each."""
    for entry in rows.inputs.values():
        tensor = entry.links if isinstance(entry, PackedRow) else entry
        for dimension, size in enumerate(tensor.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
