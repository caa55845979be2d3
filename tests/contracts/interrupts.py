"""What an interrupt leaves behind: every public call, stopped before its n-th line, for every n until it returns.

A call that was stopped has happened as a whole or not at all: the books are those before or those after, K and V of
committed tokens are right, copies are handed out, subscribers have heard of everything.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tests.states import snapshot_texts, state_of

import pagedkv
from pagedkv import AllBlocksCleared, BlockManager, BlockRemoved, BlockStored, PagedKvCache

SOURCE = str(Path(pagedkv.__file__).parent)


def interrupted(call: Callable[[], object], line: int) -> bool:
    """Run `call` and raise KeyboardInterrupt before the `line`-th line of pagedkv; returns whether it came so far.

    The end of a ``with`` block is no such place: between the last line within and the release of a lock CPython looks
    at no signal.
    """
    left = line
    entered: dict[object, set[int]] = {}

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event != "line":
            return trace
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if text.startswith("with "):
            seen = entered.setdefault(frame, set())
            if frame.f_lineno in seen:
                return trace
            seen.add(frame.f_lineno)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class Mirror:
    """The index as a subscriber sees it; an event may come twice, but none is lost."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], str]] = {}

    def hear(self, event: object) -> None:
        if isinstance(event, BlockStored):
            self.blocks[event.block_id] = (event.parent_id, event.token_ids, event.cache_salt)
        elif isinstance(event, BlockRemoved):
            self.blocks.pop(event.block_id, None)
        else:
            assert isinstance(event, AllBlocksCleared)
            self.blocks.clear()


class Case:
    """One call, on a cache that is made anew each time."""

    def __init__(self, kind: type[BlockManager], options: dict, prepare: Callable, call: Callable) -> None:
        self.mirror = Mirror()
        if kind is PagedKvCache:
            options = {**options, "num_kv_heads": 1, "head_dim": 2, "dtype": "float32"}
        self.cache = kind(**{"num_blocks": 16, "block_size": 2, **options})
        # What somebody keeps who obeys the plans of a BlockManager.
        self.pool = np.full(self.cache.total_blocks * 2, -1)
        self.states = torch.zeros(self.cache.total_states, 1, dtype=torch.float64)
        if kind is PagedKvCache and self.cache.total_states:
            self.cache.states.add((1,), torch.float64, "cpu")
            self.states = self.cache.states.tensors[0]
        self.cache._state.counters[0].seed = 1
        self.cache.subscribe(self.mirror.hear)
        prepare(self)
        self.call = lambda: call(self)

    def fill(self, seq_id: int, tokens: list[int], commit: bool = True, **options) -> None:
        """Allocate, write and commit: every token's K and V is its id."""
        self.cache.allocate(seq_id, tokens, **options)
        self.write(self.cache.plan([seq_id]), tokens)
        if commit:
            self.cache.commit(seq_id)

    def obey(self, plan) -> None:
        copied = self.pool.reshape(-1, 2)
        copied[plan.copies[:, 1]] = copied[plan.copies[:, 0]]

    def write(self, plan, tokens: list[int]) -> None:
        self.obey(plan)
        values = tokens[len(tokens) - plan.total_tokens :]
        self.pool[plan.slot_mapping] = values
        if isinstance(self.cache, PagedKvCache):
            rows = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 1, 2)
            self.cache.write(0, rows, rows, plan)
        if self.cache.total_states:
            self.obey_states()
            for seq_id in plan.seq_ids.tolist():
                self.states[self.cache.state_slots([seq_id])] = state_of(self.text(seq_id))

    def text(self, seq_id: int) -> list[int]:
        info = self.cache.get_sequence(seq_id)
        plan = self.cache.plan([seq_id], info.num_tokens)
        self.obey(plan)
        return self.cache._state.contents[plan.slot_mapping].tolist()

    def obey_states(self) -> None:
        for source, destination in self.cache.take_state_copies().tolist():
            self.states[destination] = self.states[source]

    def require_states(self) -> None:
        """Check every snapshot against its text, and every state of a text whose tokens are all committed."""
        self.obey_states()
        for slot, text, salt in snapshot_texts(self.cache):
            assert not salt and float(self.states[slot]) == state_of(text)
        for seq_id in self.cache.sequence_ids:
            info = self.cache.get_sequence(seq_id)
            done = state_of(self.text(seq_id)[: info.num_cached_tokens]), state_of(self.text(seq_id))
            held = float(self.states[self.cache.state_slots([seq_id])[0]])
            assert held in done or not info.num_committed_tokens

    def state(self) -> tuple:
        """Everything that a caller can see."""
        snap = self.cache.snapshot()
        books = [getattr(snap, name).tolist() for name in ("ref_count", "cached", "pinned", "indexed", "num_tokens")]
        books.append([self.cache.used_state_count, self.cache.cached_state_count])
        return *books, snap.sequences, snap.stats, snap.tick, self.cache.num_sequences

    def require_whole(self) -> None:
        """Check the books, the subscriber's mirror, and K and V of every committed token against its id."""
        assert not self.cache._lock._is_owned()
        self.cache.check()
        state = self.cache._state
        indexed = np.flatnonzero(self.cache.snapshot().indexed).tolist()
        assert sorted(self.mirror.blocks) == indexed
        for block, (parent, ids, _) in self.mirror.blocks.items():
            assert state.contents[2 * block : 2 * block + 2].tolist() == list(ids)
            assert (int(state.blocks[block].parent) if parent is not None else None) == parent
        if self.cache.total_states:
            self.require_states()
        live = self.cache.sequence_ids
        if live:
            self.obey(self.cache.plan(live, 0))
        for seq_id in live:
            info = self.cache.get_sequence(seq_id)
            plan = self.cache.plan([seq_id], info.num_tokens)
            slots = plan.slot_mapping[: info.num_committed_tokens]
            expected = state.contents[slots].tolist()
            assert self.pool[slots].tolist() == expected
            if isinstance(self.cache, PagedKvCache):
                for side in (self.cache.storage.keys(0), self.cache.storage.values(0)):
                    assert side.reshape(-1, 2)[torch.from_numpy(slots.copy())].tolist() == [[t, t] for t in expected]


