"""Makes the demo's language model: a tiny Qwen2 from random weights, trained to imitate texts.

Knows texts as (prompt, answer), but not their content.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

_IGNORED = -100  # the label that cross-entropy ignores


@dataclass(frozen=True)
class ModelSize:
    """The shape of the model."""

    hidden_size: int
    num_layers: int
    num_heads: int = 4


def new_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize, *, seed: int) -> PreTrainedModel:
    """A Qwen2 language model with random weights and the tokenizer's vocabulary, in fp32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[tuple[str, str]],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Trains the model, in place, to imitate the answers in the texts.

    The letters of a prompt are random and teach nothing, so only `answer <eos>` counts in the loss.

    Args:
        model: The model; left in evaluation mode.
        tokenizer: Its tokenizer.
        texts: (prompt, answer).
        num_steps: Optimizer steps (AdamW, warm-up and cosine decay).
        batch_size: Texts per step, drawn anew for each.
        learning_rate: The peak learning rate.
        seed: Decides which texts each step draws.
        on_step: Called after every step, for progress.

    Returns:
        The last step's loss, in nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_and_decay(step, num_steps))
    rng = random.Random(seed)
    loss = torch.tensor(math.nan)
    model.train()
    for _ in range(num_steps):
        inputs, labels = _collate(tokenizer, rng.sample(texts, batch_size))
        logits = model(**inputs).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step()
    model.eval()
    return loss.item()


def _warm_up_and_decay(step: int, num_steps: int) -> float:
    warm_up = min(1.0, (step + 1) / max(1, num_steps // 10))
    return warm_up * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def _collate(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs and labels, padded on the right; only answers have labels."""
    whole: Any = tokenizer(
        [prompt + answer + str(tokenizer.eos_token) for prompt, answer in texts],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    prompt_lengths = torch.tensor([len(ids) for ids in tokenizer([prompt for prompt, _ in texts])["input_ids"]])
    positions = torch.arange(whole["input_ids"].shape[1])
    is_answer = (positions >= prompt_lengths[:, None]) & whole["attention_mask"].bool()
    return dict(whole), whole["input_ids"].where(is_answer, _IGNORED)
