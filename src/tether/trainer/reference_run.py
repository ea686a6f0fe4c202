"""The reference of one run: prepared, watched and moved while transformers trains.

Knows the trainer's events and sets; knows no kind of reference, no loss and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from tether.config.dpo_config import DPOConfig
from tether.data.collators import Collator
from tether.data.datasets import PairDataset, batch_of
from tether.distributed import raising_together
from tether.reference import Reference
from tether.reference.probing import RunProbes
from tether.reference.watch import ReferenceWatch
from tether.trainer.batches import RowsToScore, pair_lengths, sampled_rows
from tether.trainer.checkpoints import warn_of_no_sync, warn_of_weights_alone
from tether.trainer.saving import keep_savable
from tether.types import PairBatch, ResponseLogProbs

_SENTINEL_PAIRS = 2
_SAMPLED_PAIRS = 4
_PROBED_ROWS = 32
# Where rounding plays a part, a small shift is seen on many tokens only; the rows must be short, not to take long.
_SAMPLED_SHORT_PAIRS, _SAMPLED_TOKENS = 8, 1024
# So many rows more, up to as many tokens, as show a shift of so many nats per token.
_SHIFT_TO_SEE, _MANY_TOKENS = 0.02, 16_384


class _Sample(NamedTuple):
    """Some rows of a set."""

    name: str
    rows: list[int]
    batch: PairBatch


class ReferenceRun(TrainerCallback):
    """A reference during one run. It is told of each optimizer step, and watched whenever training pauses.

    Args:
        reference: The reference.
        accelerator: Of the trainer.
        args: The options.
        collator: What makes the batches now.
        sets: The tokenized sets by name, as they are when training begins.
        policy: The policy, as it is while the reference is built.
        autocast_dtype: Autocast dtype of the policy's forward; None for no autocast.
        waits: Whether a pass through the policy's own modules must wait until training has sharded them and put them
            in place.

    Attributes:
        reference: The reference.
        watch: What looks at it: the gap at step 0, drift, distances.
        probes: Its answers to texts that are no rows, for checkpoints.
    """

    def __init__(
        self,
        reference: Reference,
        accelerator: Accelerator,
        args: DPOConfig,
        collator: Callable[[], Collator],
        sets: Callable[[], Mapping[str, PairDataset]],
        policy: nn.Module,
        *,
        autocast_dtype: torch.dtype | None,
        waits: bool,
    ) -> None:
        self.reference, self.watch = reference, ReferenceWatch(reference, autocast_dtype)
        self.probes = RunProbes(reference, self._few_rows)
        self._accelerator, self._args, self._collator_now, self._sets = accelerator, args, collator, sets
        self._waits = waits and reference.traits.runs_in_policy
        self._prepared: dict[str, PairDataset] = {}
        self.prepare(sets())
        self.watch.shared.hold()
        self.watch.shared.watch_behaviour(policy)
        if reference.traits.moves:
            warn_of_weights_alone(args)

    @property
    def _collator(self) -> Collator:
        return self._collator_now()

    def prepare(self, sets: Mapping[str, PairDataset]) -> None:
        """Lets the reference score sets ahead, if it does that and the policy is in place."""
        if self._waits:
            return
        self._prepared |= sets
        batches = {
            name: lambda dataset=dataset: RowsToScore(dataset, self._collator, self._args)
            for name, dataset in sets.items()
            if isinstance(dataset, Dataset)
        }
        show_progress = not self._args.disable_tqdm and self._accelerator.is_local_main_process
        # A row that one process cannot use stops them all; where scoring is collective they are in step already.
        with nullcontext() if self.reference.traits.is_collective else raising_together():
            self.reference.prepare(batches, show_progress=show_progress)
        self._accelerator.wait_for_everyone()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        policy = self._accelerator.unwrap_model(model)
        keep_savable(policy)  # by now it has the tokenizer's special tokens; the reference shares its generation config
        if self._waits:
            self._waits = False
            self.prepare(self._sets())
            self.watch.shared.hold()
        self.watch.shared.tell_changes()
        self.watch.shared.check()
        self._watch_from_start(policy, has_trained=state.global_step > 0)
        self.watch.shared.keep_what_trains(kwargs.get("optimizer"))
        self._look_at_sample(policy, check=state.global_step == 0 and self.watch.begin())
        warn_of_no_sync(self._args, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.shared.keep_what_trains(kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.shared.check(state.global_step)
        self.reference.advance(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.shared.check()
        self.watch.check_drift()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.shared.check()
        self.watch.check_drift()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.shared.check()

    def _look_at_sample(self, policy: nn.Module, *, check: bool) -> None:
        """Measures the policy's noise on a few rows from everywhere, and compares policy and reference on them; the
        first batch may be right by chance.
        """
        if not self.reference.traits.means_policy:
            return
        samples = self._samples(self.watch.is_noisy(policy))
        if not samples:
            return
        largest = max(samples, key=lambda sample: sample.batch.num_pairs)
        share = self.watch.measure_noise(policy, largest.batch, _SHIFT_TO_SEE)
        if not check:
            return
        for sample in samples:
            where = f"row {', '.join(map(str, sample.rows))} of the {sample.name} set"
            answer = self._answer(sample.batch)
            self.watch.keep_sampled(sample.batch, answer)
            self.watch.check_rows(policy, [(sample.batch, answer)], where)
        if share > 1:
            more = self._like(largest, math.ceil(share * largest.batch.num_pairs))
            self.watch.check_rows(
                policy, ((batch, self._answer(batch)) for batch in more), f"many rows of the {largest.name} set"
            )

    def _answer(self, batch: PairBatch) -> ResponseLogProbs:
        traits = self.reference.traits
        fills_store = traits.answers_are_stored and not traits.is_collective  # then no row is scored by two processes
        with self._accelerator.main_process_first() if fills_store else nullcontext():
            return self.reference.log_probs(batch)

    def _like(self, sample: _Sample, num_pairs: int) -> Iterator[PairBatch]:
        """So many rows of a set as like those of a sample have `_MANY_TOKENS`, in batches no larger than the sample's
        or a step's.
        """
        rows, tokens = self._prepared[sample.name], sample.batch.num_row_tokens()
        num_pairs = min(num_pairs, len(rows), max(1, _MANY_TOKENS * sample.batch.num_pairs // tokens))
        at_once = max(1, sample.batch.num_pairs, _SAMPLED_TOKENS * sample.batch.num_pairs // tokens)
        places = [place * len(rows) // num_pairs for place in range(num_pairs)]
        for start in range(0, num_pairs, at_once):
            part = rows.select(places[start : start + at_once])
            yield batch_of(self._collator(list(part))).to(self._args.device)

    def _few_rows(self) -> PairBatch | None:
        """Rows of the first set, that to train on if there is one; the longest among them if it is no stream."""
        pairs: Any = next(iter(self._sets().values()))
        if isinstance(pairs, Dataset):
            return RowsToScore(pairs, self._collator, self._args).some(_PROBED_ROWS)
        return batch_of(self._collator(list(pairs.take(_SENTINEL_PAIRS))))

    def _samples(self, more: bool) -> list[_Sample]:
        """A few rows of each set: by name, with their numbers, and as a batch; `more` if they are short."""
        sets = {name: rows for name, rows in self._sets().items() if isinstance(rows, Dataset)}
        # A set that came later may have no stored answers, and no step may need them.
        sets = {name: rows for name, rows in sets.items() if rows is self._prepared.get(name)}
        step = self._args.per_device_train_batch_size * self._args.gradient_accumulation_steps
        samples = self._drawn(sets, _SAMPLED_SHORT_PAIRS) if more else []
        if more and sum(sample.batch.num_row_tokens() for sample in samples) <= _SAMPLED_TOKENS:
            return samples
        return self._drawn(sets, min(step, _SAMPLED_PAIRS))

    def _drawn(self, sets: Mapping[str, Dataset], count: int) -> list[_Sample]:
        sampled = sampled_rows(sets, count)
        if not self.reference.traits.knows_tokens:  # sums made at another `max_length` differ where a row is cut
            for name, rows in sets.items():
                longest = int(pair_lengths(rows, None).argmax())
                sampled[name] = sorted({*sampled.get(name, ()), longest})
        return [
            _Sample(name, rows, batch_of(self._collator(list(sets[name].select(rows)))).to(self._args.device))
            for name, rows in sampled.items()
        ]

    def _watch_from_start(self, policy: nn.Module, *, has_trained: bool) -> None:
        """Keeps what reference and policy answer for a few fixed pairs; a resumed policy is not the initial one."""
        pairs: Any = self._sets()["train"]
        # Where answers are stored, each process watches pairs of its own share: none is scored by two. Elsewhere all
        # watch the same, which a resumed run finds again in the checkpoint that one of them wrote.
        share = self._args.process_index if self.reference.traits.answers_are_stored else 0
        own = share * self._args.per_device_train_batch_size
        rows = list(islice(pairs.skip(own), _SENTINEL_PAIRS)) if own else []
        rows = rows or list(islice(pairs, _SENTINEL_PAIRS))
        self.watch.set_sentinel(batch_of(self._collator(rows)).to(self._args.device))
        self._accelerator.wait_for_everyone()  # so that a store filled on the way has them before anyone asks again
        if not has_trained:
            self.watch.set_start(policy)
