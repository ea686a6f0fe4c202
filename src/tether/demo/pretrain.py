"""Trains the demo's language model from nothing, and stops half way.

A model that always answers right leaves nothing to prefer, and one that never does offers no right answer to
choose: about half right is where preference pairs say most. Knows the task only as texts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

_IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class ModelSize:
    """The shape of the tiny Qwen2 model."""

    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4

    @property
    def intermediate_size(self) -> int:
        return 3 * self.hidden_size


def new_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize, *, seed: int) -> PreTrainedModel:
    """A Qwen2 language model with random weights and the tokenizer's vocabulary, in fp32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
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
    examples: Sequence[tuple[str, str]],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[float], None] | None = None,
) -> float:
    """Next-token training in place on the answers of ``examples``.

    The prompt's letters are random and teach nothing, so only ``answer <eos>`` counts in the loss.

    Args:
        model: the model to train.
        tokenizer: its tokenizer.
        examples: (prompt, right answer), visited in an order that ``seed`` decides.
        num_steps: optimizer steps (AdamW, warm-up and cosine decay).
        batch_size: examples of a step.
        learning_rate: the highest learning rate.
        seed: order of the examples.
        on_step: called with the loss after every step, for progress.

    Returns:
        The last step's loss in nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_and_decay(step, num_steps))
    rng = random.Random(seed)
    loss = math.nan
    model.train()
    for _ in range(num_steps):
        input_ids, attention_mask, labels = _collate(tokenizer, rng.sample(examples, batch_size))
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        step_loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
        schedule.step()
        loss = step_loss.item()
        if on_step is not None:
            on_step(loss)
    model.eval()
    return loss


def _warm_up_and_decay(step: int, num_steps: int) -> float:
    warm_up = min(1.0, (step + 1) / max(1, num_steps // 10))
    return warm_up * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def _collate(tokenizer: PreTrainedTokenizerFast, examples: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels, padded on the right; (rows, width) each."""
    prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
    answers = tokenizer([answer + tokenizer.eos_token for _, answer in examples])["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, _IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return input_ids, (input_ids != tokenizer.pad_token_id).long(), labels
