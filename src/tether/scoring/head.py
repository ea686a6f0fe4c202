"""From hidden states to log-probabilities without full logits: the mathematics of a language model's head.

Only this file knows softcaps, logit scales and head biases. `projection.py` installs it in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tether.types import TokenStatistics

# Logits in memory at a time. On a CPU, few enough to stay in the cache between the product that computes them and the
# passes that read them; on an accelerator, enough to make kernel launches negligible (256 MB in fp32).
LOGITS_AT_A_TIME = {"cpu": 2**20, "cuda": 2**26}
TOKENS_AT_A_TIME = 4096

# Exponentials of logits that a forward may keep, so that its backward need not recompute them: bounds the memory for
# any vocabulary and batch (512 MB in fp32). None on an accelerator until it has been measured there.
LOGITS_KEPT = {"cpu": 2**27, "cuda": 0}


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the projection: `softcap * tanh(scale * z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def slope(self, transformed: Tensor) -> Tensor | None:
        """Derivative with respect to the raw logits, given the transformed ones; None if it is 1 everywhere."""
        if self.softcap is not None:
            return self.scale * (1 - (transformed / self.softcap) ** 2)
        return torch.full_like(transformed[:, :1], self.scale).expand_as(transformed) if self.scale != 1.0 else None

    @classmethod
    def of(cls, model: nn.Module) -> LogitTransform:
        """Reads the transform from the model and its config, by transformers' names for it."""
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        scale = float(getattr(model, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0)
        divisor = getattr(config, "logits_scaling", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(scale / float(divisor) if divisor else scale, float(softcap) if softcap else None)


class TokenScores(NamedTuple):
    """A head's results for each target: its log-probability and, if requested, the statistics for logging."""

    log_probs: Float[Tensor, " tokens"]
    statistics: TokenStatistics | None


def token_log_probs(
    hidden: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, " tokens"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None = None,
    transform: LogitTransform | None = None,
) -> Float[Tensor, " tokens"]:
    """Log-probability of each target under its hidden state; the vocabulary is scanned in tiles.

    Means, with at most `LOGITS_AT_A_TIME` logits alive, forward and backward::

        logits = transform((hidden @ weight.T + bias).float())
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    The products run in the autocast dtype if autocast is on, otherwise in the inputs' dtype; everything after them
    in fp32 (fp64 for fp64 inputs).

    Returns:
        Log-probabilities in nats, fp32.
    """
    return token_scores(hidden, targets, weight, bias, transform).log_probs


def token_scores(
    hidden: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, " tokens"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None = None,
    transform: LogitTransform | None = None,
    *,
    statistics: bool = False,
) -> TokenScores:
    """`token_log_probs`, and in the same sweep the statistics for logging."""
    transform = transform or LogitTransform()
    log_probs, *found = _TokenLogProbs.apply(
        hidden, weight, bias, targets, transform, statistics, torch.is_grad_enabled()
    )
    return TokenScores(log_probs, TokenStatistics(*found) if statistics else None)


class _TokenLogProbs(torch.autograd.Function):
    """Log-softmax of a linear head at one target per position.

    The backward recomputes each tile's logits, except for the first ones, whose exponentials the forward has kept.
    With a frozen head (LoRA), `d log p_y / d hidden = W_y - sum_v p_v W_v` does not depend on the incoming gradient:
    the forward sums it up along the way, like attention over the vocabulary, and the backward is one scaling.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        statistics: bool,
        has_backward: bool,
    ) -> tuple[Tensor, ...]:
        head = _Head(weight.to(_product_dtype(hidden)), bias, transform)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ctx.head_is_frozen = wants_hidden and not wants_weight and not wants_bias
        # `needs_input_grad` ignores `no_grad`.
        ctx.kept = _Kept(_room_to_keep(head) if has_backward and not ctx.head_is_frozen else 0)
        tiles = list(head.tiles(min(hidden.shape[0], TOKENS_AT_A_TIME)))
        scanned = [
            _scan(
                head,
                tiles,
                hidden[run],
                targets[run],
                gradient=ctx.head_is_frozen,
                statistics=statistics,
                keep=partial(ctx.kept.offer, run),
            )
            for run in _runs(hidden.shape[0], TOKENS_AT_A_TIME)
        ]
        log_probs, normalizer, gradient, *found = (torch.cat(column) for column in zip(*scanned, strict=True))
        ctx.transform, ctx.weight_dtype = transform, weight.dtype
        if ctx.head_is_frozen:
            ctx.save_for_backward(gradient.to(hidden.dtype))
        else:
            # The weight as it was cast for the products: it is large, and the backward needs no other.
            ctx.save_for_backward(hidden, head.weight, bias, targets, normalizer, *ctx.kept.give())
        ctx.mark_non_differentiable(*found)
        return (log_probs, *found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        if ctx.head_is_frozen:
            (gradient,) = ctx.saved_tensors
            return (gradient * upstream[:, None]).to(gradient.dtype), *[None] * 6
        hidden, weight, bias, targets, normalizer, *kept = ctx.saved_tensors
        head = _Head(weight, bias, ctx.transform)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        inputs = hidden.to(weight.dtype)
        hidden_grad = torch.zeros_like(hidden, dtype=normalizer.dtype) if wants_hidden else None
        weight_grad = torch.empty_like(weight, dtype=ctx.weight_dtype) if wants_weight else None
        bias_grad = torch.empty_like(bias) if wants_bias else None
        runs = list(_runs(hidden.shape[0], TOKENS_AT_A_TIME))
        for tile in head.tiles(min(hidden.shape[0], TOKENS_AT_A_TIME)):
            for number, run in enumerate(runs):
                factor = -upstream[run, None]
                if (place := ctx.kept.places.get((run.start, tile.start))) is not None:
                    shares, largest = kept[place : place + 2]
                    slope = head.transform.slope(shares)
                    grad = shares * (factor * (largest - normalizer[run, None]).exp_())
                else:
                    logits = head.logits(inputs[run], tile)
                    slope = head.transform.slope(logits)
                    grad = logits.sub_(normalizer[run, None]).exp_().mul_(factor)
                _add_at_targets(grad, targets[run], tile, upstream[run])
                if slope is not None:
                    grad *= slope
                product_grad = grad.to(weight.dtype)
                if hidden_grad is not None:
                    _add_product(hidden_grad[run], product_grad, head.weight[tile])
                if weight_grad is not None:
                    _set_or_add_product(weight_grad[tile], product_grad.T, inputs[run], first=number == 0)
                if bias_grad is not None:
                    _set_or_add(bias_grad[tile], grad.sum(0), first=number == 0)
        return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, bias_grad, *[None] * 4


@dataclass(frozen=True)
class _Head:
    """A linear head and its transform, projected one tile of the vocabulary at a time."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def tiles(self, num_tokens: int) -> Iterator[slice]:
        limit = LOGITS_AT_A_TIME.get(self.weight.device.type, LOGITS_AT_A_TIME["cuda"])
        return _runs(self.weight.shape[0], max(1, limit // max(1, num_tokens)))

    def logits(self, inputs: Tensor, tile: slice) -> Tensor:
        """Transformed logits of a tile, in fp32 or better; the caller may overwrite them."""
        bias = None if self.bias is None else self.bias[tile].to(inputs.dtype)
        logits = nn.functional.linear(inputs, self.weight[tile], bias)
        return self.transform(logits.to(_wide(logits.dtype)))


class _Kept:
    """Tiles of `exp(logits - largest)` that a forward keeps for its backward, as long as there is room."""

    def __init__(self, room: int) -> None:
        self.places: dict[tuple[int, int], int] = {}  # by first token and first vocabulary entry
        self._room, self._tensors = room, list[Tensor]()

    def offer(self, run: slice, tile: slice, shares: Tensor, largest: Tensor) -> None:
        if shares.numel() <= self._room:
            self._room -= shares.numel()
            self.places[run.start, tile.start] = len(self._tensors)
            self._tensors += [shares, largest[:, None]]

    def give(self) -> list[Tensor]:
        """The tensors, for autograd to hold."""
        tensors, self._tensors = self._tensors, []
        return tensors


def _room_to_keep(head: _Head) -> int:
    """How many logits may be kept for the backward; none under a softcap, whose slope needs the logits themselves."""
    return 0 if head.transform.softcap is not None else LOGITS_KEPT.get(head.weight.device.type, 0)


def _scan(
    head: _Head,
    tiles: list[slice],
    hidden: Tensor,
    targets: Tensor,
    *,
    gradient: bool,
    statistics: bool,
    keep: Callable[[slice, Tensor, Tensor], None],
) -> tuple[Tensor, ...]:
    """One sweep over the vocabulary with a running maximum, as in flash attention; offers its tiles to `keep`.

    Returns log-probs, normalizers (log-sum-exps), the gradient with respect to `hidden` (empty unless requested),
    and the four statistics if requested.
    """
    inputs = hidden.to(head.weight.dtype)
    wide, num_tokens = _wide(inputs.dtype), hidden.shape[0]
    largest = hidden.new_full((num_tokens,), float("-inf"), dtype=wide)
    total, target = (hidden.new_zeros(num_tokens, dtype=wide) for _ in range(2))
    expectation = hidden.new_zeros(hidden.shape if gradient else (0, 0), dtype=wide)
    target_slope = hidden.new_ones(num_tokens, dtype=wide)
    sums = _Sums(targets, wide) if statistics else None
    for tile in tiles:
        logits = head.logits(inputs, tile)
        slope = head.transform.slope(logits) if gradient else None
        here, column = _places(targets, tile)
        target = torch.where(here, logits.gather(-1, column)[:, 0], target)
        tile_largest = logits.amax(-1) if sums is None else sums.see(logits, tile, largest)
        before, largest = largest, torch.maximum(largest, tile_largest)
        shrink = (before - largest).exp_()
        below = logits.sub_(largest[:, None])
        shares = below.exp_() if sums is None else below.exp()
        tile_total = shares.sum(-1)
        total = total * shrink + tile_total
        keep(tile, shares, largest)
        if sums is not None:
            sums.add(below, shares, shrink, largest * tile_total)
        if gradient:
            if slope is not None:
                target_slope = torch.where(here, slope.gather(-1, column)[:, 0], target_slope)
                shares *= slope
            expectation *= shrink[:, None]
            _add_product(expectation, shares.to(inputs.dtype), head.weight[tile])
    normalizer = largest + total.log()
    if gradient:
        expectation = target_slope[:, None] * head.weight[targets] - expectation / total[:, None]
    found = () if sums is None else sums.statistics(targets, total, normalizer, head.weight.shape[0])
    return (target - normalizer, normalizer, expectation, *found)


class _Sums:
    """What the sweep of `_scan` adds up for the statistics, tile by tile."""

    def __init__(self, targets: Tensor, dtype: torch.dtype) -> None:
        self._weighted, self._plain, self._squares = (torch.zeros_like(targets, dtype=dtype) for _ in range(3))
        self._top = torch.zeros_like(targets)

    def see(self, logits: Tensor, tile: slice, largest: Tensor) -> Tensor:
        """Takes in a tile's logits, with the largest of the tiles before; returns the largest of this one."""
        tile_largest, tile_top = logits.max(-1)
        self._top = torch.where(tile_largest > largest, tile_top + tile.start, self._top)
        self._plain += logits.sum(-1)
        return tile_largest

    def add(self, below: Tensor, shares: Tensor, shrink: Tensor, offset: Tensor) -> None:
        """Takes in `logits - largest` and their exponentials; `offset` is `largest` times the sum of these.

        Overwrites `below` with the products it sums, so that no third tile is made.
        """
        self._weighted = self._weighted * shrink + below.mul_(shares).sum(-1) + offset
        self._squares = self._squares * shrink.square() + torch.mul(shares, shares, out=below).sum(-1)

    def statistics(self, targets: Tensor, total: Tensor, normalizer: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
        """Entropy, mean logit, top-1 hits and `log sum_v p_v^2`."""
        log_expected_prob = self._squares.log() - 2 * total.log()
        entropy = normalizer - self._weighted / total
        return entropy, self._plain / vocab_size, self._top == targets, log_expected_prob


def logits_scores(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], statistics: bool
) -> TokenScores:
    """The same from given logits, for heads that are more than a projection."""
    logits = logits.to(_wide(logits.dtype))
    every = logits.log_softmax(-1)
    log_probs = every.gather(-1, targets[:, None])[:, 0]
    if not statistics:
        return TokenScores(log_probs, None)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
        expected = (2 * every).logsumexp(-1)
        found = TokenStatistics(entropy, logits.mean(-1), logits.argmax(-1) == targets, expected)
        return TokenScores(log_probs, found)


def checkpointed_scores(
    hidden: Tensor,
    targets: Tensor,
    project: Callable[[Tensor], Tensor],
    transform: LogitTransform,
    vocab_size: int,
    statistics: bool,
) -> TokenScores:
    """The same for a projection with a forward of its own (an adapter, a quantized head), some rows at a time."""

    def score_run(run_hidden: Tensor, run_targets: Tensor) -> TokenScores:
        logits = project(run_hidden)
        return logits_scores(transform(logits.to(_wide(logits.dtype))), run_targets, statistics)

    size = max(1, LOGITS_AT_A_TIME["cuda"] // vocab_size)
    scores = [
        checkpoint(score_run, hidden[run], targets[run], use_reentrant=False) for run in _runs(hidden.shape[0], size)
    ]
    log_probs = torch.cat([score.log_probs for score in scores])
    if not statistics:
        return TokenScores(log_probs, None)
    found = (
        torch.cat([getattr(score.statistics, entry.name) for score in scores]) for entry in fields(TokenStatistics)
    )
    return TokenScores(log_probs, TokenStatistics(*found))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _runs(total: int, size: int) -> Iterator[slice]:
    for start in range(0, max(total, 1), size):
        yield slice(start, min(start + size, total))


def _places(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile, and a column for each (any column for the others)."""
    column = targets - tile.start
    here = (column >= 0) & (column < tile.stop - tile.start)
    return here, column.clamp(0, tile.stop - tile.start - 1)[:, None]


def _add_at_targets(grad: Tensor, targets: Tensor, tile: slice, upstream: Tensor) -> None:
    here, column = _places(targets, tile)
    grad.scatter_add_(-1, column, (upstream * here).to(grad.dtype)[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, summed in the accumulator's precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _set_or_add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    if first and total.dtype == left.dtype:
        torch.mm(left, right, out=total)
    else:
        _set_or_add(total, left @ right, first=first)


def _set_or_add(total: Tensor, value: Tensor, *, first: bool) -> None:
    if first:
        total.copy_(value)
    else:
        total += value
