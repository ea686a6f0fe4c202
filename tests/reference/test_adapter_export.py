"""An adapter merged over tied embeddings: the saved model is the one that was trained, with one weight or with two."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from support.observe import bits, same_bits, traces
from support.tiny import naive_log_probs, tiny_model
from tether.reference import ImplicitReference

K: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# A configuration, and whether the merged embeddings are one weight still.
OVER_TIED: dict[str, tuple[Callable[[], Any], bool]] = {
    "LoRA on attention": (lambda: LoraConfig(**K, target_modules=["q_proj"]), True),
    "LoRA on the embeddings": (lambda: LoraConfig(**K, target_modules=["embed_tokens"]), False),
    "LoRA on the head": (lambda: LoraConfig(**K, target_modules=["lm_head"]), False),
    "LoRA on both": (lambda: LoraConfig(**K, target_modules=["embed_tokens", "lm_head"]), False),
    "DoRA on the embeddings": (lambda: LoraConfig(**K, target_modules=["embed_tokens"], use_dora=True), False),
    "LoHa on the head": (lambda: peft.LoHaConfig(**K, target_modules=["lm_head"]), False),
    "IA3 on the head": (
        lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[]),
        False,
    ),
    "a copy of the embeddings": (
        lambda: LoraConfig(**K, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        False,
    ),
    "a copy of both": (
        lambda: LoraConfig(**K, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
    ),
    "tokens of both": (
        lambda: LoraConfig(**K, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        True,
    ),
    "tokens of the head": (
        lambda: LoraConfig(**K, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5, 6]}),
        False,
    ),
}


def trained_over_tied(config: Any) -> Any:
    torch.manual_seed(0)
    policy = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.eval()


def log_probs(model: Any) -> torch.Tensor:
    return naive_log_probs(model.eval(), [5, 6, 7], [8, 5, 40, 6, 9]).detach()


@pytest.mark.numerics
@pytest.mark.parametrize("kind", OVER_TIED)
def test_a_model_merged_over_tied_embeddings_is_the_reference(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, tied = OVER_TIED[kind]
    policy = trained_over_tied(make())
    expected, before, numbers = log_probs(policy), traces(policy), bits(policy)
    ImplicitReference(policy).export(tmp_path, merged=True)
    assert traces(policy) == before and same_bits(bits(policy), numbers)
    assert policy.config.tie_word_embeddings is True
    with caplog.at_level(logging.WARNING):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "tie" not in caplog.text, "the config says what the file holds"
    torch.testing.assert_close(log_probs(loaded), expected, rtol=0, atol=5e-5)
    assert (log_probs(tiny_model(tie_word_embeddings=True)) - expected).abs().max() > 1e-2, "it was trained"
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {EMBED, HEAD} - set(file.keys()) == ({HEAD} if tied else set())


@pytest.mark.numerics
def test_tied_factors_are_merged_into_both_uses(tmp_path: Path) -> None:
    """PEFT keeps a tensor of a graph beside them, which cannot be copied. The two products may round differently."""
    policy = trained_over_tied(LoraConfig(**K, target_modules=["embed_tokens"], ensure_weight_tying=True))
    expected = log_probs(policy)
    ImplicitReference(policy).export(tmp_path, merged=True)
    torch.testing.assert_close(log_probs(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=5e-5)
