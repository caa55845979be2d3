"""A BlockManager whose blocks are named by content ids, as traces name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.events import stored_blocks
from pagedkv.control.learner import tell_time
from pagedkv.control.manager import BlockManager
from pagedkv.control.pool import drop_block, put_back, share_block, take_block, use_block
from pagedkv.control.prefix import find_child, link_child, walk
from pagedkv.control.protocol import Strategy, block_scores, block_view, room_for
from pagedkv.control.reclaim import evict_leaf, lowest_leaf
from pagedkv.control.sequence_table import row_of
from pagedkv.control.sequences import carry_out_reclaims
from pagedkv.control.state import MAX_OUTPUTS, State, with_log
from pagedkv.control.turns import tell_output
from pagedkv.errors import bad_argument
from pagedkv.jit import borrowed, call_kernel, compiled, inlined
from pagedkv.spec import MAX_COUNT
from pagedkv.validate import require_int

# Requests whose blocks are named by content ids: matched, computed and released at once, a whole trace in one call.
#
# A trace names every block of a request by an id; such a block is one "token" of a pool with a block size of 1. A
# request that runs alone needs no row of its own: it holds a path of the trie, and a path is safe as long as its
# deepest block is held, because only leaves are ever reclaimed.


@inlined
def _can_take(state: State) -> bool:
    """Tell whether `take_block` finds a block that is not on the path of the running request."""
    counters = state.counters[0]
    return counters.free_top > 0 or counters.fresh < counters.num_blocks or lowest_leaf(state) >= 0


@compiled
def begin_request(
    state: State, namespace: int, ids: npt.NDArray[np.int64], start: int, stop: int, path: npt.NDArray[np.int32]
) -> tuple[int, int]:
    """Find the cached prefix of ``ids[start:stop]``, take blocks for the rest while there are any, commit them.

    Writes the blocks to `path`; returns how many were found, and how many the request has. It holds the deepest one
    found and all those after it. All are taken before the first is stored, as by allocate and commit.
    """
    state = borrowed(state)
    counters = state.counters[0]
    counters.tick += 1
    parent, length = -1 - namespace, stop - start
    hits = 0
    while hits < length:
        child = find_child(state, parent, ids, start + hits)
        if child < 0:
            break
        if hits > 0:
            use_block(state, parent)
        path[hits] = child
        parent = child
        hits += 1
    if hits > 0:
        if state.kernels.on_hit:
            for i in range(hits - 1):
                if state.blocks[path[i]].ref_count == 0:
                    call_kernel(state.kernels.on_hit, state, int(path[i]))
        share_block(state, parent)
    held = hits
    while held < length and _can_take(state):
        block = take_block(state)
        state.contents[block] = ids[start + held]
        state.blocks[block].num_tokens = 1
        path[held] = block
        held += 1
    for i in range(hits, held):
        link_child(state, parent, path[i])
        parent = path[i]
    counters.queries += 1
    counters.hits += hits > 0
    counters.hit_tokens += hits
    return hits, held


@compiled
def end_request(state: State, path: npt.NDArray[np.int32], hits: int, held: int) -> None:
    """Release what `begin_request` holds, tail first."""
    state = borrowed(state)
    for i in range(held - 1, max(hits - 1, 0) - 1, -1):
        drop_block(state, path[i])
    if state.kernels.on_release:
        for i in range(hits - 2, -1, -1):
            if state.blocks[path[i]].ref_count == 0:
                call_kernel(state.kernels.on_release, state, path[i])
    if state.kernels.on_request_end:
        call_kernel(state.kernels.on_request_end, state, 0)


@compiled
def run_requests(
    state: State,
    namespace: int,
    ids: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    path: npt.NDArray[np.int32],
    hits: npt.NDArray[np.int32],
    times: npt.NDArray[np.float64],
    outputs: npt.NDArray[np.int64],
) -> None:
    """Run requests one after the other; ``hits[i]`` becomes what request i found.

    They come at these times and write so many tokens, if they have any.
    """
    state, ids, offsets, path, hits = borrowed(state), borrowed(ids), borrowed(offsets), borrowed(path), borrowed(hits)
    times, outputs = borrowed(times), borrowed(outputs)
    for i in range(len(offsets) - 1):
        if len(times):
            tell_time(state, times[i])
        tell_output(state, outputs[i] if len(outputs) else 0)
        found, held = begin_request(state, namespace, ids, offsets[i], offsets[i + 1], path)
        end_request(state, path, found, held)
        hits[i] = found


@compiled
def drop_chain_tail(state: State, namespace: int, ids: npt.NDArray[np.int64]) -> int:
    """Evict the cached blocks of a chain from its end up to one that is in use, pinned, or continued by another chain.

    Returns how many.
    """
    state = borrowed(state)
    path = np.empty(len(ids), np.int32)
    found, _ = walk(state, namespace, ids, path)
    left = found
    while left > 0 and state.blocks[path[left - 1]].heap_pos != 0:
        left -= 1
        evict_leaf(state, path[left])
        put_back(state, path[left])
    return found - left


@compiled
def follow_log(
    log: npt.NDArray[np.int32],
    contents: npt.NDArray[np.int64],
    held: npt.NDArray[np.int64],
    gone: npt.NDArray[np.int64],
) -> int:
    """Bring ``held[block]``, the content id of a block, up to a log of what was stored and reclaimed.

    Writes what was reclaimed to `gone`; returns how many blocks that were.
    """
    count = 0
    for entry in log:
        if entry > 0:
            held[entry - 1] = contents[entry - 1]
        elif entry < 0:
            gone[count] = held[-entry - 1]
            count += 1
    return count


Ids = npt.NDArray[Any]


def _flat(name: str, array: object, dtypes: tuple[type, ...]) -> Ids:
    """Return the array, contiguous, if it is flat and of one of these types."""
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype not in dtypes:
        wanted = " or ".join(dtype.__name__ for dtype in dtypes)
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else repr(array)
        raise bad_argument(name, f"a flat {wanted} array", f"{got}")
    return np.ascontiguousarray(array)


def _by_request(name: str, numbers: object, dtype: type, count: int) -> Ids:
    """Return the numbers, one for each request, or none."""
    if numbers is None:
        return np.zeros(0, dtype)
    flat = _flat(name, numbers, (dtype,))
    if len(flat) != count:
        raise bad_argument(name, f"one for each of {count} requests", f"{len(flat)}")
    return flat


class ContentCache(BlockManager):
    """The control plane over content ids: one id stands for a whole block of tokens.

    All of a BlockManager's calls work, with ids in place of token ids and a block size of 1; but where a model must
    compute the last token of a prompt again, a trace counts every block that was found, the last one too. `run` serves
    many requests in one call.
    """

    def __init__(
        self, num_blocks: int, strategy: Strategy = "lru", *, clock: Callable[[], float] | None = None
    ) -> None:
        super().__init__(num_blocks, 1, strategy=strategy, whole_hits=True, clock=clock)
        self._given_up: list[Ids] = []

    def run(
        self,
        ids: npt.NDArray[Any],
        offsets: npt.NDArray[np.int64],
        times: npt.NDArray[np.float64] | None = None,
        outputs: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Run requests one after the other: match, allocate, commit, free.

        A request of more blocks than there is room for keeps its first ones.

        Parameters
        ----------
        ids : int32 or int64 [num_accesses]
            Content ids.
        offsets : int64 [num_requests + 1]
            Request i owns ``ids[offsets[i] : offsets[i + 1]]``.
        times : float64 [num_requests], optional
            When they came, in seconds, ascending, for a strategy that learns from pauses; else the clock tells, if the
            cache has one.
        outputs : int64 [num_requests], optional
            How many tokens each of them wrote, for the same strategy; 0 where that is not known.

        Returns
        -------
        int32 [num_requests]
            How many leading blocks of each request were found.
        """
        ids = _flat("ids", ids, (np.int32, np.int64))
        offsets = _flat("offsets", offsets, (np.int64,))
        lengths = np.diff(offsets)
        if not len(offsets) or offsets[0] < 0 or (lengths < 0).any() or offsets[-1] > len(ids):
            raise bad_argument("offsets", f"num_requests + 1 numbers, ascending, 0 … {len(ids)}")
        seconds = _by_request("times", times, np.float64, len(lengths))
        written = _by_request("outputs", outputs, np.int64, len(lengths))
        if (written < 0).any():
            raise bad_argument("outputs", "0 or more tokens", f"{written.min()}")
        path = np.zeros(int(lengths.max(initial=0)), np.int32)
        hits = np.zeros(len(lengths), np.int32)
        with self._lock:
            self._settle()
            namespace = self._enter_namespace("")
            if self._is_scored_in_numpy or self._state.counters[0].logging:
                for i in range(len(lengths)):
                    if len(seconds):
                        tell_time(self._state, seconds.item(i))
                    tell_output(self._state, written.item(i) if len(written) else 0)
                    hits[i] = self._run_observed(namespace, ids, int(offsets[i]), int(offsets[i + 1]), path)
            else:
                run_requests(self._state.packed, namespace, ids, offsets, path, hits, seconds, written)
        return hits

    def tell_output(self, seq_id: int, tokens: int) -> None:
        """Say how many tokens a request writes, for a strategy that learns from it; else its appended blocks count.

        Parameters
        ----------
        seq_id : int
        tokens : int
            0 or more; 0 if that is not known.
        """
        tokens = require_int("tokens", tokens, 0, MAX_COUNT)
        with self._lock:
            self._settle()
            row = row_of(self._state, seq_id)
            self._state.sequences[row].num_outputs = min(tokens, MAX_OUTPUTS)

    def drop_tail(self, ids: Ids) -> int:
        """Give up the cached blocks of a chain, the last one first, up to one that another chain continues.

        To the strategy they are evicted. Blocks that are in use or pinned stay, and so does what is before them.

        Parameters
        ----------
        ids : int32 or int64 [num_blocks]
            Content ids.

        Returns
        -------
        int
            How many blocks are free now.
        """
        ids = _flat("ids", ids, (np.int32, np.int64)).astype(np.int64)
        with self._lock:
            self._begin()
            dropped = int(drop_chain_tail(self._state.packed, self._enter_namespace(""), ids))
            self._finish(0)
        return dropped

    def remember_given_up(self) -> None:
        """Remember from now on which content ids are reclaimed or dropped, for `take_given_up`; the cache is empty."""
        with self._lock:
            self._settle()
            if len(self._state.log) == 1:
                self._state = with_log(self._state)
            held = np.zeros(self.total_blocks, np.int64)

            def follow(log: npt.NDArray[np.int32]) -> None:
                gone = np.empty(len(log), np.int64)
                count = int(follow_log(log, self._state.contents, held, gone))
                if count:
                    self._given_up.append(gone[:count])

            self._listens = True
            self._feed.watch(follow, self._state)

    def take_given_up(self) -> Ids:
        """Return the content ids that were reclaimed or dropped since the last call, in order, int64; forgets them."""
        with self._lock:
            given_up, self._given_up = self._given_up, []
        return np.concatenate([np.zeros(0, np.int64), *given_up])

    def has_room(self, ids: Ids, more: int = 0) -> bool:
        """Tell whether a request of these content ids, and `more` blocks behind them, fits now; changes nothing."""
        ids = _flat("ids", ids, (np.int32, np.int64)).astype(np.int64)
        with self._lock:
            _, needed, available = room_for(self._state, self._enter_namespace(""), len(ids), ids, True)
            return needed + more <= available

    def _run_observed(self, namespace: int, ids: Ids, start: int, stop: int, path: npt.NDArray[np.int32]) -> int:
        """Run one request; a strategy in NumPy scores its blocks, hooks and subscribers hear of it."""
        if self._hooks.decide_reclaims:
            wanted = ids[start:stop].astype(np.int64)
            matched, needed, available = room_for(self._state, namespace, stop - start, wanted, True)
            spared = int(matched[-1]) if len(matched) else -1
            self._order(self._hooks.orders_for(self._state, min(needed, available), spared))
            carry_out_reclaims(self._state.packed)
        found, held = begin_request(self._state.packed, namespace, ids, start, stop, path)
        try:
            self._hooks.hit(self._state, path[:found])
            self._hooks.stored(self._state, stored_blocks(self._state))
            if self._is_scored_in_numpy and held:
                view = block_view(self._state, path[:held])
                scores = block_scores(self._strategy, view, self._state.counter("tick"))
                self._state.blocks["score"][path[:held]] = scores
        finally:
            end_request(self._state.packed, path, found, held)
            if self._listens:
                self._feed.publish(self._state)
        return found
