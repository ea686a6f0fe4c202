"""The demo's task, the rule that checks an answer, its texts and its character tokenizer.

The task is to put the letters of a made-up word in alphabetical order: the answer to `sort banuko = ` is `abknou`. A
rule decides whether an answer is right, so no person and no judge model labels anything. The texts that the language
model learns from are only partly right, as real texts are. This file knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tether.errors import DataError

CONSONANTS = "bcdfghjklmnprstvz"
VOWELS = "aeiou"
PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"

# What a careless writer does with the letters instead of sorting them.
MISTAKES: dict[str, Callable[[str], str]] = {
    "left as it was": lambda word: word,
    "backwards": lambda word: word[::-1],
    "from z to a": lambda word: "".join(sorted(word, reverse=True)),
}

_PREFIX, _SUFFIX = "sort ", " = "


@dataclass(frozen=True)
class PromptSplits:
    """Three disjoint lists of prompts: no word is in two of them.

    Attributes:
        pretraining: Prompts of the texts that the language model first learns from.
        preference: Prompts whose sampled answers become preference pairs.
        held_out: Prompts used for measuring only.
    """

    pretraining: list[str]
    preference: list[str]
    held_out: list[str]


def prompt_of(word: str) -> str:
    """The prompt that asks for the letters of `word` in alphabetical order."""
    return f"{_PREFIX}{word}{_SUFFIX}"


def word_of(prompt: str) -> str:
    """The word a prompt asks about; the inverse of `prompt_of`.

    Raises:
        DataError: If `prompt` is not one of this task's prompts.
    """
    if not (prompt.startswith(_PREFIX) and prompt.endswith(_SUFFIX)):
        raise DataError(
            problem=f"Cannot find a word in {prompt!r}: prompts of the demo's task look like {prompt_of('banuko')!r}.",
            instead="Make prompts with `prompt_of(word)`.",
        )
    return prompt[len(_PREFIX) : -len(_SUFFIX)]


def right_answer(prompt: str) -> str:
    """The one right answer: `"".join(sorted(word))`."""
    return "".join(sorted(word_of(prompt)))


def is_right(prompt: str, answer: str) -> bool:
    """The rule: whether `answer` is exactly the right answer to `prompt`."""
    return answer == right_answer(prompt)


def make_splits(
    num_pretraining: int, num_preference: int, num_held_out: int, *, word_lengths: Sequence[int], seed: int
) -> PromptSplits:
    """Draws made-up words without repetition and splits them.

    Args:
        num_pretraining: Prompts to pretrain on.
        num_preference: Prompts to sample preference pairs for.
        num_held_out: Prompts to measure on.
        word_lengths: Lengths in letters; a length listed more often is more likely.
        seed: The same seed gives the same prompts.
    """
    words = _distinct_words(num_pretraining + num_preference + num_held_out, word_lengths, random.Random(seed))
    prompts = [prompt_of(word) for word in words]
    # Held-out first, so that this set stays the same when the others change size.
    held_out, rest = prompts[:num_held_out], prompts[num_held_out:]
    return PromptSplits(pretraining=rest[num_preference:], preference=rest[:num_preference], held_out=held_out)


def write_texts(prompts: Sequence[str], *, right_share: float, seed: int) -> list[tuple[str, str]]:
    """The pretraining texts: every prompt with an answer, which is right only now and then.

    A language model trained on these imitates all their writers, careless ones included: it can do the task and often
    doesn't. That is what preference training is for.

    Args:
        prompts: The prompts, each answered once.
        right_share: Probability that an answer is the right one; otherwise it is one of `MISTAKES`.
        seed: The same seed gives the same answers.

    Returns:
        (prompt, answer), in the order of `prompts`.
    """
    rng = random.Random(seed)
    careless = list(MISTAKES.values())
    return [
        (prompt, right_answer(prompt) if rng.random() < right_share else rng.choice(careless)(word_of(prompt)))
        for prompt in prompts
    ]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters whose vocabulary is learned from `texts`.

    One character is one token, so the tokens of a prompt are the first tokens of prompt + answer. It pads on the
    left, as sampling needs.
    """
    tokenizer = Tokenizer(models.WordLevel({}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(special_tokens=[PAD_TOKEN, EOS_TOKEN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, padding_side="left"
    )


def _distinct_words(num_words: int, lengths: Sequence[int], rng: random.Random) -> list[str]:
    words: dict[str, None] = {}
    for _ in range(100 * num_words):
        if len(words) == num_words:
            break
        words[_made_up_word(rng.choice(lengths), rng)] = None
    assert len(words) == num_words, f"there are not {num_words} words of {lengths} letters"
    return list(words)


def _made_up_word(length: int, rng: random.Random) -> str:
    """Alternating consonants and vowels, so that it can be pronounced."""
    start = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (start + place) % 2 else CONSONANTS) for place in range(length))
