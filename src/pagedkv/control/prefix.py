"""The exact prefix index: a trie of full, committed blocks, stored in one hash table.

The key of a node is (parent block, token ids of the block). The hash only finds the chain; parent and token ids are
compared on every hit. The first block of a prefix hangs under its namespace: parent ``-1 - namespace``.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.recurrent import drop_all_snapshots, drop_snapshot, snapshot_of
from pagedkv.control.state import LIVE, MAIN, OPAQUE, State, with_roots
from pagedkv.errors import bad_argument
from pagedkv.jit import borrowed, call_kernel, compiled, inlined
from pagedkv.validate import shown

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
    """Return the bucket of the key (parent, ``ids[start : start + block_size]``).

    Ids go through a secret factor and are folded before they meet: otherwise ids that differ in their highest bits
    only could be chosen to cancel out, as what a multiplication makes of those bits is no secret.
    """
    counters = state.counters[0]
    factor = np.uint64(counters.factor)
    mixed = (np.uint64(counters.seed) ^ np.uint64(np.int64(parent) & 0xFFFFFFFF)) * _STEP
    for i in range(start, start + counters.block_size):
        token = np.uint64(ids[i]) * factor
        mixed = (mixed ^ token ^ (token >> _SHIFT)) * _STEP
        mixed ^= mixed >> _SHIFT
    return np.int64(mixed >> _SHIFT) & (len(state.buckets) - 1)


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
def walk(state: State, namespace: int, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int32]) -> tuple[int, int]:
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
def match_full_blocks(
    state: State, namespace: int, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int32]
) -> tuple[int, int]:
    """Find the blocks that `ids` can reuse: those on the walk, up to the last snapshot where sequences have states.

    Writes them to `out`; returns how many, and the trie node at their end.
    """
    found, parent = walk(state, namespace, ids, out)
    if len(state.states) > 0:
        while found > 0 and snapshot_of(state, out[found - 1]) < 0:
            found -= 1
        parent = out[found - 1] if found > 0 else -1 - namespace
    return found, parent


@inlined
def match_partial_block(state: State, parent: int, ids: npt.NDArray[np.int64], start: int) -> tuple[int, int]:
    """Return the block under `parent` that holds the most tokens of what is left of `ids`, and how many it holds."""
    size = state.counters[0].block_size
    limit = min(size, len(ids) - 1 - start)
    if limit <= 0 or len(state.states) > 0 or state.counters[0].whole_hits != 0:
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
    record.indexed = 1 + (call_kernel(state.kernels.on_store, state, block) if state.kernels.on_store else MAIN)
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
    state.siblings[block, 3] = bucket
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
    bucket = state.siblings[block, 3] & (len(state.buckets) - 1)  # as it was: there may be 2³² buckets
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
    if len(state.states) > 0:
        drop_snapshot(state, block)
    if counters.logging != 0:
        state.log[counters.log_len] = -block - 1
        counters.log_len += 1
    return parent


# Namespaces: every cache_salt is a root of the prefix index of its own, so isolation is structural.


def checked_salt(cache_salt: Any) -> str:
    """Return the salt; what is no str is InvalidOperation."""
    if not isinstance(cache_salt, str):
        hint = "bytes are .decode()d" if isinstance(cache_salt, bytes) else "write str(…)"
        raise bad_argument("cache_salt", "a str", shown(cache_salt), hint)
    return cache_salt


def name_of(cache_salt: str) -> int:
    """Return a 32-bit number for a salt that stays the same when the salt comes back under another number."""
    return int.from_bytes(blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=4).digest(), signed=True)


class Namespaces:
    """Numbers for salts. A number is used again once no block and no sequence belongs to it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._salts: list[str] = []  # by number; one that is not in use keeps its last
        self._spare: list[int] = []
        self._sweep_at = 16

    def find(self, cache_salt: str) -> int | None:
        """Return the number of a salt that is in use, else None."""
        return self._numbers.get(checked_salt(cache_salt))

    def salt_of(self, number: int) -> str:
        """Return the salt behind a number."""
        return self._salts[number]

    def enter(self, state: State, cache_salt: str) -> tuple[State, int]:
        """Return the number of a salt, and the state with room for its root."""
        number = self.find(cache_salt)
        if number is None:
            number = self.offer(state)
            if number >= len(state.roots):
                state = with_roots(state, number + 1)
            state.roots[number, 3] = name_of(cache_salt)
            self.take(cache_salt, number)
        return state, number

    def offer(self, state: State) -> int:
        """Return a number that no salt has; `take` gives it to one, once there is room for it in the roots."""
        if len(self._numbers) >= self._sweep_at:
            self._sweep(state)
        while self._spare and self._is_taken(self._spare[-1]):
            self._spare.pop()
        return self._spare[-1] if self._spare else len(self._salts)

    def take(self, cache_salt: str, number: int) -> None:
        """Give a salt the number that was offered."""
        self._salts[number : number + 1] = [cache_salt]
        self._numbers[cache_salt] = number

    def _is_taken(self, number: int) -> bool:
        return self._numbers.get(self._salts[number]) == number

    def _sweep(self, state: State) -> None:
        """Forget the salts that nothing belongs to; each sweep pays for the next one to come at twice the size."""
        in_use = (state.roots[: len(self._salts), 0] != 0) | (state.roots[: len(self._salts), 2] != 0)
        numbers = {salt: number for salt, number in self._numbers.items() if in_use[number]}
        self._numbers = numbers
        self._spare = [number for number in range(len(self._salts) - 1, -1, -1) if not self._is_taken(number)]
        self._sweep_at = max(16, 2 * len(numbers))


# Forgetting the whole prefix index at once.


@compiled
def clear(state: State) -> int:
    """Make every block unfindable and free the cached ones; returns how many those were."""
    state = borrowed(state)
    counters = state.counters[0]
    counters.changes += 1
    freed = 0
    for block in range(counters.fresh - 1, -1, -1):  # so that the lowest one is taken first
        record = state.blocks[block]
        if record.ref_count == 0 and record.indexed != 0:
            state.free_stack[counters.free_top] = block
            counters.free_top += 1
            record.num_tokens = 0
            freed += 1
        record.indexed = 0
        record.recent_hits = 0
        record.num_children = 0
        record.pins = 0
        record.heap_pos = 0
        record.hash_next = 0
    drop_all_snapshots(state)
    state.buckets[:] = 0
    state.siblings[:] = 0
    state.roots[:, :2] = 0
    for row in range(counters.rows_used):
        sequence = state.sequences[row]
        if sequence.marks & LIVE:
            sequence.marks |= OPAQUE
            sequence.num_indexed = 0
    counters.cached = 0
    counters.pinned = 0
    counters.heap_size = 0
    counters.probation_heap_size = 0
    counters.probation = 0
    counters.was_cleared = 1
    counters.log_len = 0
    if counters.logging != 0:
        state.log[0] = 0
        counters.log_len = 1
    return freed
