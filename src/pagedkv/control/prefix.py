"""The exact prefix index: a trie of full, committed blocks, stored in one hash table.

The key of a node is (parent block, token ids of the block). The hash only finds the chain; parent and token ids are
compared on every hit. The first block of a prefix hangs under its namespace: parent ``-1 - namespace``.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.state import LIVE, MAIN, OPAQUE, State
from pagedkv.errors import bad_argument
from pagedkv.jit import borrowed, compiled, inlined

# Odd 64-bit multipliers with well mixed bits (the golden ratio, and one of SplitMix64's finaliser).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)

# Token-granular reuse looks at no more than this many children of the last matching block, the newest first.
MAX_SIBLINGS = 32


@inlined
def hash_tokens(begin: np.uint64, ids: npt.NDArray[np.int64], start: int, size: int) -> np.uint64:
    """Return a hash of ``ids[start : start + size]`` that goes on from `begin`; its high bits are the best."""
    mixed = begin
    for i in range(start, start + size):
        mixed = (mixed ^ np.uint64(ids[i])) * _STEP
        mixed ^= mixed >> _SHIFT
    return mixed * _FINISH


@inlined
def bucket_of(state: State, parent: int, ids: npt.NDArray[np.int64], start: int) -> int:
    """Return the bucket of the key (parent, ``ids[start : start + block_size]``)."""
    counters = state.counters[0]
    begin = (np.uint64(counters.seed) ^ np.uint64(np.int64(parent) & 0xFFFFFFFF)) * _STEP
    return np.int64(hash_tokens(begin, ids, start, counters.block_size) >> _SHIFT) & (len(state.buckets) - 1)


@compiled
def find_child(state: State, parent: int, ids: npt.NDArray[np.int64], start: int) -> int:
    """Return the block under `parent` that holds exactly ``ids[start : start + block_size]``, or -1."""
    state = borrowed(state)
    size = state.counters[0].block_size
    link = state.buckets[bucket_of(state, parent, ids, start)]
    while link != 0:
        block = link - 1
        if state.blocks[block].parent == parent:
            base = block * size
            same = 0
            while same < size and state.contents[base + same] == ids[start + same]:
                same += 1
            if same == size:
                return block
        link = state.blocks[block].hash_next
    return -1


@inlined
def best_partial_child(
    state: State, parent: int, ids: npt.NDArray[np.int64], start: int, limit: int
) -> tuple[int, int]:
    """Return the child of `parent` that begins most like ``ids[start : start + limit]``, and how many tokens agree."""
    size = state.counters[0].block_size
    link = state.siblings[parent, 0] if parent >= 0 else state.roots[-1 - parent, 1]
    best, longest, looked = -1, 0, 0
    while link != 0 and looked < MAX_SIBLINGS and longest < limit:
        base = (link - 1) * size
        same = 0
        while same < limit and state.contents[base + same] == ids[start + same]:
            same += 1
        if same > longest:
            best, longest = link - 1, same
        link = state.siblings[link - 1, 1]
        looked += 1
    return best, longest


@inlined
def match_full_blocks(
    state: State, namespace: int, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int32]
) -> tuple[int, int]:
    """Walk down the trie along `ids`, leaving the last token to compute (unless `whole_hits` are counted).

    Writes the blocks found to `out`; returns how many, and the trie node where the walk ended.
    """
    size = state.counters[0].block_size
    parent = -1 - namespace
    found = 0
    while (found + 1) * size < len(ids) + state.counters[0].whole_hits:
        child = find_child(state, parent, ids, found * size)
        if child < 0:
            break
        out[found] = child
        parent = child
        found += 1
    return found, parent


@inlined
def match_partial_block(state: State, parent: int, ids: npt.NDArray[np.int64], start: int) -> tuple[int, int]:
    """Return the block under `parent` that holds the most tokens of what is left of `ids`, and how many it holds."""
    size = state.counters[0].block_size
    limit = min(size, len(ids) - 1 - start)
    if limit <= 0:
        return -1, 0
    if len(ids) - start >= size:
        child = find_child(state, parent, ids, start)
        if child >= 0:
            return child, limit
    return best_partial_child(state, parent, ids, start, limit)


@inlined
def link_child(state: State, parent: int, block: int) -> None:
    """Make a full, committed `block` findable under `parent`."""
    counters = state.counters[0]
    record = state.blocks[block]
    bucket = bucket_of(state, parent, state.contents, block * counters.block_size)
    record.hash_next = state.buckets[bucket]
    state.buckets[bucket] = block + 1
    record.parent = parent
    record.num_children = 0
    record.recent_hits = 0
    record.indexed = 1 + (state.kernels.on_store(state, block) if state.kernels.on_store else MAIN)
    counters.probation += record.indexed - 1
    if parent >= 0:
        record.depth = state.blocks[parent].depth + 1
        state.blocks[parent].num_children += 1
        first = state.siblings[parent, 0]
        state.siblings[parent, 0] = block + 1
    else:
        record.depth = 0
        state.roots[-1 - parent, 0] += 1
        first = state.roots[-1 - parent, 1]
        state.roots[-1 - parent, 1] = block + 1
    state.siblings[block, 0] = 0
    state.siblings[block, 1] = first
    state.siblings[block, 2] = 0
    if first != 0:
        state.siblings[first - 1, 2] = block + 1
    if counters.logging != 0:
        state.log[counters.log_len] = block + 1
        counters.log_len += 1


@inlined
def unlink_leaf(state: State, block: int) -> int:
    """Take a childless `block` out of the trie and return its parent."""
    counters = state.counters[0]
    record = state.blocks[block]
    parent = record.parent
    bucket = bucket_of(state, parent, state.contents, block * counters.block_size)
    if state.buckets[bucket] == block + 1:
        state.buckets[bucket] = record.hash_next
    else:
        before = state.buckets[bucket] - 1
        while state.blocks[before].hash_next != block + 1:
            before = state.blocks[before].hash_next - 1
        state.blocks[before].hash_next = record.hash_next
    following, previous = state.siblings[block, 1], state.siblings[block, 2]
    if following != 0:
        state.siblings[following - 1, 2] = previous
    if previous != 0:
        state.siblings[previous - 1, 1] = following
    elif parent >= 0:
        state.siblings[parent, 0] = following
    else:
        state.roots[-1 - parent, 1] = following
    if parent >= 0:
        state.blocks[parent].num_children -= 1
    else:
        state.roots[-1 - parent, 0] -= 1
    counters.probation -= record.indexed - 1
    record.indexed = 0
    if counters.logging != 0:
        state.log[counters.log_len] = -block - 1
        counters.log_len += 1
    return parent


# Namespaces: every cache_salt is a root of the prefix index of its own, so isolation is structural.


def checked_salt(cache_salt: Any) -> str:
    """Return the salt; what is no str is InvalidOperation."""
    if not isinstance(cache_salt, str):
        raise bad_argument("cache_salt", "a str", f"{cache_salt!r}")
    return cache_salt


def name_of(cache_salt: str) -> int:
    """Return a 32-bit number for a salt that stays the same when the salt comes back under another number."""
    return int.from_bytes(blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=4).digest(), signed=True)


class Namespaces:
    """Numbers for salts. A number is used again once no block and no sequence belongs to it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._salts: dict[int, str] = {}
        self._spare: list[int] = []
        self._sweep_at = 16

    def find(self, cache_salt: str) -> int | None:
        """Return the number of a salt that is in use, else None."""
        return self._numbers.get(checked_salt(cache_salt))

    def salt_of(self, number: int) -> str:
        """Return the salt behind a number."""
        return self._salts[number]

    def enter(self, cache_salt: str, state: State) -> int:
        """Return the number of a salt, a new one if need be; the caller makes room for it in the roots."""
        number = self._numbers.get(checked_salt(cache_salt))
        if number is not None:
            return number
        if len(self._numbers) >= self._sweep_at:
            self._sweep(state)
        number = self._spare.pop() if self._spare else len(self._numbers)
        self._numbers[cache_salt] = number
        self._salts[number] = cache_salt
        return number

    def _sweep(self, state: State) -> None:
        """Forget the salts that nothing belongs to; each sweep pays for the next one to come at twice the size."""
        for salt, number in list(self._numbers.items()):
            if state.roots[number, 0] == 0 and state.roots[number, 2] == 0:
                del self._numbers[salt], self._salts[number]
                self._spare.append(number)
        self._sweep_at = max(16, 2 * len(self._numbers))


# Forgetting the whole prefix index at once, over the arrays.


def clear(state: State) -> int:
    """Make every block unfindable and free the cached ones; returns how many those were."""
    counters = state.counters[0]
    blocks = state.blocks[: int(counters.fresh)]
    cached = np.flatnonzero((blocks["ref_count"] == 0) & (blocks["indexed"] != 0)).astype(np.int32)
    top = int(counters.free_top)
    state.free_stack[top : top + len(cached)] = cached[::-1]
    blocks["num_tokens"][cached] = 0
    for field in ("indexed", "recent_hits", "num_children", "pins", "heap_pos", "hash_next"):
        blocks[field] = 0
    state.buckets.fill(0)
    state.siblings.fill(0)
    state.roots[:, :2] = 0
    live = (state.sequences["marks"] & LIVE) != 0
    state.sequences["marks"][live] |= OPAQUE
    state.sequences["num_indexed"][live] = 0
    counters.free_top = top + len(cached)
    counters.cached = counters.pinned = counters.heap_size = counters.probation_heap_size = counters.probation = 0
    counters.log_len = 0
    return len(cached)
