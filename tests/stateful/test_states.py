"""States of recurrent layers under random interleavings: each is that of its text, and so is each snapshot."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.states import snapshot_texts, state_of

from pagedkv import BlockManager, InvalidOperation, OutOfMemory, PagedKvCache, SequenceNotFound

IDS = st.integers(0, 6)
HEADS = [[], [1, 1, 2, 2], [1, 1, 2, 2, 1, 2, 1, 2], [1, 1, 2, 2, 0, 0, 0, 0, 1, 2, 0, 1]]
TEXTS = st.builds(lambda head, tail: head + tail, st.sampled_from(HEADS), st.lists(st.integers(0, 2), max_size=9))


class States(RuleBasedStateMachine):
    """A cache whose user lets the state of a sequence be a number for its text, and nothing else."""

    kind: type[BlockManager] = PagedKvCache

    @initialize(
        num_states=st.integers(1, 9),
        num_blocks=st.integers(6, 30),
        strategy=st.sampled_from(["lru", "fifo", "s3fifo", "adaptive"]),
        on_full=st.sampled_from(["raise", "evict"]),
    )
    def make(self, num_states, num_blocks, strategy, on_full):
        shapes = {"num_kv_heads": 1, "head_dim": 1} if self.kind is PagedKvCache else {}
        options = {"num_states": num_states, "strategy": strategy, "on_full": on_full}
        self.cache = self.kind(num_blocks, 4, **options, **shapes)
        self.held = torch.zeros(num_states, 1, dtype=torch.float64)
        if self.kind is PagedKvCache:
            self.cache.states.add((1,), torch.float64, "cpu")
            self.held = self.cache.states.tensors[0]
        self.texts: dict[int, list[int]] = {}  # of live sequences, as far as their states have come
        self.salts: dict[int, str] = {}
        self.pinned: set[int] = set()

    def obey(self):
        for source, destination in self.cache.take_state_copies().tolist():
            assert self.kind is BlockManager
            self.held[destination] = self.held[source]

    def compute(self, seq_id, ids):
        """Do what a forward pass does."""
        slot = int(self.cache.state_slots([seq_id])[0])
        text = self.texts[seq_id]
        assert float(self.held[slot]) == state_of(text, self.salts[seq_id]) or not text
        self.texts[seq_id] = text + ids
        self.held[slot] = state_of(self.texts[seq_id], self.salts[seq_id])

    def forget_the_evicted(self):
        for seq_id in [seq_id for seq_id in self.texts if seq_id not in self.cache]:
            del self.texts[seq_id]

    @rule(seq_id=IDS, ids=TEXTS, salt=st.sampled_from(["", "", "a"]), commit=st.booleans())
    def allocate(self, seq_id, ids, salt, commit):
        if seq_id in self.texts:
            return
        predicted = self.cache.match_prefix(ids, salt) if ids else 0
        assert not ids or predicted <= self.cache.match_blocks(ids, salt)
        before = self.cache.free_state_count
        try:
            info = self.cache.allocate(seq_id, ids, cache_salt=salt)
        except OutOfMemory as error:
            assert (error.unit == "slots for states") <= (before == 0)
            return
        self.obey()
        self.forget_the_evicted()
        assert info.num_cached_tokens == predicted and predicted % 4 == 0
        self.texts[seq_id], self.salts[seq_id] = ids[:predicted], salt
        self.compute(seq_id, ids[predicted:])
        if commit:
            self.cache.commit(seq_id)
            self.obey()

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), ids=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def step(self, data, ids):
        seq_id = data.draw(st.sampled_from(sorted(self.texts)))
        if len(self.texts[seq_id]) != self.cache.get_sequence(seq_id).num_tokens:
            return  # tokens were taken back: only its owner could bring the state back
        try:
            plan = self.cache.append_batch([seq_id], [ids])
        except OutOfMemory:
            return
        self.forget_the_evicted()
        self.compute(seq_id, ids)
        self.cache.commit(plan)
        self.obey()

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), dst=IDS)
    def fork(self, data, dst):
        src = data.draw(st.sampled_from(sorted(self.texts)))
        if dst in self.texts:
            return
        before = self.cache.free_state_count
        try:
            self.cache.fork(src, dst)
        except OutOfMemory:
            assert before == 0
            return
        self.obey()
        self.texts[dst], self.salts[dst] = self.texts[src], self.salts[src]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(0, 9), commit=st.booleans())
    def truncate(self, data, count, commit):
        seq_id = data.draw(st.sampled_from(sorted(self.texts)))
        self.cache.truncate(seq_id, min(count, self.cache.get_sequence(seq_id).num_tokens))
        if commit:
            self.cache.commit(seq_id)
            self.obey()

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def pin(self, data):
        seq_id = data.draw(st.sampled_from(sorted(self.texts)))
        if seq_id not in self.pinned:
            self.cache.pin(seq_id)
            self.pinned.add(seq_id)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        seq_id = data.draw(st.sampled_from(sorted(self.pinned)))
        with contextlib.suppress(SequenceNotFound, InvalidOperation):  # pins of what is cleared are gone
            self.cache.unpin(seq_id)
        self.pinned.remove(seq_id)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data):
        seq_id = data.draw(st.sampled_from(sorted(self.texts)))
        self.cache.free(seq_id)
        del self.texts[seq_id]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), window=st.integers(1, 6))
    def stream(self, data, window):
        seq_id = data.draw(st.sampled_from(sorted(self.texts)))
        if seq_id in self.pinned:
            return
        try:
            self.cache.apply_streaming_llm(seq_id, 0, window)
        except OutOfMemory:
            return
        self.cache.free(seq_id)
        del self.texts[seq_id]

    @rule(often=st.integers(0, 5))
    def clear(self, often):
        if often == 0:
            self.cache.clear_prefix_cache()

    @invariant()
    def the_books_agree(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        for slot, text, salt in snapshot_texts(self.cache):
            assert float(self.held[slot]) == state_of(text, salt), "a snapshot of another text"
        assert self.cache.used_state_count == len(self.texts)
        for seq_id, text in self.texts.items():
            slot = int(self.cache.state_slots([seq_id])[0])
            assert not text or float(self.held[slot]) == state_of(text, self.salts[seq_id])
        assert self.cache.used_state_count + self.cache.free_state_count <= self.cache.total_states


@pytest.mark.parametrize("kind", [PagedKvCache, BlockManager])
@pytest.mark.parametrize("examples", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_every_state_is_that_of_its_text(kind, examples):
    machine = type("States", (States,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=50, deadline=None))
