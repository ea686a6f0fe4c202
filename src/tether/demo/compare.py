"""Runs DPO on the same pairs with each of the four references, and measures the results.

This is the part of the demo that a user would write: a `DPOConfig` and a `DPOTrainer`. Knows prompts, pairs and a
rule, but not which task they belong to, nor how results are shown.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from tether.config.dpo_config import DPOConfig
from tether.demo.result import Measurement, Outcome, Strategy
from tether.demo.sample import Rule, accuracy, likeliest_answers, sample_answers, sequence_kl
from tether.demo.settings import DemoSettings
from tether.models.preparing import lora_config
from tether.trainer.dpo_trainer import DPOTrainer

Row = dict[str, str]


@dataclass(frozen=True)
class Bench:
    """What all strategies share: the initial model, the pairs, and the measurement.

    Attributes:
        model: The initial policy; never trained itself.
        tokenizer: Its tokenizer.
        train_pairs: Rows of `prompt`, `chosen`, `rejected`.
        held_out_pairs: The same, of held-out prompts.
        held_out_prompts: Prompts for measuring.
        rule: Whether an answer is right.
        settings: The numbers.
        seed: Random seed.
        output_dir: Folder of the store.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    train_pairs: list[Row]
    held_out_pairs: list[Row]
    held_out_prompts: list[str]
    rule: Rule
    settings: DemoSettings
    seed: int
    output_dir: Path

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one strategy: every pair once."""
        return -(-len(self.train_pairs) // self.settings.batch_size)


def four_strategies(settings: DemoSettings, store: Path) -> list[Strategy]:
    """The four references by the flags that choose them."""
    return [
        Strategy("explicit", "a frozen copy of the policy"),
        Strategy(
            "implicit",
            "the policy's own base, LoRA adapter off",
            {"learning_rate": settings.lora_learning_rate},
            adapter=True,
        ),
        Strategy(
            "precomputed",
            "log-probs on disk, made before training",
            {"precompute_ref_log_probs": True, "ref_store": str(store)},
        ),
        Strategy(
            "synchronized",
            "a copy that follows the policy (TR-DPO)",
            {
                "sync_ref_model": True,
                "ref_model_mixup_alpha": settings.sync_alpha,
                "ref_model_sync_steps": settings.sync_steps,
            },
        ),
    ]


def measure(bench: Bench, model: Any) -> Measurement:
    """Samples a model's answers to the held-out prompts, always with the same random numbers."""
    prompts, room = bench.held_out_prompts, bench.settings.max_new_tokens
    answers = sample_answers(
        model,
        bench.tokenizer,
        prompts,
        num_samples=bench.settings.held_out_samples,
        max_new_tokens=room,
        seed=bench.seed + 1,
    )
    likeliest = likeliest_answers(model, bench.tokenizer, prompts, max_new_tokens=room)
    return Measurement(
        answers, accuracy(prompts, answers, bench.rule), likeliest, accuracy(prompts, likeliest, bench.rule)
    )


def train_with(bench: Bench, strategy: Strategy, on_step: Callable[[], None] = lambda: None) -> Outcome:
    """Trains a copy of the initial policy with one reference, and measures it."""
    start = time.perf_counter()
    trainer = make_trainer(bench, strategy, [_EachStep(on_step)])
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    after = measure(bench, trainer.model)
    return Outcome(
        strategy,
        extra_bytes=trainer.reference.extra_bytes,
        num_passes=trainer.reference.num_passes,
        seconds=seconds,
        reward_accuracy=metrics["eval_rewards/accuracies"],
        after=after,
        kl=sequence_kl(trainer.model, bench.model, bench.tokenizer, bench.held_out_prompts, after.samples),
        log_history=trainer.state.log_history,
    )


def make_trainer(bench: Bench, strategy: Strategy, callbacks: Sequence[TrainerCallback] = ()) -> DPOTrainer:
    """The trainer of one strategy: a copy of the initial policy, and the common options with the strategy's own."""
    settings = bench.settings
    options: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "beta": settings.beta,
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "warmup_steps": settings.warmup_steps,
        "logging_steps": max(1, bench.num_steps // 25),
        "logging_first_step": True,
        "seed": bench.seed,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    # The adapter's random start is drawn before the trainer sets its seed.
    torch.manual_seed(bench.seed)
    trainer = DPOTrainer(
        copy.deepcopy(bench.model),
        args=DPOConfig(str(bench.output_dir), **(options | strategy.options)),
        train_dataset=bench.train_pairs,
        eval_dataset=bench.held_out_pairs,
        processing_class=bench.tokenizer,
        peft_config=lora_config(settings.lora_rank, target_modules=["all-linear"]) if strategy.adapter else None,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _EachStep(TrainerCallback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step()
