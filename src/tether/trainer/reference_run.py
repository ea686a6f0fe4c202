"""The reference of one run: prepared, watched and moved while transformers trains.

Knows the trainer's events and sets; knows no kind of reference, no loss and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

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
from tether.trainer.batches import RowsToScore, sampled_rows
from tether.trainer.checkpoints import warn_of_no_sync, warn_of_weights_alone
from tether.trainer.saving import keep_savable
from tether.types import PairBatch

_SENTINEL_PAIRS = 2
_SAMPLED_PAIRS = 4
_PROBED_ROWS = 32


class ReferenceRun(TrainerCallback):
    """A reference during one run. It is told of each optimizer step, and watched whenever training pauses.

    Args:
        reference: The reference.
        accelerator: Of the trainer.
        args: The options.
        collator: Makes the batches.
        sets: The tokenized sets by name, as they are when training begins.
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
        collator: Collator,
        sets: Callable[[], Mapping[str, PairDataset]],
        *,
        autocast_dtype: torch.dtype | None,
        waits: bool,
    ) -> None:
        self.reference, self.watch = reference, ReferenceWatch(reference, autocast_dtype)
        self.probes = RunProbes(reference, self._few_rows)
        self._accelerator, self._args, self._collator, self._sets = accelerator, args, collator, sets
        self._waits = waits and reference.traits.runs_in_policy
        self._prepared: dict[str, PairDataset] = {}
        self.prepare(sets())
        self.watch.hold()
        if reference.traits.moves:
            warn_of_weights_alone(args)

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
            self.watch.hold()
        self.watch.check_held(everything=True)
        self._watch_from_start(policy, has_trained=state.global_step > 0)
        self.watch.check_optimizer(kwargs.get("optimizer"))
        self.watch.watch_behaviour(policy)
        if state.global_step == 0 and self.watch.begin():
            self._check_sample(policy)
        warn_of_no_sync(self._args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.check_held(everything=False)
        self.watch.check_optimizer(kwargs.get("optimizer"))
        self.reference.advance(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.check_held(everything=True)
        self.watch.check_drift()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.check_held(everything=True)
        self.watch.check_drift()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.check_held(everything=True)

    def _check_sample(self, policy: nn.Module) -> None:
        """Compares policy and reference on a few rows from everywhere; the first batch may be right by chance."""
        traits = self.reference.traits
        if not traits.means_policy:
            return
        sets = {name: rows for name, rows in self._sets().items() if isinstance(rows, Dataset)}
        # A set that came later may have no stored answers, and no step may need them.
        sets = {name: rows for name, rows in sets.items() if rows is self._prepared.get(name)}
        most = self._args.per_device_train_batch_size * self._args.gradient_accumulation_steps
        fills_store = traits.answers_are_stored and not traits.is_collective  # then no row is scored by two processes
        for name, rows in sampled_rows(sets, min(most, _SAMPLED_PAIRS)).items():
            batch = batch_of(self._collator(list(sets[name].select(rows)))).to(self._args.device)
            with self._accelerator.main_process_first() if fills_store else nullcontext():
                answer = self.reference.log_probs(batch)
            self.watch.check_rows(policy, batch, answer, f"row {', '.join(map(str, rows))} of the {name} set")

    def _few_rows(self) -> PairBatch | None:
        """Rows of the training set, the longest among them if it is no stream."""
        pairs: Any = self._sets()["train"]
        if isinstance(pairs, Dataset):
            return RowsToScore(pairs, self._collator, self._args).some(_PROBED_ROWS)
        return batch_of(self._collator(list(pairs.take(_SENTINEL_PAIRS))))

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
