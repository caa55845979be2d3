"""Free blocks and reference counts: every way a block changes its state.

``free`` -> ``active`` (ref_count > 0) -> ``cached`` (ref_count 0, indexed) -> ``free``
"""

from __future__ import annotations

from pagedkv.control.reclaim import offer, reclaim_lowest, withdraw
from pagedkv.control.state import State
from pagedkv.jit import borrowed, call_kernel, compiled, inlined


@compiled
def available_blocks(state: State) -> int:
    """Return how many blocks an allocation can have now: free, or cached and unpinned."""
    state = borrowed(state)
    counters = state.counters[0]
    return counters.num_blocks - counters.used - counters.pinned


@inlined
def _activate(state: State) -> None:
    counters = state.counters[0]
    counters.used += 1
    counters.allocations += 1
    counters.peak = max(counters.peak, counters.used)


@inlined
def take_block(state: State) -> int:
    """Return a fresh block with one reference; the caller has made sure that one is available."""
    counters = state.counters[0]
    if counters.free_top > 0:
        counters.free_top -= 1
        block = state.free_stack[counters.free_top]
    elif counters.fresh < counters.num_blocks:
        block = counters.fresh
        counters.fresh += 1
    else:
        block = reclaim_lowest(state)
    record = state.blocks[block]
    record.ref_count = 1
    record.num_tokens = 0
    record.num_children = 0
    record.depth = 0
    record.parent = -1
    record.score = 0
    record.priority = 0
    record.created = counters.tick
    record.last_access = counters.tick
    record.access_count = 1
    _activate(state)
    return block


@inlined
def use_block(state: State, block: int) -> None:
    """Count a use at the current tick."""
    record = state.blocks[block]
    record.access_count += 1
    record.recent_hits += record.recent_hits < 255
    record.last_access = state.counters[0].tick


@inlined
def share_block(state: State, block: int) -> None:
    """Add a reference; a cached block becomes active again."""
    counters = state.counters[0]
    record = state.blocks[block]
    if record.ref_count == 0:
        withdraw(state, block)
        if state.kernels.on_hit:
            call_kernel(state.kernels.on_hit, state, block)
        counters.cached -= 1
        if record.pins > 0:
            counters.pinned -= 1
        _activate(state)
    record.ref_count += 1
    use_block(state, block)


@inlined
def put_back(state: State, block: int) -> None:
    """Lay a block that nobody holds and nobody finds on the free stack."""
    counters = state.counters[0]
    state.blocks[block].num_tokens = 0
    state.free_stack[counters.free_top] = block
    counters.free_top += 1


@inlined
def drop_block(state: State, block: int) -> None:
    """Take a reference away; the last one leaves an indexed block cached and any other one free."""
    counters = state.counters[0]
    record = state.blocks[block]
    record.ref_count -= 1
    if record.ref_count > 0:
        return
    counters.used -= 1
    counters.frees += 1
    if record.indexed:
        counters.cached += 1
        if state.kernels.on_release:
            call_kernel(state.kernels.on_release, state, block)
        if record.pins > 0:
            counters.pinned += 1
        offer(state, block)
    else:
        put_back(state, block)


@inlined
def note_copy(state: State, source: int, destination: int) -> None:
    """Note that K and V of a block are to be copied."""
    counters = state.counters[0]
    state.copies[counters.num_copies, 0] = source
    state.copies[counters.num_copies, 1] = destination
    counters.num_copies += 1


@inlined
def replace_by_copy(state: State, row: int, place: int) -> None:
    """Copy-on-write: give `row` a block of its own at table `place`, and note the copy of K and V to be made."""
    size = state.counters[0].block_size
    entry = state.sequences[row].table + place
    block = state.tables[entry]
    own = take_block(state)
    for j in range(size):
        state.contents[own * size + j] = state.contents[block * size + j]
    state.blocks[own].num_tokens = state.blocks[block].num_tokens
    state.blocks[own].priority = state.sequences[row].priority
    state.tables[entry] = own
    note_copy(state, block, own)
    state.counters[0].copied += 1
    drop_block(state, block)


@inlined
def pin_block(state: State, block: int) -> None:
    """Add a pin to an indexed block: while it has one, it is never reclaimed."""
    record = state.blocks[block]
    if record.pins == 0 and record.ref_count == 0:
        withdraw(state, block)
        state.counters[0].pinned += 1
    record.pins += 1


@inlined
def unpin_block(state: State, block: int) -> None:
    """Take a pin away."""
    record = state.blocks[block]
    record.pins -= 1
    if record.pins == 0 and record.ref_count == 0:
        state.counters[0].pinned -= 1
        offer(state, block)
