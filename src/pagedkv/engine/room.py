"""Room: the places and blocks that sequences hold, need and leave to others, and what part of them a tenant holds.

A tenant holds the larger of its parts of all places and of all blocks, after A. Ghodsi et al., "Dominant Resource
Fairness: Fair Allocation of Multiple Resource Types", NSDI 2011.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedkv.engine.batch import may_share
from pagedkv.engine.request import Sequence, streaming_blocks
from pagedkv.engine.tenants import DeficitRoundRobin


class Holdings:
    """What the running texts of each tenant hold: the larger of their parts of all places and of all blocks.

    A tenant of twice the weight may hold twice as much to count as an equal.

    Parameters
    ----------
    places, blocks : int
        What there is.
    weights : DeficitRoundRobin
        Knows them.
    """

    def __init__(self, places: int, blocks: int, weights: DeficitRoundRobin) -> None:
        self._all, self._weights = (places, blocks), weights
        self._held: dict[str, tuple[int, int]] = {}

    def add(self, tenant: str, places: int, blocks: int) -> None:
        """Count a text."""
        held = self._held.get(tenant, (0, 0))
        self._held[tenant] = held[0] + places, held[1] + blocks

    def part(self, tenant: str, places: int = 0, blocks: int = 0) -> float:
        """Return what a tenant holds, or would hold with so much more, over its weight."""
        held = self._held.get(tenant, (0, 0))
        largest = max((held[0] + places) / self._all[0], (held[1] + blocks) / self._all[1])
        return largest / self._weights.weight(tenant)

    def descending(self) -> Iterable[str]:
        """Return the tenants that hold something, who holds most first."""
        return sorted(self._held, key=self.part, reverse=True)


@dataclass(slots=True)
class RoomLeft:
    """What running texts leave to others.

    Attributes
    ----------
    places : int
    promised : int
        Blocks that the running texts will still take for what they have to compute.
    held : Holdings
        Who holds how much.
    """

    places: int
    promised: int
    held: Holdings


class Room:
    """Counts places and blocks.

    Parameters
    ----------
    cache
        Whose blocks they are.
    places : int
        Sequences that run at once.
    weights : DeficitRoundRobin
        Knows the weights of tenants.
    """

    def __init__(self, cache: Any, places: int, weights: DeficitRoundRobin) -> None:
        self._cache, self._places, self._weights = cache, places, weights

    def left(self, running: list[Sequence], has_tenants: bool) -> RoomLeft:
        """Return what running texts leave to others; who holds how much only where there are several tenants."""
        places = self.free_places(running)
        promised = sum(map(self.promised, running)) if places > 0 else 0  # without a place nobody asks
        return RoomLeft(places, promised, self.holdings(running if has_tenants else ()))

    def free_places(self, running: Iterable[Sequence]) -> int:
        """Return how many more sequences could run."""
        return self._places - sum(sequence.request.num_unforked + 1 for sequence in running)

    def holdings(self, running: Iterable[Sequence]) -> Holdings:
        """Return who holds how much."""
        held = Holdings(self._places, self._cache.total_blocks, self._weights)
        for sequence in running:
            held.add(sequence.request.tenant, *self.size(sequence))
        return held

    def size(self, *sequences: Sequence, sign: int = 1) -> tuple[int, int]:
        """Return the places and blocks of texts as they are now, prompts whole; shared blocks count for each."""
        places = sum(1 + sequence.request.num_unforked for sequence in sequences)
        blocks = sum(self.promised(each) - (-each.held // self._cache.block_size) for each in sequences)
        return sign * places, sign * blocks

    def needed(self, sequence: Sequence) -> int:
        """Return the blocks that it takes until it decodes, its copies of a shared last block included."""
        size, more = self._cache.block_size, sequence.request.num_unforked + 1
        if sequence.request.params.streaming is not None:
            return streaming_blocks(sequence.length, sequence.request.params.streaming, size) + more
        tokens = sequence.ids if may_share(sequence) else sequence.length
        count: int = self._cache.blocks_to_allocate(tokens, sequence.request.cache_salt)
        return count + more

    def promised(self, sequence: Sequence) -> int:
        """Return the blocks that a running sequence takes for the rest of its prompt, and one for what it writes."""
        size: int = self._cache.block_size
        length = sequence.length - sequence.dropped
        if sequence.request.params.streaming is not None:
            length = min(length, sum(sequence.request.params.streaming) + size)
        rest = -(-length // size) + (-sequence.held // size)
        return max(0, rest) + sequence.request.num_unforked + 1

    def suffices(self, newcomer: Sequence, going: list[Sequence], staying: list[Sequence]) -> bool:
        """Tell whether a sequence could enter if some that run had gone; True only if that is certain."""
        more = 1 + newcomer.request.num_unforked
        if staying and self.free_places(staying) < more:
            return False
        needed = self.needed(newcomer)
        if may_share(newcomer) and any(each.request.cache_salt == newcomer.request.cache_salt for each in going):
            needed = -(-newcomer.length // self._cache.block_size) + more  # what they share now it may have to take
        promised, free = sum(map(self.promised, staying)), self._cache.free_block_count + self._freed(going)
        return bool(needed - (0 if staying else more) + promised <= free)

    def _freed(self, going: list[Sequence]) -> int:
        """Return how many blocks nobody else holds."""
        if not going:
            return 0
        tables = [self._cache.get_sequence(each.seq_id).block_table for each in going]
        blocks, counts = np.unique(np.concatenate(tables), return_counts=True)
        records = self._cache.block_records(blocks.astype(np.int64))
        return int(np.count_nonzero((records["ref_count"] == counts) & (records["pins"] == 0)))
