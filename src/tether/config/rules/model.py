"""What a run is refused for because of its models: no head, other tokens, nothing that trains, a foreign optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from tether.config.rules.facts import Facts
from tether.config.rules.launch import refused_cut
from tether.models.gguf import is_unpacked
from tether.models.preparing import differing_vocabulary
from tether.reference.adapter_tensors import is_adapter_model
from tether.refusals import Refusal, listed, nearest_to, of_option

# What evaluation gives besides the figures of pairs.
_OF_THE_RUN = ("num_tokens", "runtime", "samples_per_second", "steps_per_second")
_MAKE_OPTIMIZER = "or let the trainer make it, `optimizer_cls_and_kwargs=(torch.optim.AdamW, {...})`."


def refused_model(name: str, model: Any) -> Iterator[Refusal]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    yield from refused_cut(name, base)
    devices = (getattr(base, "hf_device_map", None) or {}).values()
    places = list(dict.fromkeys(str(device).removeprefix("cuda:") for device in devices))
    if len(places) > 1:
        yield Refusal(
            f"a `{name}` that `device_map` has spread over {listed(places)}",
            "it is scored, digested and copied on one device",
            "Leave `device_map` out, or write `device_map={'': 0}`. Over several GPUs, start one process for each "
            "(`torchrun`), with FSDP2 or DeepSpeed ZeRO-3 if the model is too large for one (docs/distributed.md).",
        )
    compiled = next((path for path, module in model.named_modules() if path and hasattr(module, "_orig_mod")), None)
    if compiled is not None:
        yield Refusal(
            f"a `{name}` with `torch.compile` around `{compiled}`",
            "its weights would be saved under other names, which load as fresh ones",
            "Compile in place, `module.compile()`, or set `torch_compile=True`.",
        )
    if isinstance(base, PreTrainedModel) and base.get_output_embeddings() is None and not base.can_generate():
        yield Refusal(
            f"a `{name}` of type {type(base).__name__}",
            "it has no head that predicts tokens, so a response has no log-probability",
            "Load it with `AutoModelForCausalLM.from_pretrained(...)`, or pass its path.",
        )
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            yield Refusal(
                f"a `{name}` in 4 bits that has been evaluated on a CPU before",
                f"bitsandbytes has packed the weights of `{path}` for a product without a backward",
                "Load the model anew and pass it as it is, or pass its path.",
            )
            return


def refused_tokens(facts: Facts) -> Iterator[Refusal]:
    """Token ids that mean something else to a model than to the tokenizer."""
    pad_token = facts.args.pad_token
    if pad_token is not None and pad_token not in facts.tokenizer.get_vocab():
        why = f"the vocabulary of the {type(facts.tokenizer).__name__} has no such token"
        yield of_option("pad_token", pad_token, why, "Name a token that it has, or leave `pad_token` out.")
    if facts.ref_model is not None and (details := differing_vocabulary(facts.ref_model, facts.tokenizer)):
        yield Refusal(
            "this `ref_model`",
            "it has another vocabulary than the policy, and both must read the same token ids",
            "Use a reference of the same tokenizer family, or leave `ref_model` out to use the initial policy.",
            details,
        )


def refused_training(facts: Facts) -> Iterator[Refusal]:
    """A policy of which nothing would train, or not as it should."""
    policy: nn.Module = facts.policy
    yield from _quantized(policy, has_adapter=facts.new_adapter is not None or is_adapter_model(policy))
    if facts.new_adapter is not None:
        if is_adapter_model(policy):
            yield Refusal(
                "`peft_config` with a model that already has an adapter",
                "it would be unclear whether the first adapter belongs to the reference",
                "Leave `peft_config` out to go on training the adapter, or merge it first "
                "(`model = model.merge_and_unload()`) to start a new one on top.",
            )
        elif facts.new_adapter.inference_mode:
            yield Refusal(
                "a `peft_config` with `inference_mode=True`",
                "PEFT freezes such an adapter, so nothing would train",
                "Leave `inference_mode` out of it.",
            )
        elif facts.args.deepspeed_plugin is None:
            yield from _copied_in_float16(policy, facts.new_adapter)
        yield from _absent_modules(policy, facts.new_adapter)
        return
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        yield Refusal(
            "a model of which nothing trains",
            "`requires_grad` is False for all its parameters",
            *(
                (
                    "Load the adapter to be trained: `PeftModel.from_pretrained(base, folder, is_trainable=True)`.",
                    "PEFT loads an adapter frozen unless told otherwise.",
                )
                if is_adapter_model(policy)
                else (
                    "Call `model.requires_grad_(True)` to train the whole model, or pass `peft_config` to train an "
                    "adapter.",
                    "PEFT leaves a base frozen after `merge_and_unload()`.",
                )
            ),
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in policy.modules()):
        yield Refusal(
            "an adapter that is merged into its base",
            "its layers compute with the merged weights alone, so its tensors would get no gradient",
            "Call `model.unmerge_adapter()` before; or, to start a new adapter on top, "
            "`model = model.merge_and_unload()` and pass `peft_config`.",
        )
    if facts.args.deepspeed_plugin is None:  # whose optimizer keeps float32 copies and scales the loss itself
        yield from refused_float16(policy)


def _absent_modules(policy: nn.Module, adapter: PeftConfig) -> Iterator[Refusal]:
    """Names of layers that the model does not have; PEFT leaves one out in silence if it finds another."""
    paths = [f".{path}" for path, _ in policy.named_modules()]
    for field in ("target_modules", "modules_to_save"):
        names: Any = getattr(adapter, field, None)
        for name in sorted(names) if isinstance(names, list | tuple | set) else ():
            if not any(path.endswith(f".{name}") for path in paths):
                known = dict.fromkeys(path.rpartition(".")[2] for path in paths if not path[-1].isdigit())
                nearest = nearest_to(name, known)
                instead = f"Did you mean `{nearest}`?" if nearest else f"It has {listed(list(known)[1:], most=20)}."
                why = f"the model has no layer `{name}`"
                yield Refusal(f"`{field}={sorted(names)}`", why, instead, option=f"lora_{field}")


def _quantized(policy: Any, *, has_adapter: bool) -> Iterator[Refusal]:
    """Weights that are really quantized, without an adapter, or of a method that none can train on."""
    quantizer = getattr(policy, "hf_quantizer", None)
    has_own = getattr(policy, "_hf_peft_config_loaded", False)  # an adapter in the base's layers, by `load_adapter`
    if quantizer is None or not getattr(policy, "is_quantized", False) or has_own or is_unpacked(policy):
        return
    method = getattr(quantizer.quantization_config, "quant_method", "")
    subject = f"a quantized model for training ({getattr(method, 'value', method)})"
    if not has_adapter and not getattr(quantizer, "is_qat_trainable", False):
        yield Refusal(
            subject,
            "its weights are integers, which no gradient moves",
            "Pass `peft_config` (`--lora_r` of the command) to train an adapter on it, or load the model without "
            "quantization.",
        )
    elif not quantizer.is_trainable:
        yield Refusal(
            subject,
            "transformers trains no adapter on weights of this kind either",
            "Load the model without quantization, or in 4 or 8 bits with bitsandbytes.",
        )


def _copied_in_float16(base: nn.Module, adapter: PeftConfig) -> Iterator[Refusal]:
    """Modules of a base in float16 that an adapter would train; PEFT makes its own tensors float32."""
    trains = set(getattr(adapter, "modules_to_save", None) or ())
    biases = getattr(adapter, "bias", "none") != "none"
    for name, parameter in base.named_parameters():
        path = set(name.split("."))
        if parameter.dtype == torch.float16 and (path & trains or (biases and "bias" in path)):
            yield _float16(name)
            return


def refused_float16(policy: nn.Module) -> Iterator[Refusal]:
    """Weights that would train in float16."""
    halves = [name for name, p in policy.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if halves:
        yield _float16(halves[0])


def _float16(name: str) -> Refusal:
    return Refusal(
        f"weights in `float16` for training, such as `{name}`",
        "most steps are too small for it, and gradients overflow",
        'Load the model in float32, `model_init_kwargs={"dtype": "float32"}` or `model.float()`, and write '
        "`bf16=True` or `fp16=True` for products in 16 bits; or train in `bfloat16`.",
        "`fp16=True` alone does not help: it scales the gradients of weights in `float32` only. An adapter in "
        "float32 on a base in float16 is fine.",
    )


def refused_optimizer(facts: Facts) -> Iterator[Refusal]:
    """An optimizer that would move nothing of the policy."""
    trained, held = held_by(facts.optimizer, facts.policy, has_new_adapter=facts.new_adapter is not None)
    if held is None or held & trained or (facts.new_adapter is not None and is_adapter_model(facts.policy)):
        return
    on_base = facts.new_adapter is not None
    yield Refusal(
        "the optimizer in `optimizers`",
        "it was made of a fresh adapter's base, which is frozen"
        if on_base
        else "it holds none of the weights that train: its own are another model's, or frozen",
        "Put the adapter on first (`model = get_peft_model(model, peft_config)`), leave `peft_config` out, and make "
        f"the optimizer of that model's parameters; {_MAKE_OPTIMIZER}"
        if on_base
        else f"Make it of the parameters of the model that you pass as `model`; {_MAKE_OPTIMIZER}",
    )


def held_by(optimizer: Any, policy: nn.Module, *, has_new_adapter: bool) -> tuple[set[int], set[int] | None]:
    """The parameters that train, and those of an optimizer, each by `id`; None for none, or DeepSpeed's stand-in."""
    trained = set() if has_new_adapter else {id(p) for p in policy.parameters() if p.requires_grad}
    if not hasattr(optimizer, "param_groups"):
        return trained, None
    return trained, {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
