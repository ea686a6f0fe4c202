"""Claim: a training step on pairs with images is faster than TRL's, its batch's making included.

Families whose images are packed (LLaVA) and padded (Gemma 3), with an explicit and an implicit reference; Tether and
TRL on the same rows and weights, in turns. Random weights: a text part of 31 M parameters, a vision tower of 11 M for
pictures of 224 x 224 pixels. Questions and answers have the lengths of chat (`harness.SHAPES`).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from typing import Any

import harness
import numpy as np
import sides
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

BATCH, VOCABULARY, SIDE, PATCH = 8, 32_000, 224, 14
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1344,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SPECIAL = ("<image>", "<boi>", "<eoi>")  # the last ids of the vocabulary
IMAGE_TOKENS = {"llava": (SIDE // PATCH) ** 2, "gemma3": (SIDE // PATCH // 2) ** 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2, help="measured batches (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="times each batch is measured (default 2)")
    parser.add_argument("--families", nargs="*", default=list(IMAGE_TOKENS), help="only these")
    parser.add_argument("--references", nargs="*", default=["explicit", "implicit"], help="only these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    sides.quiet()
    results = harness.read_results("vision", arguments.device)
    for family in arguments.families:
        for reference in arguments.references:
            result = _measure(family, reference, arguments)
            results = [r for r in results if (r["family"], r["reference"]) != (family, reference)] + [result]
            harness.write_results("vision", results, arguments.device)


def _measure(family: str, reference: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model, processor = _model(family), _processor(family)
    rows = _rows(family, (arguments.batches + 1) * BATCH)
    contenders: dict[str, sides.Side] = {}
    for name, kind in (("tether", sides.TetherSide), ("trl", sides.TRLSide)):
        options: dict[str, Any] = {"rows": rows, "max_length": None}
        if arguments.device == "cuda":
            options["bf16"] = True
        if reference == "implicit":
            from peft import LoraConfig

            options["peft_config"] = LoraConfig(r=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        contenders[name] = kind(copy.deepcopy(model), processor, arguments.device, batch_size=BATCH, **options)
    tokenized = list(contenders["tether"].trainer.train_dataset)
    of_side = {"tether": harness.batches_of(tokenized, BATCH), "trl": harness.batches_of(rows, BATCH)}
    for name, side in contenders.items():
        side.step(of_side[name][-1])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    making: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for kept, run in (
            (seconds, lambda side, batch: side.step(batch)),
            (making, lambda side, batch: side.trainer.data_collator([dict(row) for row in batch])),
        ):
            runs = {
                name: lambda item, name=name, run=run: run(contenders[name], of_side[name][item]) for name in contenders
            }
            for name, times in harness.in_turns(runs, arguments.batches, arguments.device).items():
                kept[name] += times
    result = {
        "family": family,
        "reference": reference,
        "pairs": BATCH,
        "image_tokens": IMAGE_TOKENS[family],
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "median_seconds_of_making_a_batch": {name: statistics.median(times) for name, times in making.items()},
        "times_faster": harness.median_ratio(seconds["trl"], seconds["tether"]),
    }
    print(result, flush=True)
    return result


def _model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llava":
        config = LlavaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            image_token_index=VOCABULARY - 3,
            vision_feature_layer=-1,
        )
        return LlavaForConditionalGeneration(config)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**TEXT, "head_dim": 64, "sliding_window": 512},
            vision_config=VISION,
            mm_tokens_per_image=IMAGE_TOKENS[family],
            image_token_index=VOCABULARY - 3,
            boi_token_index=VOCABULARY - 2,
            eoi_token_index=VOCABULARY - 1,
        )
    )


def _processor(family: str) -> Any:
    tokenizer = harness.word_tokenizer(VOCABULARY - len(SPECIAL))
    names = dict(zip(("image_token", "boi_token", "eoi_token"), SPECIAL, strict=True))
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer._set_model_specific_special_tokens(names)
    size = {"height": SIDE, "width": SIDE}
    if family == "llava":
        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=size), tokenizer=tokenizer, image_seq_length=IMAGE_TOKENS[family]
    )


def _rows(family: str, count: int) -> list[dict[str, Any]]:
    """Pairs of words about one picture each, as text."""
    random = np.random.default_rng(0)
    place = {"llava": "<image>", "gemma3": "<boi>"}[family]

    def said(ids: list[int]) -> str:
        return " ".join(f"word{number + 10}" for number in ids)

    rows = []
    for row in harness.synthetic_rows(*harness.SHAPES["chat"], count, vocab_size=VOCABULARY - 20):
        picture = Image.fromarray(random.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
        answers = {side: " " + said(row[f"{side}_ids"]) for side in ("chosen", "rejected")}
        rows.append({"images": [picture], "prompt": f"{place} {said(row['prompt_ids'])}", **answers})
    return rows


if __name__ == "__main__":
    sys.exit(main())
