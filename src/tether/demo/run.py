"""The script of the demo: a good run, one that went too far, and the good one's first steps with other references."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from tether.config.dpo_config import DPOConfig
from tether.demo.models import HUB, PACKAGE, TINY, find_model, save_model
from tether.demo.show import MOVES_AFTER, STEPS, Narrator, Result, Run, print_result, quiet_libraries, write_page
from tether.errors import ConfigurationError
from tether.models.preparing import lora_config
from tether.reference import PrecomputedReference
from tether.trainer.dpo_trainer import DPOTrainer

NUM_PAIRS, NUM_QUESTIONS, LONGEST = 48, 12, 48
NUM_STEPS, TINY_STEPS = 24, 300

_LASTS = dict.fromkeys((PACKAGE, HUB), " About 4 minutes on two cores.") | {TINY: " About a minute."}

SAFE: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 5.0]}
BARE: dict[str, Any] = {"loss_type": "sigmoid"}
ASKS: dict[str, Any] = {"report_samples": NUM_QUESTIONS, "report_samples_max_new_tokens": LONGEST}


def run_demo(output_dir: str | Path, *, model: str | None = None, seed: int = 0, quick: bool = False) -> Result:
    """Trains a small chat model to answer in one sentence, well and too far, and compares the four references.

    Args:
        output_dir: Folder for the models, the store and `report.html`; created if necessary.
        model: A folder or a name on the hub, or `tiny`; by default a real one if there is one at hand.
        seed: Random seed.
        quick: Few steps, of the tiny model unless another is named: a smoke test whose results mean nothing.

    Returns:
        What was measured; printed and drawn as well.

    Raises:
        ConfigurationError: There is no such model, or `output_dir` is no folder that can be written.
    """
    started, narrator = time.perf_counter(), Narrator()
    train_pairs, held_out = _pairs("train"), _pairs("held_out")[:NUM_QUESTIONS]
    with quiet_libraries():
        name, about = find_model(TINY if quick and model is None else model)
        folder = _made_folder(Path(output_dir))
        narrator.say(f"Model: {about}.")
        narrator.say(
            f"It learns to answer in one sentence, from {NUM_PAIRS} pairs: the first sentence of an answer is "
            f"preferred to all of it.{'' if quick else _LASTS.get(name, '')}\n"
        )
        steps, tiny_steps = (STEPS[-1], TINY_STEPS // 10) if quick else (NUM_STEPS, TINY_STEPS)
        title = f"Train the tiny model: {tiny_steps} steps" if name == TINY else "Get the model"
        with narrator.part(title, tiny_steps if name == TINY else 1) as advance:
            policy = save_model(name, folder / "model", train_pairs, tiny_steps, EachStep(advance))
        bench = Bench(policy, folder, train_pairs[:NUM_PAIRS], held_out, seed, narrator)
        good = bench.train("good", "implicit", SAFE | ASKS | {"eval_on_start": True}, steps)
        too_far = bench.train("too far", "implicit", BARE | ASKS, steps)
        references = _references(folder)
        others = [bench.train("good", kind, SAFE | references[kind], steps, stop_at=STEPS[-1]) for kind in references]
        again = bench.train("good", "precomputed", SAFE | references["precomputed"], steps, stop_at=1)
    questions = [row["prompt"][0]["content"] for row in held_out]
    seconds = time.perf_counter() - started
    result = Result(folder, about, policy, questions, good, too_far, others, again, seconds)
    write_page(result)
    print_result(narrator, result)
    return result


@dataclass(frozen=True)
class Bench:
    """What the runs share: the initial policy, rows of messages to train on and to hold out, and the rest."""

    policy: str
    folder: Path
    train_pairs: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    seed: int
    narrator: Narrator

    def train(self, name: str, kind: str, options: dict[str, Any], num_steps: int, stop_at: int | None = None) -> Run:
        """One run of a LoRA adapter. A whole one answers the held-out questions at its end; others stop early."""
        is_whole = stop_at is None
        output_dir = self.folder / name.replace(" ", "-") if is_whole else self.folder / "first-steps"
        args = DPOConfig(
            str(output_dir),
            beta=0.1,
            learning_rate=2.5e-4,
            max_steps=num_steps,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
            **options,
        )
        with self.narrator.part(_title(name, kind, args, stop_at), stop_at or num_steps, "answers") as advance:
            trainer = DPOTrainer(
                self.policy,
                ref_model=self.policy if kind == "explicit" else None,
                args=args,
                train_dataset=self.train_pairs,
                eval_dataset=self.held_out if is_whole else None,
                peft_config=lora_config(16, target_modules=["all-linear"]),
            )
            reference, each = trainer.reference, EachStep(advance, lambda: trainer.reference.num_passes, stop_at)
            trainer.add_callback(each)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            if is_whole:
                trainer.evaluate()
                trainer.save_model()
        stored = reference if isinstance(reference, PrecomputedReference) else None
        return Run(
            kind,
            trainer.state.log_history,
            _rows((output_dir / "samples.jsonl").read_text(encoding="utf-8")) if is_whole else [],
            reference.extra_bytes,
            each.passes[: STEPS[-1]][-1],
            stored.num_found if stored else 0,
            stored.num_computed if stored else 0,
            median(each.seconds),
        )


class EachStep(TrainerCallback):
    """Calls a function after each optimizer step, and may stop early; keeps durations, and passes since the first."""

    def __init__(
        self, advance: Callable[[], None], num_passes: Callable[[], int] = lambda: 0, stop_at: int | None = None
    ) -> None:
        self._advance, self._num_passes, self._stop_at = advance, num_passes, stop_at
        self._begun, self._before = 0.0, 0
        self.seconds, self.passes = list[float](), list[int]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()
        self._before = self._before if self.seconds else self._num_passes()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)
        self.passes.append(self._num_passes() - self._before)
        self._advance()
        control.should_training_stop |= state.global_step == self._stop_at


def _references(folder: Path) -> dict[str, dict[str, Any]]:
    """The options of each reference beside the implicit one, which needs none."""
    store = folder / "reference-log-probs.sqlite"
    return {
        "explicit": {},
        "precomputed": {"precompute_ref_log_probs": True, "ref_store": str(store)},
        "synchronized": {"sync_ref_model": True, "ref_model_sync_steps": MOVES_AFTER},
    }


def _title(name: str, kind: str, args: DPOConfig, stop_at: int | None) -> str:
    if stop_at is not None:
        return f"Repeat the good run's first {stop_at} step{'s'[: stop_at - 1]}: {kind} reference"
    weights = args.loss_weights or [1.0]
    loss = " + ".join(
        f"{weight:g} {loss}".removeprefix("1 ") for weight, loss in zip(weights, args.loss_type, strict=True)
    )
    return f"Train, {name}: {args.max_steps} steps, {kind} reference, loss {loss}"


def _pairs(name: str) -> list[dict[str, Any]]:
    return _rows(files("tether.demo").joinpath(f"{name}.jsonl").read_text(encoding="utf-8"))


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _made_folder(folder: Path) -> Path:
    """The folder, without the report and the store of an earlier demo, so that what is there is of this one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (folder / "report.html", *folder.glob("reference-log-probs.sqlite*")):
            file.unlink(missing_ok=True)
        (folder / "model").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            problem=f"Cannot use `output_dir={str(folder)!r}`: it is no folder that can be written ({error.strerror}).",
            instead="Name another one, existing or new.",
        ) from error
    return folder
