"""What a pass depends on beside the weights: each change is told once, and what libraries do is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from support.kinds import adapted
from support.tiny import tiny_model
from tether.reference.behaviour import Behaviour

FIRST = "base_model.model.model.layers.0"


def first(model: Any) -> Any:
    return model.get_submodule(FIRST)


def rescale(model: Any) -> None:
    first(model).self_attn.q_proj.scaling["default"] *= 2


def scale_frequencies(model: Any) -> None:
    model.get_submodule("base_model.model.model.rotary_emb").inv_freq.data.mul_(2)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hook": (lambda model: first(model).mlp.register_forward_hook(lambda *_: None), f"a hook of `{FIRST}.mlp`"),
    "a hook before": (
        lambda model: first(model).mlp.register_forward_pre_hook(lambda *_: None),
        f"a hook of `{FIRST}.mlp`",
    ),
    "a forward": (lambda model: setattr(first(model).mlp, "forward", torch.tanh), f"the forward of `{FIRST}.mlp`"),
    "a module": (lambda model: setattr(first(model), "mlp", torch.nn.Identity()), f"a module of `{FIRST}`"),
    "a buffer": (scale_frequencies, "the buffer of `base_model.model.model.rotary_emb.inv_freq`"),
    "an entry of the config": (lambda model: setattr(model.config, "rms_norm_eps", 1.0), "`config.rms_norm_eps`"),
    "in the config": (lambda model: model.config.rope_parameters.update(rope_theta=1.0), "`config.rope_parameters`"),
    "a number": (
        lambda model: setattr(first(model).input_layernorm, "variance_epsilon", 1.0),
        f"`{FIRST}.input_layernorm.variance_epsilon`",
    ),
    "an adapter's scaling": (rescale, f"`{FIRST}.self_attn.q_proj.scaling`"),
}


def adapter_model() -> Any:
    return adapted(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_told_once(name: str) -> None:
    change, told = CHANGES[name]
    model = adapter_model()
    behaviour = Behaviour(model)
    assert behaviour.changes(everything=True) == []
    change(model)
    found = behaviour.changes(everything=True)
    assert told in found
    assert behaviour.changes(everything=True) == []


def test_numbers_are_looked_at_in_rotation() -> None:
    model = adapter_model()
    behaviour = Behaviour(model)
    rescale(model)
    assert sum(map(len, (behaviour.changes() for _ in range(60)))) == 1


def test_what_leaves_the_answers_as_they_are_is_no_change() -> None:
    model = adapter_model()
    behaviour = Behaviour(model)
    model.config.pad_token_id, model.config.use_cache = 3, False
    model.get_base_model().set_attn_implementation("eager")
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with model.disable_adapter():
        assert behaviour.changes(everything=True) == []
    model.eval()
    assert behaviour.changes(everything=True) == []
