"""Would the policy train, and as it should? Its weights' dtype, its adapter, the user's optimizer, checkpointing.

Knows PEFT's layers and configurations; knows no data and no training.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tether.errors import ConfigurationError

logger = logging.getLogger(__name__)


def checkpoints_activations(model: nn.Module, asked: bool | None) -> bool | None:
    """`gradient_checkpointing` for a policy: as asked, or False for adapters that a second forward of a layer loses."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    why = next(filter(None, map(_lost_by_replay, configs)), None)
    if not asked or why is None:
        return asked
    logger.warning("`gradient_checkpointing` is switched off: %s.", why)
    return False


def _lost_by_replay(config: PeftConfig) -> str | None:
    """Why a layer can't be run again in the backward; None if it can."""
    if config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
        return "this adapter's prompt is in the layers' cache, which they go without when activations are recomputed"
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return "PEFT allows an activated LoRA one forward for each backward, and evaluation makes others"
    return None


def check_optimizer(model: nn.Module, optimizer: Any, *, new_adapter: bool) -> None:
    """Refuses an optimizer that would move nothing of the policy, and says so if it moves a part.

    Args:
        model: The policy.
        optimizer: The user's own; None for the trainer's.
        new_adapter: The policy will get a fresh adapter, which no optimizer can know yet.

    Raises:
        ConfigurationError: If the optimizer holds no weight that trains.
    """
    if not hasattr(optimizer, "param_groups"):  # none, or a stand-in for one that DeepSpeed makes
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [] if new_adapter else [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    num_held = len(held.intersection(trained))
    if not num_held:
        raise ConfigurationError(
            problem="Cannot train with the optimizer in `optimizers`: it holds none of the weights that train, so the "
            "policy would stay as it is.",
            details="It was made of a fresh adapter's base, which is frozen."
            if new_adapter
            else "Its parameters are those of another model, or frozen ones of this model.",
            instead="Put the adapter on first (`model = get_peft_model(model, peft_config)`), leave `peft_config` out, "
            "and make the optimizer of that model's parameters; or let the trainer make it, "
            "`optimizer_cls_and_kwargs=(torch.optim.AdamW, {...})`."
            if new_adapter
            else "Make it of the parameters of the model that you pass as `model`; or let the trainer make it, "
            "`optimizer_cls_and_kwargs=(torch.optim.AdamW, {...})`.",
        )
    if num_held < len(trained):
        logger.warning(
            "The optimizer in `optimizers` holds %d of the %d tensors that train; the others stay as they are.",
            num_held,
            len(trained),
        )


def check_trainable(model: nn.Module, *, keeps_masters: bool = False) -> None:
    """Refuses a policy of which nothing would train, or not as it should.

    Args:
        model: The policy, with its adapter.
        keeps_masters: The optimizer keeps float32 copies of the weights and scales the loss itself (DeepSpeed).

    Raises:
        ConfigurationError: If nothing trains, if an adapter is merged, or if weights train in float16.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            problem="The model has no parameter that trains: `requires_grad` is False for all.",
            details="There would be nothing to optimize. PEFT, for one, leaves a base frozen after `merge_and_unload()`, "
            "and loads an adapter frozen unless `is_trainable=True`.",
            instead="Call `model.requires_grad_(True)` to train the whole model, or pass `peft_config` to train an "
            "adapter.",
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise ConfigurationError(
            problem="Cannot train an adapter that is merged into its base: its tensors would get no gradient.",
            details="After `merge_adapter()` a layer computes with the merged weights alone.",
            instead="Call `model.unmerge_adapter()` before; or, to start a new adapter on top, "
            "`model = model.merge_and_unload()` and pass `peft_config`.",
        )
    if not keeps_masters:
        _check_not_float16(model)


def _check_not_float16(model: nn.Module) -> None:
    halves = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if halves:
        raise ConfigurationError(
            problem="Cannot train weights in `float16`: most steps are too small for it, and gradients overflow.",
            details=f"Among them is `{halves[0]}`, and the model would soon be ruined. `fp16=True` does not help, because "
            "it scales the gradients of weights in `float32` only.",
            instead='Load the model in float32, `model_init_kwargs={"dtype": "float32"}` or `model.float()`, and write '
            "`bf16=True` or `fp16=True` for products in 16 bits; or train in `bfloat16`. An adapter in float32 on a "
            "base in float16 is fine.",
        )
