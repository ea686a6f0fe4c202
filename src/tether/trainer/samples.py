"""Answers to a few held-out prompts, while a run goes on and after it: kept as data, and the figures of them logged.

A loss can be perfect while the policy talks nonsense; what it says is looked at here. Knows the trainer's events and
any reference; changes neither the policy nor the random state.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from tether.config.dpo_config import DPOConfig
from tether.distributed import device_of, raising_together
from tether.errors import DataError, MissingLogProbsError, ReferenceModelError
from tether.models.answering import answer, can_answer, ends_of, same_random_state
from tether.reference import PrecomputedReference, Reference
from tether.reference.base import score_without_gradient
from tether.scoring.evaluation import running_in
from tether.store import content_key
from tether.trainer.sets import named_sets
from tether.types import PairBatch, Response

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
_NONE = "-"  # in the file: not to be had


class Sums(NamedTuple):
    """What the figures of one answer are made of; the last two are None where the reference does not answer.

    Attributes:
        length: Tokens of the greedy answer, with its end token.
        ended: 1 if it ended by itself.
        repetition: Share of its trigrams that came before.
        surprise: Its nats under the reference, summed.
        kl: `log pi - log pi_ref` of the drawn answer, summed.
        drawn: Tokens of the drawn answer.
    """

    length: int
    ended: int
    repetition: float
    surprise: float | None
    kl: float | None
    drawn: int


class SampleReport(TrainerCallback):
    """Answers `report_samples` prompts at each evaluation and after training.

    The processes of a run share the prompts.

    Args:
        trainer: The run.
        reference: Its reference.
        autocast_dtype: Autocast dtype of the policy's forward; None for no autocast.
    """

    def __init__(self, trainer: Any, reference: Reference, autocast_dtype: torch.dtype | None) -> None:
        self._trainer, self._reference, self._autocast_dtype = trainer, reference, autocast_dtype
        self._args: DPOConfig = trainer.args
        self._prompts: list[list[int]] | None = None
        self._of_reference: dict[str, list[list[int]]] = {}  # its answers, where it stands still
        self._warned: set[str] = set()
        self._done_at: int | None = None  # the step that was sampled last
        self._resumed_at, self._has_written = 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._done_at, self._resumed_at = None, state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._done_at != state.global_step:  # once for several sets
            self._report(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_best = self._args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if is_best else state.global_step  # whose weights these are
        if self._done_at != step:
            self._report(step)
        self._done_at = state.global_step  # they stay as they are

    # ---- one report ----------------------------------------------------------------------------------------------

    def _report(self, step: int) -> None:
        policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
        with same_random_state():
            with raising_together():
                batches = enumerate(self._own_batches())
                found = [row for number, prompts in batches for row in self._answered(policy, prompts, step, number)]
            everything: list[tuple[dict[str, Any], Sums]] = gather_object(found)
            self._done_at = step
            if not everything:
                self._warn_once("No prompt leaves room for an answer within `max_length`, so no samples were made.")
                return
            if self._args.should_save:
                self._write([row for row, _ in everything], step)
        self._trainer.log(figures_of([sums for _, sums in everything]))

    def _own_batches(self) -> Iterator[list[list[int]]]:
        """This process's share of the prompts, in batches."""
        if self._prompts is None:
            self._prompts = list(self._chosen_prompts())
        own = self._prompts[self._args.process_index :: self._args.world_size]
        size = self._args.per_device_eval_batch_size
        for start in range(0, len(own), size):
            yield own[start : start + size]

    def _chosen_prompts(self) -> Iterator[list[int]]:
        """The first distinct prompts of the set to evaluate on, or of the training set, that leave room to answer."""
        sets = named_sets(self._trainer.train_dataset, self._trainer.eval_dataset)
        rows: Any = next((dataset for name, dataset in sets.items() if name != "train"), sets.get("train"))
        longest, num_new = self._args.max_length, self._args.report_samples_max_new_tokens
        seen: set[tuple[int, ...]] = set()
        for row in rows.select_columns(["prompt_ids"]):
            ids = tuple(row["prompt_ids"])
            if ids in seen or (longest is not None and len(ids) + num_new > longest):
                continue
            seen.add(ids)
            yield list(ids)
            if len(seen) == self._args.report_samples:
                return

    def _answered(
        self, policy: nn.Module, prompts: list[list[int]], step: int, number: int
    ) -> list[tuple[dict[str, Any], Sums]]:
        """For each prompt of a batch, its row in the file and what its figures are made of."""
        ends = ends_of(policy, self._trainer._tokenizer)
        seed = abs(hash((self._args.seed, step, self._args.process_index, number)))  # of integers, so always the same
        with running_in(self._autocast_dtype, device_of(policy)):
            greedy = self._answers(policy, prompts, ends)
            drawn = self._answers(policy, prompts, ends, seed)
        batch = _pairs(prompts, greedy, drawn).to(self._args.device)
        own = score_without_gradient(policy, batch, self._autocast_dtype).split()
        with self._released_again():
            known = self._reference_log_probs(batch)  # first, because it may load the weights that then answer
            theirs = self._reference_answers(policy, prompts, ends)
        rows = []
        for index, (prompt, first, second) in enumerate(zip(prompts, greedy, drawn, strict=True)):
            of_first, of_second = batch.chosen[index], batch.rejected[index]
            sums = Sums(
                len(first),
                int(first[-1] in ends),
                repetition(first),
                None if known is None else -_sum(known[of_first]),
                None if known is None else _sum(own[of_second]) - _sum(known[of_second]),
                len(second),
            )
            text = {
                "step": step,
                "prompt": self._text(prompt, special=True),
                "policy": self._text(first),
                "reference": _NONE if theirs is None else self._text(theirs[index]),
                "drawn": self._text(second),
            }
            figures = {name.removeprefix("samples/"): value for name, value in figures_of([sums], _NONE).items()}
            rows.append((text | figures, sums))
        return rows

    def _answers(
        self, model: nn.Module, prompts: list[list[int]], ends: list[int], seed: int | None = None
    ) -> list[list[int]]:
        return answer(model, prompts, ends, self._args.report_samples_max_new_tokens, seed=seed)

    # ---- the reference -------------------------------------------------------------------------------------------

    def _reference_answers(
        self, policy: nn.Module, prompts: list[list[int]], ends: list[int]
    ) -> list[list[int]] | None:
        """Its own greedy answers, from its model or from the policy in another state; None if it is neither."""
        module, key = self._reference.module, str(prompts)
        if key in self._of_reference:
            return self._of_reference[key]
        try:
            if module is not None and can_answer(module):
                with running_in(self._autocast_dtype, device_of(module)):
                    answers = self._answers(module, prompts, ends)
            else:
                with self._reference.in_policy(), running_in(self._autocast_dtype, device_of(policy)):
                    answers = self._answers(policy, prompts, ends)
            if not self._reference.traits.moves:
                self._of_reference[key] = answers
            return answers
        except ReferenceModelError:
            self._warn_once(
                f"The {self._reference.kind.name} reference has no model at hand to answer with: {SAMPLES_FILE} has "
                f"`{_NONE}` in place of its answers."
            )
            return None

    @contextmanager
    def _released_again(self) -> Iterator[None]:
        """Weights that a stored reference loads for an answer are given up afterwards: they may be the policy's."""
        was_released = self._reference.traits.answers_are_stored and self._reference.module is None
        try:
            yield
        finally:
            if was_released:
                self._reference.release()

    def _reference_log_probs(self, batch: PairBatch) -> list[Tensor] | None:
        """Of the policy's answers; None where they cannot be had. A store is not asked: it would keep them."""
        stored = isinstance(self._reference, PrecomputedReference)
        asked = self._reference.source if isinstance(self._reference, PrecomputedReference) else self._reference
        try:
            if asked is not None:
                return asked.log_probs(batch).split()
        except (MissingLogProbsError, DataError):
            pass
        what = "its source is not at hand" if stored else "it only knows the rows of the sets"
        self._warn_once(
            f"The {self._reference.kind.name} reference cannot score the policy's answers, because {what}: "
            "`samples/surprise` and `samples/kl` are not logged."
        )
        return None

    # ---- words and files -----------------------------------------------------------------------------------------

    def _text(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self._trainer._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and self._args.process_index == 0:
            logger.warning(message)
        self._warned.add(message)

    def _write(self, rows: list[dict[str, Any]], step: int) -> None:
        """Adds rows to the file; of an earlier run in the folder, only what a resumed one goes on from stays."""
        path = Path(str(self._args.output_dir)) / SAMPLES_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if not self._has_written:
            lines = [line for line in lines if json.loads(line)["step"] <= self._resumed_at] if self._resumed_at else []
        self._has_written = True
        lines += [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def figures_of(answers: Sequence[Sums], missing: Any = None) -> dict[str, Any]:
    """The figures of some answers by their names in the log: means, the last two per token.

    Args:
        answers: Of all processes.
        missing: Stands for a figure that cannot be had; None leaves it out.
    """
    num_tokens, num_drawn = sum(one.length for one in answers), sum(one.drawn for one in answers)
    has_reference = all(one.surprise is not None and one.kl is not None for one in answers)
    values: dict[str, Any] = {
        "samples/length": num_tokens / len(answers),
        "samples/ended": sum(one.ended for one in answers) / len(answers),
        "samples/repetition": sum(one.repetition for one in answers) / len(answers),
        "samples/surprise": sum(one.surprise or 0.0 for one in answers) / num_tokens if has_reference else missing,
        "samples/kl": sum(one.kl or 0.0 for one in answers) / num_drawn if has_reference else missing,
    }
    return {name: value for name, value in values.items() if value is not None}


def repetition(ids: Sequence[int]) -> float:
    """The share of an answer's trigrams of tokens that came before in it; 0 below three tokens.

    Example:
        >>> repetition([1, 2, 3, 1, 2, 3, 1])  # 123 231 312 123 231
        0.4
    """
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _pairs(prompts: list[list[int]], greedy: list[list[int]], drawn: list[list[int]]) -> PairBatch:
    """Each prompt with its two answers, the greedy one in the place of the chosen response."""

    def response(prompt: list[int], ids: list[int]) -> Response:
        return Response(tuple(prompt), tuple(ids), content_key(prompt, ids))

    each = zip(prompts, greedy, drawn, strict=True)
    return PairBatch.of_pairs([(response(prompt, first), response(prompt, second)) for prompt, first, second in each])


def _sum(values: Tensor) -> float:
    return float(values.double().sum())
