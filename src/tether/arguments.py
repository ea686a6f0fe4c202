"""Whether the trainer was given what it takes: options, models and callbacks of the kinds it knows.

Looks at types only; what goes together is the business of others.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tether.config import DPOConfig
from tether.errors import ArgumentTypeError, ConfigurationError
from tether.parallelism import check_not_cut


def check_arguments(args: Any, model: Any, ref_model: Any, callbacks: Any) -> None:
    """Refuses arguments of another kind than the trainer's, by name.

    Raises:
        ArgumentTypeError: If one is of another kind.
        ConfigurationError: If a model has no head that predicts tokens, or its weights are cut over processes in a way
            that is not supported.
    """
    if args is not None and not isinstance(args, DPOConfig):
        raise ArgumentTypeError(
            problem=f"`args` is a `{type(args).__module__}.{type(args).__qualname__}`.",
            details="The options of the reference and of the loss are missing in it, or mean something else.",
            instead="Write `from tether import DPOConfig` and `DPOConfig(...)` with the same options.",
        )
    _check_model("model", model)
    if ref_model is not None:
        _check_model("ref_model", ref_model)
    if callbacks is not None and not isinstance(callbacks, list):
        raise ArgumentTypeError(
            problem=f"`callbacks` is a {type(callbacks).__name__}.",
            details="Those of transformers are added to the list of them.",
            instead="Write a list: `callbacks=[...]`.",
        )


def _check_model(name: str, model: Any) -> None:
    if isinstance(model, str):
        return
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ArgumentTypeError(
            problem=f"`{name}` is a {type(model).__name__}.",
            details="It is scored as a language model of transformers is.",
            instead="Pass a path or name, an `AutoModelForCausalLM.from_pretrained(...)`, or a `PeftModel` of one.",
        )
    wrapper: Any = model  # of PEFT
    base = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    check_not_cut(name, base)
    if isinstance(base, PreTrainedModel) and base.get_output_embeddings() is None and not base.can_generate():
        raise ConfigurationError(
            problem=f"`{name}` is a {type(base).__name__}.",
            details="It has no head that predicts tokens, so a response has no log-probability.",
            instead="Load it with `AutoModelForCausalLM.from_pretrained(...)`, or pass its path.",
        )
