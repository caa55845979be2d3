"""Recurrent states: slots for what a sequence keeps besides K and V, and snapshots of them at block boundaries.

Recurrent, convolution and linear-attention layers keep a state of all tokens so far, of one size however long the text
is. Every live sequence has a slot for it. A snapshot is a copy in a slot of its own that belongs to a block of the
prefix index: the state behind the last token of the block. A prefix is reused up to its last block with a snapshot.

A slot is free, a sequence's, or a snapshot's. A snapshot goes when its block leaves the index, or, the least recently
used one first, when its slot is needed; those of pinned blocks stay. A sequence that decodes leaves a snapshot at each
block boundary while slots are free; once they are not, its last one moves on with it, and no other has to go.
"""

from __future__ import annotations

from pagedkv.control.state import State
from pagedkv.jit import borrowed, compiled, inlined


@compiled
def oldest_snapshot(state: State) -> int:
    """Return the slot of the snapshot that would be given up next, or -1."""
    state = borrowed(state)
    oldest = -1
    for slot in range(len(state.states)):
        record = state.states[slot]
        if record.block == 0 or state.blocks[record.block - 1].pins > 0:
            continue
        if oldest < 0 or record.last_access < state.states[oldest].last_access:
            oldest = slot
    return oldest


@inlined
def lacks_slot(state: State) -> bool:
    """Tell whether a sequence needs a slot and there is none to be had."""
    return len(state.states) > 0 and state.counters[0].free_state == 0 and oldest_snapshot(state) < 0


@compiled
def count_available_slots(state: State) -> int:
    """Return how many sequences could have a slot now: free ones, and snapshots that would be given up."""
    state = borrowed(state)
    count: int = len(state.states) - state.counters[0].states_used
    for slot in range(len(state.states)):
        record = state.states[slot]
        if record.block != 0 and state.blocks[record.block - 1].pins > 0:
            count -= 1
    return count


@inlined
def _put_back(state: State, slot: int) -> None:
    state.states[slot].next = state.counters[0].free_state
    state.counters[0].free_state = slot + 1


@inlined
def _detach(state: State, slot: int) -> None:
    """Take a snapshot away from its block; the slot is nobody's then."""
    record = state.states[slot]
    state.block_states[record.block - 1] = 0
    record.block = 0
    record.writer = 0
    state.counters[0].states_cached -= 1


@inlined
def _take_slot(state: State) -> int:
    """Return a slot that is nobody's, or -1."""
    counters = state.counters[0]
    if counters.free_state != 0:
        slot: int = counters.free_state - 1
        counters.free_state = state.states[slot].next
        return slot
    slot = oldest_snapshot(state)
    if slot >= 0:
        _detach(state, slot)
        counters.states_reclaimed += 1
    return slot


@inlined
def _note_copy(state: State, source: int, destination: int) -> None:
    counters = state.counters[0]
    state.state_copies[counters.num_state_copies, 0] = source
    state.state_copies[counters.num_state_copies, 1] = destination
    counters.num_state_copies += 1


@inlined
def snapshot_of(state: State, block: int) -> int:
    """Return the slot of a block's snapshot, or -1."""
    slot: int = state.block_states[block] - 1
    return slot


@inlined
def give_slot(state: State, row: int, source: int) -> None:
    """Give a new sequence a slot, with a copy of what `source` holds (-1: nothing); the caller has made sure of it.

    Where the only slot to be had is that of the snapshot itself, the sequence takes it over.
    """
    if source >= 0:
        state.states[source].last_access = state.counters[0].tick
    slot = _take_slot(state)
    state.sequence_states[row] = slot + 1
    state.counters[0].states_used += 1
    if source != slot:
        _note_copy(state, source if source >= 0 else slot, slot)


@inlined
def release_slot(state: State, row: int, last: int) -> None:
    """Take the slot of a sequence that ends; a snapshot of its `last` indexed block (-1: none) that moved on with it
    stays where it is.
    """
    if last >= 0:
        snapshot = snapshot_of(state, last)
        if snapshot >= 0 and state.states[snapshot].writer == row + 1:
            state.states[snapshot].writer = 0
    _put_back(state, state.sequence_states[row] - 1)
    state.sequence_states[row] = 0
    state.counters[0].states_used -= 1


@inlined
def drop_snapshot(state: State, block: int) -> None:
    """Give up the snapshot of a block that leaves the index, if it has one."""
    slot = snapshot_of(state, block)
    if slot >= 0:
        _detach(state, slot)
        _put_back(state, slot)


@inlined
def drop_all_snapshots(state: State) -> None:
    """Give up every snapshot."""
    for slot in range(len(state.states)):
        if state.states[slot].block != 0:
            _detach(state, slot)
            _put_back(state, slot)


@inlined
def keep_snapshot(state: State, row: int, block: int, before: int, writes: bool) -> None:
    """Keep the state of a sequence as it is behind `block`, its last indexed one, which follows on `before` (-1: none).

    `writes`: it got there by a decode step. Nothing is kept where no slot can be had.
    """
    slot = snapshot_of(state, block)
    if slot >= 0:
        state.states[slot].last_access = state.counters[0].tick
        return
    if writes and before >= 0 and state.counters[0].free_state == 0:
        slot = snapshot_of(state, before)
        if slot >= 0 and state.states[slot].writer == row + 1:
            _detach(state, slot)
        else:
            slot = -1
    if slot < 0:
        slot = _take_slot(state)
    if slot < 0:
        return
    snapshot = state.states[slot]
    snapshot.block = block + 1
    snapshot.writer = row + 1 if writes else 0
    snapshot.last_access = state.counters[0].tick
    state.block_states[block] = slot + 1
    state.counters[0].states_cached += 1
    state.counters[0].states_stored += 1
    _note_copy(state, state.sequence_states[row] - 1, slot)
