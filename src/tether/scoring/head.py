"""The last step of a language model, from hidden states to log-probabilities, without full logits.

The only file that knows about softcaps, logit scales and head biases, and the only one that touches a model: while
a request is open, the output projection's `forward` scores the requested positions in chunks instead of
projecting every position. Nothing is left behind when the request closes: class, `state_dict`, `save_pretrained`
and plain calls are as before. Scoring inside the projection's own call means that DDP, FSDP and ZeRO gather its
weight as they would for an ordinary forward.

Must not know what a pair, a reference or a loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tether.scoring.layout import ScoringRows
from tether.types import TokenStatistics

# Logits held at a time: 2**24 fp32 values are 64 MB. Large enough that the products run at full speed, small
# enough to disappear beside a model.
LOGITS_PER_CHUNK = 2**24


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

    def backward(self, transformed: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, given the transformed ones."""
        if self.softcap is not None:
            grad = grad * (1 - (transformed / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad

    @classmethod
    def of(cls, model: nn.Module) -> LogitTransform:
        """Reads the transform from the model and its config, by the names transformers uses for it."""
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        scale = float(getattr(model, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0)
        divisor = getattr(config, "logits_scaling", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(scale / float(divisor) if divisor else scale, float(softcap) if softcap else None)


def token_log_probs(
    hidden: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, " tokens"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None = None,
    transform: LogitTransform | None = None,
) -> Float[Tensor, " tokens"]:
    """Log-probability of each target under its hidden state, projected in chunks.

    Means, with logits of at most `LOGITS_PER_CHUNK` values alive at a time, forward and backward::

        logits = transform((hidden @ weight.T + bias).float())
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    The products run in the autocast dtype where autocast is on, else in the inputs' dtype; everything after them
    in fp32 (fp64 for fp64 inputs).

    Returns:
        Log-probabilities in nats, fp32.
    """
    result: Tensor = _TokenLogProbs.apply(hidden, weight, bias, targets, transform or LogitTransform())
    return result


class _TokenLogProbs(torch.autograd.Function):
    """Chunked log-softmax of a linear head; the backward recomputes each chunk's logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> Tensor:
        dtype = _product_dtype(hidden)
        product_weight = weight.to(dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # With a frozen head (LoRA), d log p_y / d hidden = W_y - p W needs no gradient from above: it is made here
        # from the logits at hand, and the backward is one scaling.
        eager_hidden_grad = wants_hidden and not wants_weight and not wants_bias
        log_probs, normalizers, grads = [], [], []
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits = _logits(hidden[part].to(dtype), product_weight, bias, transform)
            normalizer = logits.logsumexp(-1)
            log_probs.append(logits.gather(-1, targets[part, None])[:, 0] - normalizer)
            normalizers.append(normalizer)
            if eager_hidden_grad:
                grad = _logit_grad(logits, normalizer, targets[part], transform)
                grads.append((grad.to(dtype) @ product_weight).to(hidden.dtype))
        ctx.transform, ctx.dtype, ctx.eager = transform, dtype, eager_hidden_grad
        if eager_hidden_grad:
            ctx.save_for_backward(torch.cat(grads) if grads else hidden)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalizers) if normalizers else hidden)
        return torch.cat(log_probs) if log_probs else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        if ctx.eager:
            (unit,) = ctx.saved_tensors
            return (unit * upstream[:, None]).to(unit.dtype), None, None, None, None
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        product_weight = weight.to(ctx.dtype)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            inputs = hidden[part].to(ctx.dtype)
            logits = _logits(inputs, product_weight, bias, ctx.transform)
            grad = _logit_grad(logits, normalizers[part], targets[part], ctx.transform)
            grad *= upstream[part, None]
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            product_grad = grad.to(ctx.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = product_grad @ product_weight
            if wants_weight:
                _accumulate_product(weight_grad, product_grad.T, inputs)
        return (
            hidden_grad,
            weight_grad.to(weight.dtype) if wants_weight else None,
            bias_grad.to(bias.dtype) if bias_grad is not None else None,
            None,
            None,
        )


def token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, " tokens"],
    project: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> TokenStatistics:
    """Entropy, mean logit and top-1 hits of each position, in chunks and without gradient."""
    entropy, mean_logit, is_top1 = [], [], []
    with torch.no_grad():
        for part in _chunks(hidden.shape[0], vocab_size):
            logits = project(hidden[part]).float()
            log_probs = logits.log_softmax(-1)
            entropy.append(-(log_probs.exp() * log_probs).sum(-1))
            mean_logit.append(logits.mean(-1))
            is_top1.append(logits.argmax(-1) == targets[part])
    return TokenStatistics(torch.cat(entropy), torch.cat(mean_logit), torch.cat(is_top1))


@dataclass
class HeadRequest:
    """What the projection is asked while a request is open, and what it answered.

    The answer is taken from a forward hook, so behind any hook that a sharding library put on the module: the
    gradient then passes through theirs, and the weight is whole when the backward needs it.
    """

    rows: ScoringRows
    statistics_wanted: bool
    log_probs: Tensor | None = None
    statistics: TokenStatistics | None = None


@contextmanager
def scoring_head(model: nn.Module, rows: ScoringRows, statistics: bool) -> Iterator[HeadRequest]:
    """While open, the model's output projection answers `rows` instead of projecting every position."""
    base = base_model_of(model)
    head = base.get_output_embeddings()  # type: ignore[operator]
    request = HeadRequest(rows, statistics)
    transform = LogitTransform.of(base)
    plain_forward = head.forward

    def forward(hidden: Tensor) -> Tensor:
        # Prompt-learning adapters put virtual tokens in front of each row.
        columns = rows.column + (hidden.shape[1] - rows.width)
        selected = hidden[rows.row, columns]
        # `view` gives the shape (rows, columns, vocabulary) that model code behind the projection expects.
        return _score(head, plain_forward, selected, request, transform).view(1, -1, 1)

    def capture(_module: nn.Module, _args: Any, output: Tensor) -> None:
        request.log_probs = output

    had_own_forward = "forward" in vars(head)
    head.forward = forward
    hook = head.register_forward_hook(capture)
    try:
        yield request
    finally:
        hook.remove()
        if had_own_forward:
            head.forward = plain_forward
        else:
            del head.forward


def _score(
    head: nn.Module,
    plain_forward: Callable[[Tensor], Tensor],
    hidden: Tensor,
    request: HeadRequest,
    transform: LogitTransform,
) -> Tensor:
    targets = request.rows.targets
    if type(head) is nn.Linear:
        log_probs = token_log_probs(hidden, targets, head.weight, head.bias, transform)
    else:  # an adapter on the head, a quantized head: their own forward, chunk by chunk
        log_probs = _checkpointed_log_probs(hidden, targets, plain_forward, transform, _vocab_size(head))
    if request.statistics_wanted:
        request.statistics = token_statistics(
            hidden.detach(), targets, lambda part: transform(plain_forward(part).float()), _vocab_size(head)
        )
    return log_probs


def _checkpointed_log_probs(
    hidden: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor], transform: LogitTransform, vocab_size: int
) -> Tensor:
    def chunk(part_hidden: Tensor, part_targets: Tensor) -> Tensor:
        logits = transform(project(part_hidden).float())
        return logits.log_softmax(-1).gather(-1, part_targets[:, None])[:, 0]

    parts = [
        checkpoint(chunk, hidden[part], targets[part], use_reentrant=False)
        for part in _chunks(hidden.shape[0], vocab_size)
    ]
    return torch.cat(parts)


# Models whose head was found to do more than `LogitTransform` says, after one look at a real forward.
_VERDICTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_known_head(model: nn.Module) -> bool | None:
    """Whether the model's head is a projection and a `LogitTransform`; None while nobody has looked."""
    base = base_model_of(model)
    head = base.get_output_embeddings()  # type: ignore[operator]
    if head is None or not hasattr(head, "out_features"):
        return False
    return _VERDICTS.get(base)


def judge_head(model: nn.Module, captured: Tensor, outputs: Any) -> bool:
    """Compares what the model made of the captured values with what `LogitTransform` would.

    The values that left the projection (log-probabilities, but the model cannot know) went through the model's
    remaining code: had that code done anything beyond the transform, the two would differ.
    """
    base = base_model_of(model)
    logits = getattr(outputs, "logits", None)
    known = False
    if logits is not None and logits.numel() == captured.numel():
        with torch.no_grad():
            expected = LogitTransform.of(base)(captured.detach().float())
            known = torch.allclose(logits.detach().float().flatten(), expected.flatten(), rtol=1e-4, atol=1e-4)
    _VERDICTS[base] = known
    return known


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


def _vocab_size(head: nn.Module) -> int:
    return int(head.out_features)  # type: ignore[arg-type]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocab_size)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _logits(inputs: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    logits = nn.functional.linear(inputs, weight, bias.to(inputs.dtype) if bias is not None else None)
    return transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _logit_grad(logits: Tensor, normalizer: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """d log p_target / d raw logits = transform'(z) * (onehot - softmax)."""
    grad = (logits - normalizer[:, None]).exp_().neg_()
    grad.scatter_add_(-1, targets[:, None], torch.ones_like(grad[:, :1]))
    return transform.backward(logits, grad)


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, summed over chunks in the accumulator's precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
