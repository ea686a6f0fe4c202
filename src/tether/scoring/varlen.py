"""A packed row's attention as one call of torch's variable-length flash attention, on CUDA in half precision.

The query sequences are the row's chains. The keys of each are those of its sequence, gathered. Causal attention aligned
at the end does the rest.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tether.scoring.chains import VarlenPlan


def varlen_attention(
    query: Float[Tensor, "1 heads row size"],
    key: Float[Tensor, "1 key_heads row size"],
    value: Float[Tensor, "1 key_heads row size"],
    plan: VarlenPlan,
    *,
    scale: float,
    window: int | None,
) -> Float[Tensor, "1 row heads size"]:
    """`packed_attention` for CUDA tensors in half precision, without softcap and dropout.

    Args:
        query, key, value: Of the whole row.
        plan: The row's plan.
        scale: Factor on the scores.
        window: Each query sees at most this many positions, its own included.
    """
    from torch.nn.attention import varlen  # missing in older versions of torch that this package supports

    rows, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen.varlen_attn(
        rows.contiguous(),
        keys.index_select(0, plan.key_places),
        values.index_select(0, plan.key_places),
        plan.query_ends,
        plan.key_ends,
        plan.longest_query,
        plan.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]
