"""Vision-language models: images in the rows, through processor, layout, references and training."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference as TheirCollator

import tether
from support.observe import bits, same_bits
from support.runs import curve, differences, make_trainer, shared_names, steps, stream, trained
from support.tiny import naive_log_probs, tiny_model, tiny_pairs, tiny_tokenizer
from support.tiny_vision import FAMILIES, PLACEHOLDERS, tiny_image, tiny_image_pairs, tiny_processor, tiny_vision_model
from support.trl_oracle import trl_curve
from tether import DataCollatorForVisionPreference
from tether.data.datasets import PairCollator, as_dataset, batch_of
from tether.data.image_rows import ImageRows
from tether.errors import ConfigurationError, DataError
from tether.reference import ImplicitReference
from tether.scoring import score
from tether.trainer.reference_columns import with_reference_columns
from tether.types import PairBatch, image_inputs

pytestmark = pytest.mark.numerics

SHAPES = ("messages", "blocks", "text")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def vision_trainer(folder: Path, rows: Any = None, family: str = "llava", **options: Any) -> Any:
    given = {"processing_class": tiny_processor(family), "max_length": None} | options
    model = given.pop("model", None) or tiny_vision_model(family)
    return make_trainer(folder, model, tiny_image_pairs(8, family=family) if rows is None else rows, **given)


def vision_trained(folder: Path, *args: Any, **options: Any) -> Any:
    trainer = vision_trainer(folder, *args, **options)
    trainer.train()
    return trainer


def batch_from(rows: list[dict[str, Any]], family: str = "llava", **options: Any) -> PairBatch:
    reader = ImageRows(tiny_processor(family))
    tokenized = [row | reader.tokens(row, "A row")._asdict() for row in rows]
    return batch_of(PairCollator(image_rows=reader, **options)(tokenized))


def saved(folder: Path, family: str = "llava") -> str:
    tiny_vision_model(family).save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    return str(folder)


# ---- log-probs ---------------------------------------------------------------------------------------------------


def told(row: dict[str, Any], side: str, family: str) -> tuple[str, str]:
    """Prompt and answer of a row as text, written by hand from the tests' own template."""
    answer = row[side] if isinstance(row[side], str) else row[side][0]["content"]
    answer = answer if isinstance(answer, str) else answer[0]["text"]
    if isinstance(row["prompt"], str):
        return row["prompt"], answer
    content = row["prompt"][0]["content"]
    question = content if isinstance(content, str) else content[-1]["text"]
    places = PLACEHOLDERS[family] * len(row["images"])
    return f"<|im_start|>user\n{places}{question}<eos><|im_start|>assistant\n", answer + "<eos>"


