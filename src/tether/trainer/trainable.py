"""What of a policy would train otherwise than it was asked to: by its adapter, or by the user's optimizer.

Knows PEFT's configurations; knows no data and no training.
"""

from __future__ import annotations

import logging

from peft import PeftConfig, PeftModel
from torch import nn

from tether.config.rules.facts import Facts
from tether.config.rules.model import held_by

logger = logging.getLogger(__name__)


def checkpoints_activations(model: nn.Module, asked: bool) -> bool:
    """`gradient_checkpointing` for a policy: as asked, or False for adapters that a second forward of a layer loses."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    why = next(filter(None, map(_lost_by_replay, configs)), None)
    if not asked or why is None:
        return asked
    logger.warning("`gradient_checkpointing` is switched off: %s.", why)
    return False


def _lost_by_replay(config: PeftConfig) -> str | None:
    """Why a layer can't be run again in the backward; None if it can."""
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):  # by name: PEFT 0.18 does not know the second
        return "this adapter's prompt is in the layers' cache, which they go without when activations are recomputed"
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return "PEFT allows an activated LoRA one forward for each backward, and evaluation makes others"
    return None


def warn_of_optimizer(facts: Facts) -> None:
    """Says so if an optimizer of the user's moves only a part of the policy."""
    trained, held = held_by(facts.optimizer, facts.policy, has_new_adapter=facts.new_adapter is not None)
    if held is not None and trained - held:
        logger.warning(
            "The optimizer in `optimizers` holds %d of the %d tensors that train; the others stay as they are.",
            len(held & trained),
            len(trained),
        )
