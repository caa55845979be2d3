"""Sinks and window inside one sequence, at token granularity.

StreamingLLM (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2) keeps the
first ``sink_tokens`` and the last ``window_tokens`` of a sequence. In slots of the block table::

    [0, sink)                 sinks
    [sink, sink + hole_len)   dropped: the rest of the last sink block and the front of the first window block
    [sink + hole_len, end)    window

Blocks that lie wholly between are given back. From then on K and V depend on what was dropped and not only on the
token ids, so the sequence is never committed to the prefix index again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.control.pool import drop_block, replace_by_copy
from pagedkv.control.reclaim import forget
from pagedkv.control.rows import mark_dirty
from pagedkv.control.state import OPAQUE, TRUNCATED, State
from pagedkv.jit import borrowed, compiled


@compiled
def _is_own(state: State, block: int, num_own_children: int) -> bool:
    """Tell whether only this sequence knows `block`: no other owner, no pin, no trie children but its own."""
    record = state.blocks[block]
    is_alone = record.ref_count == 1 and record.pins == 0
    return is_alone and (not record.indexed or record.num_children == num_own_children)


@compiled
def _count_foreign(state: State, row: int, first: int) -> int:
    """Return how many of the blocks from table place `first` on somebody else shares or builds upon."""
    record, table = state.sequences[row], state.tables[row]
    foreign, own_children = 0, 0
    for place in range(record.num_blocks - 1, first - 1, -1):
        block = table[place]
        if _is_own(state, block, own_children):
            own_children = 1 if state.blocks[block].indexed else 0
        else:
            foreign += 1
            own_children = 0
    return foreign


@compiled
def _detach(state: State, row: int, first: int, copies: npt.NDArray[np.int32]) -> int:
    """Make the blocks from table place `first` on private and unindexed, copying where others share them.

    Whoever holds a node of the trie must hold its ancestors, and this sequence is about to let go of some.
    """
    record, table = state.sequences[row], state.tables[row]
    count = 0
    for place in range(record.num_blocks - 1, first - 1, -1):
        block = table[place]
        if not _is_own(state, block, 0):
            replace_by_copy(state, row, place, copies, count)
            count += 1
        elif state.blocks[block].indexed:
            forget(state, block)
    return count


@compiled
def _cuts(state: State, row: int, sink: int, window: int) -> tuple[int, int, int]:
    """Return where the window begins, and the blocks [cut, keep) of the table that hold only dropped tokens."""
    record = state.sequences[row]
    size = state.counters[0].block_size
    cut = (sink + size - 1) // size
    resume = record.num_tokens - window + record.hole_len
    keep = resume // size if window > 0 else record.num_blocks
    return resume, cut, max(keep, cut)


@compiled
def blocks_to_stream(state: State, row: int, sink: int, window: int) -> int:
    """Return how many blocks ``stream_row`` takes for private copies of what others share."""
    state = borrowed(state)
    _, cut, keep = _cuts(state, row, sink, window)
    return _count_foreign(state, row, keep) if keep > cut else 0


@compiled
def stream_row(state: State, row: int, sink: int, window: int) -> tuple[int, npt.NDArray[np.int32]]:
    """Drop everything between sinks and window; the caller has made sure of the blocks that it takes.

    Returns how many tokens were dropped, at least one, and the copies.
    """
    state = borrowed(state)
    record, table = state.sequences[row], state.tables[row]
    size = state.counters[0].block_size
    dropped = record.num_tokens - sink - window
    copies = np.empty((record.num_blocks, 2), np.int32)
    resume, cut, keep = _cuts(state, row, sink, window)
    count = 0
    if keep > cut:
        count = _detach(state, row, keep, copies)
        for place in range(keep - 1, cut - 1, -1):
            drop_block(state, table[place])
        for place in range(keep, record.num_blocks):
            table[place - keep + cut] = table[place]
        record.num_blocks -= keep - cut
    record.hole_start = sink
    record.hole_len = resume - (keep - cut) * size - sink if window > 0 else 0
    record.num_tokens = sink + window
    record.num_dropped += dropped
    record.num_committed = max(min(record.num_committed, sink), record.num_committed - dropped)
    record.num_known = min(record.num_known, sink)
    record.num_indexed = min(record.num_indexed, sink // size)
    record.num_cached = min(record.num_cached, record.num_tokens)
    record.pinned_blocks = min(record.pinned_blocks, cut)
    record.marks |= OPAQUE | TRUNCATED
    mark_dirty(state, row)
    return dropped, copies[:count]
