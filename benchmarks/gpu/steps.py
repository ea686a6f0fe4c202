"""Training steps and scoring passes of Llamas with random weights: Tether and TRL in turns on the same rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import bench_precompute
import harness
import sides
import torch
from stage import Rows, Stage
from transformers import BitsAndBytesConfig, LlamaForCausalLM

NAMES = ("trl", "tether")  # with the order turning: B T T B


class Setup(NamedTuple):
    """What is trained: a size of `harness.llama`, whole or an adapter on it, with each of these references."""

    size: str
    references: tuple[str, ...]
    adapter: bool = False
    quantized: bool = False


SETUPS = {
    "step-8b": Setup("8b", ("implicit", "precomputed"), adapter=True),
    "qlora-8b": Setup("8b", ("implicit", "precomputed"), adapter=True, quantized=True),
    "step-1b": Setup("1b", ("explicit", "precomputed", "synchronized")),
}
WEIGHED = (SETUPS["step-1b"], Setup("1b", ("implicit", "precomputed"), adapter=True))


def steps(stage: Stage) -> None:
    """Steps on batches that are seen once, so that their lengths are new."""
    setup = SETUPS[stage.name]
    config = _config(stage, setup)
    if setup.quantized and find_spec("bitsandbytes") is None:
        stage.left_out["everything"] = "bitsandbytes is not installed"
        stage.write()
        return
    shapes = dict(stage.each_shape(4 if stage.toy else 8, config.vocab_size))
    peak = harness.matmul_flops_per_second(stage.device, stage.dtype)
    for reference in setup.references:
        rows = [row for batches in shapes.values() for batch in batches for row in batch]
        contenders = Contenders.of(stage, setup, reference, rows)
        for shape, batches in shapes.items():
            what = f"{reference}, {shape}"
            stage.measure(what, partial(_steps, stage, setup, reference, shape, batches, contenders, peak))
        del contenders
    if setup.quantized:
        rows = [row for batches in shapes.values() for row in batches[0]]
        stage.measure("gap and drift", partial(_gap_and_drift, stage, setup, rows))


def memory(stage: Stage) -> None:
    """Peak of a step with each kind of reference, one side at a time."""
    for setup in WEIGHED:
        rows = dict(stage.each_shape(1, _config(stage, setup).vocab_size))["instructions"][0]
        for reference in setup.references:
            for name in NAMES:
                what = f"{name}, {reference}, {'LoRA' if setup.adapter else 'full'}"
                stage.measure(what, partial(_memory, stage, setup, reference, name, rows))


def precompute(stage: Stage) -> None:
    """The pass that scores a data set under an explicit reference."""
    setup = SETUPS["step-1b"]
    shapes = dict(stage.each_shape(3 if stage.toy else 9, _config(stage, setup).vocab_size))
    contenders = Contenders.of(stage, setup, "explicit", shapes["chat"][0])
    for shape, batches in shapes.items():
        run = partial(bench_precompute.measured, shape, batches, contenders.sides, stage.device, repeats=1)
        stage.measure(shape, run)


@dataclass
class Contenders:
    """The sides that could be made, after a first step; bytes that each of them holds, and what building it took.

    Building makes the model and the trainer; Tether's scores the rows in it if its reference is precomputed.
    """

    sides: dict[str, sides.Side] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    build_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, stage: Stage, setup: Setup, reference: str, rows: Rows, names: Iterable[str] = NAMES) -> Contenders:
        """`rows` are those that a precomputed reference answers; the longest of them is the first step."""
        made, first = cls(), harness.longest_pair(rows)
        stage.let_go()  # or what is freed while they are made would be taken off what they hold
        for name in names:
            before, begun = _allocated(stage.device), time.perf_counter()
            side = stage.attempt(f"{name}, {reference}", partial(_side, stage, setup, reference, name, rows))
            seconds = time.perf_counter() - begun
            # The optimizer's state comes with the first step.
            if side and stage.attempt(f"{name}, {reference}, a step", partial(side.step, first)) is not None:
                made.sides[name], made.build_seconds[name] = side, seconds
                made.held[name] = _allocated(stage.device) - before
        return made

    def peak_bytes(self, stage: Stage, what: str, rows: Rows) -> dict[str, int]:
        """Of a step of each side that can make it, without what the others hold meanwhile."""
        found = {}
        for name, side in self.sides.items():
            step = partial(side.step, rows)
            peak = stage.attempt(f"{name}, {what}", partial(harness.device_peak_bytes, step, stage.device))
            if peak is not None:
                found[name] = peak - sum(held for other, held in self.held.items() if other != name)
        return found


def _side(stage: Stage, setup: Setup, reference: str, name: str, rows: Rows, **options: Any) -> sides.Side:
    return sides.make_side(
        name,
        reference,
        _model(stage, setup),
        harness.word_tokenizer(_config(stage, setup).vocab_size),
        stage.device,
        batch_size=8,
        rows=rows,
        adapter=setup.adapter,
        gradient_checkpointing=setup.size == "8b",
        **options,
    )


def _steps(
    stage: Stage, setup: Setup, reference: str, shape: str, batches: list[Rows], contenders: Contenders, peak: float
) -> dict[str, Any]:
    (warm_up, counted, *measured), device = batches, stage.device
    peaks = contenders.peak_bytes(stage, f"{reference}, {shape}", warm_up)
    steps = {name: contenders.sides[name].step for name in peaks}
    syncs = {name: harness.host_syncs(partial(step, counted), device) for name, step in steps.items()}
    runs = {name: lambda item, step=step: step(measured[item]) for name, step in steps.items()}
    seconds = harness.in_turns(runs, len(measured), device)
    weightless = harness.random_model(_config(stage, setup), "meta", stage.dtype)
    return {
        "shape": shape,
        "reference": reference,
        "trains": "an adapter" if setup.adapter else "everything",
        "pairs": len(warm_up),
        "tokens": [harness.num_tokens(rows) for rows in measured],
        "rows_sha256": hashlib.sha256(json.dumps(measured).encode()).hexdigest(),
        "build_seconds": contenders.build_seconds,
        "seconds": seconds,
        **harness.compared(seconds),
        **harness.rates(measured, seconds),
        "matmul_gflops_per_second": peak / 1e9,
        "share_of_matmul_peak": harness.share_of_peak(
            weightless, measured, reference, seconds["tether"], peak, adapter=setup.adapter
        ),
        **({"peak_bytes": peaks, "host_syncs": syncs} if device == "cuda" else {}),
    }


def _memory(stage: Stage, setup: Setup, reference: str, name: str, rows: Rows) -> dict[str, Any]:
    contenders = Contenders.of(stage, setup, reference, rows, [name])
    return {
        "side": name,
        "reference": reference,
        "trains": "an adapter" if setup.adapter else "everything",
        "pairs": len(rows),
        "tokens": harness.num_tokens(rows),
        "held_bytes": contenders.held[name],
        "step_peak_bytes": contenders.peak_bytes(stage, f"{reference}, a batch", rows)[name],
    }


def _gap_and_drift(stage: Stage, setup: Setup, rows: Rows) -> dict[str, Any]:
    """What a short run logs of its reference, and how far the reference's answers are from those before it."""
    side: Any = _side(stage, setup, "implicit", "tether", rows, max_steps=4, learning_rate=1e-3, save_strategy="no")
    trainer = side.trainer
    batch = trainer._prepare_inputs(trainer.data_collator(rows))["batch"]
    before = trainer.reference.log_probs(batch).values
    trainer.train()
    drift = (trainer.reference.log_probs(batch).values - before).abs()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    return {
        **{name: value for name, value in logged.items() if name.startswith("reference/")},
        "mean_drift": float(drift.mean()),
        "largest_drift": float(drift.max()),
        "margin": logged["rewards/margins"],
    }


def _model(stage: Stage, setup: Setup) -> Any:
    config = _config(stage, setup)
    model = harness.random_model(config, stage.device, stage.dtype)
    if not setup.quantized:
        return model
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=stage.dtype)
    return LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=model.state_dict(),
        quantization_config=four_bits,
        dtype=stage.dtype,
        device_map={"": 0 if stage.device == "cuda" else "cpu"},  # a number, or accelerate takes it for another device
    )


def _config(stage: Stage, setup: Setup) -> Any:
    return harness.llama("toy" if stage.toy else setup.size)


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0
