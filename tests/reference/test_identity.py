"""A reference's identity is equal exactly where the same numbers would be computed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from support.store_cases import in_fork
from support.tiny import tiny_model
from tether.errors import ReferenceModelError
from tether.reference import ExplicitReference, ImplicitReference, Placement, ReferenceIdentity

TESTS = Path(__file__).parents[1]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # PEFT keeps them as a set


def digest_of(model: Any, **options: Any) -> str:
    return ExplicitReference(model, **options).identity.digest


def adapter_digest(seed: int = 0, **options: Any) -> str:
    base = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": LAYERS} | options))
    return ImplicitReference(model).identity.digest


def changed(change: Callable[[Any], None]) -> Any:
    model = tiny_model()
    with torch.no_grad():
        change(model)
    return model


def set_config(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


DIFFERENT = {
    "one weight by one bit": lambda m: m.model.norm.weight[0].add_(1e-7),
    "two weights exchanged": lambda m: setattr(m.model.layers[0], "mlp", m.model.layers[1].mlp),
    "a config that shapes the forward": set_config("rms_norm_eps", 1e-3),
    "the number of heads": set_config("num_attention_heads", 8),
    "the activation": set_config("hidden_act", "gelu"),
    "a softcap of the logits": set_config("final_logit_softcapping", 5.0),
    "a scale of the logits": set_config("logit_scale", 2.0),
    "the rotary base": set_config("rope_parameters", {"rope_theta": 5.0, "rope_type": "default"}),
}
ALIKE: dict[str, Callable[[Any], Any]] = {
    "its name": set_config("_name_or_path", "elsewhere"),
    "its dropout": set_config("attention_dropout", 0.5),
    "its cache": set_config("use_cache", False),
    "its special tokens": set_config("pad_token_id", 3),
    "its attention kernel": lambda m: m.set_attn_implementation("eager"),
    "its mode": lambda m: m.train(),
    "what of it trains": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_identity_differs_with_what_changes_the_answers(name: str) -> None:
    assert digest_of(changed(DIFFERENT[name])) != digest_of(tiny_model())


@pytest.mark.parametrize("name", ALIKE)
def test_identity_does_not_depend_on_what_changes_no_answer(name: str) -> None:
    assert digest_of(changed(ALIKE[name])) == digest_of(tiny_model())


def test_identity_depends_on_the_dtype_of_the_weights_and_of_the_products() -> None:
    digests = [
        digest_of(tiny_model()),
        digest_of(tiny_model(dtype=torch.bfloat16)),
        digest_of(tiny_model(), placement=Placement(autocast_dtype=torch.bfloat16)),
    ]
    assert len(set(digests)) == 3


def test_identity_knows_that_a_gpu_multiplies_float32_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = digest_of(tiny_model())
    before = torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        identity = ExplicitReference(tiny_model()).identity
        assert identity.compute_dtype == "tf32" and identity.digest != plain
        half = ExplicitReference(tiny_model(), Placement(autocast_dtype=torch.bfloat16)).identity
        assert half.compute_dtype == "bfloat16"
        torch.backends.cuda.matmul.allow_tf32 = False
        assert digest_of(tiny_model()) == plain
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_identity_of_a_base_under_a_fresh_adapter_is_that_of_the_base_alone() -> None:
    assert adapter_digest() == adapter_digest(seed=1) == digest_of(tiny_model())
    assert adapter_digest(bias="all") == digest_of(tiny_model())
    assert adapter_digest(r=8) == adapter_digest(lora_alpha=99, use_rslora=True) == digest_of(tiny_model())


def test_identity_of_a_trained_adapter_is_its_own() -> None:
    digests = {
        digest_of(tiny_model()),
        adapter_digest(init_lora_weights=False),
        adapter_digest(init_lora_weights=False, seed=1),
        adapter_digest(init_lora_weights=False, lora_alpha=16),
        adapter_digest(init_lora_weights=False, use_rslora=True),
        adapter_digest(init_lora_weights=False, r=2),
    }
    assert len(digests) == 6
    assert adapter_digest(init_lora_weights=False) == adapter_digest(init_lora_weights=False)


def test_identity_of_a_trained_adapter_knows_a_frozen_one_beside_it() -> None:
    def digest(style: float, active: list[str]) -> str:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_model(), config)
        model.add_adapter("style", config)
        for name, parameter in model.named_parameters():
            if ".style." in name:
                parameter.requires_grad_(False).fill_(style)
        model.base_model.set_adapter(active, inference_mode=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".default." in name)
        return ImplicitReference(model).identity.digest

    both = ["default", "style"]
    assert digest(0.1, both) == digest(0.1, both)
    assert len({digest(0.1, both), digest(0.2, both), digest(0.1, ["default"])}) == 3


def given(**options: Any) -> Any:
    """A PEFT model with two trained adapters, the first of them active."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(**{"r": 4, "target_modules": LAYERS, "init_lora_weights": False} | options)
        model = get_peft_model(tiny_model(), config)
        model.add_adapter("second", config)
    return model


def rescaled(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", 3.0)
    return model


def test_identity_of_a_given_adapter_model_knows_how_its_adapters_are_set() -> None:
    switched, merged, off = given(), given(), given()
    switched.set_adapter("second")
    merged.merge_adapter()
    off.base_model.disable_adapter_layers()
    models = [given(), given(lora_alpha=16), given(use_rslora=True), rescaled(given()), switched, merged, off]
    assert len({digest_of(model) for model in [*models, tiny_model()]}) == 8
    assert digest_of(given()) == digest_of(given()) == ImplicitReference(given()).identity.digest


def test_identity_is_the_same_in_every_process() -> None:
    """Whatever the process's hash seed, by which sets of names are ordered."""
    script = "import test_identity as t; print(t.digest_of(t.tiny_model()), t.adapter_digest(init_lora_weights=False))"
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), str(TESTS / "reference")])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": path}
    output = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True, timeout=120)
    assert output.split() == [digest_of(tiny_model()), adapter_digest(init_lora_weights=False)]


def test_identity_is_the_same_in_a_forked_process() -> None:
    model = tiny_model()
    expected = digest_of(model)
    assert {in_fork(lambda: digest_of(model)) for _ in range(20)} == {expected}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_identity_refuses_weights_that_are_not_finite_and_names_them(value: float) -> None:
    model = changed(lambda m: m.model.layers[1].mlp.up_proj.weight[0, 0].fill_(value))
    with pytest.raises(ReferenceModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        ExplicitReference(model)


def test_a_reference_without_weights_is_told_from_others_by_its_name() -> None:
    one, same, other = (ReferenceIdentity.named(name) for name in ("team/dpo-v3", "team/dpo-v3", "team/dpo-v4"))
    assert one.digest == same.digest != other.digest
    assert one.digest != digest_of(tiny_model()) and one.describe()["kind"] == "named"
