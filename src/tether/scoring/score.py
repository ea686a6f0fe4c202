"""The one engine that scores responses, for the policy and every reference, so that they agree by construction.

Chooses the layout and the head; does not know whether it scores a policy or a reference.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tether.distributed import has_shards, num_processes
from tether.refusals import refuse
from tether.scoring.attention import UnsupportedAttentionError, packed_attention_of, restore
from tether.scoring.evaluation import evaluation_mode
from tether.scoring.head import logits_scores
from tether.scoring.images import check_even_images
from tether.scoring.layout import ScoringRows, packed_rows, padded_rows
from tether.scoring.packing import known_to_pack, layouts_agree, packs_images, probe_batch, remember
from tether.scoring.projection import base_model_of, has_known_head, judge_head, scoring_head
from tether.scoring.rotary import reset_rotary, rotary_limit, uneven_forwards
from tether.scoring.router import router_loss
from tether.types import PairBatch, ResponseLogProbs, TokenStatistics, join_log_probs, offsets_of

# Part of every reference's identity: raise it when a change here alters the numbers beyond rounding.
SCORING_VERSION = 1

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
            `auto` packs where the model's family is proven, or proves it first; prompts with images only where proven.

    Returns:
        Values in nats, fp32, in the batch's order of responses; with gradient if the caller records one.

    Example:
        >>> log_probs = score(model, batch)          # doctest: +SKIP
        >>> chosen, rejected = batch.of_responses(log_probs.sums())  # doctest: +SKIP
    """
    batch = batch.to(next(model.parameters()).device)
    limit = rotary_limit(model)
    if limit is not None:
        reset_rotary(model)
        if batch.num_responses > 1 and max(batch.fed_lengths()) > limit:
            return _score_apart(model, batch, limit, statistics, auxiliary_loss, layout)
    base = base_model_of(model)
    check_even_images(base, batch)
    packed = layout == "packed" or (layout == "auto" and _packs(model, base, batch, auxiliary_loss))
    rows = packed_rows(batch, router_weights=auxiliary_loss) if packed else padded_rows(batch)
    if hasattr(model, "_orig_mod"):
        _expect_other_sizes(rows)
    answer = _run(model, base, rows, statistics, auxiliary_loss)
    return ResponseLogProbs(
        values=answer.values,
        offsets=offsets_of(batch.response_lengths, batch.device),
        statistics=answer.statistics,
        auxiliary_loss=router_loss(base, answer.outputs, rows.inputs["attention_mask"]) if auxiliary_loss else None,
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


def _packs(model: nn.Module, base: nn.Module, batch: PairBatch, auxiliary_loss: bool) -> bool:
    if not batch.images:
        return can_pack(model)
    says_more = any(images is not None and images.token_inputs for images in batch.images)
    return not says_more and not auxiliary_loss and packs_images(model, base)


def can_pack_images(model: nn.Module) -> bool:
    """Whether packed rows give a vision-language model's own log-probs for prompts with images."""
    return packs_images(model, base_model_of(model))


def can_pack(model: nn.Module) -> bool:
    """Whether packed rows give a model's own log-probs; compares the layouts once for unknown families."""
    base = base_model_of(model)
    known = known_to_pack(model, base)
    if known is not None:
        return known
    batch = probe_batch(base)
    generator = torch.Generator().manual_seed(1)
    shuffled = torch.randperm(len(batch.prompt_ids), generator=generator).to(batch.device)
    try:
        with torch.no_grad(), evaluation_mode(model):
            padded = score(model, batch, layout="padded").values
            elsewhere = replace(batch, prompt_ids=batch.prompt_ids[shuffled])
            other_context = score(model, elsewhere, layout="padded").values
            packed = score(model, batch, layout="packed").values
    except (UnsupportedAttentionError, TypeError, ValueError, RuntimeError) as error:
        return remember(base, False, f"its attention cannot be packed ({error})")
    return remember(
        base, layouts_agree(packed, padded, other_context), "its attention gives other numbers on packed rows"
    )


def restore_attention(model: nn.Module) -> None:
    """Restores a model's own attention implementation, which checkpointed training leaves replaced."""
    restore(base_model_of(model))


class _Answer(NamedTuple):
    values: Float[Tensor, " tokens"]
    statistics: TokenStatistics | None
    outputs: Any


def _run(model: nn.Module, base: nn.Module, rows: ScoringRows, statistics: bool, auxiliary_loss: bool) -> _Answer:
    options: dict[str, Any] = {"use_cache": False}
    if auxiliary_loss:
        options["output_router_logits"] = True
    is_packed = "packed_lengths" in rows.inputs
    attention = packed_attention_of(base, keep=_replays_forward(model)) if is_packed else nullcontext()
    with attention:
        verdict = has_known_head(base)
        if verdict is not False:
            with scoring_head(base, rows, statistics) as request:
                outputs = model(**rows.inputs, **options)
            answered = request.log_probs is not None
            if answered and (verdict or judge_head(base, request.log_probs, outputs)):  # type: ignore[arg-type]
                return _Answer(request.log_probs.flatten(), request.statistics, outputs)  # type: ignore[union-attr]
        outputs = model(**rows.inputs, **options)
    return _answer_of_logits(outputs, rows, statistics)


def _answer_of_logits(outputs: Any, rows: ScoringRows, statistics: bool) -> _Answer:
    """The fallback for heads that are more than a projection and a known transform: the model's own full logits."""
    logits: Tensor = outputs.logits
    selected = logits[rows.row, rows.column + (logits.shape[1] - rows.width)]
    scores = logits_scores(selected, rows.targets, statistics)
    return _Answer(scores.log_probs, scores.statistics, outputs)


def _expect_other_sizes(rows: ScoringRows) -> None:
    """Tells `torch.compile` that row lengths vary, so that it compiles once and not for each."""
    for tensor in rows.inputs.values():
        for dimension, size in enumerate(tensor.shape):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _replays_forward(model: nn.Module) -> bool:
    """Whether activation checkpointing will run layers again during the backward."""
    return torch.is_grad_enabled() and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
