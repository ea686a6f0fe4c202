"""The script of the demo: a good run, one that went too far, and the same start with each of the other references."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from tether.config.dpo_config import DPOConfig
from tether.demo.models import TINY, EachStep, find_model, save_model
from tether.demo.show import COMPARED_AT, Narrator, Result, Run, print_result, write_page
from tether.errors import ConfigurationError
from tether.trainer.dpo_trainer import DPOTrainer

GOOD: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 5.0]}
TOO_FAR: dict[str, Any] = {"loss_type": "sigmoid"}
NUM_PAIRS, NUM_QUESTIONS, COMPARED_STEPS = 64, 12, COMPARED_AT[-1]
NUM_STEPS, TINY_STEPS = 24, 300


def run_demo(output_dir: str | Path, *, model: str | None = None, seed: int = 0, quick: bool = False) -> Result:
    """Trains a small chat model to answer in one sentence, well and too far, and compares the four references.

    Args:
        output_dir: Folder for the models, the store and `report.html`; created if necessary.
        model: A folder or a name on the hub, or `tiny`; by default a real one if there is one at hand.
        seed: Random seed.
        quick: The tiny model and few steps: a smoke test whose results mean nothing.

    Returns:
        What was measured; printed and drawn as well.

    Raises:
        ConfigurationError: If `output_dir` is a file.
    """
    folder, started = _made_folder(Path(output_dir)), time.perf_counter()
    narrator = Narrator()
    name, about = find_model(TINY if quick and model is None else model)
    train_pairs, held_out = _pairs("train"), _pairs("held_out")[:NUM_QUESTIONS]
    with _quiet_libraries():
        narrator.print(f"{about}, learns from {NUM_PAIRS} pairs of its own answers to answer in one sentence.")
        narrator.print("About 4 minutes on two cores.\n")
        num_tiny = TINY_STEPS // 10 if quick else TINY_STEPS
        with narrator.step("the model", num_tiny if name == TINY else 1) as on_step:
            policy = save_model(name, folder / "model", train_pairs, num_tiny, on_step)
        bench = Bench(policy, folder, train_pairs[:NUM_PAIRS], held_out, seed, narrator)
        num_steps = COMPARED_STEPS if quick else NUM_STEPS
        good = bench.train("good", "implicit", num_steps, GOOD, shows=True)
        too_far = bench.train("too far", "implicit", num_steps, TOO_FAR, shows=True)
        others = [bench.train(kind, kind, COMPARED_STEPS, GOOD | OPTIONS[kind]) for kind in OPTIONS]
        again = bench.train("again", "precomputed", 1, GOOD | OPTIONS["precomputed"])
    questions = [row["prompt"][0]["content"] for row in held_out]
    seconds = time.perf_counter() - started
    result = Result(folder, about, policy, NUM_PAIRS, questions, good, too_far, others, again, seconds)
    write_page(result)
    print_result(narrator, result)
    return result


OPTIONS: dict[str, dict[str, Any]] = {
    "explicit": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": COMPARED_STEPS // 2},
}


@dataclass(frozen=True)
class Bench:
    """What the runs share.

    Attributes:
        policy: Path or name of the initial policy.
        folder: Where the runs write.
        train_pairs: Rows of `prompt`, `chosen`, `rejected`, as lists of messages.
        held_out: The same, for evaluation; their questions are answered.
        seed: Random seed.
        narrator: Says what happens.
    """

    policy: str
    folder: Path
    train_pairs: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    seed: int
    narrator: Narrator

    def train(self, name: str, kind: str, num_steps: int, options: dict[str, Any], shows: bool = False) -> Run:
        """One run: a LoRA adapter on the initial policy; `shows` answers the held-out questions before and after."""
        output_dir = self.folder / name.replace(" ", "-")
        report: dict[str, Any] = {"eval_on_start": True, "report_samples": NUM_QUESTIONS} if shows else {}
        args = DPOConfig(
            str(output_dir),
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            beta=0.1,
            max_steps=num_steps,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
            ref_store=str(self.folder / "reference-log-probs.sqlite"),
            **report,
            **options,
        )
        meter = Meter()
        with self.narrator.step(f"{title}", num_steps) as on_step:
            trainer = DPOTrainer(
                self.policy,
                ref_model=self.policy if kind == "explicit" else None,
                args=args,
                train_dataset=self.train_pairs,
                eval_dataset=self.held_out if shows else None,
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
                callbacks=[EachStep(on_step)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            if shows:
                trainer.evaluate()
                trainer.save_model()
        return Run(name, trainer.reference.kind.name, trainer.state.log_history, _samples(output_dir),
                   trainer.reference.extra_bytes, trainer.reference.num_passes)


def _pairs(name: str) -> list[dict[str, Any]]:
    text = files("tether.demo").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _samples(folder: Path) -> list[dict[str, Any]]:
    path = folder / "samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _made_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(
            problem=f"Cannot use `output_dir={str(folder)!r}`: it is a file.",
            instead="Name a folder, existing or new.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("reference-log-probs.sqlite*"):  # so that only this demo's passes are counted
        file.unlink()
    return folder


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hides progress bars between ours, and warnings that users cannot act on."""
    were_shown, of_transformers = datasets.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT (0.21) asks transformers by an old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
        if of_transformers:
            transformers_logging.enable_progress_bar()
