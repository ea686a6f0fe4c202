"""One comparison of ways to score a model with the plain way, on a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tether.distributed import has_shards
from tether.errors import ConfigurationError, TetherError
from tether.scoring.at_rest import exact_call, is_rough
from tether.scoring.equality import Difference, exact_difference, rough_difference
from tether.scoring.forward import PLAIN, Way, rows_of, run
from tether.scoring.probe import Probe, probe_of
from tether.scoring.rotary import reset_rotary, rotary_limit
from tether.types import PairBatch

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
_COMPARED = 16  # positions at the end of a prompt, whose predictions must not depend on the response


class _Plain(NamedTuple):
    """Plain log-probs of the responses, what another context changes, predictions before the last two responses."""

    values: Tensor
    effect: float
    before: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trial:
    """Plain answers on a probe, to compare others with.

    Attributes:
        model: The model without wrappers, at rest.
        base: The causal language model inside.
        probe: The rows.
        plain: The plain answers.
        exact: The plain answers in fp32, if the model computes in less and may be copied, with how to get others.
        is_rough: Whether the model computes in less than fp32.
    """

    model: nn.Module
    base: nn.Module
    probe: Probe
    plain: _Plain
    exact: tuple[_Plain, Callable[..., Any]] | None
    is_rough: bool

    @property
    def length(self) -> int:
        return self.probe.length

    @property
    def sees_later_tokens(self) -> bool:
        """Whether a prompt's predictions depend on the tokens after it, for equally many (some see how many)."""
        plain = self.plain if self.exact is None else self.exact[0]
        one, other = plain.before
        if self.is_rough and self.exact is None:
            return not rough_difference(one, other, None, plain.effect).is_rounding
        return not exact_difference(one, other, plain.effect).is_rounding

    def difference(self, way: Way) -> Difference:
        """How far the answers of a way are from the plain ones.

        Raises:
            Exception: Whatever the model raises in that way.
        """
        if self.exact is not None:
            plain, call = self.exact
            found = exact_difference(self._values(call, way), plain.values, plain.effect)
            if not found.is_rounding:
                return found
        values = self._values(self.model, way)
        if not self.is_rough:
            return exact_difference(values, self.plain.values, self.plain.effect)
        exact = None if self.exact is None else self.exact[0].values
        return rough_difference(values, self.plain.values, exact, self.plain.effect)

    def _values(self, call: Callable[..., Any], way: Way) -> Tensor:
        reset_rotary(self.model)
        return run(call, self.base, rows_of(self.model, self.probe.batch, way, spare=self.probe.spare), way).values


def trial_of(model: nn.Module, base: nn.Module, batch: PairBatch, length: int, limit: int | None, seed: int) -> Trial:
    """Makes the plain answers on a probe of the batch.

    Args:
        model: The model without wrappers, at rest.
        base: The causal language model inside.
        batch: The batch at hand.
        length: Tokens of the long rows; those of the batch's longest row if the model cannot read so many.
        limit: Tokens that it can read, if known.
        seed: Draws the probe.

    Raises:
        ConfigurationError: If the model's plain forward fails.
    """
    longest, rotary = max(batch.fed_lengths()), rotary_limit(model)
    for tokens in dict.fromkeys((length, longest)):
        alone = rotary is not None and tokens > rotary
        probe = probe_of(batch, tokens, limit, alone=alone, one_image=has_shards(model), seed=seed)
        try:
            plain = _plain(model, model, base, probe)
            break
        except (*OUT_OF_MEMORY, TetherError):
            raise
        except Exception as error:
            if tokens == longest:
                raise _failure(base, error) from error
    rough = is_rough(model)
    return Trial(model, base, probe, plain, _exact(model, base, probe) if rough else None, rough)


def _exact(model: nn.Module, base: nn.Module, probe: Probe) -> tuple[_Plain, Callable[..., Any]] | None:
    call = exact_call(model)
    if call is None:
        return None
    try:
        return _plain(call, model, base, probe), call
    except Exception:  # code that casts to half precision itself
        return None


def _plain(call: Callable[..., Any], model: nn.Module, base: nn.Module, probe: Probe) -> _Plain:
    values: list[Tensor] = []
    before: list[Tensor] = []
    for index in range(probe.batch.num_responses):
        reset_rotary(model)
        one = probe.batch.only([index])
        answer = run(call, base, rows_of(model, one, PLAIN), PLAIN)
        values.append(answer.values)
        if index >= probe.batch.num_responses - 2:
            end = answer.outputs.logits.shape[1] - one.response_lengths[0]
            logits = answer.outputs.logits[0, end - min(_COMPARED, one.prompt_lengths[0]) : end]
            before.append(logits.float().log_softmax(-1).flatten())
    contexts = [
        run(call, base, rows_of(model, probe.contexts.only([index]), PLAIN), PLAIN).values
        for index in range(probe.contexts.num_responses)
    ]
    effect = float((contexts[0] - contexts[-1]).abs().nan_to_num().mean())
    return _Plain(torch.cat(values), effect, (before[0], before[1]))


def _failure(base: nn.Module, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        problem=f"Cannot score with a {type(base).__name__}: its own forward fails on a single row of tokens with an "
        "attention mask.",
        details=f"{type(error).__name__}: {error}",
        instead="Make `model(input_ids=..., attention_mask=..., use_cache=False).logits` work first.",
    )
