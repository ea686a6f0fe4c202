"""Tiny vision-language models, their processors and rows with images; made from a seed, without `tether`.

The image processors are those that need no torchvision.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.tiny import tiny_tokenizer

FAMILIES = ("llava", "llava_next", "gemma3", "idefics3", "qwen2_5_vl")
PLACEHOLDERS = dict.fromkeys(FAMILIES, "<image>") | {
    "gemma3": "<boi>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}

_TOKENS = {
    "llava": ("<image>",),
    "llava_next": ("<image>",),
    "gemma3": ("<boi>", "<eoi>", "<image>"),
    "idefics3": ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
}
_VOCABULARY = 264  # 256 tokens of text, and room for those of images
_SIDE, _PATCH = 28, 14

# Content is a list of blocks, as vision-language models have it.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}PLACEHOLDER{% else %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{{ '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class StillQwenProcessor(Qwen2VLProcessor):
    """Qwen's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_processor(family: str = "llava") -> ProcessorMixin:
    """The family's own processor, for images of 28 x 28 pixels in patches of 14."""
    tokenizer: Any = tiny_tokenizer(chat=False, pad=True)
    tokenizer.add_tokens(list(_TOKENS[family]), special_tokens=True)
    size = {"height": _SIDE, "width": _SIDE}
    shared = {"tokenizer": tokenizer, "chat_template": _TEMPLATE.replace("PLACEHOLDER", PLACEHOLDERS[family])}
    patches = {"patch_size": _PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        images: Any = CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=size)
        return LlavaProcessor(image_processor=images, **shared, **patches)
    if family == "llava_next":
        grid = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
        images = LlavaNextImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=size, image_grid_pinpoints=grid)
        return LlavaNextProcessor(image_processor=images, **shared, **patches)
    if family == "gemma3":
        names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
        tokenizer._set_model_specific_special_tokens(names)
        return Gemma3Processor(image_processor=Gemma3ImageProcessorPil(size=size), image_seq_length=4, **shared)
    if family == "qwen2_5_vl":
        area = {"shortest_edge": _SIDE**2, "longest_edge": 4 * _SIDE**2}
        images = Qwen2VLImageProcessorPil(size=area, patch_size=_PATCH, merge_size=2)
        return StillQwenProcessor(images, **shared)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    return Idefics3Processor(image_processor=images, image_seq_len=4, **shared)


def tiny_vision_model(family: str = "llava", seed: int = 0, **text: Any) -> PreTrainedModel:
    """A model of two text layers and one vision layer, whose image features reach the answers."""
    torch.manual_seed(seed)
    processor: Any = tiny_processor(family)
    image_token = processor.tokenizer.convert_tokens_to_ids(_TOKENS[family][2 if family == "gemma3" else 0])
    layer = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {**layer, "num_hidden_layers": 2, "image_size": _SIDE, "patch_size": _PATCH}
    llama = {
        **layer,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 512,
        **text,
    }
    if family in ("llava", "llava_next"):
        clip = CLIPVisionConfig(**vision, projection_dim=32).to_dict()
        options = {"vision_config": clip, "text_config": {"model_type": "llama", **llama}}
        options |= {"image_token_index": image_token, "vision_feature_layer": -1}
        if family == "llava":
            model: PreTrainedModel = LlavaForConditionalGeneration(LlavaConfig(**options))
        else:
            grid = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
            model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=grid, **options))
    elif family == "gemma3":
        text_config = {**llama, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        text_config["layer_types"] = ["sliding_attention", "full_attention"]
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text_config,
                vision_config=vision,
                mm_tokens_per_image=4,
                image_token_index=image_token,
                boi_token_index=processor.tokenizer.boi_token_id,
                eoi_token_index=processor.tokenizer.eoi_token_id,
            )
        )
    elif family == "qwen2_5_vl":
        sections = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = dict(zip(names, processor.tokenizer.convert_tokens_to_ids(list(_TOKENS[family])), strict=True))
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={**llama, "rope_parameters": sections, "pad_token_id": 1},
                vision_config={
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_heads": 4,
                    "depth": 2,
                    "out_hidden_size": 32,
                    "patch_size": _PATCH,
                    "window_size": 2 * _SIDE,
                    "fullatt_block_indexes": [1],
                },
                **ids,
            )
        )
    else:
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(
                text_config={"model_type": "llama", **llama, "pad_token_id": 1},
                vision_config={**vision, "patch_size": 7},
                scale_factor=2,
                image_token_id=image_token,
            )
        )
    with torch.no_grad():  # a fresh model hardly looks at anything: larger weights make images matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        if family == "gemma3":  # zeros, until it is trained
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    return model.eval()


def tiny_image(number: int, width: int = 40, height: int = 36) -> Image.Image:
    """A picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def tiny_image_pairs(
    count: int, *, seed: int = 0, shape: str = "messages", family: str = "llava"
) -> list[dict[str, Any]]:
    """Rows with one image each; every third has two, every fourth shares its prompt with the row before.

    Args:
        count: Number of rows.
        seed: Of what they say.
        shape: `messages` (text contents), `blocks` (contents say where images stand) or `text`.
        family: Whose placeholder plain text has.
    """
    source = random.Random(seed)
    words = ["red", "blue", "green", "small", "large", "round", "square", "dark", "bright", "old", "new", "three"]
    rows: list[dict[str, Any]] = []
    for number in range(count):
        shown = [tiny_image(10 * number + place, width=40 - 12 * place) for place in range(2 if number % 3 == 2 else 1)]
        question, *answers = (" ".join(source.choices(words, k=k)) for k in (4, source.randint(1, 6), 3))
        if number % 4 == 3:
            question, shown = rows[-1]["question"], rows[-1]["images"]
        rows.append({"question": question, "images": shown, "chosen": answers[0], "rejected": answers[1] + " no"})
    return [_shaped(row, shape, PLACEHOLDERS[family]) for row in rows]


def _shaped(row: dict[str, Any], shape: str, placeholder: str) -> dict[str, Any]:
    question, images = row["question"], row["images"]
    sides = {side: " " + row[side] for side in ("chosen", "rejected")}  # with a space, no token merges with the prompt
    if shape == "text":
        return {"images": images, "prompt": placeholder * len(images) + question, **sides}
    blocks: Any = [{"type": "image", "text": None}] * len(images) + [{"type": "text", "text": question}]
    answers = {
        side: [{"role": "assistant", "content": [{"type": "text", "text": text}] if shape == "blocks" else text}]
        for side, text in sides.items()
    }
    content = blocks if shape == "blocks" else question
    return {"images": images, "prompt": [{"role": "user", "content": content}], **answers}
