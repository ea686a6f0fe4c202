"""A probe of a reference: what it answers to texts that are no rows, to tell it from one with the same weights.

A digest covers weights, config and adapters. Code, hooks, activations and buffers that are not saved change the answers
too; these are compared. So a change that changes no answer, as of a source file's layout, goes unnoticed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from tether.distributed import any_process, of_main
from tether.errors import ResumeError
from tether.reference.base import Reference
from tether.reference.noise import ALIKE, Gap, Noise, Tolerance, measured, rounds_coarsely, unreduced
from tether.reference.watch import said
from tether.store import KeptProbe, content_key
from tether.store.probe import Text
from tether.types import PairBatch, Response, ResponseLogProbs, offsets_of

logger = logging.getLogger(__name__)

LEAST_TOKENS = 256  # shorter texts hide what acts on later positions
_PROMPT_TOKENS, _SHORT_TOKENS = 16, 112
_LIBRARIES = ("torch", "transformers", "peft")
_FILE = "probe.json"


class Scope(NamedTuple):
    """What of a run its probes depend on.

    Attributes:
        longest: Tokens of its longest row.
        token_ids: Those of its rows, for a reference that does not say what it reads.
    """

    longest: int
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, batches: Iterable[PairBatch]) -> Scope:
        """Of some batches, the longest rows among them; images leave ids in a prompt that are no text."""
        longest, ids = 0, set[int]()
        for batch in batches:
            longest = max(longest, *batch.fed_lengths())
            for response in batch.responses():
                ids.update(response.token_ids, () if response.images else response.prompt_ids)
        return cls(longest, tuple(sorted(ids)))


class Difference(NamedTuple):
    """How far the answers to a probe are from those that were kept, and how far they may be."""

    gap: Gap
    allowed: Tolerance
    kept: KeptProbe

    def __str__(self) -> str:
        return (
            f"on a probe of {self.kept.length} tokens, mean gap {self.gap.mean:.3g} nats per token, largest "
            f"{self.gap.largest:.3g}"
        )

    def explain(self, dtype: str) -> str:
        """The tolerance, and what is known of the cause."""
        now = _made_with()
        other = [
            f"{name} {then} then, {now[name]} now"
            for name, then in self.kept.made_with.items()
            if now.get(name, then) != then
        ]
        return (
            f"Rounding in {dtype} explains {said(self.allowed)}. Weights, config and "
            "adapters are the same, so the code of the model, a hook, an activation, a forward or a buffer differs"
            + (f", or what it runs on ({'; '.join(other)})." if other else ".")
        )


def length_for(reference: Reference, longest: int) -> int:
    """Tokens of the text by which a reference is probed for rows of up to `longest` tokens."""
    reads, limit = reference.reads, reference.length_limit
    if reads is None:  # a longer text may be more than it can read
        return longest
    most = [reads.max_tokens] if reads.max_tokens is not None else []
    most += [limit] if limit is not None and longest <= limit else []
    return max(min([LEAST_TOKENS, *most]), longest)


def is_near(length: int, longest: int) -> bool:
    """Whether a probe of that length serves rows of up to `longest` tokens."""
    return length >= 0.8 * longest


def make_probe(reference: Reference, length: int, token_ids: Sequence[int]) -> KeptProbe | None:
    """Asks a reference texts of some length. Collective where the reference is.

    Returns:
        The texts and answers. None if it fails on what is no row, as a table of answers does: it may still be right
        on rows, which are then all that can be compared.
    """
    reads = reference.reads
    texts = _texts(length, token_ids if reads is None else reads.token_ids)
    try:
        probe = ask(reference, texts)
        rounds = rounds_coarsely(reference.identity.compute_dtype)
        return probe._replace(noise=asdict(_noise(reference, probe))) if rounds else probe
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning(
            "The %s reference answers nothing but its rows (%s: %s), so no probe tells it from others of its identity.",
            *(reference.identity.kind, type(error).__name__, error),
        )
        return None


def ask(reference: Reference, texts: tuple[Text, ...]) -> KeptProbe:
    """A reference's answers to texts. Collective where the reference is."""
    answer = reference.log_probs(_batch(texts))
    return KeptProbe(texts, answer.values.float().cpu().numpy(), _made_with())