def two_texts(case: Case) -> None:
    """Two live texts of which the second begins like the first, one text pinned and freed, and some cached blocks."""
    case.fill(1, [1, 2, 3, 4, 5])
    case.fill(2, [1, 2, 3, 4, 9, 9, 9])
    case.fill(3, [7, 7, 8, 8], cache_salt="a")
    case.cache.pin(3)
    case.cache.free(3)
    case.fill(4, [6, 6, 5, 5])
    case.cache.free(4)
    case.cache.fork(1, 5)


def full(case: Case) -> None:
    """Nothing but live sequences, and all blocks taken."""
    for seq_id in range(1, 5):
        case.fill(seq_id, [seq_id] * 7)
    case.cache.fork(1, 5)


def crowded(case: Case) -> None:
    """One live sequence, all other blocks cached."""
    case.fill(1, [1, 1, 2])
    for seq_id in range(2, 9):
        case.fill(seq_id, [10 * seq_id, 1, 2, 3])
        case.cache.free(seq_id)


def many_salts(case: Case) -> None:
    """So many salts that the next one sweeps those that nothing belongs to."""
    two_texts(case)
    for number in range(18):
        case.cache.allocate(100, 1, cache_salt=f"old {number}")
        case.cache.free(100)


class Keeper(pagedkv.LRU):
    """A strategy with all hooks, which scores in NumPy and keeps every block once."""

    def __init__(self) -> None:
        self.__dict__["kept"] = set()

    def score_blocks(self, blocks, now):
        return blocks.last_access + blocks.num_children

    def on_hit(self, blocks, now):
        pass

    def on_store(self, blocks, now):
        pass

    def on_reclaim(self, block, now):
        number = int(block.block_id[0])
        if number in self.kept:
            return None
        self.kept.add(number)
        return now + 10


def streaming(case: Case) -> None:
    two_texts(case)
    case.cache.append(5, [3])


def states(case: Case) -> None:
    """Two texts with states, snapshots at two block boundaries of a third, and one slot that is free."""
    case.fill(1, [1, 2, 3, 4])
    case.cache.append(1, [5, 8])
    case.write(case.cache.plan([1], 2), [1, 2, 3, 4, 5, 8])
    case.cache.commit(1)
    case.fill(2, [1, 2, 3, 4, 9, 9, 9])


def few_states(case: Case) -> None:
    """As many texts as there are slots."""
    for seq_id in range(1, 5):
        case.fill(seq_id, [seq_id] * 3)


