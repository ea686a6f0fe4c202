"""What reaches `from_pretrained`: quantization, revision, the user's arguments; and adapters on quantized bases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from support.runs import make_trainer, trained
from support.tiny import tiny_model, tiny_tokenizer
from tether.errors import ConfigurationError
from tether.models.loading import load_model
from tether.models.preparing import add_adapter


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The keyword arguments of each load; those that need other machines are noted and taken out."""
    calls: dict[str, list[dict[str, Any]]] = {"model": [], "tokenizer": []}
    load_model, load_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model(name: str, **options: Any) -> Any:
        calls["model"].append(dict(options))
        for option in ("quantization_config", "revision"):
            options.pop(option, None)
        return load_model(name, **options)

    def tokenizer(name: str, **options: Any) -> Any:
        calls["tokenizer"].append(dict(options))
        options.pop("revision", None)
        return load_tokenizer(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    return calls


def test_quantization_is_passed_on_to_the_loader(model_folder: str, asked: Any, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    trained(
        tmp_path / "run", model_folder, quantization_config=config, peft_config=LoraConfig(target_modules=["q_proj"]),
        model_init_kwargs={"attn_implementation": "eager"}, max_steps=1,
    )  # fmt: skip
    (options,) = asked["model"]
    assert options["quantization_config"] is config and options["attn_implementation"] == "eager"
    assert options["dtype"] == torch.float32 and options["trust_remote_code"] is False


def test_no_quantization_is_asked_for_unless_it_was(model_folder: str, asked: Any, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", model_folder)
    assert set(asked["model"][0]) == {"dtype", "trust_remote_code"}


def test_an_instance_with_a_quantization_is_refused(tmp_path: Path) -> None:
    """Whatever its own state: already quantized or not."""
    model = tiny_model()
    model.is_loaded_in_4bit = True
    with pytest.raises(ConfigurationError, match="already an instance") as caught:
        make_trainer(tmp_path, model, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert "path or name" in caught.value.instead


def test_a_quantization_that_is_given_twice_is_refused(model_folder: str, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ConfigurationError, match="model_init_kwargs"):
        make_trainer(
            tmp_path, model_folder, quantization_config=config, model_init_kwargs={"quantization_config": config}
        )


def test_the_revision_holds_for_model_and_tokenizer(model_folder: str, asked: Any, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", model_folder, processing_class=None, model_init_kwargs={"revision": "v2"})
    assert asked["model"][0]["revision"] == "v2" and asked["tokenizer"][0]["revision"] == "v2"


@pytest.mark.parametrize("flag", ["is_loaded_in_4bit", "is_loaded_in_8bit", None])
def test_an_adapter_on_a_quantized_base_trains_in_bfloat16(flag: str | None) -> None:
    base: Any = tiny_model()
    if flag:
        setattr(base, flag, True)
    model = add_adapter(base, LoraConfig(target_modules=["q_proj"], use_dora=True))
    dtypes = {
        "magnitude" if "lora_magnitude_vector" in name else "factor": p.dtype
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert dtypes == {"magnitude": torch.float32, "factor": torch.bfloat16 if flag else torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("trained", [{}, {"trainable_token_indices": [256, 257]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_with_added_tokens_loads_as_it_was_saved(trained: dict[str, Any], tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(258)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **trained))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 256, 257, 9]])
    loaded: Any = load_model(str(tmp_path / "adapter"), None, trust_remote_code=False)
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)


def test_an_adapter_whose_new_tokens_have_no_row_in_the_head_is_refused(tmp_path: Path) -> None:
    """PEFT saves the embedding that an adapter is on, but not the head; its new rows would be random."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(258)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigurationError, match="trained with 258 tokens, its base has 256"):
        load_model(str(tmp_path / "adapter"), None, trust_remote_code=False)


def test_a_compiled_model_is_saved_under_plain_names(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", torch.compile(tiny_model()), max_steps=1)
    trainer.save_model()
    names = set(load_file(tmp_path / "run" / "model.safetensors"))
    assert names == set(tiny_model().state_dict())
    model = tiny_model()
    model.model = torch.compile(model.model)  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match=r"`torch.compile` around `model`"):
        make_trainer(tmp_path / "run", model)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_layer_that_the_model_lacks_is_refused_with_the_nearest(field: str, tmp_path: Path) -> None:
    """PEFT leaves out a name that it does not find, if it finds another."""
    names = {"target_modules": ["q_proj", "v_porj"], "modules_to_save": ["lm_haed"]}[field]
    with pytest.raises(ConfigurationError, match=r"the model has no layer `\w+`\.") as caught:
        make_trainer(tmp_path, peft_config=LoraConfig(**{"target_modules": ["q_proj"]} | {field: names}))
    assert caught.value.instead in ("Did you mean `v_proj`?", "Did you mean `lm_head`?")


@pytest.mark.parametrize("option", ["model", "ref_model"])
def test_a_wrong_path_is_refused_at_once_with_the_folder_beside_it(
    option: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    wrong = f"{tmp_path.name}/modle"
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)  # nothing looks for it elsewhere
    with pytest.raises(ConfigurationError, match=f"Cannot use `{option}='{wrong}'`: there is no such folder") as caught:
        make_trainer(tmp_path / "run", **{"model": tiny_model(), option: wrong})
    assert caught.value.instead == f"Did you mean `{tmp_path.name}/model`?"


def test_a_folder_without_tokenizer_or_an_adapter_without_base_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigurationError, match="cannot load the tokenizer of this folder") as caught:
        make_trainer(tmp_path / "run", str(tmp_path / "bare"), processing_class=None)
    assert "processing_class" in caught.value.instead
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "bare"), LoraConfig(r=2))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    shutil.rmtree(tmp_path / "bare")
    with pytest.raises(ConfigurationError, match=r"cannot load the base of this adapter, .*bare"):
        make_trainer(tmp_path / "run", str(tmp_path / "adapter"))
