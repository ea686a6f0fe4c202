"""What a checkpoint gives back: every tensor that trains, resumed or chosen as the best, and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from transformers.integrations.peft import MIN_PEFT_VERSION

from support.observe import bits, same_bits
from support.runs import as_dataset, make_trainer, trained
from support.tiny import tiny_model, tiny_pairs
from tether import BEMACallback
from tether.errors import ConfigurationError, ResumeError

K: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = K | {"r": 4, "target_modules": ["q_proj", "v_proj"]}
# The best is the first: tokens seen grow, and are asked to be few.
RUN: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 3e-2,
    "metric_for_best_model": "num_tokens",
    "greater_is_better": False,
}
EVAL = tiny_pairs(8, seed=1)


class Snapshots(TrainerCallback):
    """Every bit of the policy at each checkpoint (a forward of CPT projects its weights, in evaluation too)."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after[state.global_step] = bits(model)


def adapted(config: Any, name: str = "default", **options: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(tiny_model(**options), config, adapter_name=name)


def with_second(both: bool = False, **first: Any) -> Any:
    model = adapted(LoraConfig(**LORA, **first))
    model.add_adapter("dpo", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "dpo"]) if both else model.set_adapter("dpo")
    return model


def with_trained_base() -> Any:
    model = adapted(LoraConfig(**LORA))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def resized() -> Any:
    model = tiny_model()
    torch.manual_seed(3)
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    return get_peft_model(model, LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]))


def added_by_transformers() -> Any:
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers asks for PEFT {MIN_PEFT_VERSION}")
    model = tiny_model()
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(**LORA))
    return model


def half_frozen() -> Any:
    model = tiny_model()
    model.get_input_embeddings().requires_grad_(False)
    return model


def frozen_projection() -> Any:
    """Drawn anew each time, as by another seed: the factors that train mean nothing without it."""
    model = get_peft_model(tiny_model(), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_A" in name:
            parameter.data = torch.rand_like(parameter)
    return model


PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **K),
    "P-tuning, MLP": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **K),
    "P-tuning, LSTM": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **K
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **K),
    "prefix tuning, projection": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16, **K
    ),
    "CPT": lambda: peft.CPTConfig(cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], **K),
}
VERA: dict[str, Any] = K | {"r": 4, "target_modules": ["q_proj"]}
POLICIES: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: adapted(make()) for name, make in PROMPTS.items()},
    "LoRA": lambda: adapted(LoraConfig(**LORA)),
    "LoRA called dpo": lambda: adapted(LoraConfig(**LORA), "dpo"),
    "two adapters, the second trains": with_second,
    "two adapters, both train": lambda: with_second(both=True),
    "DoRA": lambda: adapted(LoraConfig(**LORA, use_dora=True)),
    "trained biases": lambda: adapted(LoraConfig(**LORA, bias="all"), "dpo", attention_bias=True),
    "modules_to_save": lambda: adapted(LoraConfig(**LORA, modules_to_save=["lm_head"]), "dpo"),
    "modules_to_save, tied": lambda: adapted(
        LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True), tie_word_embeddings=True
    ),
    "LoRA, tied": lambda: adapted(
        LoraConfig(**K, r=4, target_modules=["embed_tokens"], ensure_weight_tying=True), tie_word_embeddings=True
    ),
    "trainable tokens": lambda: adapted(LoraConfig(**LORA, trainable_token_indices=[5, 6]), "dpo"),
    "trainable tokens, tied": lambda: adapted(
        LoraConfig(**LORA, trainable_token_indices=[5, 6]), tie_word_embeddings=True
    ),
    "resized embeddings": resized,
    "VeRA without its projections": lambda: adapted(peft.VeraConfig(**VERA, save_projection=False)),
    "VB-LoRA, top k alone": lambda: adapted(
        peft.VBLoRAConfig(**VERA, num_vectors=8, vector_length=8, save_only_topk_weights=True)
    ),
    "AdaLoRA": lambda: adapted(peft.AdaLoraConfig(**LORA, total_step=10)),
    "a base of which a norm trains": with_trained_base,
    "a projection of another seed": frozen_projection,
    "an adapter added by transformers": added_by_transformers,
    "half frozen": half_frozen,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
}


