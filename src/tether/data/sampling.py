"""Which pairs form a micro-batch: groups of similar length, within a budget of tokens.

Knows lengths, a seed and a number of processes; knows no rows and no trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# Pairs are sorted by length within pools of this many micro-batches, so that batches stay random.
_POOL_BATCHES = 50


class EvenBatches(Sampler[list[int]]):
    """Micro-batches of pairs of similar length, fixed at construction and visited in another order each epoch.

    Every pair is in exactly one micro-batch. Their number is a multiple of `num_processes`, so that all processes get
    the same number without dropping or repeating one. Has no `batch_size` attribute, because accelerate would then drop
    rows of smaller batches.

    Args:
        lengths: Tokens of each pair as it is laid out (prompt once, both responses).
        max_pairs: Maximum pairs of a micro-batch.
        max_tokens: Maximum tokens of a micro-batch; None for no budget. A longer pair is a micro-batch of its own.
        num_processes: Processes that share the micro-batches.
        seed: Fixes the micro-batches and, with the epoch, their order.

    Raises:
        ValueError: If there are fewer pairs than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        max_pairs: int,
        max_tokens: int | None = None,
        num_processes: int = 1,
        seed: int = 0,
    ) -> None:
        if len(lengths) < num_processes:
            raise ValueError(
                f"Cannot share {len(lengths)} pairs between {num_processes} processes: each needs at least one."
            )
        self._seed = seed
        self._epoch = 0
        generator = np.random.default_rng([seed, 0])
        order = generator.permutation(len(lengths)).tolist()
        order = _sorted_in_pools(order, lengths, max_pairs * _POOL_BATCHES)
        self._batches = _equal_shares(_cut(order, lengths, max_pairs, max_tokens), num_processes)
        self._num_processes = num_processes
        self._tokens = [sum(lengths[index] for index in batch) for batch in self._batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        # Micro-batches that run on the processes at the same time have similar sizes, so that none waits for another.
        generator = np.random.default_rng([self._seed, 1, self._epoch])
        by_size = sorted(range(len(self._batches)), key=self._tokens.__getitem__)
        sides = [by_size[start : start + self._num_processes] for start in range(0, len(by_size), self._num_processes)]
        for side in generator.permutation(len(sides)):
            for batch in sides[side]:
                yield list(self._batches[batch])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch (counted from 0)."""
        self._epoch = epoch


def _sorted_in_pools(order: list[int], lengths: Sequence[int], pool: int) -> list[int]:
    pools = (order[start : start + pool] for start in range(0, len(order), pool))
    return [index for members in pools for index in sorted(members, key=lengths.__getitem__)]


def _cut(order: list[int], lengths: Sequence[int], max_pairs: int, max_tokens: int | None) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    tokens = 0
    for index in order:
        full = len(batches[-1]) == max_pairs or (max_tokens is not None and tokens + lengths[index] > max_tokens)
        if batches[-1] and full:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def _equal_shares(batches: list[list[int]], num_processes: int) -> list[list[int]]:
    """Halves the batches with most pairs until their number is a multiple of `num_processes`."""
    while len(batches) % num_processes:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        if len(batches[largest]) == 1:  # nothing left to halve: some process would have no pair
            raise ValueError(f"Cannot share {len(batches)} pairs evenly between {num_processes} processes.")
        batch = batches.pop(largest)
        middle = len(batch) // 2
        batches += [batch[:middle], batch[middle:]]
    return batches
