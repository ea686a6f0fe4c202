"""The demo's results, as plain values."""

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
        about: Where the reference's log-probs come from, in a few words.
        options: Its options besides the common ones.
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
    """The result of training with one reference.

    Attributes:
        strategy: The strategy.
        extra_bytes: Size of the weights that the reference held beside the policy's own while training.
        num_passes: The reference's forward passes, in training and evaluation together.
        seconds: From building the trainer to the end of training.
        reward_accuracy: Share of the held-out pairs whose chosen answer has the higher reward.
        after: The trained policy's answers.
        kl: KL divergence from the initial policy, in nats.
        log_history: The trainer's log.
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
        held_out_prompts: The prompts used for measuring.
        num_pairs: Preference pairs trained on.
        num_parameters: Of the language model.
        before: The initial policy.
        outcomes: One per reference, in the order of the table.
        num_passes_again: Reference passes of a second trainer that found the first one's store.
        seconds: Duration of the whole demo.
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
