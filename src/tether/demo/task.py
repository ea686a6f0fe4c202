"""The demo's task, the rule that checks an answer, its prompts and its character tokenizer.

The task is to put the letters of a made-up word in alphabetical order: ``sort banuko = `` is answered by ``abknou``.
A rule decides whether an answer is right, so no person and no judge model labels anything. The texts the language
model learns from are only partly right, as texts are. This file knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONSONANTS = "bcdfghjklmnprstvz"
VOWELS = "aeiou"
PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"

_PREFIX = "sort "
_SUFFIX = " = "


@dataclass(frozen=True)
class PromptSplits:
    """Three disjoint lists of prompts: no word is in two of them.

    Attributes:
        pretraining: prompts whose right answers the language model is first trained on.
        preference: prompts whose sampled answers become preference pairs.
        held_out: prompts used for measuring only.
    """

    pretraining: list[str]
    preference: list[str]
    held_out: list[str]


def prompt_of(word: str) -> str:
    """The prompt that asks for the letters of ``word`` in alphabetical order."""
    return f"{_PREFIX}{word}{_SUFFIX}"


def word_of(prompt: str) -> str:
    """The word a prompt asks about; the inverse of `prompt_of`.

    Raises:
        ValueError: if ``prompt`` is not one of this task's prompts.
    """
    if not (prompt.startswith(_PREFIX) and prompt.endswith(_SUFFIX)):
        raise ValueError(
            f"The prompt {prompt!r} is not one of the demo's task, whose prompts look like "
            f"{prompt_of('banuko')!r}. Make prompts with prompt_of(word)."
        )
    return prompt[len(_PREFIX) : len(prompt) - len(_SUFFIX)]


def right_answer(prompt: str) -> str:
    """The one right answer: ``"".join(sorted(word))``."""
    return "".join(sorted(word_of(prompt)))


def is_right(prompt: str, answer: str) -> bool:
    """The rule: True if ``answer`` is exactly the right answer to ``prompt``."""
    return answer == right_answer(prompt)


# What a careless writer does with the letters instead.
MISTAKES: dict[str, Callable[[str], str]] = {
    "left as it was": lambda word: word,
    "backwards": lambda word: word[::-1],
    "from z to a": lambda word: "".join(sorted(word, reverse=True)),
}


def write_corpus(prompts: Sequence[str], *, right_share: float, seed: int) -> list[tuple[str, str]]:
    """What there is to learn from: every prompt with an answer, right only as often as ``right_share`` says.

    A language model trained on this imitates all its writers, the careless ones too. That is what preference
    training is for.

    Args:
        prompts: the prompts, each answered once.
        right_share: the probability that an answer is the right one; otherwise it is one of `MISTAKES`.
        seed: the same seed gives the same corpus.

    Returns:
        (prompt, answer), in the order of ``prompts``.
    """
    rng = random.Random(seed)
    writers = list(MISTAKES.values())
    return [
        (prompt, right_answer(prompt) if rng.random() < right_share else rng.choice(writers)(word_of(prompt)))
        for prompt in prompts
    ]


def make_splits(
    num_pretraining: int, num_preference: int, num_held_out: int, *, word_lengths: tuple[int, ...], seed: int
) -> PromptSplits:
    """Draw made-up words without repetition and share them out.

    Args:
        num_pretraining: how many prompts to pretrain on.
        num_preference: how many prompts to sample preference pairs for.
        num_held_out: how many prompts to measure on.
        word_lengths: the lengths in letters to draw from, each equally likely.
        seed: the same seed gives the same prompts.

    Returns:
        The three disjoint lists.
    """
    words = _distinct_words(num_pretraining + num_preference + num_held_out, word_lengths, random.Random(seed))
    prompts = [prompt_of(word) for word in words]
    # Held-out first, so that the measuring set does not move when the training sets change size.
    held_out, rest = prompts[:num_held_out], prompts[num_held_out:]
    return PromptSplits(pretraining=rest[num_preference:], preference=rest[:num_preference], held_out=held_out)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters whose vocabulary is learned from ``texts``.

    One character is one token, so the tokens of a prompt are always a prefix of the tokens of prompt + answer.
    """
    tokenizer = Tokenizer(models.WordLevel({}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=[PAD_TOKEN, EOS_TOKEN], show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, padding_side="left"
    )


def _distinct_words(num_words: int, lengths: tuple[int, ...], rng: random.Random) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < num_words:
        words[_word(rng.choice(lengths), rng)] = None
    return list(words)


def _word(length: int, rng: random.Random) -> str:
    """Consonants and vowels in turn, so that the words can be read aloud."""
    start = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (start + i) % 2 else CONSONANTS) for i in range(length))
