"""Finds out, on rows of the run and before a model's first answer, which way of scoring gives its own log-probs.

Every way is compared with the plain one: the model's own attention, its own logits, one response at a time. The result
is remembered in this process by everything that can change it (`fingerprint`), and found anew when that changes or
longer rows come.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from tether.distributed import any_process, device_of, has_shards, num_processes, reduced
from tether.errors import ConfigurationError
from tether.scoring.at_rest import at_rest, is_rough
from tether.scoring.attention import kernels_for
from tether.scoring.fingerprint import fingerprint
from tether.scoring.forward import Way
from tether.scoring.probe import proven_length
from tether.scoring.projection import has_projection
from tether.scoring.reading import max_tokens_of
from tether.scoring.rotary import rotary_limit
from tether.scoring.trial import OUT_OF_MEMORY, Trial, trial_of
from tether.types import PairBatch

logger = logging.getLogger(__name__)

_SAYS = {
    "packed": "in packed rows",
    "padded": "in the padded layout (one row per response), which is slower",
    "rows": "one response at a time, which is much slower",
}
_LOOKS = 3


@dataclass
class _Proof:
    way: Way
    why: str  # why it is not the first; empty if it is
    length: int
    functions: tuple[Any, ...]  # alive as long as their identities are in the key
    told: WeakSet[nn.Module] = field(default_factory=WeakSet)


_proofs: dict[Hashable, _Proof] = {}
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def way_of(
    model: nn.Module,
    base: nn.Module,
    batch: PairBatch,
    layouts: Sequence[str],
    why_not: str = "",
    failed: Way | None = None,
) -> Way:
    """The first way that gives the model's own log-probs. Collective if the model is sharded.

    Args:
        model: The model, in any wrappers.
        base: The causal language model inside.
        batch: The batch to be scored, on the model's device.
        layouts: Those to try, the fastest first. The last one is used if no other gives the model's own log-probs.
        why_not: Why a faster one is not among them, or failed.
        failed: A way that was found to work, and did not.

    Raises:
        ConfigurationError: If the model is not causal, or its plain forward fails.
    """
    model = _without_wrappers(model)
    found = fingerprint(model)
    key = found.key, tuple(layouts), bool(batch.images)
    known = _proofs.get(key)
    longest = max(batch.fed_lengths())
    wants, longest = _agreed(model, known is None or failed is not None or longest > known.length, longest)
    if wants:
        ways = list(_ways(model, base, layouts))
        if known is not None:
            ways = ways[ways.index(known.way) :]
        if failed is not None:
            ways = [way for way in ways if way.layout != failed.layout]
        way, why, length = _first_that_works(_Trials(model, base, batch, longest), ways)
        if known is None or known.way != way:
            known = _proofs[key] = _Proof(way, why or why_not, length, found.functions)
        known.length = length
    assert known is not None
    if not len(known.told):  # once for a model and its copies
        known.told.add(base)
        _tell(known, base)
    return known.way


def _without_wrappers(model: nn.Module) -> nn.Module:
    """What DDP and `torch.compile` wrap: both leave the answers alone. What shards weights stays."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or has_shards(model):
            return model
        model = inner


def _agreed(model: nn.Module, wants: bool, longest: int) -> tuple[bool, int]:
    if not _is_collective(model):
        return wants, longest
    together = reduced(torch.tensor([int(wants), longest], device=device_of(model)), "max").tolist()
    return bool(together[0]), together[1]


def _is_collective(model: nn.Module) -> bool:
    return num_processes() > 1 and has_shards(model)


def _ways(model: nn.Module, base: nn.Module, layouts: Sequence[str]) -> Iterator[Way]:
    kernels = kernels_for(device_of(model), is_rough(model))
    heads = (False, True) if has_projection(base) else (True,)
    for layout in layouts:
        if layout == "packed":
            yield from (Way("packed", own, kernel) for own in heads for kernel in kernels)
        elif layout == "padded":
            yield from (Way("padded", own) for own in heads)
        else:
            yield Way("rows", True)


def _limit(model: nn.Module, base: nn.Module, longest: int) -> int | None:
    """Tokens of the longest row that the model can be asked for."""
    limit, rotary = max_tokens_of(model, base), rotary_limit(model)
    known = [] if limit is None else [limit]
    if rotary is not None and longest <= rotary:
        known.append(rotary)
    return min(known, default=None)


def _first_that_works(trials: _Trials, ways: Sequence[Way]) -> tuple[Way, str, int]:
    """The first of the ways that is equal to the plain one; why the first one is not it; the length of the proof."""
    why = ""
    with at_rest(trials.model):
        if trials.see_later_tokens():
            raise ConfigurationError(
                problem=f"Cannot train a {type(trials.base).__name__} on preferences: it is not causal, so the "
                "log-prob of a token would depend on the tokens after it.",
                details="With another token at the end of a row, its predictions before that token changed.",
                instead="Use a model that reads from left to right (a decoder, `AutoModelForCausalLM`).",
            )
        for way in ways[:-1]:
            reason = trials.judge(way)
            if reason is None:
                return way, why, trials.length
            why = why or reason
    return ways[-1], why, trials.length


class _Trials:
    """Comparisons on rows of a batch. Another one is made only where rounding may have failed those before."""

    def __init__(self, model: nn.Module, base: nn.Module, batch: PairBatch, longest: int) -> None:
        self.model, self.base, self._batch = model, base, batch
        self._is_collective = _is_collective(model)
        self._trials: list[Trial] = []
        self._limit = _limit(model, base, longest)
        self.length = proven_length(longest, self._limit)

    def looks(self) -> Iterator[Trial]:
        for number in range(_LOOKS):
            if number == len(self._trials):
                trial = trial_of(self.model, self.base, self._batch, self.length, self._limit, seed=number)
                self._trials.append(trial)
                self.length = trial.length
            yield self._trials[number]

    def see_later_tokens(self) -> bool:
        """Whether the model is not causal, on every look."""
        for trial in self.looks():
            sees = trial.sees_later_tokens
            if not (any_process(sees) if self._is_collective else sees):
                return False
        return True

    def judge(self, way: Way) -> str | None:
        """Why a way is not to be used; None if it is equal to the plain one."""
        reason = ""
        for trial in self.looks():
            reason, is_certain = _judged(trial, way)
            if self._is_collective:
                failed = any_process(bool(reason))
                reason = reason or ("another process found other log-probs" if failed else "")
                is_certain = any_process(is_certain)
            if not reason:
                return None
            if is_certain:
                return reason
        return reason


def _judged(trial: Trial, way: Way) -> tuple[str, bool]:
    """Why a way failed a trial, if it did, and whether rounding cannot be the reason."""
    try:
        found = trial.difference(way)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        return f"its forward failed on {way.layout} rows ({type(error).__name__}: {error})", True
    if found.is_rounding:
        return "", False
    what = "a response alone" if way.layout == "packed" else "the same row without padding"
    return f"{way.layout} rows gave other log-probs than {what} (by {found.largest:.2g} nats)", found.is_certain


def _tell(proof: _Proof, base: nn.Module) -> None:
    name, layout = type(base).__name__, proof.way.layout
    if layout in (said := _said.setdefault(base, set())):  # with its adapter on and off
        return
    said.add(layout)
    head = ", from its own full logits" if proof.way.own_head and layout != "rows" else ""
    if proof.why:
        logger.warning("%s is scored %s%s: %s.", name, _SAYS[layout], head, proof.why)
    else:
        logger.info("%s is scored %s%s: proven on rows of %d tokens.", name, _SAYS[layout], head, proof.length)