def compare(reference: Reference, kept: KeptProbe, now: KeptProbe, *, may_ask: bool = True) -> Difference | None:
    """How far a reference's answers are from those that were kept; None if rounding explains it, here and there.

    Args:
        reference: Whose answers they are.
        kept: The answers that were kept.
        now: Those to the same texts.
        may_ask: Measure the reference's noise if they differ. Collective where the reference is.
    """
    was, answer = _answer(kept), _answer(now)
    ruled_out = ~was.values.isfinite() & (was.values.nan_to_num(nan=1) == answer.values.nan_to_num(nan=1))
    was, answer = (replace(one, values=one.values.masked_fill(ruled_out, 0)) for one in (was, answer))
    gap = Gap.between(answer, was, unreduced, reference.traits.knows_tokens)
    allowed = ALIKE[reference.identity.compute_dtype]
    differs = not gap.within(allowed)
    if any_process(differs) if may_ask and reference.traits.is_collective else differs:
        known = [kept.noise, asdict(_noise(reference, now)) if may_ask else now.noise]
        noises = [Noise(**noise) for noise in known if noise is not None]
        if noises:
            allowed = (noises[0] + noises[-1]).allowed(gap, reference.identity.compute_dtype)
    return None if gap.within(allowed) else Difference(gap, allowed, kept)


def _noise(reference: Reference, probe: KeptProbe) -> Noise:
    return measured(reference.log_probs, _batch(probe.texts), _answer(probe), unreduced)


def _batch(texts: tuple[Text, ...]) -> PairBatch:
    responses = [Response(prompt, ids, content_key(prompt, ids)) for prompt, ids in texts]
    return PairBatch.of_pairs([(response, response) for response in responses])


def _answer(probe: KeptProbe) -> ResponseLogProbs:
    return ResponseLogProbs(torch.tensor(probe.log_probs), offsets_of([len(response) for _, response in probe.texts]))


class RunProbes:
    """What the checkpoints of a run keep of its reference's answers: as they are of one that moves, else as at first.

    A reference whose answers are stored keeps its store's probes itself.

    Args:
        reference: The reference.
        rows: Gives some rows of the run, the longest among them.
    """

    def __init__(self, reference: Reference, rows: Callable[[], PairBatch | None]) -> None:
        self._reference, self._rows = reference, rows
        self._kept: list[KeptProbe] | None = None

    def save(self, folder: Path | None) -> None:
        """Writes them; with None, only takes part. Every process calls it."""
        traits = self._reference.traits
        if traits.answers_are_stored or (folder is None and not traits.is_collective):
            return
        if self._kept is None or traits.moves:
            self._kept = self._made()
        if folder is not None:
            write_probes(folder, self._kept)

    def check(self, folder: Path) -> None:
        """Compares the reference with those of a checkpoint. Every process calls it.

        Raises:
            ResumeError: If it answers otherwise.
        """
        if not self._reference.traits.answers_are_stored:
            self._kept = check_probes(folder, self._reference) or None

    def _made(self) -> list[KeptProbe]:
        rows = self._rows()
        scope = Scope.of([] if rows is None else [rows])
        scope = of_main(scope) if self._reference.traits.is_collective else scope
        length = length_for(self._reference, scope.longest)
        probe = make_probe(self._reference, length, scope.token_ids) if scope.longest else None
        return [] if probe is None else [probe]


def write_probes(folder: Path, probes: Sequence[KeptProbe]) -> None:
    """Writes probes into a checkpoint's folder of the reference."""
    (folder / _FILE).write_text(json.dumps([probe.as_fields() for probe in probes]))


def check_probes(
    folder: Path, reference: Reference, known: Mapping[tuple[Text, ...], KeptProbe] | None = None
) -> list[KeptProbe]:
    """Compares a reference with the probes of a checkpoint, if it has any, and returns these.

    Args:
        folder: The checkpoint's folder of the reference.
        reference: The reference, as it goes on.
        known: Its answers by the texts; other texts are not compared. By default it is asked.

    Raises:
        ResumeError: If it answers otherwise.
    """
    path = folder / _FILE
    probes = [KeptProbe.of_fields(fields) for fields in json.loads(path.read_text())] if path.is_file() else []
    for probe in probes:
        now = ask(reference, probe.texts) if known is None else known.get(probe.texts)
        found = None if now is None else compare(reference, probe, now, may_ask=known is None)
        if found is not None:
            raise ResumeError(
                problem=f"Cannot resume from {folder.parent}: the reference of its run had the same weights, but "
                f"answers differently now ({found}).",
                details=found.explain(reference.identity.compute_dtype),
                instead="Build the trainer with the model, the hooks and the code of that run, or start a new run.",
            )
    return probes


def _texts(length: int, token_ids: Sequence[int]) -> tuple[Text, ...]:
    """A prompt with a response up to that length, and a shorter one; always the same for the same ids."""
    draw = Random(0)
    prompt = tuple(draw.choices(token_ids, k=max(1, min(_PROMPT_TOKENS, length // 4))))
    room = length - len(prompt)
    drawn = [tuple(draw.choices(token_ids, k=number)) for number in (room, min(_SHORT_TOKENS, room))]
    return tuple((prompt, response) for response in dict.fromkeys(drawn))


def _made_with() -> dict[str, str]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else str(device or "cpu")
    return {library: version(library) for library in _LIBRARIES} | {"device": name}