def tight(case: Case) -> None:
    """No room in the block tables: the next sequence, or one that grows out of its segment, has them laid out anew."""
    two_texts(case)
    state = case.cache._state
    case.cache._state = state._replace(tables=state.tables[: state.counter("tables_top")].copy())


def first_leaf(cache):
    records = cache.block_records(np.arange(cache.total_blocks))
    return int(np.flatnonzero(cache.snapshot().cached & (records["num_children"] == 0))[0])


HITS = [1, 2, 3, 4, 5, 8, 8]
CALLS: dict[str, tuple[dict, Callable, Callable]] = {
    "allocate": ({}, two_texts, lambda case: case.cache.allocate(9, HITS)),
    "allocate_with_salt": ({}, two_texts, lambda case: case.cache.allocate(9, HITS, cache_salt="b")),
    "allocate_without_reuse": ({}, two_texts, lambda case: case.cache.allocate(9, HITS, reuse=False)),
    "allocate_after_many_salts": ({}, many_salts, lambda case: case.cache.allocate(9, HITS, cache_salt="b")),
    "allocate_moves_tables": ({}, tight, lambda case: case.cache.allocate(9, HITS)),
    "allocate_evicts": ({"on_full": "evict"}, full, lambda case: case.cache.allocate(9, [4, 4, 4, 4, 1, 1, 1])),
    "allocate_evicts_in_numpy": (
        {"on_full": "evict", "strategy": "keeper"},
        full,
        lambda case: case.cache.allocate(9, [1, 1, 1, 1, 2]),
    ),
    "allocate_reclaims": ({}, crowded, lambda case: case.cache.allocate(9, [20, 1, 2, 4] + [3] * 8)),
    "allocate_asks_hooks": (
        {"strategy": "keeper"},
        crowded,
        lambda case: case.cache.allocate(9, [20, 1, 2, 4] + [3] * 8),
    ),
    "allocate_with_state": ({"num_states": 5}, states, lambda case: case.cache.allocate(9, HITS)),
    "allocate_takes_over_a_snapshot": ({"num_states": 4}, states, lambda case: case.cache.allocate(9, HITS)),
    "allocate_evicts_for_a_state": (
        {"num_states": 4, "on_full": "evict"},
        few_states,
        lambda case: case.cache.allocate(9, HITS),
    ),
    "commit_with_state": (
        {"num_states": 6},
        lambda case: (states(case), case.fill(9, [1, 2, 3, 4, 7, 7], False)),
        lambda case: case.cache.commit(9),
    ),
    "fork_with_state": ({"num_states": 5}, states, lambda case: case.cache.fork(2, 9)),
    "free_with_state": ({"num_states": 5}, states, lambda case: case.cache.free(2)),
    "clear_prefix_cache_with_states": ({"num_states": 5}, states, lambda case: case.cache.clear_prefix_cache()),
    "state_slots": ({"num_states": 5}, states, lambda case: case.cache.state_slots([1, 2])),
    "match_blocks": ({"num_states": 5}, states, lambda case: case.cache.match_blocks(HITS)),
    "append": ({}, two_texts, lambda case: case.cache.append(5, [3, 3, 3])),
    "append_moves_tables": (
        {"num_blocks": 64},
        tight,
        lambda case: case.cache.append(1, [3] * 40),
    ),
    "append_evicts": ({"on_full": "evict"}, full, lambda case: case.cache.append(5, [3, 3, 3, 3])),
    "append_batch": ({}, two_texts, lambda case: case.cache.append_batch([1, 5, 2], [[3], [4, 4], [5]])),
    "append_batch_asks_hooks": ({"strategy": "keeper"}, crowded, lambda case: case.cache.append_batch([1], [[3] * 6])),
    "plan": ({}, streaming, lambda case: case.cache.plan([1, 5])),
    "commit": ({}, lambda case: (two_texts(case), case.fill(9, HITS, False)), lambda case: case.cache.commit(9)),
    "commit_some": (
        {},
        lambda case: (two_texts(case), case.fill(9, HITS, False), case.fill(8, HITS[::-1], False)),
        lambda case: case.cache.commit([9, 8], upto=[4, 6]),
    ),
    "matching_block_ids": ({}, two_texts, lambda case: case.cache.matching_block_ids(HITS)),
    "evict_block": ({}, crowded, lambda case: case.cache.evict_block(first_leaf(case.cache))),
    "fork": ({}, two_texts, lambda case: case.cache.fork(2, 9)),
    "fork_moves_tables": ({}, tight, lambda case: case.cache.fork(2, 9)),
    "truncate": ({}, two_texts, lambda case: case.cache.truncate(2, 3)),
    "truncate_in_numpy": ({"strategy": "keeper"}, two_texts, lambda case: case.cache.truncate(2, 3)),
    "free": ({}, two_texts, lambda case: case.cache.free(2)),
    "free_in_numpy": ({"strategy": "keeper"}, two_texts, lambda case: case.cache.free(2)),
    "free_pinned": ({}, lambda case: (two_texts(case), case.cache.pin(2)), lambda case: case.cache.free(2)),
    "touch": ({}, two_texts, lambda case: case.cache.touch(1)),
    "set_priority": ({}, two_texts, lambda case: case.cache.set_priority(1, 3)),
    "pin": ({}, two_texts, lambda case: case.cache.pin(1, 3)),
    "unpin": ({}, lambda case: (two_texts(case), case.cache.pin(1)), lambda case: case.cache.unpin(1)),
    "unpin_freed": ({}, two_texts, lambda case: case.cache.unpin(3)),
    "select_eviction_target": ({}, two_texts, lambda case: case.cache.select_eviction_target([1])),
    "evict": ({}, two_texts, lambda case: case.cache.evict()),
    "evict_in_numpy": ({"strategy": "keeper"}, two_texts, lambda case: case.cache.evict()),
    "evict_to_threshold": ({}, full, lambda case: case.cache.evict_to_threshold(0.3)),
    "evict_to_threshold_in_numpy": ({"strategy": "keeper"}, full, lambda case: case.cache.evict_to_threshold(0.3)),
    "apply_streaming_llm": ({}, streaming, lambda case: case.cache.apply_streaming_llm(5, 1, 2)),
    "clear_prefix_cache": ({}, two_texts, lambda case: case.cache.clear_prefix_cache()),
    "clear_prefix_cache_s3fifo": (
        {"strategy": "s3fifo"},
        two_texts,
        lambda case: case.cache.clear_prefix_cache(),
    ),
    "clear_prefix_cache_adaptive": (
        {"strategy": "adaptive"},
        two_texts,
        lambda case: case.cache.clear_prefix_cache(),
    ),
    "match_prefix": ({}, two_texts, lambda case: case.cache.match_prefix(HITS)),
    "blocks_to_allocate": ({}, two_texts, lambda case: case.cache.blocks_to_allocate(HITS)),
    "snapshot": ({}, two_texts, lambda case: case.cache.snapshot()),
    "hottest_prefixes": ({}, two_texts, lambda case: case.cache.hottest_prefixes()),
    "subscribe": ({}, two_texts, lambda case: case.cache.subscribe(print)()),
    "check": ({}, two_texts, lambda case: case.cache.check()),
}