def naive_vision_log_prob(model: Any, row: dict[str, Any], side: str, family: str) -> Tensor:
    """`log pi(y | images, x)`: one unpadded forward of the whole text, and a plain log-softmax."""
    processor: Any = tiny_processor(family)
    prompt, answer = told(row, side, family)
    fed = processor(
        text=[prompt + answer],
        images=[row["images"]] if row["images"] else None,
        add_special_tokens=False,
        return_tensors="pt",
    )
    num_answer = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
    logits = model(**fed).logits.float()[0, -num_answer - 1 : -1]
    return logits.log_softmax(-1).gather(-1, fed["input_ids"][0, -num_answer:, None]).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_those_of_each_response_alone(family: str, shape: str) -> None:
    rows = tiny_image_pairs(6, shape=shape, family=family)
    model = tiny_vision_model(family)
    batch = batch_from(rows, family)
    with torch.no_grad():
        found = batch.of_responses(score(model, batch).sums())
        for side, values in zip(("chosen", "rejected"), found, strict=True):
            expected = torch.stack([naive_vision_log_prob(model, row, side, family) for row in rows])
            assert torch.allclose(values, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_in_values_and_gradients(family: str) -> None:
    """Where a family's images are packed, each prompt with its images is read once; all others are padded."""
    rows = tiny_image_pairs(5, family=family) + [row | {"images": []} for row in tiny_image_pairs(2, seed=3)]
    model, batch = tiny_vision_model(family), batch_from(rows, family)
    weights = torch.randn(sum(batch.response_lengths), generator=torch.Generator().manual_seed(0))
    found = []
    for layout in ("padded", "auto"):
        model.zero_grad()
        values = score(model, batch, layout=layout).values
        (values * weights).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((values.detach(), grads))
    (padded, padded_grads), (auto, auto_grads) = found
    assert torch.allclose(auto, padded, rtol=0, atol=1e-5)
    assert padded_grads.keys() == auto_grads.keys()
    assert any("vis" in name and grad.abs().max() > 1e-3 for name, grad in auto_grads.items())
    for name, grad in padded_grads.items():
        # The gradient of a key's bias is 0 but for the rounding of others, whose entries are 10 and more.
        assert (auto_grads[name] - grad).abs().max() <= 1e-4 * max(1e-1, grad.abs().max()), name


def test_the_proof_finds_a_family_whose_images_must_not_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's image tokens see each other: its packed row is another answer."""
    monkeypatch.setattr(sys.modules["tether.scoring.score"], "why_unpacked", lambda *args: "")
    model, batch = tiny_vision_model("gemma3"), batch_from(tiny_image_pairs(4, family="gemma3"), "gemma3")
    with torch.no_grad():
        packed, padded, chosen = (score(model, batch, layout=how).values for how in ("packed", "padded", "auto"))
    assert (packed - padded).abs().max() > 1e-2
    assert torch.allclose(chosen, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_matter(family: str) -> None:
    """The models of these tests would notice a wrong picture: the tolerances above mean something."""
    rows = tiny_image_pairs(1, family=family)
    others = [row | {"images": [tiny_image(99, *image.size) for image in row["images"]]} for row in rows]
    model = tiny_vision_model(family)
    with torch.no_grad():
        first, second = (score(model, batch_from(some, family)).sums() for some in (rows, others))
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_processed_one_by_one_make_the_processors_own_batch(family: str) -> None:
    """Image tensors of single prompts, put together, are what the processor makes of them all at once."""
    rows = [row for row in tiny_image_pairs(6, shape="text", family=family) if row["images"]]
    processor: Any = tiny_processor(family)
    reader = ImageRows(processor)
    tokens = [row | reader.tokens(row, "A row")._asdict() for row in rows]
    together = processor(
        text=[row["prompt"] for row in rows],
        images=[row["images"] for row in rows],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    found = image_inputs([reader.shown(row) for row in tokens], together["input_ids"].shape[1])
    assert found.keys() == together.keys() - {"input_ids", "attention_mask"}
    for name, value in found.items():
        # A processor may put the images of a batch in rows: the models take them out again, in order.
        expected = together[name] if together[name].shape == value.shape else together[name].reshape(value.shape)
        assert torch.equal(value, expected), name


def test_a_batch_may_mix_rows_with_and_without_images() -> None:
    with_images, without = tiny_image_pairs(2), [row | {"images": []} for row in tiny_image_pairs(2, seed=7)]
    for family in ("llava", "gemma3"):
        model, rows = tiny_vision_model(family), [with_images[0], without[0], with_images[1], without[1]]
        batch = batch_from(rows, family)
        assert [images is None for images in batch.images] == [False, True, False, True]
        with torch.no_grad():
            chosen, _ = batch.of_responses(score(model, batch).sums())
            expected = [naive_vision_log_prob(model, row, "chosen", family) for row in rows]
        assert torch.allclose(chosen, torch.stack(expected), rtol=0, atol=2e-4)


# ---- what is one response ----------------------------------------------------------------------------------------


def test_the_same_text_under_another_image_is_another_prompt() -> None:
    (row,) = tiny_image_pairs(1)
    other = row | {"images": [tiny_image(55, *row["images"][0].size)]}
    batch = batch_from([row, other, row])
    assert (batch.num_pairs, batch.num_groups, batch.num_responses) == (3, 2, 4)
    assert len(set(batch.keys)) == 4
    again = batch.only(range(batch.num_responses))
    assert set(again.keys) == set(batch.keys) and again.num_groups == 2


def test_a_key_knows_the_pixels_and_not_the_object() -> None:
    (row,) = tiny_image_pairs(1)
    (copied,) = tiny_image_pairs(1)
    copied["images"][0].paste((0, 0, 0), (16, 16, 20, 20))
    same, changed = batch_from([row]), batch_from([copied])
    assert batch_from(tiny_image_pairs(1)).keys == same.keys
    assert not set(changed.keys) & set(same.keys)


def test_a_cut_response_keeps_its_key() -> None:
    (row,) = tiny_image_pairs(1)
    whole = batch_from([row])
    cut = batch_from([row], max_length=whole.prompt_lengths[0] + 2)
    assert cut.keys == whole.keys and max(cut.response_lengths) == 2


# ---- references --------------------------------------------------------------------------------------------------

REFERENCES: dict[str, dict[str, Any]] = {
    "explicit": {},
    "explicit, a model of its own": {"ref_model": "itself"},
    "implicit": {"peft_config": LORA},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed, implicit": {"precompute_ref_log_probs": True, "peft_config": LORA},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "synchronized, implicit": {"sync_ref_model": True, "ref_model_sync_steps": 2, "peft_config": LORA},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_every_reference_starts_at_log_2_and_learns(name: str, tmp_path: Path) -> None:
    options = dict(REFERENCES[name])
    if "ref_model" in options:
        options["ref_model"] = tiny_vision_model()
    rows = Dataset.from_list(tiny_image_pairs(6))
    rate = 2e-2 if "peft_config" in options else 1e-3
    trainer = vision_trained(tmp_path, rows, eval_dataset=rows, max_steps=6, learning_rate=rate, **options)
    losses = curve(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert steps(trainer)[0]["reference/initial_gap"] == pytest.approx(0, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] < losses[0] - 0.005


IMPLICIT = {
    "biases train everywhere": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all"),
    "fresh LoHa in the tower": LoHaConfig(r=4, target_modules=".*vision_tower.*q_proj"),
    "moved LoHa in the tower": LoHaConfig(r=4, target_modules=".*vision_tower.*q_proj", init_weights=False),
    "moved bias of LoRA": LoraConfig(r=4, target_modules=".*projector.*linear_1", lora_bias=True),
}


@pytest.mark.parametrize("name", IMPLICIT)
def test_an_implicit_reference_stays_where_only_images_show_what_trains(name: str) -> None:
    policy = get_peft_model(tiny_vision_model("llava"), IMPLICIT[name]).eval()
    batch = batch_from(tiny_image_pairs(4))

    def move() -> None:
        with torch.no_grad():
            for key, parameter in policy.named_parameters():
                if parameter.requires_grad and (key.endswith("bias") or "LoHa" in name):
                    parameter.add_(torch.randn_like(parameter) * 0.3)

    if name == "moved bias of LoRA":
        move()
    with torch.no_grad():
        start = score(policy, batch).values
    reference = ImplicitReference(policy)
    for _ in range(2):
        torch.testing.assert_close(reference.log_probs(batch).values, start, atol=1e-5, rtol=0)
        move()
    assert (score(policy, batch).values - start).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_implicit_and_precomputed_references_are_one(family: str, tmp_path: Path) -> None:
    """The same base: a frozen copy, the adapter off, and the answers from a store give the same rewards."""

    def rewards(name: str, **options: Any) -> list[float]:
        options |= {"peft_config": LORA, "max_steps": 3, "learning_rate": 1e-2, "family": family}
        return curve(vision_trained(tmp_path / name, **options), "rewards/margins")

    implicit = rewards("implicit")
    assert abs(implicit[-1]) > 1e-4
    assert rewards("explicit", ref_model=tiny_vision_model(family)) == pytest.approx(implicit, abs=1e-5)
    assert rewards("precomputed", precompute_ref_log_probs=True) == pytest.approx(implicit, abs=1e-5)


def test_a_store_serves_the_same_images_and_only_these(tmp_path: Path) -> None:
    store = {"precompute_ref_log_probs": True, "ref_store": str(tmp_path / "store.sqlite")}
    rows = tiny_image_pairs(5)
    assert vision_trainer(tmp_path / "1", rows, **store).reference.num_passes > 0
    assert vision_trainer(tmp_path / "2", rows, **store).reference.num_passes == 0
    rows[0]["images"] = [tiny_image(77)]
    third = vision_trainer(tmp_path / "3", rows, **store)
    assert third.reference.num_passes == 1
    batch = batch_of(third.data_collator(list(third.train_dataset)))
    with torch.no_grad():
        expected = score(tiny_vision_model(), batch).sums()
    assert torch.allclose(third.reference.log_probs(batch).sums(), expected, atol=1e-4)


def test_rows_are_given_the_references_sums_and_train_by_them(tmp_path: Path) -> None:
    expected = naive_vision_log_prob(tiny_vision_model(), tiny_image_pairs(1)[0], "chosen", "llava").item()
    trainer = vision_trainer(tmp_path / "own")
    rows = with_reference_columns(trainer.train_dataset, trainer.reference, trainer.data_collator)
    assert rows[0]["ref_chosen_logps"] == pytest.approx(expected, abs=2e-4)
    trainer.train()
    given = vision_trained(tmp_path / "given", rows)
    assert given.reference.num_passes == 0 and curve(given) == pytest.approx(curve(trainer), abs=1e-5)


def test_a_saved_reference_comes_with_its_processor(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path / "run")
    trainer.export_reference(tmp_path / "reference")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "reference")
    assert type(AutoProcessor.from_pretrained(tmp_path / "reference")) is type(tiny_processor())
    assert same_bits(bits(loaded), bits(tiny_vision_model()))


# ---- training ----------------------------------------------------------------------------------------------------


def assert_trains_as_trl(
    family: str, shape: str, num_steps: int, tmp_path: Path, *, lora: bool = False, **more: Any
) -> None:
    folder, rows = saved(tmp_path / "model", family), tiny_image_pairs(12, shape=shape, family=family)
    options = {
        "learning_rate": 1e-2 if lora else 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": num_steps,
        "logging_steps": 1,
        "max_length": None,
        "gradient_checkpointing": False,
        **({"peft_config": LORA} if lora else {}),
    }
    processor = tiny_processor(family)
    theirs = trl_curve(folder, rows, processor, tmp_path / "trl", **options)
    given = options | more | {"gradient_checkpointing": False, "processing_class": processor}
    ours = steps(trained(tmp_path / "tether", folder, rows, **given))
    assert len(ours) == num_steps and shared_names(ours[1]) == theirs[1].keys()
    for metric, difference in differences(ours, theirs).items():
        assert difference <= 1e-4 * max(1, max(abs(entry[metric]) for entry in theirs)), metric
    assert max(entry["loss"] for entry in ours) - min(entry["loss"] for entry in ours) > 1e-2


@pytest.mark.parametrize("lora", [False, True])
def test_curves_equal_those_of_trl(lora: bool, tmp_path: Path) -> None:
    assert_trains_as_trl("llava", "messages", 4, tmp_path, lora=lora)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["explicit", "implicit", "precomputed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_30_steps_equal_those_of_trl(family: str, shape: str, reference: str, tmp_path: Path) -> None:
    more = {"precompute_ref_log_probs": True} if reference == "precomputed" else {}
    assert_trains_as_trl(family, shape, 30, tmp_path, lora=reference == "implicit", **more)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = vision_trained(tmp_path, **options)
    again = vision_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(bits(again.model), bits(whole.model))
    loaded = AutoProcessor.from_pretrained(tmp_path / "checkpoint-4")
    assert type(loaded) is type(tiny_processor())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_curve(reentrant: bool, tmp_path: Path) -> None:
    plain = curve(vision_trained(tmp_path / "plain"))
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = vision_trained(tmp_path / "checkpointed", gradient_checkpointing=True, **kwargs)
    assert curve(checkpointed) == pytest.approx(plain, abs=1e-6)


def test_rows_from_a_stream_and_from_worker_processes_train_alike(tmp_path: Path) -> None:
    rows = tiny_image_pairs(12)
    options = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    in_memory = curve(vision_trained(tmp_path / "memory", rows, **options))
    workers = {"dataloader_num_workers": 2, "dataset_num_proc": 2}
    assert curve(vision_trained(tmp_path / "workers", rows, **options, **workers)) == in_memory
    assert curve(vision_trained(tmp_path / "stream", stream(rows), max_steps=3)) == pytest.approx(in_memory, abs=1e-6)


def test_batches_of_even_length_count_the_tokens_of_images(tmp_path: Path) -> None:
    trainer = vision_trained(tmp_path, max_tokens_per_micro_batch=100, max_steps=2)
    for inputs in trainer.get_train_dataloader():
        batch = batch_of(inputs)
        assert batch.images and (batch.num_pairs == 1 or batch.num_row_tokens() <= 100)


def test_new_sets_are_evaluated_and_predicted_at_any_time(tmp_path: Path) -> None:
    options = {"model": saved(tmp_path / "model"), "compute_metrics": lambda _: {"seen": 1.0}}
    trainer = vision_trained(tmp_path / "run", precompute_ref_log_probs=True, **options)
    new = Dataset.from_list(tiny_image_pairs(3, seed=5))
    figures = trainer.evaluate(new)
    assert figures["eval_seen"] == 1.0 and math.isfinite(figures["eval_loss"])
    predicted = trainer.predict(new)
    logits, ids = predicted.predictions, predicted.label_ids
    assert logits.shape[:2] == ids.shape == (6, max(map(len, ids)))
    rows = list(trainer._sets.read(new, "new"))
    fed = TheirCollator(tiny_processor())(tiny_image_pairs(3, seed=5))
    with torch.no_grad():
        names = ("input_ids", "attention_mask", "pixel_values")
        expected = trainer.model(**{name: fed[name] for name in names}).logits
    for row, tokens in enumerate(fed["attention_mask"].sum(1).tolist()):
        assert torch.allclose(torch.tensor(logits)[row, :tokens], expected[row, :tokens], atol=1e-3)
    assert len(rows[0]["prompt_ids"]) > len(set(rows[0]["prompt_ids"]))


def test_text_alone_trains_a_vision_language_model(tmp_path: Path) -> None:
    """Without images the text part is all there is: the curve is that of the rows as padded text."""
    rows = [row | {"images": []} for row in tiny_image_pairs(8)]
    with_column = curve(vision_trained(tmp_path / "column", rows))
    without = curve(vision_trained(tmp_path / "none", [{k: v for k, v in r.items() if k != "images"} for r in rows]))
    assert with_column == pytest.approx(without, abs=1e-6) and with_column[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_has_the_log_probs_of_each_response_alone(family: str, tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, tiny_pairs(4), family)
    row, model = trainer.train_dataset[0], tiny_vision_model(family)
    batch = batch_of(trainer.data_collator([row]))
    with torch.no_grad():
        expected = naive_log_probs(model, row["prompt_ids"], row["chosen_ids"]).sum()
        assert batch.of_responses(score(model, batch).sums())[0].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_path_loads_the_whole_model_and_its_processor(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    trainer = vision_trained(tmp_path / "run", tiny_image_pairs(4), model=folder, processing_class=None, max_steps=1)
    assert type(trainer.model).__name__ == "LlavaForConditionalGeneration"
    assert type(trainer.processing_class).__name__ == "LlavaProcessor"
    assert trainer.args.ddp_find_unused_parameters is True


# ---- rows --------------------------------------------------------------------------------------------------------


def test_one_image_a_path_and_an_array_are_images_too(tmp_path: Path) -> None:
    (row,) = tiny_image_pairs(1)
    image = row.pop("images")[0]
    path = tmp_path / "picture.png"
    image.save(path)
    keys = {
        batch_from([row | {column: value}]).keys
        for column, value in (
            ("image", image),
            ("image", str(path)),
            ("images", [str(path)]),
            ("images", str(path)),
            ("images", [np.asarray(image)]),
        )
    }
    assert len(keys) == 1


def test_rows_that_are_too_long_with_their_images_are_dropped_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny_image_pairs(6)
    lengths = [len(row["prompt_ids"]) for row in vision_trainer(tmp_path, rows).train_dataset]
    limit = sorted(lengths)[-1]
    dropped = [index for index, length in enumerate(lengths) if length >= limit]
    trainer = vision_trainer(tmp_path, rows, max_length=limit)
    assert len(trainer.train_dataset) == len(rows) - len(dropped)
    numbers = ", ".join(map(str, dropped))
    assert (
        f"{len(dropped)}: has a prompt that fills `max_length={limit}` and leaves no room for a response" in caplog.text
    )
    assert f"(row{'s' * (len(dropped) > 1)} {numbers})" in caplog.text


def broken(**changes: Any) -> list[dict[str, Any]]:
    rows = tiny_image_pairs(3)
    rows[1] |= changes
    return rows


USER = [{"role": "user", "content": "What is it?"}]
BLOCKS = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "These?"}]}]
SYSTEM = [{"role": "system", "content": "Look."}]
SHOWN = [{"role": "assistant", "content": [{"type": "text", "text": "Here: <image>"}]}]
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a path to nothing": ({"images": ["/nowhere/picture.png"]}, "images that cannot be used"),
    "no image at all": ({"images": [3]}, "images that cannot be used"),
    "both columns": ({"image": tiny_image(1)}, "both `image` and `images`"),
    "more places than images": ({"prompt": BLOCKS}, "has 1 images but places for 2"),
    "nobody to show it to": ({"prompt": SYSTEM}, "has 1 images but places for 0"),
    "an image in a response": ({"prompt": USER, "chosen": SHOWN}, "an image in a response"),
    "no response": ({"chosen": None}, "has no `chosen`"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(name: str, tmp_path: Path) -> None:
    changes, says = BAD_ROWS[name]
    rows = broken(**changes)
    with pytest.raises(DataError, match=f"(?s)Row 1 of the train set .*{says}"):
        vision_trainer(tmp_path, stream(rows), max_steps=1).train()


def test_bad_rows_can_be_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cut.png"
    tiny_image(1).save(path)
    path.write_bytes(path.read_bytes()[:60])
    rows = [
        row | {"images": [str(path) if number == 1 else str(tmp_path / "whole.png")]}
        for number, row in enumerate(tiny_image_pairs(3))
    ]
    tiny_image(2).save(tmp_path / "whole.png")
    trainer = vision_trainer(tmp_path, rows, bad_rows="drop")
    assert len(trainer.train_dataset) == 2
    assert "1: has images that cannot be used: reading them raised OSError (row 1)" in caplog.text


@pytest.mark.parametrize("text", ["no place", "<image><image> two places"])
def test_plain_text_has_a_place_for_each_image(text: str, tmp_path: Path) -> None:
    rows = [{"images": [tiny_image(1)], "prompt": text, "chosen": " a", "rejected": " b"}]
    with pytest.raises(DataError, match="Row 0 of the train set"):
        vision_trainer(tmp_path, rows)


def test_images_are_refused_without_a_processor(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError,
        match="Row 0 of the train set is vision-related ",
    ):
        make_trainer(tmp_path, tiny_model(), tiny_image_pairs(2))
    with pytest.raises(ValueError):  # as TRL raises it
        make_trainer(tmp_path, tiny_model(), stream(tiny_image_pairs(2)), max_steps=1).train()


def test_keeping_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="keep_end"):
        vision_trainer(tmp_path, truncation_mode="keep_end", max_length=64)


def test_keeping_the_end_of_a_row_that_is_cut_is_refused_where_a_stream_names_no_columns(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, stream(tiny_image_pairs(4)), truncation_mode="keep_end", max_length=12)
    with pytest.raises(DataError, match="would cut the start of its prompt"):
        trainer.train()


def test_padding_free_is_refused_with_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="padding_free=True` with images"):
        vision_trainer(tmp_path, padding_free=True)


def test_token_ids_belong_to_their_images(tmp_path: Path) -> None:
    rows = vision_trainer(tmp_path, tiny_image_pairs(2)).train_dataset
    again = vision_trainer(tmp_path, rows)
    assert again.train_dataset[0]["prompt_ids"] == rows[0]["prompt_ids"]
    for columns, says in (
        (["prompt_ids", "chosen_ids", "rejected_ids"], "no `image` or `images`"),
        (["prompt_ids", "chosen_ids", "rejected_ids", "images"], "but no text"),
    ):
        with pytest.raises(DataError, match=says):
            vision_trainer(tmp_path, rows.select_columns(columns)).train()
    two = [row | {"images": [tiny_image(1), tiny_image(2)]} for row in rows]
    with pytest.raises(DataError, match="do not belong"):
        vision_trainer(tmp_path, two).train()


# ---- the collator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "qwen2_5_vl"])
def test_the_collator_has_trls_keys_shapes_and_values(family: str, shape: str, cuts: bool) -> None:
    rows = [row for row in tiny_image_pairs(5, shape=shape, family=family) if len(row["images"]) == 1]
    processor = tiny_processor(family)
    max_length = max(batch_from(rows, family).prompt_lengths) + 3 if cuts else None
    ours = DataCollatorForVisionPreference(processor, max_length=max_length)(rows)
    theirs = TheirCollator(processor, max_length=max_length)([dict(row) for row in rows])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_collator_given_to_the_trainer_counts(tmp_path: Path) -> None:
    rows = tiny_image_pairs(6)
    given = DataCollatorForVisionPreference(tiny_processor(), max_length=40)
    own = curve(vision_trained(tmp_path / "own", rows, max_length=40))
    assert curve(vision_trained(tmp_path / "given", rows, max_length=40, data_collator=given)) == own
    assert given is not None and isinstance(tether.DataCollatorForVisionPreference, type)


def test_the_collator_pads_to_a_multiple_and_refuses_a_full_prompt() -> None:
    rows = tiny_image_pairs(2)
    batch = DataCollatorForVisionPreference(tiny_processor(), pad_to_multiple_of=16)(rows)
    assert {batch[name].shape[1] % 16 for name in ("input_ids", "attention_mask", "completion_mask")} == {0}
    with pytest.raises(DataError, match="Row 0 of a batch has a prompt of"):
        DataCollatorForVisionPreference(tiny_processor(), max_length=10)(rows)


def test_a_collator_of_ones_own_that_returns_images_is_refused(tmp_path: Path) -> None:
    theirs = TheirCollator(tiny_processor())
    trainer = vision_trainer(tmp_path, data_collator=lambda rows: theirs(rows), remove_unused_columns=False)
    with pytest.raises(ConfigurationError, match="pixel_values"):
        trainer.train()


class WithoutFirstTokens(DataCollatorForVisionPreference):
    """Scores all but the first token of each response, and may change the images."""

    brighter = False

    def torch_call(self, examples: Any) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        mask = batch["completion_mask"]
        first = mask.cumsum(1) == 1
        if self.brighter:
            batch["pixel_values"] = batch["pixel_values"] + 1
        return batch | {"completion_mask": mask * ~first}


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}])
def test_a_collator_that_subclasses_ours_is_used(options: dict[str, Any], tmp_path: Path) -> None:
    rows = tiny_image_pairs(6)
    own = WithoutFirstTokens(tiny_processor(), max_length=40)
    trainer = vision_trainer(tmp_path, rows, data_collator=own, max_length=40, eval_dataset=as_dataset(rows), **options)
    expected = []
    for row in trainer.train_dataset:
        batch = batch_of(PairCollator(40, image_rows=ImageRows(tiny_processor()))([row]))
        expected.append(score(trainer.model, batch).split()[batch.chosen[0]][1:].sum().item())
    assert trainer.evaluate()["eval_logps/chosen"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    own.brighter = True
    with pytest.raises(ConfigurationError, match="what `data_collator` made of `pixel_values`"):
        trainer.train()


def test_a_dataset_of_images_is_not_written_again(tmp_path: Path) -> None:
    """The set's own image column stays the object on disk that it was; token ids stand beside it."""
    dataset = Dataset.from_list(tiny_image_pairs(3))
    trainer = vision_trainer(tmp_path, dataset)
    ours, theirs = (each.data.column("images").chunk(0).buffers()[1] for each in (trainer.train_dataset, dataset))
    assert ours.address == theirs.address
    assert isinstance(trainer.train_dataset[0]["images"][0], Image.Image)
    assert tiny_tokenizer().eos_token_id in trainer.train_dataset[0]["chosen_ids"]


def test_images_of_later_rows_of_a_list_are_seen_as_those_of_the_first(tmp_path: Path) -> None:
    rows = tiny_image_pairs(4)
    plain = {name: value for name, value in rows[0].items() if name not in ("image", "images")}
    trainers = [
        vision_trainer(tmp_path / str(number), as_dataset(order))
        for number, order in enumerate(([plain, *rows[1:]], [*rows[1:], plain]))
    ]
    first, last = ([trainer.train_dataset[i]["prompt_ids"] for i in range(4)] for trainer in trainers)
    assert first == [last[3], *last[:3]]
    assert [reads_images(trainers[0], index) for index in range(4)] == [False, True, True, True]


def reads_images(trainer: Any, index: int) -> bool:
    return bool(batch_of(trainer.data_collator([trainer.train_dataset[index]])).images)
