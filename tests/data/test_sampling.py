"""Micro-batches of similar length: every pair once, equally many for each process, the same from the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from tether.data.sampling import EvenBatches

LENGTHS = st.lists(st.integers(2, 400), min_size=4, max_size=120)


@given(
    lengths=LENGTHS, max_pairs=st.integers(1, 9), budget=st.none() | st.integers(1, 900), processes=st.integers(1, 4)
)
def test_even_batches_hold_every_pair_once_within_the_limits(
    lengths: list[int], max_pairs: int, budget: int | None, processes: int
) -> None:
    try:
        sampler = EvenBatches(lengths, max_pairs=max_pairs, max_tokens=budget, num_processes=processes)
    except ValueError:
        assert len(lengths) % processes  # single pairs that cannot be shared evenly
        return
    batches = list(sampler)
    assert Counter(index for batch in batches for index in batch) == Counter(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert len(batches) % processes == 0
    for batch in batches:
        assert 1 <= len(batch) <= max_pairs
        assert budget is None or len(batch) == 1 or sum(lengths[index] for index in batch) <= budget


def test_even_batches_are_fixed_and_only_their_order_changes_with_the_epoch() -> None:
    lengths = [(7 * number) % 53 + 5 for number in range(100)]
    first, again = (EvenBatches(lengths, max_pairs=8, seed=3) for _ in range(2))
    assert list(first) == list(again)
    epoch_0 = list(first)
    first.set_epoch(1)
    epoch_1 = list(first)
    assert epoch_0 != epoch_1
    assert sorted(epoch_0) == sorted(epoch_1)
    assert list(EvenBatches(lengths, max_pairs=8, seed=4)) != list(again)


def test_grouping_brings_similar_lengths_together() -> None:
    lengths = [(37 * number) % 397 + 5 for number in range(400)]

    def spread(batches: list[list[int]]) -> float:
        return sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)

    in_order = [list(range(start, start + 8)) for start in range(0, len(lengths), 8)]
    assert spread(list(EvenBatches(lengths, max_pairs=8))) < 0.1 * spread(in_order)


@pytest.mark.parametrize("processes", [2, 3])
def test_accelerate_gives_every_row_to_one_process(processes: int) -> None:
    lengths = [(7 * number) % 53 + 5 for number in range(101)]
    sampler = EvenBatches(lengths, max_pairs=8, max_tokens=150, num_processes=processes)
    shards = [
        BatchSamplerShard(sampler, num_processes=processes, process_index=rank, even_batches=False)
        for rank in range(processes)
    ]
    parts = [list(shard) for shard in shards]
    assert len({len(part) for part in parts}) == 1
    seen = Counter(index for part in parts for batch in part for index in batch)
    assert seen == Counter(range(len(lengths)))
