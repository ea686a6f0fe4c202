"""Samples answers from a model, makes preference pairs of them, and measures a model by its answers.

Knows prompts, answers and a rule that judges them; not which task it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tether.scoring import score
from tether.types import PairBatch

Rule = Callable[[str, str], bool]
"""``rule(prompt, answer)``: is the answer right?"""


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its standard error, in the unit of the samples."""

    mean: float
    standard_error: float


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 512,
) -> list[list[str]]:
    """Sample answers at temperature 1 from the whole distribution.

    Args:
        model: the model, put in eval mode.
        tokenizer: its tokenizer, padding on the left.
        prompts: what to answer.
        num_samples: answers per prompt.
        max_new_tokens: an answer that has not ended by then is cut.
        seed: the same seed, model and prompts give the same answers; the global random state is left as it was.
        batch_size: answers sampled at once.

    Returns:
        ``num_samples`` answers for each prompt, in the order of the prompts.
    """
    model.eval()
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    answers: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(repeated), batch_size):
            inputs = tokenizer(repeated[start : start + batch_size], padding=True, return_tensors="pt")
            output = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
            )
            responses = output[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]


def preference_pairs(
    prompts: Sequence[str], answers: Sequence[Sequence[str]], rule: Rule, *, max_pairs_per_prompt: int
) -> list[dict[str, str]]:
    """Pairs of a right and a wrong answer that the same model gave to the same prompt.

    A prompt whose answers are all right or all wrong gives no pair. Empty answers are left out.

    Returns:
        Rows of ``prompt``, ``chosen``, ``rejected``; no row twice.
    """
    rows = []
    for prompt, given in zip(prompts, answers, strict=True):
        distinct = [answer for answer in dict.fromkeys(given) if answer]
        right = [answer for answer in distinct if rule(prompt, answer)]
        wrong = [answer for answer in distinct if not rule(prompt, answer)]
        combinations = [(chosen, rejected) for chosen in right for rejected in wrong]
        rows += [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in combinations[:max_pairs_per_prompt]
        ]
    return rows


def accuracy(prompts: Sequence[str], answers: Sequence[Sequence[str]], rule: Rule) -> float:
    """The share of all answers that the rule calls right, between 0 and 1."""
    verdicts = [rule(prompt, answer) for prompt, given in zip(prompts, answers, strict=True) for answer in given]
    return sum(verdicts) / len(verdicts)


@torch.no_grad()
def sequence_kl(
    policy: nn.Module,
    initial: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
) -> Estimate:
    """How far the policy has moved: ``KL(policy || initial)`` over whole answers, in nats.

    Estimated from the policy's own ``answers`` ``y`` to prompts ``x``::

        mean over samples of  log policy(y | x) - log initial(y | x)

    Args:
        policy: the trained model the answers were sampled from.
        initial: the model it started from.
        tokenizer: the tokenizer of both.
        prompts: the prompts.
        answers: the policy's samples, each taken to have ended by itself.
        batch_size: answers scored at once.
    """
    policy.eval(), initial.eval()
    flat = [(prompt, answer) for prompt, given in zip(prompts, answers, strict=True) for answer in given]
    differences = []
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size]
        prompt_ids = tokenizer([prompt for prompt, _ in part])["input_ids"]
        answer_ids = tokenizer([answer + str(tokenizer.eos_token) for _, answer in part])["input_ids"]
        batch = PairBatch.from_token_lists(prompt_ids, answer_ids, answer_ids)
        gap = score(policy, batch).sums() - score(initial, batch).sums()
        differences.append(batch.of_responses(gap)[0])
    return _estimate(torch.cat(differences))


def _estimate(samples: torch.Tensor) -> Estimate:
    return Estimate(samples.mean().item(), samples.std().item() / sqrt(len(samples)))
