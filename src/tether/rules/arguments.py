"""Whether the trainer was given what it takes: options, models and callbacks of the kinds it knows.

Looks at kinds only, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftConfig
from torch import nn

from tether.config import DPOConfig
from tether.refusals import Refusal


def refused_arguments(args: Any, model: Any, ref_model: Any, callbacks: Any, peft_config: Any) -> Iterator[Refusal]:
    """Arguments of another kind than the trainer's."""
    if args is not None and not isinstance(args, DPOConfig):
        yield Refusal(
            f"`args` of type {type(args).__module__}.{type(args).__qualname__}",
            "the options of the reference and of the loss are missing in it, or mean something else",
            "Write `from tether import DPOConfig` and `DPOConfig(...)` with the same options.",
        )
    for name, value in (("model", model), ("ref_model", ref_model)):
        if isinstance(value, str) or (name == "ref_model" and value is None):
            continue
        if not isinstance(value, nn.Module) or not hasattr(value, "config"):
            yield Refusal(
                f"a `{name}` of type {type(value).__name__}",
                "it is scored as a language model of transformers is",
                "Pass a path or name, an `AutoModelForCausalLM.from_pretrained(...)`, or a `PeftModel` of one.",
            )
    if callbacks is not None and not isinstance(callbacks, list):
        yield Refusal(
            f"`callbacks` of type {type(callbacks).__name__}",
            "those of transformers are added to the list of them",
            "Write a list: `callbacks=[...]`.",
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        yield Refusal(
            f"a `peft_config` of type {type(peft_config).__name__}",
            "it says which adapter to put on the model",
            "Pass a PEFT config, such as `peft.LoraConfig(...)`.",
        )


def refused_data_parallel(args: DPOConfig) -> Iterator[Refusal]:
    """Several GPUs in one process, as `Trainer` would use them."""
    if args.n_gpu > 1:
        yield Refusal(
            f"{args.n_gpu} GPUs in one process",
            "Trainer would use `nn.DataParallel`, which cuts a batch of pairs at the wrong places and replicates the "
            "reference at every step",
            f"Start one process for each GPU: `torchrun --nproc_per_node {args.n_gpu} script.py` (or "
            "`accelerate launch`), or show a single one: `CUDA_VISIBLE_DEVICES=0`.",
        )


def refused_loss(args: DPOConfig, loss: Any) -> Iterator[Refusal]:
    """A loss of the user's own beside named ones."""
    if loss is not None and (args.loss_type != ["sigmoid"] or args.loss_weights is not None):
        yield Refusal(
            f"`loss=...` with `loss_type={args.loss_type!r}`, `loss_weights={args.loss_weights!r}`",
            "your own loss takes the place of the named ones",
            "Leave `loss_type` and `loss_weights` out; your function may call `tether.losses.LOSSES[name]` and add "
            "what it gives.",
        )
