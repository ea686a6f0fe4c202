"""Tiny models that are right by plain forwards, and would be wrong in rows packed or padded without looking.

Each was changed in a way that users change models in: patched, hooked, extended. Nothing here may import `tether`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from support.tiny import _randomize, tiny_model


def _half_scaled(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **kwargs: Any
) -> Any:
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling / 2, **kwargs)


def own_attention() -> Any:
    AttentionInterface.register("half_scaled", _half_scaled)
    AttentionMaskInterface.register("half_scaled", sdpa_mask)
    model = tiny_model()
    model.set_attn_implementation("half_scaled")
    return model


class SummingAttention(LlamaAttention):
    """Adds a running sum over positions."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output + 0.1 * output.cumsum(1), weights


def own_attention_class() -> Any:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.__class__ = SummingAttention
    return model


def patched_on_the_instance() -> Any:
    model = tiny_model()
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        attention.forward = types.MethodType(SummingAttention.forward, attention)
        attention.forward = _summing(LlamaAttention.forward.__get__(attention))
    return model


def _summing(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output, weights = plain(*args, **kwargs)
        return output + 0.1 * output.cumsum(1), weights

    return forward


class Neighbours(nn.Module):
    """A causal mix of neighbours, as a short convolution is; with a gate of 0 it does nothing yet."""

    def __init__(self, plain: nn.Module, gate: float) -> None:
        super().__init__()
        self.plain, self.gate = plain, nn.Parameter(torch.tensor(gate))

    def forward(self, hidden: Tensor) -> Any:
        return self.plain(hidden + self.gate * F.pad(hidden, (0, 0, 1, 0))[:, :-1])


def mixes_neighbours(gate: float = 0.5) -> Any:
    model = tiny_model()
    model.model.layers[0].mlp = Neighbours(model.model.layers[0].mlp, gate)
    return model


def late_tokens_steered() -> Any:
    model = tiny_model()
    model.model.layers[0].register_forward_hook(lambda _, __, out: torch.cat([out[:, :4], out[:, 4:] + 0.5], 1))
    return model


def position_added() -> Any:
    """A hook that counts columns, where a model counts positions."""
    model = tiny_model()

    def add(_: Any, __: Any, out: Tensor) -> Tensor:
        return out + 0.05 * torch.arange(out.shape[1])[None, :, None]

    model.model.embed_tokens.register_forward_hook(add)
    return model


def lost_in_a_tree() -> Any:
    """Wrong where sequences part at more than one depth, as those of prompts that begin alike."""
    model = tiny_model()

    def look(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs["position_ids"][0] if kwargs.get("position_ids") is not None else torch.arange(1)
        depths: set[int] = set()
        for depth in positions[1:][positions.diff() != 1].tolist():
            depths = {*depths, depth} if depth else set()
            if len(depths) > 1:
                kwargs["position_ids"] = 2 * kwargs["position_ids"]
                return (), kwargs

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    return model


def cooled_logits() -> Any:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _, __, out: 0.7 * out)
    return model


def shifted_on_the_head() -> Any:
    """One token is made less likely: nothing that a scale or a softcap would be."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _, __, out: out - 5.0 * (torch.arange(out.shape[-1]) == 7))
    return model


class NeedsMask(LlamaAttention):
    """Fails in its own way where no mask was made."""

    error: type[Exception] = AttributeError

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            raise self.error("no mask")
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


def needs_mask(error: type[Exception]) -> Any:
    model = tiny_model(attn_implementation="eager")
    kind = type("NeedsThisMask", (NeedsMask,), {"error": error})
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


class Windowed(LlamaAttention):
    """Sees 64 positions, and no config says so."""

    def forward(self, hidden_states: Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        length = hidden_states.shape[1]
        place = torch.arange(length)
        sees = (place[None] <= place[:, None]) & (place[None] > place[:, None] - 64)
        mask = torch.zeros(length, length).masked_fill(~sees, float("-inf"))[None, None]
        return super().forward(hidden_states, *args, attention_mask=mask, **kwargs)


def windowed_beyond_64() -> Any:
    model = tiny_model(attn_implementation="eager")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Windowed
    return model


def small(family: str, **fields: Any) -> Any:
    """A tiny model of a family that `tiny_model` lacks."""
    wanted: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 4096,
        "pad_token_id": None, "bos_token_id": 2, "eos_token_id": 0, "n_routed_experts": 4, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2,
    }  # fmt: skip
    default = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in wanted.items() if hasattr(default, k)} | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize(model, std=1.7 / 32**0.5, seed=0)
    return model.eval()


def sparse_beyond_96() -> Any:
    kinds = ["full_attention", "minimax_m3_sparse"]
    return small("minimax_m3_vl_text", index_block_size=16, index_topk_blocks=6, layer_types=kinds)


def _subclassed(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.__class__ = SummingAttention


def _other_epsilon(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.0


def _other_rotation(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(5)


def _other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def _steered(model: Any) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.model.layers[0].register_forward_hook(lambda _, __, out: out + direction)


# Changes of a model that leave its weights and its config as they are, and so its digest.
BEHAVIOURS: dict[str, Callable[[Any], None]] = {
    "a subclass": _subclassed,
    "norm epsilon": _other_epsilon,
    "rotary buffers": _other_rotation,
    "an activation": _other_activation,
    "a steering hook": _steered,
}


def with_behaviour(name: str, seed: int = 0) -> Any:
    model = tiny_model(seed=seed)
    BEHAVIOURS[name](model)
    return model


_REMOTE = """
from transformers import LlamaForCausalLM


class OwnModel(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = SCALE * output.logits
        return output
"""


def with_remote_code(folder: Path, scale: float, *, comment: str = "") -> Any:
    """A tiny model whose folder brings its code along, with the logits scaled by it."""
    model = tiny_model()
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    model.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(comment + _REMOTE.replace("SCALE", str(scale)))
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def activated(calls: tuple[int, ...] = (5, 6)) -> Any:
    """An adapter that acts from the last of these tokens in a row on. Its B is zero: it does nothing yet."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=list(calls)
    )
    return get_peft_model(tiny_model(), config).eval()
