"""The load-balancing loss of a mixture of experts: the model's own, or computed from its router's logits.

Knows what a model's forward returns and which of its modules are routers; knows no batch and no loss of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tether.errors import ConfigurationError


def has_router(base: nn.Module) -> bool:
    """Whether a model routes tokens to experts and can return its router's logits.

    A config with `output_router_logits` promises logits. A dense model of such a family has no router, though: its
    classes declare which modules are routers, and it has none of them. Custom code without that declaration is trusted.
    """
    config: Any = base.config
    if not hasattr(config.get_text_config(), "output_router_logits"):
        return False
    recorded = [(getattr(module, "_can_record_outputs", None) or {}).get("router_logits") for module in base.modules()]
    recorders = [one for entry in recorded if entry for one in (entry if isinstance(entry, list) else [entry])]
    kinds = tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)
    return not kinds or any(isinstance(module, kinds) for module in base.modules())


def router_loss(base: nn.Module, outputs: Any, weights: Int[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """The model's own auxiliary loss if its forward returns one, else `load_balancing_loss` of its router's logits.

    Args:
        base: The causal language model.
        outputs: What its forward returned with `output_router_logits=True`.
        weights: How many sequences each token of the rows stands for; 0 for padding.

    Raises:
        ConfigurationError: If the forward returned neither.
    """
    own: Tensor | None = getattr(outputs, "aux_loss", None)
    if own is not None:
        return own
    router_logits = getattr(outputs, "router_logits", None)
    config: Any = base.config
    top_k = getattr(config.get_text_config(), "num_experts_per_tok", None)
    if not router_logits or not top_k:
        raise ConfigurationError(
            problem=f"Cannot compute the router's loss of a {type(base).__name__}: its forward returns no auxiliary "
            "loss, and nothing to compute one from.",
            details="Tether needs `router_logits` in the forward's output, and `num_experts_per_tok` in the config.",
            instead="Set `router_aux_loss_coef=0`.",
        )
    return load_balancing_loss(router_logits, top_k, weights)


def load_balancing_loss(
    router_logits: Sequence[Float[Tensor, "_ experts"]],
    top_k: int | Sequence[int],
    weights: Int[Tensor, "rows columns"],
) -> Float[Tensor, ""]:
    """How unevenly tokens are sent to experts: `top_k` if the load is even, larger otherwise.

    Over the tokens `t` of all layers, each with its weight `w_t`, `E` experts, and `p = softmax(router_logits)`::

        f_e = sum_t w_t [e among the top_k of p_t] / sum_t w_t        no gradient
        P_e = sum_t w_t p_te / sum_t w_t
        loss = E sum_e f_e P_e

    Switch Transformers, Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6, generalised to `top_k` experts as in
    transformers' Mixtral. Families that route by sigmoids (DeepSeek-V3, GLM-4.5) define no such loss, because they
    balance by a bias instead. If one is requested anyway, it is this one: the softmax keeps the order of the logits,
    and transformers computes it for sigmoid families that do define a loss (GLM-4.5V, MiniMax-M2), as does TRL. Groups
    and biases that choose experts are not in `f`, as there.

    Args:
        router_logits: One tensor per layer, with a row for each token of the batch.
        top_k: Experts that a token is sent to; or one number per layer.
        weights: How many sequences each token stands for, so that a shared prompt counts as often as in separate rows;
            0 for padding. Tokens that an adapter prepends to a row count once.
    """
    device, num_experts = router_logits[0].device, router_logits[0].shape[-1]
    rows, columns = weights.shape
    virtual = router_logits[0].shape[0] // rows - columns
    each = functional.pad(weights.to(device, torch.float32), (virtual, 0), value=1.0).flatten()
    sent, probability = torch.zeros(2, num_experts, device=device)
    for layer, logits in enumerate(router_logits):
        p = logits.to(device).float().softmax(-1)
        chosen = p.topk(top_k if isinstance(top_k, int) else top_k[layer]).indices
        sent = sent + each @ torch.zeros_like(p).scatter(-1, chosen, 1.0)
        probability = probability + each @ p
    loss: Tensor = num_experts * (sent @ probability) / (each.sum() * len(router_logits)) ** 2
    return loss
