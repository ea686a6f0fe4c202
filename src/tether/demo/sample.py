"""Samples answers from a model, makes preference pairs of them, and measures a model by its answers.

Knows prompts, answers and a rule that judges them, but not the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tether.scoring import score
from tether.types import PairBatch, Response

Rule: TypeAlias = Callable[[str, str], bool]  # rule(prompt, answer): is the answer right?
Answers: TypeAlias = Sequence[Sequence[str]]  # for each prompt, its answers


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its standard error, both in the unit of the samples."""

    mean: float
    standard_error: float


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 512,
    on_batch: Callable[[int], None] = lambda num_answers: None,
) -> list[list[str]]:
    """Answers drawn from the model's own distribution (temperature 1, nothing cut off).

    Args:
        model: A causal language model, plain or with an adapter; left in evaluation mode.
        tokenizer: Its tokenizer, which pads on the left.
        prompts: The prompts to answer.
        num_samples: Answers per prompt.
        max_new_tokens: Longer answers are cut.
        seed: The same seed, model and prompts give the same answers; the global random state is left alone.
        batch_size: Answers sampled at once.
        on_batch: Called with the number of answers after every batch, for progress.

    Returns:
        `num_samples` answers to each prompt, in the order of the prompts.
    """
    model.eval()
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    answers: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(repeated), batch_size):
            part = repeated[start : start + batch_size]
            answers += _generate(model, tokenizer, part, max_new_tokens, do_sample=True, top_k=0, top_p=1.0)
            on_batch(len(part))
    return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]


@torch.no_grad()
def likeliest_answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, max_new_tokens: int
) -> list[list[str]]:
    """The greedy answer to each prompt: the likeliest token at every position."""
    model.eval()
    return [[answer] for answer in _generate(model, tokenizer, prompts, max_new_tokens, do_sample=False)]


def preference_pairs(prompts: Sequence[str], answers: Answers, rule: Rule) -> list[dict[str, str]]:
    """Pairs of a right and a wrong answer of the same model to the same prompt, one per prompt.

    Of several wrong answers the most frequent is rejected: it shows a habit, while a rare one is mostly a slip that
    teaches little. A prompt whose answers are all right or all wrong gives no pair; empty answers do not count.

    Returns:
        Rows of `prompt`, `chosen`, `rejected`, in the order of the prompts.
    """
    rows = []
    for prompt, given in zip(prompts, answers, strict=True):
        by_frequency = [answer for answer, _ in Counter(given).most_common() if answer]
        right = [answer for answer in by_frequency if rule(prompt, answer)]
        wrong = [answer for answer in by_frequency if not rule(prompt, answer)]
        if right and wrong:
            rows.append({"prompt": prompt, "chosen": right[0], "rejected": wrong[0]})
    return rows


def accuracy(prompts: Sequence[str], answers: Answers, rule: Rule) -> float:
    """The share of all answers that are right by the rule, in [0, 1]."""
    verdicts = [rule(prompt, answer) for prompt, answer in _flat(prompts, answers)]
    return sum(verdicts) / len(verdicts)


@torch.no_grad()
def sequence_kl(
    policy: nn.Module,
    initial: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    answers: Answers,
    *,
    batch_size: int = 256,
) -> Estimate:
    """How far the policy has moved: `KL(policy || initial)` over whole answers, in nats.

    Estimated from the policy's own samples `y` to prompts `x`::

        mean over samples of  log policy(y | x) - log initial(y | x)

    Args:
        policy: The trained model, which gave `answers`; left in evaluation mode.
        initial: The model it started from; left in evaluation mode.
        tokenizer: The tokenizer of both.
        prompts: The prompts.
        answers: The policy's samples, each assumed complete.
        batch_size: Answers scored at once.
    """
    policy.eval()
    initial.eval()
    flat = _flat(prompts, answers)
    log_ratios = []
    for start in range(0, len(flat), batch_size):
        batch = _answer_batch(tokenizer, flat[start : start + batch_size])
        log_ratio = score(policy, batch).sums() - score(initial, batch).sums()
        log_ratios.append(batch.of_responses(log_ratio)[0])
    return _estimate(torch.cat(log_ratios))


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_new_tokens: int, **options: Any
) -> list[str]:
    inputs: Any = tokenizer(list(prompts), padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    answers: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _flat(prompts: Sequence[str], answers: Answers) -> list[tuple[str, str]]:
    return [(prompt, answer) for prompt, given in zip(prompts, answers, strict=True) for answer in given]


def _answer_batch(tokenizer: PreTrainedTokenizerFast, flat: Sequence[tuple[str, str]]) -> PairBatch:
    """Each answer as a pair with itself, since the scoring engine takes pairs."""
    prompt_ids = tokenizer([prompt for prompt, _ in flat])["input_ids"]
    answer_ids = tokenizer([answer + str(tokenizer.eos_token) for _, answer in flat])["input_ids"]
    responses = [Response(tuple(p), tuple(a)) for p, a in zip(prompt_ids, answer_ids, strict=True)]
    return PairBatch.of_pairs([(response, response) for response in responses])


def _estimate(samples: Tensor) -> Estimate:
    return Estimate(samples.mean().item(), samples.std().item() / sqrt(len(samples)))
