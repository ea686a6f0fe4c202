"""A LLaVA of a hundred thousand random weights and coloured squares to name, for the example; good for nothing else."""

from __future__ import annotations

import random
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

_COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
_WORDS = ["<eos>", "<unk>", "<image>", "which", "colour", "?", *_COLOURS]
_SIDE, _PATCH = 28, 14


def toy_processor() -> LlavaProcessor:
    """Pictures of 28 x 28 pixels as four tokens, and one token for each word."""
    words = {word: index for index, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", extra_special_tokens=["<image>"]
        ),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def toy_vision_model() -> LlavaForConditionalGeneration:
    """The same random weights each time."""
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**size, num_hidden_layers=2, vocab_size=len(_WORDS), max_position_embeddings=64),
        vision_config=CLIPVisionConfig(**size, num_hidden_layers=2, image_size=_SIDE, patch_size=_PATCH),
        image_token_index=_WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def toy_image_pairs(num_pairs: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """A square of one colour: its name preferred to another's."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(num_pairs):
        right, wrong = draw.sample(_COLOURS, 2)
        picture = Image.new("RGB", (_SIDE, _SIDE), right)
        pairs.append(
            {
                "image": picture,
                "prompt": "<image> which colour ?",
                "chosen": f" {right} <eos>",
                "rejected": f" {wrong} <eos>",
            }
        )
    return pairs
