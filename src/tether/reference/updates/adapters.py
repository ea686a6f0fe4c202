"""How an adapter follows the policy: which of its tensors move together, by which rule.

Reads PEFT's layers and configurations; does no arithmetic (`groups`, `averaging`) and holds no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper, _ConvNd
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from tether.distributed import has_shards
from tether.errors import ConfigurationError
from tether.reference.updates.groups import DenseGroup, UpdateGroup, UpdateRule
from tether.reference.updates.low_rank import (
    MATRIX,
    DoraGroup,
    Layout,
    LowRankGroup,
    convolution,
    experts,
)
from tether.refusals import Refusal, of_option, refuse

# Types whose weights are linear in the tensors they train, so that the average of the tensors is the average of the
# weights: proven one by one in tests/reference/test_adapter_averaging.py.
LINEAR_TYPES = frozenset(
    """
    IA3 LN_TUNING FOURIERFT WAVEFT C3A SHIRA MISS TRAINABLE_TOKENS PROMPT_TUNING PREFIX_TUNING
    """.split()  # noqa: SIM905
)
# Variants of LoRA that PEFT does not mark as such, or did not before 0.20.
_UNMARKED = ("alora_invocation_tokens", "arrow_config", "use_bdlora", "use_qalora")
# Layers on a quantized base, known by name: their libraries need not be there. The base is never touched.
_QUANTIZED = ("Linear4bit", "Linear8bitLt")


def refused_followers(configs: Iterable[Any], rule: UpdateRule | None = None) -> Iterator[Refusal]:
    """Adapters that have no average, and ranks that do not apply to them.

    Args:
        configs: PEFT configurations, of adapters that exist or that will be made.
        rule: How they follow; None to check the adapters alone.
    """
    configs = list(configs)
    for config in configs:
        kind = _kind(config)
        if kind == "LORA":
            yield from _variants(config)
        elif kind and kind not in LINEAR_TYPES:
            yield _refusal(
                f"a {kind} adapter",
                "its weights are not linear in the tensors it trains, so the average of two such adapters is not known "
                "to be one",
            )
        elif kind == "PREFIX_TUNING" and config.prefix_projection:
            yield _refusal(
                "prefix tuning with `prefix_projection=True`",
                "its prefixes come out of a network, and the average of two networks is not the network of the average",
            )
    if rule is not None and configs:
        yield from _rank(rule, [config for config in configs if _kind(config) == "LORA"])


def _kind(config: Any) -> str:
    return str(getattr(getattr(config, "peft_type", None), "value", ""))


def _variants(config: Any) -> Iterator[Refusal]:
    marked = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    for name in dict.fromkeys((*marked, *_UNMARKED)):
        if name != "use_dora" and getattr(config, name, None):
            yield _refusal(f"LoRA with `{name}`", "its update is not the product of two matrices")


def refused_shards(policy: nn.Module | None = None) -> Iterator[Refusal]:
    """An adapter that follows a sharded policy.

    Args:
        policy: Looked at for shards; None where training is known to shard it.
    """
    if policy is None or has_shards(policy):
        yield _refusal(
            "a PEFT model under ZeRO-3 or FSDP2",
            "each process holds a shard of an adapter's factors, and their average is made of whole matrices",
            "Train with DDP or ZeRO-2, where adapters stay whole, or train the full model, or set "
            "`sync_ref_model=False`.",
        )


def adapter_groups(policy: PeftModel, rule: UpdateRule) -> list[UpdateGroup]:
    """Everything that an adapter policy trains, in groups.

    LoRA's factors are averaged as the weights they make, DoRA's exactly; everything else (biases, norms, copies of
    whole modules, token rows, prompts, and types linear in what they train) tensor by tensor.

    Raises:
        ConfigurationError: If an adapter has no average, or the rank does not apply to it; names it.
    """
    refuse(refused_followers((policy.peft_config[name] for name in policy.active_adapters), rule))
    names = {id(p): name for name, p in policy.named_parameters() if p.requires_grad}
    low_rank = [
        group for path, layer, adapter in lora_layers(policy) for group in _groups(path, layer, adapter, names, rule)
    ]
    refuse(_unused_rank(rule, bool(low_rank)))
    claimed = {name for group in low_rank for name in group.names}
    return [*low_rank, *(DenseGroup(name, rule.alpha) for name in names.values() if name not in claimed)]


def _rank(rule: UpdateRule, configs: Sequence[Any]) -> Iterator[Refusal]:
    """A rank that no averaged update would have."""
    yield from _unused_rank(rule, bool(configs))
    rank = max([0, *(r for config in configs for r in (config.r, *config.rank_pattern.values()))])
    if rule.max_rank is not None and rule.max_rank < rank:
        why = f"the adapter has rank {rank}, so the reference could not even be the policy"
        yield of_option("ref_model_sync_rank", rule.max_rank, why, f"Write {2 * rank}, or None.")


def _unused_rank(rule: UpdateRule, has_low_rank: bool) -> Iterator[Refusal]:
    if rule.max_rank is not None and not has_low_rank:
        why = "nothing of LoRA is averaged, so no update has a rank to limit"
        yield of_option("ref_model_sync_rank", rule.max_rank, why, "Leave it out.")


def lora_layers(policy: PeftModel) -> Iterator[tuple[str, Any, str]]:
    """Path, layer and adapter name of every active LoRA update."""
    for path, layer in policy.named_modules():
        if isinstance(layer, lora.LoraLayer):
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                    yield path, layer, adapter


def factors_of(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """`B` and `A` of a LoRA layer."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def _groups(path: str, layer: Any, adapter: str, names: Mapping[int, str], rule: UpdateRule) -> list[UpdateGroup]:
    """The update of one layer; nothing where only one factor trains, since the update is linear in that one."""
    b, a = factors_of(layer, adapter)
    is_dora = adapter in layer.lora_magnitude_vector
    trained = [names.get(id(tensor)) for tensor in (b, a)]
    if not is_dora and not all(trained):
        return []
    rank = int(layer.r[adapter])
    options: dict[str, Any] = {
        "scaling": float(layer.scaling[adapter]),
        "alpha": rule.alpha,
        "max_rank": rule.max_rank or 2 * rank,
    }
    if is_dora:
        return [_dora_group(path, layer, adapter, names, options)]
    layout = _layout(path, layer, a)
    bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
    bias_name = None if bias is None else names.get(id(bias))
    return [LowRankGroup(names[id(b)], names[id(a)], layout=layout, bias=bias_name, **options)]


