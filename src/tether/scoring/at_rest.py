"""A model at rest, as ways of scoring are compared on it: in evaluation mode, without gradient, in full precision.

Leaves weights, modes and random state as they were. Knows modules; knows no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tether.distributed import device_of, has_shards
from tether.scoring.evaluation import evaluation_mode
from tether.scoring.rotary import reset_rotary

_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """While open, the model is in evaluation mode, and what is still constant in it has some other value.

    A part that does nothing yet (an adapter's zeros, a gate, a temperature of 1) will do something once it trains.
    """
    device = device_of(model)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.no_grad(),
        evaluation_mode(model),
        _moved_constants(model),
    ):
        try:
            yield
        finally:
            reset_rotary(model)


@contextmanager
def _moved_constants(model: nn.Module) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    moved: list[tuple[nn.Parameter, Tensor, float]] = []
    try:
        # A gathered parameter lives for one forward only.
        for parameter in () if has_shards(model) else model.parameters():
            if _is_constant(parameter):
                value = parameter.data.flatten()[0].item()
                moved.append((parameter, parameter.data, value))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                # `data` has a version of its own: a backward that waits for this weight does not notice.
                parameter.data.copy_(value + 0.1 * noise if value else 0.05 * noise)
        torch.clear_autocast_cache()
        yield
    finally:
        for parameter, before, value in moved:
            before.fill_(value)
            parameter.data = before  # PEFT's CPT puts another tensor there in its forward; this may be the reference's
        torch.clear_autocast_cache()


def _is_constant(parameter: Tensor) -> bool:
    if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
        return False
    first = parameter.data.flatten()
    return bool(first[0] == first[-1]) and bool((first == first[0]).all())


def is_rough(model: nn.Module) -> bool:
    """Whether the model computes in less than fp32, so that its plain log-probs have errors of their own."""
    device = device_of(model).type
    return (
        any(one.dtype in _HALF or not one.is_floating_point() for one in model.parameters())
        or torch.is_autocast_enabled(device)
        or "_original_forward" in vars(model)  # accelerate's autocast
        or (device == "cuda" and multiplies_in_tf32())
    )


def multiplies_in_tf32() -> bool:
    """Whether CUDA multiplies float32 in TF32, with the 10 bits of float16, as `tf32` and `torch_compile` have it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; the flag before it raises where this was set
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def exact_call(model: nn.Module) -> Callable[..., Any] | None:
    """The model's forward in fp32; None where its weights are sharded, quantized, or too large to be copied.

    A copy in fp32 is smaller than what training all weights needs anyway, and larger than what scoring or training an
    adapter does.
    """
    parameters = list(model.parameters())
    if has_shards(model) or not all(one.is_floating_point() for one in parameters):
        return None
    if not any(one.dtype in _HALF for one in parameters):
        return partial(_without_autocast, model, model)
    if 2 * sum(one.numel() for one in parameters if one.requires_grad) < sum(one.numel() for one in parameters):
        return None
    tensors = (*model.named_parameters(), *model.named_buffers())
    wide = {name: tensor.detach().float() for name, tensor in tensors if tensor.dtype in _HALF}
    return partial(_without_autocast, model, lambda **inputs: functional_call(model, wide, kwargs=inputs))


def _without_autocast(model: nn.Module, call: Callable[..., Any], /, **inputs: Any) -> Any:
    own = vars(model)
    wrapped = own.get("forward")
    try:
        if "_original_forward" in own:
            own["forward"] = own["_original_forward"]
        with torch.autocast(device_of(model).type, enabled=False):
            return call(**inputs)
    finally:
        if wrapped is not None:
            own["forward"] = wrapped
