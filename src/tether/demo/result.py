"""What the demo measures: values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tether.demo.sample import Estimate


@dataclass(frozen=True)
class Strategy:
    """One of the four ways to have a reference, as options of `DPOConfig`.

    Attributes:
        name: Its name.
        about: Where the reference's answers come from, in a few words.
        options: What it adds to the common options.
        adapter: Whether a LoRA adapter is trained instead of all weights.
    """

    name: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    adapter: bool = False


@dataclass(frozen=True)
class Measurement:
    """A model's answers to the held-out prompts.

    Attributes:
        samples: Answers to each prompt, sampled at temperature 1.
        sampled_accuracy: Share of the samples that are right.
        likeliest: The greedy answer to each prompt.
        greedy_accuracy: Share of the greedy answers that are right.
    """

    samples: list[list[str]]
    sampled_accuracy: float
    likeliest: list[list[str]]
    greedy_accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What came of training with one reference.

    Attributes:
        strategy: Which.
        extra_bytes: Bytes of weights the reference held beyond the policy's own while training.
        num_passes: Batches a model was run for on the reference's behalf, training and evaluation together.
        seconds: From building the trainer to the end of training.
        reward_accuracy: Share of the held-out pairs whose chosen answer has the higher reward.
        after: The trained policy's answers.
        kl: How far it has moved from the initial policy, in nats.
        log_history: What the trainer logged.
    """

    strategy: Strategy
    extra_bytes: int
    num_passes: int
    seconds: float
    reward_accuracy: float
    after: Measurement
    kl: Estimate
    log_history: list[dict[str, Any]]


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` measured.

    Attributes:
        held_out_prompts: The prompts that were measured on.
        num_pairs: Preference pairs trained on.
        num_parameters: Of the language model.
        before: The initial policy.
        outcomes: One for each reference, in the order of the table.
        num_passes_again: Reference passes of a second trainer that found the first one's store.
        seconds: The whole demo.
        report: The written HTML page.
    """

    held_out_prompts: list[str]
    num_pairs: int
    num_parameters: int
    before: Measurement
    outcomes: list[Outcome]
    num_passes_again: int
    seconds: float
    report: Path
