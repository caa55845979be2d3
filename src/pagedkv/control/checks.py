"""check(): every invariant of the control state, verified from scratch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pagedkv.control.prefix import find_child
from pagedkv.control.sequence_table import find_row
from pagedkv.control.state import CLASSES, DIRTY, LIVE, MAIN, OPAQUE, PROBATION, TURNS, State
from pagedkv.errors import CorruptedState


def _require(holds: bool, what: str, *where: Any) -> None:
    if not holds:
        raise CorruptedState(f"{what}: {', '.join(map(str, where))}" if where else what)


def check_state(state: State, kept_pins: dict[int, list[int]]) -> None:
    """Raise CorruptedState at the first invariant that does not hold."""
    rows = [row for row in range(int(state.counters[0].rows_used)) if state.sequences[row].marks & LIVE]
    _check_tables(state, rows)
    _check_sequences(state, rows)
    _check_references(state, rows)
    _check_free_blocks(state)
    _check_trie(state)
    _check_heap(state)
    _check_expected(state)
    _check_notes(state)
    _check_pins(state, rows, kept_pins)
    _check_states(state, rows)
    _check_counters(state, rows)


def _table(state: State, row: int) -> list[int]:
    blocks: list[int] = state.table(row).tolist()
    return blocks


def _check_tables(state: State, rows: list[int]) -> None:
    used = state.sequences[: state.counter("rows_used")]
    segments = sorted(
        (start, room) for start, room in zip(used["table"].tolist(), used["room"].tolist(), strict=True) if room
    )
    end = 0
    for start, room in segments:
        _require(room > 0 and start >= end, "segments of block tables overlap", start, room, end)
        end = start + room
    top, left = state.counter("tables_top"), state.counter("tables_left")
    _require(end <= top <= len(state.tables), "block tables end beyond what was handed out", end, top)
    _require(sum(room for _, room in segments) + left == top, "segments of block tables lost", left, top)
    for row in rows:
        record = state.sequences[row]
        _require(record.num_blocks <= record.room, "block table is longer than its segment", record)


def _check_sequences(state: State, rows: list[int]) -> None:
    size = int(state.counters[0].block_size)
    for row in rows:
        record, table = state.sequences[row], _table(state, row)
        _require(find_row(state.packed, record.seq_id) == row, "sequence not findable by its id", record)
        _require(len(set(table)) == len(table), "a block twice in one sequence", record, table)
        end = int(record.num_tokens + record.hole_len)
        _require(len(table) == -(-end // size), "number of blocks does not fit the tokens", record)
        _require(0 <= record.num_committed <= record.num_tokens, "committed tokens", record)
        _require(0 <= record.num_known <= record.num_tokens, "known tokens", record)
        _require(0 <= record.num_cached <= record.num_tokens, "cached tokens", record)
        _require(0 <= record.pinned_blocks <= len(table), "pinned blocks", record)
        _require(record.hole_len == 0 or record.hole_start <= record.num_tokens, "hole", record)
        _require(record.num_indexed * size <= end, "indexed blocks", record)
        for place, block in enumerate(table):
            _require(0 <= block < len(state.blocks), "block id out of the pool", record, block)
            used = min(size, end - place * size)
            _require(state.blocks[block].num_tokens >= used, "block holds fewer tokens than its owner", record, block)
        _check_path(state, record, table)
    free, link = 0, int(state.counters[0].free_row)
    while link:
        _require(not state.sequences[link - 1].marks & LIVE, "live row in the free list", link - 1)
        link, free = int(state.sequences[link - 1].num_blocks), free + 1
    _require(free + len(rows) == state.counters[0].rows_used, "rows lost", free, len(rows))


def _check_path(state: State, record: Any, table: list[int]) -> None:
    parent = -1 - int(record.namespace)
    for block in table[: record.num_indexed]:
        _require(bool(state.blocks[block].indexed), "block of the indexed prefix is not in the index", record, block)
        _require(state.blocks[block].parent == parent, "indexed prefix is no path of the trie", record, block)
        parent = block
    if not record.marks & OPAQUE:
        return
    # A streaming sequence holds every ancestor of the trie nodes that it still holds.
    held = set(table)
    for block in table:
        above = int(state.blocks[block].parent)
        _require(not state.blocks[block].indexed or above < 0 or above in held, "ancestor not held", record, block)


def _check_references(state: State, rows: list[int]) -> None:
    owners = Counter(block for row in rows for block in _table(state, row))
    expected = np.zeros(len(state.blocks), np.int64)
    for block, count in owners.items():
        expected[block] = count
    wrong = np.flatnonzero(expected != state.blocks["ref_count"])
    for block in wrong[:1]:
        _require(False, "references do not balance", int(block), int(expected[block]), state.blocks[block])


def _check_free_blocks(state: State) -> None:
    counters = state.counters[0]
    free = state.free_stack[: counters.free_top].tolist()
    fresh = int(counters.fresh)
    _require(len(set(free)) == len(free), "a block twice in the free stack", free)
    idle = (state.blocks["ref_count"][:fresh] == 0) & (state.blocks["indexed"][:fresh] == 0)
    _require(sorted(free) == np.flatnonzero(idle).tolist(), "free stack and free blocks differ", free)
    never = state.blocks[fresh:]
    _require(not never["ref_count"].any() and not never["indexed"].any(), "a never used block is in use")
    _require(not state.blocks["pins"][free].any(), "a free block is pinned")
    _require(not state.blocks["num_tokens"][free].any(), "a free block holds tokens")


def _check_trie(state: State) -> None:
    blocks, size = state.blocks, int(state.counters[0].block_size)
    indexed = np.flatnonzero(blocks["indexed"]).tolist()
    children: Counter[int] = Counter()
    for block in indexed:
        record = blocks[block]
        parent = int(record.parent)
        children[parent] += 1
        _require(record.num_tokens == size, "indexed block is not full", block, record)
        found = find_child(state.packed, parent, state.contents, block * size)
        _require(found == block, "indexed block not findable", block)
        if parent >= 0:
            _require(bool(blocks[parent].indexed), "indexed block without its parent", block, parent)
            _require(record.depth == blocks[parent].depth + 1, "depth", block, parent)
            held = blocks[parent].ref_count > 0 or record.ref_count == 0
            _require(bool(held), "active block under a parent that nobody holds", block, parent)
            _require(blocks[parent].pins > 0 or record.pins == 0, "pinned block under an unpinned parent", block)
        else:
            _require(record.depth == 0, "depth", block)
    for block in indexed:
        _require(blocks[block].num_children == children[block], "number of children", block, children[block])
    for namespace in range(len(state.roots)):
        _require(state.roots[namespace, 0] == children[-1 - namespace], "number of roots", namespace)
    links = [(int(state.buckets[bucket]), bucket) for bucket in np.flatnonzero(state.buckets).tolist()]
    for link, bucket in links:
        kept = state.siblings.item(link - 1, 3) & (len(state.buckets) - 1)
        _require(kept == bucket, "bucket of an indexed block", link - 1, kept, bucket)
        following = int(blocks[link - 1].hash_next)
        if following:
            links.append((following, bucket))
    _require(sorted(link for link, _ in links) == [block + 1 for block in indexed], "hash chains and index differ")
    listed = [block for first in _first_children(state, indexed) for block in _siblings(state, first)]
    _require(sorted(listed) == indexed, "sibling lists and index differ")


def _first_children(state: State, indexed: list[int]) -> list[int]:
    return [int(state.siblings[block, 0]) for block in indexed] + list(map(int, state.roots[:, 1]))


def _siblings(state: State, link: int) -> list[int]:
    found: list[int] = []
    previous = 0
    while link:
        _require(state.siblings[link - 1, 2] == previous, "sibling list", link - 1)
        _require(len(found) <= len(state.blocks), "sibling list is a ring", link - 1)
        found.append(link - 1)
        previous, link = link, int(state.siblings[link - 1, 1])
    return found


def _check_order(heap: list[int], ranks: Any, what: str) -> None:
    """Blocks know their places in a heap, and none goes before the one above it."""
    for position, block in enumerate(heap):
        _require(ranks[block].heap_pos == position + 1, "place in the heap", block, position)
        if position:
            above, key = heap[(position - 1) // 2], (int(ranks[block].score), block)
            _require((int(ranks[above].score), above) < key, what, above, block)


def _check_heap(state: State) -> None:
    blocks, counters = state.blocks, state.counters[0]
    leaf = (blocks["indexed"] != 0) & (blocks["ref_count"] == 0) & (blocks["pins"] == 0) & (blocks["num_children"] == 0)
    for queue, size in ((MAIN, counters.heap_size), (PROBATION, counters.probation_heap_size)):
        base = queue * len(blocks)
        heap = state.heap[base : base + int(size)].tolist()
        _check_order(heap, blocks, "heap order")
        expected = np.flatnonzero(leaf & (blocks["indexed"] == 1 + queue)).tolist()
        _require(sorted(heap) == expected, "heap and cached leaves differ", queue, sorted(heap))
    _require(counters.probation == (blocks["indexed"] == 1 + PROBATION).sum(), "probation", counters.probation)


def _check_expected(state: State) -> None:
    """The second order of leaves: all of them while turns rule, else none."""
    if not len(state.expected):
        return
    counters, ranks = state.counters[0], state.expected
    _require(bool(counters.by_turns) == (state.learner.totals[0].rules == TURNS), "what rules", counters.by_turns)
    size, base = int(counters.heap_size) if counters.by_turns else 0, len(state.blocks)
    heap, leaves = state.heap[base : base + size].tolist(), state.heap[:size].tolist()
    _check_order(heap, ranks, "order by turns")
    _require(sorted(heap) == sorted(leaves), "order by turns and cached leaves differ", sorted(heap))
    _require(np.count_nonzero(ranks["heap_pos"]) == size, "a block has a place in the order by turns", size)


def _check_notes(state: State) -> None:
    if not len(state.notes):
        return
    blocks, kinds, numbers = state.blocks, state.notes["kind"], state.learner.totals[0]
    cached = (blocks["ref_count"] == 0) & (blocks["indexed"] != 0)
    for block in np.flatnonzero(cached != (kinds[: len(blocks)] != 0))[:1].tolist():
        _require(False, "notes and cached blocks differ", block, state.notes[block])
    _require(int(kinds.max(initial=0)) <= CLASSES, "class of a note", kinds.max(initial=0))
    _require(numbers.shadow_size <= numbers.room, "shadow caches", numbers)
    for groups in state.learner.places["group"]:
        _require(np.count_nonzero(groups) == numbers.shadow_size, "entries of a shadow cache", numbers)


def _check_pins(state: State, rows: list[int], kept_pins: dict[int, list[int]]) -> None:
    pins = Counter(block for blocks in kept_pins.values() for block in blocks)
    for block in np.flatnonzero(state.blocks["pins"]).tolist():
        _require(state.blocks[block].pins == pins[block], "pins do not balance", block, pins[block])
        _require(bool(state.blocks[block].indexed), "pinned block is not findable", block)
    _require(all(state.blocks[block].pins for block in pins), "a pin was lost", pins)


def _check_states(state: State, rows: list[int]) -> None:
    counters, states = state.counters[0], state.states
    if not len(states):
        return
    used = [int(state.sequence_states[row]) - 1 for row in rows]
    kept = np.flatnonzero(states["block"]).tolist()
    free, link = [], int(counters.free_state)
    while link:
        free.append(link - 1)
        _require(len(free) <= len(states), "free slots are a ring", link - 1)
        link = int(states[link - 1].next)
    _require(sorted(used + kept + free) == list(range(len(states))), "slots lost or used twice", used, kept, free)
    _require(counters.states_used == len(used), "slots of sequences", counters.states_used, len(used))
    _require(counters.states_cached == len(kept), "snapshots", counters.states_cached, len(kept))
    for slot in kept:
        block = int(states[slot].block) - 1
        _require(state.block_states[block] == slot + 1, "snapshot and block differ", slot, block)
        _require(bool(state.blocks[block].indexed), "snapshot of a block that is not in the index", slot, block)
    _require(np.count_nonzero(state.block_states) == len(kept), "a block names a snapshot that is none", kept)


def _check_counters(state: State, rows: list[int]) -> None:
    counters, blocks = state.counters[0], state.blocks
    active, cached = blocks["ref_count"] > 0, (blocks["ref_count"] == 0) & (blocks["indexed"] != 0)
    _require(counters.used == active.sum(), "used blocks", counters.used, active.sum())
    _require(counters.cached == cached.sum(), "cached blocks", counters.cached, cached.sum())
    _require(counters.pinned == (cached & (blocks["pins"] > 0)).sum(), "pinned blocks", counters.pinned)
    _require(counters.allocations - counters.frees == counters.used, "allocations and frees", counters)
    _require(counters.num_sequences == len(rows), "sequences", counters.num_sequences, len(rows))
    _require(counters.peak >= counters.used, "peak", counters.peak)
    dirty = set(state.dirty[: counters.num_dirty].tolist())
    flagged = {row for row in range(int(counters.rows_used)) if state.sequences[row].marks & DIRTY}
    _require(dirty == flagged, "dirty sequences", dirty, flagged)
    namespaces = Counter(int(state.sequences[row].namespace) for row in rows)
    for number in range(len(state.roots)):
        _require(state.roots[number, 2] == namespaces[number], "sequences of a namespace", number)
