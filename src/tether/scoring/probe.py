"""Rows on which ways of scoring a model are compared: some of the run's own, and shapes in which faults show.

Knows batches; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from tether.types import PairBatch, Response

_SHORTEST = 64  # tokens of a probe's long rows, at least
_ROOM = 16  # of them a response's, at least; also the responses of the short group
_SHORT_PROMPT = 6
_SPARE = 10


class Probe(NamedTuple):
    """What is scored to compare ways of scoring.

    Attributes:
        batch: A prompt with a response up to the length that is proven and one of half as many tokens; one that shares
            the first half of that prompt, where images do not forbid it; and another prompt, with its images if the run
            has two such, with two short ones. The last two are equally long.
        contexts: One response behind two prompts.
        length: Tokens of the long row.
        spare: Columns of padding behind it in the padded layout: padding that takes part shows most in long rows.
    """

    batch: PairBatch
    contexts: PairBatch
    length: int
    spare: int


def proven_length(longest: int, limit: int | None) -> int:
    """The length at which a model is proven that is asked for rows of `longest` tokens: a power of two.

    So rows that grow by and by ask for few proofs.

    Args:
        longest: Tokens of the longest row.
        limit: Tokens that the model can read, if known.
    """
    length = 1 << (max(longest, _SHORTEST) - 1).bit_length()
    return max(longest, length if limit is None else min(length, limit))


def probe_of(
    batch: PairBatch, length: int, limit: int | None, *, alone: bool = False, one_image: bool = False, seed: int = 0
) -> Probe:
    """Rows of a batch: its longest one and a sibling, extended with the batch's own tokens, and a short group.

    Args:
        batch: The batch at hand.
        length: Tokens of the long rows; at least the batch's longest.
        limit: Tokens that the model can read, if known.
        alone: Rows of one length only, for those that are never scored together with shorter ones.
        one_image: Images in the first prompt only; other processes may have no second one, and wait for each other.
        seed: Draws what is added.
    """
    draw = Random(seed)  # leaves the global random state alone
    responses = [response._replace(scored=None) for response in batch.responses()]
    pool = [token for response in responses for token in response.token_ids]

    def some(num: int) -> tuple[int, ...]:
        start = draw.randrange(len(pool))
        return tuple((pool[start:] + pool * (num // len(pool) + 1))[:num])

    shown = [response for response in responses if response.images]  # a sharded tower is used on all processes or none
    first = max(shown or responses, key=lambda response: len(response.prompt_ids) + len(response.token_ids))
    second = next((r for r in responses if r.prompt == first.prompt and r.token_ids != first.token_ids), None)
    if not first.images:
        first = first._replace(prompt_ids=first.prompt_ids[: max(1, length - _ROOM)])
    room = length - len(first.prompt_ids)
    one = (first.token_ids + some(room))[:room]
    rest = room if alone else max(min(room, _ROOM), room // 2)
    two = ((second.token_ids if second else ()) + some(room))[:rest]
    two = _differing(two, one, pool)  # what one response begins with must not move the other
    three, four = some(_ROOM), some(_ROOM)
    prompt = _differing(some(_SHORT_PROMPT), first.prompt_ids, pool)  # or two groups would be one
    three = _differing(three, four, pool)
    pairs = [(first._replace(token_ids=one, key=b""), first._replace(token_ids=two, key=b""))]
    shared = 0 if alone or shown else min((len(first.prompt_ids) + 1) // 2, length - _SHORT_PROMPT - _ROOM)
    if shared > 0:
        ending = _differing(prompt, first.prompt_ids[shared:], pool)
        like = first._replace(prompt_ids=first.prompt_ids[:shared] + ending, token_ids=three, key=b"")
        pairs.append((like, like))
    if not alone:
        others = (r for r in shown if r.prompt != first.prompt and len(r.prompt_ids) + _ROOM <= length)
        behind = Response(prompt, ()) if one_image else next(others, Response(prompt, ()))
        pairs.append((behind._replace(token_ids=three, key=b""), behind._replace(token_ids=four, key=b"")))
    contexts = Response(prompt, four), Response(_differing(prompt, prompt, pool)[::-1], four)
    spare = 0 if alone else _SPARE if limit is None else max(0, min(_SPARE, limit - length))
    made, context = (PairBatch.of_pairs(one).to(batch.device) for one in (pairs, [contexts]))
    return Probe(_sharing(made, shared), context, length, spare)


def _differing(ids: tuple[int, ...], others: tuple[int, ...], pool: Sequence[int]) -> tuple[int, ...]:
    """The ids, with another first one if it is that of the others."""
    return (next(token for token in (ids[0], *pool, 0, 1) if (token,) != others[:1]), *ids[1:])


def _sharing(batch: PairBatch, num: int) -> PairBatch:
    """The batch, whose second prompt shares its first `num` tokens, whether that is worth it or not."""
    prefixes = ((group, num if group == 1 else 0) for group in range(batch.num_groups))
    return replace(batch, prefixes=tuple(prefixes)) if num > 0 else batch
