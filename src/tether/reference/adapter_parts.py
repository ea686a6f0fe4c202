"""How an adapter follows the policy: which of its tensors move together, by which rule; and how the result is saved.

Reads PEFT's layers and configurations; does no arithmetic (`parts`, `averaging`) and holds no tensors.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper, _ConvNd
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from tether.errors import ConfigurationError
from tether.reference.parts import (
    MATRIX,
    DoraPart,
    Layout,
    LowRankBemaPart,
    LowRankPart,
    Part,
    UpdateRule,
    convolution,
    dense_part,
    experts,
)

# Types whose weights are linear in the tensors they train, so that the average of the tensors is the average of the
# weights: proven one by one in tests/test_adapter_averaging.py.
LINEAR_TYPES = frozenset(
    """
    IA3 LN_TUNING FOURIERFT WAVEFT C3A SHIRA MISS TRAINABLE_TOKENS PROMPT_TUNING PREFIX_TUNING
    """.split()  # noqa: SIM905
)
# Layers on a quantized base, known by name: their libraries need not be there. The base is never touched.
_QUANTIZED = ("Linear4bit", "Linear8bitLt")
# Starts that change the base in memory, so that an adapter does not fit the model it was loaded on any more.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_can_follow(configs: Iterable[Any], rule: UpdateRule | None = None) -> None:
    """Refuses adapters that have no average, and rules without a meaning for them.

    Args:
        configs: PEFT configurations, of adapters that exist or that will be made.
        rule: How they are to follow; None to look at the adapters alone.

    Raises:
        ConfigurationError: Names the type, the variant of LoRA, or the option.
    """
    configs = list(configs)
    for config in configs:
        kind = _kind(config)
        if kind == "LORA":
            _check_variant(config)
        elif kind and kind not in LINEAR_TYPES:
            _refuse(
                f"a {kind} adapter",
                "The average of two such adapters is not known to be such an adapter: its weights are not linear in "
                "the tensors it trains.",
            )
        elif kind == "PREFIX_TUNING" and config.prefix_projection:
            _refuse(
                "prefix tuning with `prefix_projection=True`",
                "Its prefixes come out of a network, whose average is not the network of the average.",
            )
    if rule is not None and configs:
        _check_rule(rule, [config for config in configs if _kind(config) == "LORA"])


def _kind(config: Any) -> str:
    return str(getattr(getattr(config, "peft_type", None), "value", ""))


def _check_variant(config: Any) -> None:
    chosen = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
    for name in (*chosen, *(["use_qalora"] if getattr(config, "use_qalora", False) else [])):
        if name != "use_dora":
            _refuse(f"LoRA with `{name}`", "Its update is not the product of two matrices that LoRA's average is of.")


def adapter_parts(policy: PeftModel, rule: UpdateRule) -> list[Part]:
    """All that an adapter policy trains, in parts.

    LoRA's factors are averaged as the weights they make, DoRA's exactly; everything else (biases, norms, copies of
    whole modules, token rows, prompts, and types linear in what they train) tensor by tensor.

    Raises:
        ConfigurationError: If an adapter has no average, or the rule no meaning for it; names it.
    """
    check_can_follow((policy.peft_config[name] for name in policy.active_adapters), rule)
    names = {id(p): name for name, p in policy.named_parameters() if p.requires_grad}
    low_rank = [
        part for path, layer, adapter in lora_layers(policy) for part in _parts(path, layer, adapter, names, rule)
    ]
    _check_in_use(rule, bool(low_rank))
    if rule.name == "factors":
        low_rank = []
    claimed = {name for part in low_rank for name in part.names}
    return [*low_rank, *(dense_part(name, rule) for name in names.values() if name not in claimed)]


def _check_rule(rule: UpdateRule, configs: Sequence[Any]) -> None:
    """Refuses rules without a meaning for what the LoRA configurations make."""
    if rule.name == "factors" and any(config.use_dora for config in configs):
        _refuse(
            "`ref_model_sync_rule='factors'` and DoRA",
            "A magnitude averaged apart from the direction it scales is no average of anything.",
            "`ref_model_sync_rule='soft'`, which is exact.",
        )
    if rule.name == "bema" and any(config.use_dora for config in configs):
        _refuse(
            "`ref_model_sync_rule='bema'` and DoRA",
            "Its correction is a difference of weights, and such a sum of DoRA weights need not be one: a row's scale "
            "may vanish.",
            "`ref_model_sync_rule='soft'`, or `use_dora=False`.",
        )
    _check_in_use(rule, bool(configs))
    rank = max([0, *(r for config in configs for r in (config.r, *config.rank_pattern.values()))])
    if rule.max_rank is not None and rule.max_rank < rank:
        _refuse(
            f"`ref_model_sync_rank={rule.max_rank}` below the policy's rank",
            f"The adapter has rank {rank}: the reference could not even be the policy.",
            f"`ref_model_sync_rank={2 * rank}`, or None.",
        )


def _check_in_use(rule: UpdateRule, has_low_rank: bool) -> None:
    if rule.name == "factors" and not has_low_rank:
        _refuse(
            "`ref_model_sync_rule='factors'`",
            "It averages the factors of LoRA, and this adapter has none that train in pairs.",
            "`ref_model_sync_rule='soft'`.",
        )
    if rule.max_rank is not None and (rule.name == "factors" or rule.copies or not has_low_rank):
        _refuse(
            f"`ref_model_sync_rank={rule.max_rank}`",
            "Nothing here is averaged at a rank of its own: it is for LoRA and DoRA, averaged as weights with alpha "
            "below 1.",
            "`ref_model_sync_rank=None`.",
        )


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


def _parts(path: str, layer: Any, adapter: str, names: Mapping[int, str], rule: UpdateRule) -> list[Part]:
    """The update of one layer; nothing where only one factor trains, since the update is linear in that one."""
    b, a = factors_of(layer, adapter)
    is_dora = adapter in layer.lora_magnitude_vector
    trained = [names.get(id(tensor)) for tensor in (b, a)]
    if not is_dora and not all(trained):
        return []
    rank = int(layer.r[adapter])
    options: dict[str, Any] = {
        "scaling": float(layer.scaling[adapter]),
        "alpha": rule.weight,
        "max_rank": rule.max_rank or 2 * rank,
    }
    if is_dora:
        return [_dora_part(path, layer, adapter, names, options)]
    layout = _layout(path, layer, a)
    if rule.name == "bema":
        return [LowRankBemaPart(names[id(b)], names[id(a)], options["scaling"], options["max_rank"], layout)]
    bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
    bias_name = None if bias is None else names.get(id(bias))
    return [LowRankPart(names[id(b)], names[id(a)], layout=layout, bias=bias_name, **options)]


def _layout(path: str, layer: Any, a: Tensor) -> Layout:
    if isinstance(layer, ParamWrapper):
        return experts(int(layer.num_experts)) if layer.num_experts > 1 else MATRIX
    if isinstance(layer, _ConvNd) and layer.get_base_layer().groups == 1:
        return convolution(tuple(a.shape[2:]))
    if isinstance(layer, lora.Linear | lora.Embedding) or type(layer).__name__ in _QUANTIZED:
        return MATRIX
    _refuse(
        f"LoRA on `{path}` ({type(layer).__name__})",
        "Its factors do not make up one matrix, or nobody has shown that they do.",
        "a `target_modules` without that layer, or `sync_ref_model=False`.",
    )


def _dora_part(path: str, layer: Any, adapter: str, names: Mapping[int, str], options: dict[str, Any]) -> DoraPart:
    tensors = (*factors_of(layer, adapter), layer.lora_magnitude_vector[adapter].weight)
    base = layer.get_base_layer()
    if not all(id(tensor) in names for tensor in tensors) or id(base.weight) in names:
        _refuse(
            f"DoRA on `{path}`, of which only a part trains (or the base too)",
            "Its average is exact over one frozen base, with both factors and the magnitude free.",
            "train all three, and no base weight under them.",
        )
    weight: Callable[[], Tensor]
    if isinstance(layer, lora.Embedding):
        weight = lambda: base.weight.detach().T  # noqa: E731
    elif isinstance(layer, lora.Linear):
        weight = lambda: transpose(dequantize_module_weight(base).detach(), layer.fan_in_fan_out)  # noqa: E731
    else:
        _refuse(
            f"DoRA on `{path}` ({type(layer).__name__})",
            "Its norms run over other axes than a matrix's rows.",
            "a `target_modules` without that layer, or `use_dora=False`.",
        )
    b, a, magnitude = (names[id(tensor)] for tensor in tensors)
    return DoraPart(b, a, magnitude, weight, **options)


# ---- saving ----------------------------------------------------------------------------------------------------------


def changes_base(config: Any) -> bool:
    """Whether making this adapter changed the weights of its base."""
    start = getattr(config, "init_lora_weights", None)
    return isinstance(start, str) and start.startswith(_BASE_CHANGING)


@contextmanager
def saved_as_it_is(policy: PeftModel) -> Iterator[None]:
    """While open, the adapters' configurations say the ranks that their layers have now.

    The scaling of a layer stays what it is: its alpha grows with its rank.
    """
    before = dict(policy.peft_config)
    try:
        for adapter in policy.active_adapters:
            policy.peft_config[adapter] = _config_of(policy, adapter)
        yield
    finally:
        policy.peft_config.update(before)


def _config_of(policy: PeftModel, adapter: str) -> Any:
    config: Any = copy.deepcopy(policy.peft_config[adapter])
    found = [(path, layer) for path, layer, name in lora_layers(policy) if name == adapter]
    ranks = {_key(path, layer): _rank(layer, adapter) for path, layer in found}
    if not found or all(_rank(layer, adapter) == layer.r[adapter] for _, layer in found):
        return config
    alphas = {_key(path, layer): _alpha(layer.scaling[adapter], _rank(layer, adapter)) for path, layer in found}
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}
    config.use_rslora = False  # the scaling is alpha / rank, as written here
    config.init_lora_weights = True
    return config


def _rank(layer: Any, adapter: str) -> int:
    rows = factors_of(layer, adapter)[1].shape[0]
    return int(rows) // (int(layer.num_experts) if isinstance(layer, ParamWrapper) else 1)


def _alpha(scaling: float, rank: int) -> float:
    alpha = scaling * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _key(path: str, layer: Any) -> str:
    """The layer's name as patterns match it: without PEFT's own levels."""
    path = path.removeprefix("base_model.model.")
    while path.endswith(".base_layer"):  # parameters of one module are wrapped around one another
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else path


def _refuse(asked: str, why: str, instead: str = "") -> NoReturn:
    raise ConfigurationError(
        asked=f"`sync_ref_model=True` with {asked}.",
        why=why,
        instead=f"Write: {instead}"
        if instead
        else "Train LoRA, DoRA, IA3 or the full model, or set `sync_ref_model=False`.",
    )
