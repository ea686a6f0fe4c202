"""A model, a tokenizer and pairs for the examples: made in memory in a second, offline, and good for nothing else."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

_NUMBERS = [str(number) for number in range(19)]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the sums below."""
    words = {word: index for index, word in enumerate(["<eos>", "<unk>", "+", "=", *_NUMBERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def toy_model(seed: int = 0) -> PreTrainedModel:
    """A Qwen2 of 70 thousand random weights, the same ones for each seed."""
    config = Qwen2Config(
        vocab_size=23,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


def toy_pairs(num_pairs: int = 64, seed: int = 0) -> list[dict[str, str]]:
    """Sums of two digits: the right answer preferred to a wrong one."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(num_pairs):
        a, b = draw.randrange(10), draw.randrange(10)
        wrong = draw.choice([number for number in _NUMBERS if number != str(a + b)])
        pairs.append({"prompt": f"{a} + {b} =", "chosen": f" {a + b} ", "rejected": f" {wrong} "})
    return pairs