def _layout(path: str, layer: Any, a: Tensor) -> Layout:
    if isinstance(layer, ParamWrapper):
        return experts(int(layer.num_experts)) if layer.num_experts > 1 else MATRIX
    if isinstance(layer, _ConvNd) and layer.get_base_layer().groups == 1:
        return convolution(tuple(a.shape[2:]))
    if isinstance(layer, lora.Linear | lora.Embedding) or type(layer).__name__ in _QUANTIZED:
        return MATRIX
    raise _unknown_layer(
        f"LoRA on `{path}` ({type(layer).__name__})",
        "its factors are not known to make up one matrix",
        "Write a `target_modules` without that layer, or set `sync_ref_model=False`.",
    )


def _dora_group(path: str, layer: Any, adapter: str, names: Mapping[int, str], options: dict[str, Any]) -> DoraGroup:
    tensors = (*factors_of(layer, adapter), layer.lora_magnitude_vector[adapter].weight)
    base = layer.get_base_layer()
    if not all(id(tensor) in names for tensor in tensors) or id(base.weight) in names:
        raise _unknown_layer(
            f"DoRA on `{path}`, of which only a part trains (or the base too)",
            "its average is only exact over a frozen base, with both factors and the magnitude training",
            "Train all three, and no base weight under them.",
        )
    weight: Callable[[], Tensor]
    if isinstance(layer, lora.Embedding):
        weight = lambda: base.weight.detach().T  # noqa: E731
    elif isinstance(layer, lora.Linear):
        weight = lambda: transpose(dequantize_module_weight(base).detach(), layer.fan_in_fan_out)  # noqa: E731
    else:
        raise _unknown_layer(
            f"DoRA on `{path}` ({type(layer).__name__})",
            "its norms run over other axes than a matrix's rows",
            "Write a `target_modules` without that layer, or `use_dora=False`.",
        )
    b, a, magnitude = (names[id(tensor)] for tensor in tensors)
    return DoraGroup(b, a, magnitude, weight, **options)


def _refusal(beside: str, why: str, instead: str = "") -> Refusal:
    otherwise = "Train LoRA, DoRA, IA3 or the full model, or set `sync_ref_model=False`."
    return of_option("sync_ref_model", True, why, instead or otherwise, f"with {beside}")


def _unknown_layer(beside: str, why: str, instead: str) -> ConfigurationError:
    refusal = _refusal(beside, why, instead)
    return ConfigurationError(refusal.problem, refusal.instead)
