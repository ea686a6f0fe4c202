"""From tokenized sets to micro-batches on a device: for the precompute pass, and grouped by length for training.

Knows loaders, samplers and accelerate's way with them; knows no model and no reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from tether.config.dpo_config import DPOConfig
from tether.data.collators import Collator
from tether.data.datasets import TOKEN_COLUMNS, batch_columns, batch_of, truncation_of
from tether.data.rounds import FilledOrder, FilledStream, MarkedRows
from tether.data.rows import has_image_column
from tether.data.sampling import EvenBatches
from tether.data.tokenizing import arrow_tables, largest_id
from tether.data.truncation import Truncation
from tether.types import PairBatch

_Numbers: TypeAlias = npt.NDArray[np.int64]
_ROWS_AT_ONCE = 32
_ENOUGH_ROWS = 2048
_ENOUGH_TOKENS = 16_384  # more at once is hardly faster, and a stopped pass loses what is in flight


class RowsToScore:
    """The rows of a set that this process scores: the longest first, rows of one prompt together, each once.

    The processes share the rows between them, evenly by tokens, and every process finds the same shares by itself.

    Args:
        dataset: A tokenized set.
        collator: Makes a batch of rows.
        args: The run's options: which process this is, and how much it takes at once.

    Attributes:
        num_rows: Rows of this process.
        num_tokens: Tokens of them, each row's prompt once.
        max_tokens: Tokens to score at once.
        source: What the set says of where it comes from.
    """

    def __init__(self, dataset: Dataset, collator: Collator, args: DPOConfig) -> None:
        self._dataset, self._collator = token_columns(dataset, args.pair_columns.names), collator
        lengths, groups = pair_lengths(self._dataset, truncation_of(collator)), _prompts(self._dataset)
        order = _longest_first(lengths, groups)
        self._order = _share_of(order, lengths, groups, args.process_index, args.world_size)
        self.num_rows = len(self._order)
        self.num_tokens = int(lengths[self._order].sum())
        self.max_tokens = _tokens_at_once(int(lengths.max()), args)
        said = dataset.info.description or dataset.info.dataset_name or ""
        self.source = (said.strip().splitlines() or [""])[0][:200]

    def __iter__(self) -> Iterator[PairBatch]:
        for start in range(0, self.num_rows, _ROWS_AT_ONCE):
            yield self._batch(self._order[start : start + _ROWS_AT_ONCE].tolist())

    def some(self, count: int) -> PairBatch | None:
        """A batch of so many rows, the longest and others evenly from all lengths; None if this process has none."""
        apart = -(-self.num_rows // count) or 1
        return self._batch(self._order[::apart].tolist()) if self.num_rows else None

    def _batch(self, rows: list[int]) -> PairBatch:
        return replace(batch_of(self._collator(self._dataset.__getitems__(rows))), rows=tuple(rows))


def sampled_rows(sets: Mapping[str, Dataset], count: int) -> dict[str, list[int]]:
    """A few rows of all sets together, by set: the last one, others evenly before it, and one with a large token id.

    Tokens that were added last have the largest ids, and may be in few rows.
    """
    sampled: dict[str, set[int]] = {name: set() for name, rows in sets.items() if len(rows)}
    if not sampled:
        return {}
    largest = {name: _row_of_large_id(sets[name]) for name in sampled}
    newest = max(largest, key=lambda name: largest[name][0])
    sampled[newest].add(largest[newest][1])
    total = sum(map(len, sets.values()))
    for number in range(1, count):
        place = max(total * number // (count - 1) - 1, 0)
        for name, rows in sampled.items():
            if place < len(sets[name]):
                rows.add(place)
                break
            place -= len(sets[name])
    return {name: sorted(rows) for name, rows in sampled.items() if rows}


def _row_of_large_id(dataset: Dataset) -> tuple[int, int]:
    """The largest token id of a set and its row, among so many rows that looking takes no time to speak of."""
    apart = -(-len(dataset) // _ENOUGH_ROWS)
    found, row = largest_id(dataset.select(range(0, len(dataset), apart)))
    return found, row * apart


def _prompts(dataset: Any) -> _Numbers:
    """A number for each row, which rows of one prompt share; in bounded memory."""
    prompts: list[int] = []
    for table in arrow_tables(dataset, TOKEN_COLUMNS):
        lengths = pc.list_value_length(table[TOKEN_COLUMNS[0]]).to_numpy().astype(np.int64)
        ids = pc.list_flatten(table[TOKEN_COLUMNS[0]]).to_numpy()
        for part in np.split(ids, np.cumsum(lengths)[:-1]):
            prompts.append(int.from_bytes(blake2b(part.tobytes(), digest_size=8).digest()))
    return np.unique(np.array(prompts, dtype=np.uint64), return_inverse=True)[1]


def _longest_first(lengths: _Numbers, groups: _Numbers) -> _Numbers:
    """Row numbers: groups by their longest row, and within a group as the rows come."""
    longest = np.zeros(groups.max() + 1, dtype=np.int64)
    np.maximum.at(longest, groups, lengths)
    first = np.full(len(longest), len(groups))
    np.minimum.at(first, groups, np.arange(len(groups)))
    return np.lexsort((np.arange(len(groups)), first[groups], -longest[groups]))


def _share_of(order: _Numbers, lengths: _Numbers, groups: _Numbers, process: int, num_processes: int) -> _Numbers:
    """The rows of one process, in order. Rows of a prompt stay together, unless they are very many."""
    if num_processes == 1:
        return order
    starts = [0]
    for place in range(1, len(order)):
        if groups[order[place]] != groups[order[place - 1]] or place - starts[-1] >= _ROWS_AT_ONCE:
            starts.append(place)
    loads, shares = [0] * num_processes, []
    for part in np.split(order, starts[1:]):
        owner = loads.index(min(loads))
        loads[owner] += int(lengths[part].sum())
        if owner == process:
            shares.append(part)
    return np.concatenate(shares) if shares else order[:0]


def _tokens_at_once(longest: int, args: DPOConfig) -> int:
    if args.precompute_ref_batch_size is not None:
        return args.precompute_ref_batch_size * longest
    trained = args.max_tokens_per_micro_batch or args.per_device_train_batch_size * longest
    return max(trained, min(4 * trained, _ENOUGH_TOKENS))


def counted_loader(
    make: Callable[[Any], DataLoader[Any]], dataset: Any, batch_size: int, accelerator: Accelerator, *, drop_last: bool
) -> DataLoader[Any]:
    """A loader as `make` makes it of a set, whose rows are marked where several processes get one again.

    accelerate fills the last round of batches up with the first rows, and nobody could tell them from the others.

    Args:
        make: Makes a loader that accelerate has prepared.
        dataset: A set, or a stream.
        batch_size: Rows of a batch.
        accelerator: Deals the rows to the processes.
        drop_last: Whether a set's last round is dropped instead.
    """
    if accelerator.num_processes == 1:
        return make(dataset)
    size = batch_size * (1 if accelerator.split_batches else accelerator.num_processes)
    if isinstance(dataset, IterableDataset):
        return make(FilledStream(dataset, size))
    loader: Any = make(MarkedRows(dataset))
    if not drop_last:
        loader.set_sampler(FilledOrder(loader.batch_sampler.batch_sampler.sampler, size))
    return loader  # type: ignore[no-any-return]


def even_loader(
    dataset: Dataset, collator: Collator, max_pairs: int, args: DPOConfig, accelerator: Accelerator
) -> tuple[DataLoader[Any], EvenBatches]:
    """The training batches of `EvenBatches`, dealt to the processes, and the sampler to tell the epoch to."""
    sampler = EvenBatches(
        pair_lengths(dataset, truncation_of(collator)).tolist(),
        max_pairs=max_pairs,
        max_tokens=args.max_tokens_per_micro_batch,
        num_processes=args.world_size,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )
    loader: DataLoader[Any] = DataLoader(
        token_columns(dataset, args.pair_columns.names),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    evened = accelerator.even_batches
    accelerator.even_batches = False  # they are even already, and accelerate cannot even variable sizes
    try:
        return accelerator.prepare(loader), sampler
    finally:
        accelerator.even_batches = evened


def pair_lengths(dataset: Dataset, truncation: Truncation | None) -> _Numbers:
    """Tokens of each pair as it is laid out.

    Args:
        dataset: A tokenized set.
        truncation: Where its rows are cut. None if nobody knows: both sequences count whole, which no cut exceeds.
    """
    lengths: list[_Numbers] = []
    for table in arrow_tables(dataset, TOKEN_COLUMNS):
        prompt, chosen, rejected = (
            pc.list_value_length(table[column]).to_numpy().astype(np.int64) for column in TOKEN_COLUMNS
        )
        whole = 2 * prompt + chosen + rejected
        lengths.append(whole if truncation is None else truncation.num_tokens(prompt, chosen, rejected))
    return np.concatenate(lengths)


def token_columns(dataset: Dataset, further: Sequence[str] = ()) -> Any:
    """The set with what a batch needs of it."""
    names = batch_columns(with_images=has_image_column(dataset.column_names), further=further)
    return dataset.select_columns([name for name in names if name in dataset.column_names])