@pytest.mark.numerics
@pytest.mark.parametrize("kind", POLICIES)
def test_the_best_and_the_resumed_policy_have_every_bit(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    seen, again = Snapshots(), Snapshots()
    options = RUN | {"eval_dataset": as_dataset(EVAL)}
    best = trained(tmp_path, POLICIES[kind](), callbacks=[seen], load_best_model_at_end=True, **options)
    figures = [entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry]
    assert best.state.best_global_step == 2 and figures[0] != figures[1]
    assert not same_bits(seen.after[2], seen.after[4])
    assert same_bits(bits(best.model), seen.after[2])
    assert best.evaluate()["eval_loss"] == pytest.approx(figures[0], abs=1e-6)
    torch.manual_seed(0 if kind != "a projection of another seed" else 1)
    resumed = make_trainer(tmp_path, POLICIES[kind](), callbacks=[again], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(again.after[4], seen.after[4])


# ------------------------------------------------------------------------------------- what belongs to the weights

SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}
MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "synchronized": lambda: SYNC,
    "synchronized, given": lambda: SYNC | {"ref_model": tiny_model(seed=1)},
    "synchronized, LoRA": lambda: SYNC | {"model": adapted(LoraConfig(**LORA), "dpo")},
    "synchronized, prompts": lambda: SYNC | {"model": adapted(PROMPTS["prompt tuning"]())},
    "bema": lambda: {
        "callbacks": [BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)],
    },
    "running mean of rewards": lambda: {"loss_type": ["bco_pair"], "beta": 0.5},
}


def figures_of(entry: dict[str, float]) -> dict[str, float]:
    left_out = ("num_tokens", "runtime", "per_second")  # of the run, and of the machine
    return {n: v for n, v in entry.items() if n.startswith("eval_") and not any(word in n for word in left_out)}


@pytest.mark.numerics
@pytest.mark.parametrize("kind", MEASURED)
def test_the_best_checkpoint_brings_what_it_was_measured_against(kind: str, tmp_path: Path) -> None:
    options = RUN | {"eval_dataset": as_dataset(EVAL), "load_best_model_at_end": True} | MEASURED[kind]()
    trainer = trained(tmp_path, **options)
    first, last = (figures_of(entry) for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.state.best_global_step == 2 and abs(first["eval_loss"] - last["eval_loss"]) > 1e-3
    assert figures_of(trainer.evaluate()) == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("kind", ["synchronized", "bema", "running mean of rewards"])
def test_a_best_checkpoint_of_weights_alone_is_refused_where_more_belongs_to_it(kind: str, tmp_path: Path) -> None:
    options = RUN | {"eval_dataset": as_dataset(EVAL), "load_best_model_at_end": True} | MEASURED[kind]()
    with pytest.raises(ConfigurationError, match="save_only_model"):
        make_trainer(tmp_path, save_only_model=True, **options)


def test_a_best_checkpoint_of_weights_alone_is_loaded_where_nothing_moves(tmp_path: Path) -> None:
    seen = Snapshots()
    options = RUN | {"eval_dataset": as_dataset(EVAL), "load_best_model_at_end": True, "save_only_model": True}
    trainer = trained(tmp_path, adapted(PROMPTS["P-tuning, MLP"]()), callbacks=[seen], **options)
    assert same_bits(bits(trainer.model), seen.after[2])


# ----------------------------------------------------------------------------------------------- what is not there


class Loses(TrainerCallback):
    """Removes a file from the checkpoint of step 2, while the run goes on."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            (Path(args.output_dir) / "checkpoint-2" / self.name).unlink()


@pytest.mark.parametrize("kind", ["LoRA", "tied"])
def test_a_best_checkpoint_without_its_weights_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers warns, and leaves the weights of the last step under the name of the best."""
    file = "model.safetensors" if kind == "tied" else "adapter_tensors.safetensors"
    options = RUN | {"eval_dataset": as_dataset(EVAL), "load_best_model_at_end": True, "callbacks": [Loses(file)]}
    with pytest.raises(ResumeError, match=f"`{file}` is missing"):
        trained(tmp_path, POLICIES[kind](), **options)


OTHERS: dict[str, Callable[[], Any]] = {
    "another rank": lambda: adapted(LoraConfig(**LORA | {"r": 2})),
    "another name": lambda: adapted(LoraConfig(**LORA), "dpo"),
    "fewer adapters": lambda: adapted(LoraConfig(**LORA | {"target_modules": ["q_proj"]})),
    "more adapters": with_second,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_other_adapters_is_refused(other: str, tmp_path: Path) -> None:
    run: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, adapted(LoraConfig(**LORA)), **run)
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()  # which would name what differs
    resumed = make_trainer(tmp_path, OTHERS[other](), **run | {"max_steps": 2, "resume_changes": ["manifest"]})
    before = bits(resumed.model)
    with pytest.raises(ResumeError, match="Cannot load the"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same_bits(bits(resumed.model), before)
