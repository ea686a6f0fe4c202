"""What trains, trains: optimizers of your own, adapters in another dtype than their base, and checkpointing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from support.observe import bits
from support.runs import as_dataset, curve, make_trainer, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer
from tether.errors import ConfigurationError
from tether.trainer.trainable import checkpoints_activations

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CALL = tiny_tokenizer()("<|im_start|>assistant\n")["input_ids"]  # what ends every prompt of a conversation


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1), None


# ------------------------------------------------------------------------------------------------------ optimizers


@pytest.mark.numerics
def test_an_optimizer_of_the_policy_trains_it(tmp_path: Path) -> None:
    """One step of SGD by hand: the gradient of the same loss, from plain forwards."""
    model, by_hand = tiny_model(), tiny_model()
    trainer = make_trainer(
        tmp_path, model, tiny_pairs(4), max_steps=1, optimizers=sgd(model.parameters()), max_grad_norm=0.0
    )
    rows = list(trainer.train_dataset)
    trainer.train()
    _dpo_loss(by_hand, tiny_model(), rows, beta=0.1).backward()
    for own, expected in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(own, expected - 0.1 * expected.grad, atol=1e-5)  # 6e-6 under `OtherRounding(10)`


def _dpo_loss(policy: Any, reference: Any, rows: list[dict[str, Any]], beta: float) -> Tensor:
    def ratio(row: dict[str, Any], side: str) -> Tensor:
        of_policy, of_reference = (naive_log_probs(m, row["prompt_ids"], row[side]) for m in (policy, reference))
        return (of_policy - of_reference.detach()).sum()

    margins = [ratio(row, "chosen_ids") - ratio(row, "rejected_ids") for row in rows]
    return -torch.nn.functional.logsigmoid(beta * torch.stack(margins)).mean()


def test_an_optimizer_of_an_adapter_that_was_put_on_before_trains_it(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), peft.LoraConfig(**LORA))
    before = bits(model)
    trainer = trained(tmp_path, model, optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-2), None))
    moved = {name for name, tensor in bits(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_an_optimizer_of_a_part_trains_that_part_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    before = bits(model)
    with caplog.at_level(logging.WARNING, logger="tether"):
        trainer = trained(tmp_path, model, optimizers=sgd(model.lm_head.parameters()))
    moved = {name for name, tensor in bits(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"lm_head.weight"}
    assert f"holds 1 of the {len(list(model.parameters()))} tensors that train" in caplog.text


# ---------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.numerics
def test_an_adapter_in_float32_trains_on_a_base_in_float16_as_on_the_same_base_in_float32(tmp_path: Path) -> None:
    options: dict[str, Any] = {"peft_config": peft.LoraConfig(**LORA), "learning_rate": 1e-2, "max_steps": 10}
    half = trained(tmp_path / "16", tiny_model(dtype=torch.float16), **options)
    single = trained(tmp_path / "32", tiny_model(dtype=torch.float16).float(), **copy.deepcopy(options))
    # Products in float16 have 11 bits: sums of a hundred log-probs of 5 nats are off by some 0.05 nats, times beta.
    assert curve(half) == pytest.approx(curve(single), abs=0.02)
    assert curve(half)[-1] < 0.5  # it learns: log 2 is 0.69


# --------------------------------------------------------------------------------------------------- checkpointing

ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=4, task_type="CAUSAL_LM"),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}
LOST_BY_REPLAY: dict[str, Callable[[], peft.PeftConfig]] = {
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "activated LoRA": lambda: peft.LoraConfig(**LORA, alora_invocation_tokens=CALL),
}
if hasattr(peft, "CartridgeConfig"):  # since PEFT 0.19
    LOST_BY_REPLAY["Cartridge"] = lambda: peft.CartridgeConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")


@pytest.mark.numerics
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", [*ADAPTERS, *LOST_BY_REPLAY])
def test_checkpointing_changes_no_number_of_any_adapter(
    name: str, reentrant: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = (ADAPTERS | LOST_BY_REPLAY)[name]
    rows = tiny_pairs(8, conversational=True)
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "eval_dataset": as_dataset(rows)}
    plain = trained(tmp_path / "plain", rows=rows, peft_config=make(), gradient_checkpointing=False, **options)
    with caplog.at_level(logging.WARNING, logger="tether"):
        checkpointed = trained(
            tmp_path / "checkpointed", rows=rows, peft_config=make(), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}, eval_strategy="steps", eval_steps=1, **options,
        )  # fmt: skip
    for figure in ("loss", "grad_norm", "rewards/margins"):
        assert curve(checkpointed, figure) == pytest.approx(curve(plain, figure), rel=1e-4, abs=1e-5)
    assert min(curve(plain, "grad_norm")) > 0
    said = [record.getMessage() for record in caplog.records if "gradient_checkpointing" in record.getMessage()]
    assert len(said) == (name in LOST_BY_REPLAY)


def test_every_kind_of_prompt_that_is_a_cache_is_known() -> None:
    """A layer that is run again gets no cache: PEFT's kinds of prompts that travel in it can't be checkpointed."""
    kinds = [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(kind, peft.PromptLearningConfig)]
    own: dict[Any, dict[str, Any]] = {
        peft.CPTConfig: {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
        peft.MultitaskPromptTuningConfig: {"num_tasks": 1},
    }
    for kind in kinds:
        options = own.get(kind, {}) | ({} if kind is peft.CPTConfig else {"num_virtual_tokens": 2})
        model = get_peft_model(tiny_model(), kind(task_type="CAUSAL_LM", **options))
        in_cache = not isinstance(model.get_prompt(1, task_ids=torch.tensor([0])), Tensor)
        assert checkpoints_activations(model, True) is not in_cache, kind
    assert len(kinds) >= 5


def test_checkpointing_that_was_not_asked_for_stays_off_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    for make in (*ADAPTERS.values(), *LOST_BY_REPLAY.values()):
        assert checkpoints_activations(get_peft_model(tiny_model(), make()), False) is False
    assert not [record for record in caplog.records if record.name.startswith("tether")]


@pytest.mark.numerics
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_activated_lora_gives_the_numbers_of_each_row_alone(batch_size: int, tmp_path: Path) -> None:
    """PEFT looks for one invocation in each row, so that a packed row would switch it on for the last prompt only."""
    rows = tiny_pairs(8, conversational=True)
    trainer = trained(
        tmp_path, rows=rows, peft_config=LOST_BY_REPLAY["activated LoRA"](), learning_rate=3e-2,
        eval_dataset=as_dataset(rows), per_device_eval_batch_size=batch_size,
    )  # fmt: skip
    found = trainer.evaluate()["eval_logps/chosen"]
    model = trainer.model.eval()

    def mean_by_hand() -> float:
        with torch.no_grad():
            sums = [naive_log_probs(model, r["prompt_ids"], r["chosen_ids"]).sum() for r in trainer.train_dataset]
        return float(torch.stack(sums).mean())

    assert found == pytest.approx(mean_by_hand(), rel=1e-5)
    with model.disable_adapter():
        assert abs(found - mean_by_hand()) > 1  # the adapter has something to say


@pytest.mark.parametrize("name", ["activated LoRA", "prompt tuning", "prefix tuning"])
def test_padding_free_is_refused_with_an_adapter_that_acts_once_in_a_row(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="padding_free=True"):
        make_trainer(tmp_path, peft_config=(ADAPTERS | LOST_BY_REPLAY)[name](), padding_free=True)
