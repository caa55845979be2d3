"""Requests whose blocks are named by content ids: matched, computed and let go at once, a whole trace in one call.

A trace names every block of a request by an id; such a block is one "token" of a pool with a block size of 1. A request
that runs alone needs no row of its own: it holds a path of the trie, and a path is safe as long as its deepest block is
held, because only leaves are ever reclaimed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.control.adapting import end_of_request
from pagedkv.control.pool import drop_block, share_block, take_block, use_block
from pagedkv.control.prefix import find_child, link_child
from pagedkv.control.reclaim import lowest_leaf
from pagedkv.control.reuse import note_hit, note_release
from pagedkv.control.rules import ADAPTIVE
from pagedkv.control.state import State
from pagedkv.jit import borrowed, compiled


@compiled
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
        if counters.rule == ADAPTIVE:
            for i in range(hits - 1):
                if state.blocks[path[i]].ref_count == 0:
                    note_hit(state, int(path[i]))
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
    """Let go of what `begin_request` holds, tail first."""
    for i in range(held - 1, max(hits - 1, 0) - 1, -1):
        drop_block(state, path[i])
    if state.counters[0].rule == ADAPTIVE:
        for i in range(hits - 2, -1, -1):
            if state.blocks[path[i]].ref_count == 0:
                note_release(state, path[i])
        end_of_request(state)


@compiled
def run_requests(
    state: State,
    namespace: int,
    ids: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    path: npt.NDArray[np.int32],
    hits: npt.NDArray[np.int32],
) -> None:
    """Run requests one after the other; ``hits[i]`` becomes how many blocks request i found."""
    state, ids, offsets, path, hits = borrowed(state), borrowed(ids), borrowed(offsets), borrowed(path), borrowed(hits)
    for i in range(len(offsets) - 1):
        found, held = begin_request(state, namespace, ids, offsets[i], offsets[i + 1], path)
        end_request(state, path, found, held)
        hits[i] = found
