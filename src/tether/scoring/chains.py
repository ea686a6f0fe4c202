"""The structure of a packed row: chains of tokens, each continuing the sequence of another from some token on.

Planned once for a batch, in plain integers, and passed through a model's forward as one object. Knows no pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tether.types import placed


class Link(NamedTuple):
    """What a chain continues, and its length.

    Attributes:
        parent: Number of an earlier chain; any number if `depth` is 0.
        depth: How many tokens of the parent's sequence come before it, which is the position of its first token.
        length: Its own tokens.
    """

    parent: int
    depth: int
    length: int


class Chain(NamedTuple):
    """Tokens that are neighbours both in the row and in their sequence.

    Attributes:
        start: Position of the first one in the sequence.
        own: Their places in the row.
        before: Places of the tokens that come before them in the sequence, in order.
    """

    start: int
    own: slice
    before: tuple[slice, ...]

    @property
    def length(self) -> int:
        """Its own tokens."""
        length: int = self.own.stop - self.own.start
        return length

    @property
    def sequence(self) -> tuple[slice, ...]:
        """Places of everything that the last token attends to."""
        return (*self.before, self.own)


class VarlenPlan(NamedTuple):
    """Where the keys of each chain are, and where each chain ends, as variable-length attention reads it.

    Attributes:
        key_places: For every key of every chain, its place in the row.
        query_ends, key_ends: Cumulative lengths, from 0, as int32.
        longest_query, longest_key: Lengths of the longest ones.
    """

    key_places: Int[Tensor, " keys"]
    query_ends: Int[Tensor, " chains+1"]
    key_ends: Int[Tensor, " chains+1"]
    longest_query: int
    longest_key: int


class PackedRow:
    """A row of chains, in their order.

    A class of its own, and neither a dataclass nor a container: DDP, FSDP2 and accelerate look into those for tensors
    to move.

    Attributes:
        links: The chains as they were given, three entries each, on the host. Operators take tensors only, and
            `torch.compile` would compile again for other integers, or for a dimension of a single entry.
        chains: The same with places in the row.
    """

    def __init__(self, links: Sequence[Link], device: torch.device | str = "cpu") -> None:
        """Makes the row, for tensors on `device`."""
        self.links: Int[Tensor, " entries"] = torch.tensor(links, dtype=torch.int64, device="cpu").flatten()
        self.chains = chains_of(links)
        self._device = device

    @cached_property
    def pieces(self) -> tuple[list[int], list[list[int]]]:
        """Lengths of the pieces between all ends of slices; and for each chain, the pieces of its sequence."""
        cuts = sorted({cut for chain in self.chains for part in chain.sequence for cut in (part.start, part.stop)})
        number = {cut: index for index, cut in enumerate(cuts)}
        used = [
            [index for part in chain.sequence for index in range(number[part.start], number[part.stop])]
            for chain in self.chains
        ]
        return [stop - start for start, stop in pairwise(cuts)], used

    @cached_property
    def varlen_plan(self) -> VarlenPlan:
        """The plan of variable-length attention, on the device; one for all layers."""
        keys = [np.arange(part.start, part.stop) for chain in self.chains for part in chain.sequence]
        queries = [chain.length for chain in self.chains]
        sequences = [chain.start + chain.length for chain in self.chains]
        ends = (list(accumulate(lengths, initial=0)) for lengths in (queries, sequences))
        places, query_ends, key_ends = placed([np.concatenate(keys), *ends], self._device)
        return VarlenPlan(places, query_ends.int(), key_ends.int(), max(queries), max(sequences))


def chains_of(links: Iterable[Link]) -> tuple[Chain, ...]:
    """The chains of a row, with their places in it."""
    chains: list[Chain] = []
    start = 0
    for parent, depth, length in links:
        before = _first(depth, chains[parent].sequence) if depth else ()
        chains.append(Chain(depth, slice(start, start + length), before))
        start += length
    return tuple(chains)


def _first(num: int, parts: Iterable[slice]) -> tuple[slice, ...]:
    """The first `num` of some places, neighbours joined."""
    found: list[slice] = []
    for part in parts:
        stop = min(part.stop, part.start + num)
        num -= stop - part.start
        if found and found[-1].stop == part.start:
            found[-1] = slice(found[-1].start, stop)
        elif stop > part.start:
            found.append(slice(part.start, stop))
    return tuple(found)