TENSOR_CALLS: dict[str, tuple[dict, Callable, Callable]] = {
    "write": (
        {},
        lambda case: (two_texts(case), case.cache.append(1, [3])),
        lambda case: case.write(case.cache.plan([1], 1), [3]),
    ),
    "add_layer": ({}, two_texts, lambda case: case.cache.add_layer(1, 2)),
    "attend": (
        {},
        two_texts,
        lambda case: case.cache.attend(0, torch.ones(1, 1, 2), case.cache.plan([2], 1)),
    ),
}


def made(kind: type[BlockManager], name: str) -> Case:
    options, prepare, call = (CALLS | TENSOR_CALLS)[name]
    if options.get("strategy") == "keeper":
        options = {**options, "strategy": Keeper()}
    return Case(kind, options, prepare, call)


def require_whole_or_not_at_all(kind: type[BlockManager], name: str, step: int = 1, start: int = 1) -> int:
    """Interrupt a call before its lines `start`, `start` + `step`, …; returns how many places there were."""
    before, after = made(kind, name).state(), made(kind, name)
    after.call()
    after_state, line = after.state(), start
    while True:
        case = made(kind, name)
        if not interrupted(case.call, line):
            return line - 1
        case.require_whole()
        state = case.state()
        assert state in (before, after_state), f"{name} is half done when it is interrupted before line event {line}"
        has_slot = case.cache.free_state_count > 0 or not case.cache.total_states
        if case.cache.free_block_count >= 2 and has_slot:  # and it goes on
            case.fill(77, [1, 2, 3])
            case.require_whole()
        line += step
