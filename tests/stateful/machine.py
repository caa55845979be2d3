"""Random interleavings of every public call, checked against the plain model after every step."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.stateful.model import RANKS, Index, Sequence, Token, Values, extend

from pagedkv import InvalidOperation, OutOfMemory, SequenceNotFound

IDS = [0, 1, 2, 3, 2**64 - 1]
SALTS = ["", "", "", "a", "a\0"]
STRATEGIES = ["lru", "lfu", "longest_first", "priority:3", "streaming_llm:sink=1,window=3", "fifo"]

# Mostly calls that go through; now and then one for a sequence that is not there, or is there already.
seq_ids = st.runner().flatmap(
    lambda machine: st.sampled_from([*sorted(machine.live), *sorted(machine.live)] * 12 + IDS)
)
new_ids = st.runner().flatmap(lambda machine: st.sampled_from([s for s in IDS if s not in machine.live] * 12 + IDS))
salts = st.sampled_from(SALTS)
often = st.sampled_from([True, True, True, False])
seldom = st.integers(0, 7).map(lambda number: number == 7)
token_ids = st.integers(0, 14).flatmap(lambda count: st.lists(st.integers(0, 1), min_size=count, max_size=count))
tokens = st.one_of(token_ids, token_ids, st.integers(0, 9))
growth = st.one_of(st.lists(st.integers(0, 1), min_size=1, max_size=5), st.integers(0, 4))


class CacheMachine(RuleBasedStateMachine):
    """Rules common to a ``PagedKvCache`` and a ``BlockManager`` with a data plane of its own."""

    steps = 0
    checks_every_step = True

    # ---------------------------------------------------------------- what the two kinds differ in

    def make(self, num_blocks, block_size, **options):
        raise NotImplementedError

    def store(self, plan, values):
        """Write K and V made of these numbers where the plan says."""
        raise NotImplementedError

    def stored(self, slots):
        """Return the numbers found in these slots."""
        raise NotImplementedError

    def contents(self):
        """Return the bytes of the whole pool."""
        raise NotImplementedError

    def obey(self, plan):
        """Do what a plan asks for before anything is written."""
        return plan

    # ---------------------------------------------------------------- beginning

    @initialize(
        num_blocks=st.sampled_from([12, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        block_size=st.sampled_from([2, 3, 2, 4, 1, 5]),
        strategy=st.sampled_from(STRATEGIES),
        on_full=st.sampled_from(["raise", "raise", "evict"]),
        caching=st.integers(0, 7).map(bool),
        collide=st.booleans(),
        prompts=st.lists(st.tuples(token_ids, salts), max_size=4),
    )
    def begin(self, num_blocks, block_size, strategy, on_full, caching, collide, prompts):
        self.size, self.on_full, self.caching = block_size, on_full, caching
        self.cache = self.make(num_blocks, block_size, strategy=strategy, on_full=on_full, prefix_caching=caching)
        if collide:  # every key in one bucket: only comparing the tokens keeps prefixes apart
            self.cache._state = self.cache._state._replace(buckets=np.zeros(1, np.int32))
        self.rank = RANKS[type(self.cache.eviction_strategy).__name__]
        self.levels = getattr(self.cache.eviction_strategy, "levels", 2**20)
        self.live: dict[int, Sequence] = {}
        self.kept_pins: set[int] = set()
        self.values, self.index = Values(), Index(block_size)
        self.findable: set[tuple] = set()
        self.plans: list = []
        self.era = self.clock = self.steps_taken = 0
        self.cache.subscribe(self.index.receive)
        for seq_id, (prompt, salt) in enumerate(prompts):
            self.allocate(seq_id, prompt, salt, 0, True)

    # ---------------------------------------------------------------- helpers

    @property
    def is_rare(self):
        """Every few steps: calls that undo much, or do nothing, must not drown the others."""
        return self.steps_taken % 5 == 4

    def digest(self):
        """Everything that a caller can see."""
        snap = self.cache.snapshot()
        arrays = [snap.ref_count, snap.cached, snap.pinned, snap.indexed, snap.num_tokens, snap.depth, snap.last_access]
        tables = [info.block_ids for info in snap.sequences]
        numbers = (snap.stats, snap.tick, self.cache.free_block_count, self.cache.select_eviction_target())
        return [a.tobytes() for a in arrays], snap.sequences, tables, numbers, self.contents(), dict(self.index.blocks)

    def refused(self, error, call, *args, **kwargs):
        """The call fails with this error and changes nothing."""
        before = self.digest()
        try:
            call(*args, **kwargs)
        except error as raised:
            assert self.digest() == before
            return raised
        raise AssertionError(f"{call.__name__}{args} did not raise {error.__name__}")

    def tables(self, leaving=()):
        return {s: self.cache.get_sequence(s).block_ids for s in self.live if s not in leaving}

    def victims(self, spared=()):
        """The order in which the sequences would be evicted."""
        free_to_go = [s for s in self.live if not self.live[s].is_pinned and s not in spared]
        return sorted(free_to_go, key=lambda s: (self.rank(self.cache.get_sequence(s), self.live[s].created), s))

    def drop(self, seq_id):
        if self.live.pop(seq_id).is_pinned:
            self.kept_pins.add(seq_id)

    def blocks_for(self, count):
        return -(-count // self.size)

    def allocation_need(self, count, ids, salt, leaving=()):
        """Blocks that an allocation needs and can have, once some sequences have left."""
        matched = self.index.match(ids, salt)[0] if ids is not None and self.caching else []
        held = {block for table in self.tables(leaving).values() for block in table} | set(matched)
        pinned = set(np.flatnonzero(self.cache.snapshot().pinned).tolist()) - held
        return self.blocks_for(count) - len(matched), self.cache.total_blocks - len(held) - len(pinned)

    def growth_need(self, counts, leaving=()):
        """Blocks that an append to a batch needs and can have, once some sequences have left."""
        tables, holes = self.tables(leaving), self.holes()
        refs = Counter(block for table in tables.values() for block in table)
        pinned = set(np.flatnonzero(self.cache.snapshot().pinned).tolist())
        available = self.cache.total_blocks - len(refs) - len(pinned - set(refs))
        needed, parents = 0, self.index.parents
        for seq_id, count in counts.items():
            end = len(self.live[seq_id].tokens) + holes[seq_id]
            needed += (self.blocks_for(end + count) - len(tables[seq_id])) if count else 0
            if count and end % self.size:
                tail = tables[seq_id][-1]
                if refs[tail] > 1 or parents[tail] or tail in pinned:
                    needed += 1
                    refs[tail] -= refs[tail] > 1
        return needed, available

    def holes(self):
        if not self.live:
            return {}
        plan = self.obey(self.cache.plan(list(self.live), 0))
        return dict(zip(self.live, (plan.holes[:, 1] - plan.holes[:, 0]).tolist(), strict=True))

    def attempt(self, need, spared, call, *args, **kwargs):
        """Make a call that needs blocks; say whether it went through, and check who had to go for it."""
        needed, available = need()
        order = self.victims(spared)
        if needed > available:
            could_fit = self.on_full == "evict" and (lambda n: n[0] <= n[1])(need(order))
            if not could_fit:
                error = self.refused(OutOfMemory, call, *args, **kwargs)
                assert (error.requested, error.available) == (needed, available)
                return None
        result = call(*args, **kwargs)
        gone = [s for s in self.live if s not in self.cache]
        assert gone == [] or needed > available, "evicted without need"
        assert sorted(gone) == sorted(order[: len(gone)]), "evicted in the wrong order"
        for seq_id in gone:
            self.drop(seq_id)
        return result

    # ---------------------------------------------------------------- sequences

    @rule(
        seq_id=new_ids,
        tokens=tokens,
        salt=salts,
        priority=st.sampled_from([0, 0, 1, 2, 2, 3]),
        write=often,
        reuse=often,
    )
    def allocate(self, seq_id, tokens, salt, priority, write, reuse=True):
        ids = tokens if isinstance(tokens, list) else None
        count = tokens if ids is None else len(ids)
        call = (self.cache.allocate, seq_id, tokens)
        if seq_id in self.live or priority >= self.levels:
            self.refused(InvalidOperation, *call, priority=priority, cache_salt=salt, reuse=reuse)
            return
        predicted = self.cache.match_prefix(ids, salt) if ids and reuse else 0
        shared = self.cache.matching_block_ids(ids, salt) if ids and reuse else ()
        info = self.attempt(
            lambda leaving=(): self.allocation_need(count, ids if reuse else None, salt, leaving),
            (),
            *call,
            priority=priority,
            cache_salt=salt,
            reuse=reuse,
        )
        if info is None:
            return
        self.clock += 1
        made = Sequence(salt, self.era, priority, self.clock)
        extend(made, self.values, count, ids)
        made.committed = info.num_cached_tokens
        assert info.num_cached_tokens == predicted
        assert info.block_ids[: len(shared)] == shared
        assert info.num_cached_tokens < count or count == 0 == info.num_cached_tokens
        if info.num_cached_tokens:
            assert (self.era, salt, *ids[: info.num_cached_tokens]) in self.findable, "cached but never committed"
        for token in made.tokens[: info.num_cached_tokens]:
            token.written = True
        self.live[seq_id] = made
        if write:
            self.write_all(self.cache.plan([seq_id]), commit=True)

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids, tokens=growth, write=st.booleans())
    def append(self, seq_id, tokens, write):
        ids = tokens if isinstance(tokens, list) else None
        count = tokens if ids is None else len(ids)
        if seq_id not in self.live:
            self.refused(SequenceNotFound, self.cache.append, seq_id, tokens)
            return
        need = lambda leaving=(): self.growth_need({seq_id: count}, leaving)  # noqa: E731
        if self.attempt(need, [seq_id], self.cache.append, seq_id, tokens) is not None:
            extend(self.live[seq_id], self.values, count, ids)
            if write:
                self.write_all(self.cache.plan([seq_id], count), commit=False)

    def append_given(self, known, keys, given):
        return self.cache.append_batch(keys, given) if known else self.cache.append_batch(keys, counts=given)

    @precondition(lambda self: self.live or self.is_rare)
    @rule(
        batch=st.dictionaries(seq_ids, st.lists(st.integers(0, 1), max_size=4), max_size=3),
        known=st.booleans(),
        then=st.sampled_from(["write", "commit", "commit", "hold", "nothing"]),
        twice=seldom,
    )
    def append_batch(self, batch, known, then, twice):
        keys = list(batch)
        counts = {s: len(ids) for s, ids in batch.items()}
        given = [batch[s] if known else counts[s] for s in keys]
        append = (
            self.cache.append_batch
            if known
            else lambda seq_ids, counts: self.cache.append_batch(seq_ids, counts=counts)
        )
        unknown = [s for s in keys if s not in self.live]
        if unknown:
            self.refused(SequenceNotFound, append, keys, given)
            return
        if twice and keys:
            self.refused(InvalidOperation, append, [*keys, keys[0]], [*given, given[0]])
            return
        need = lambda leaving=(): self.growth_need(counts, leaving)  # noqa: E731
        plan = self.attempt(need, keys, append, keys, given)
        if plan is None:
            return
        for seq_id in keys:
            extend(self.live[seq_id], self.values, counts[seq_id], batch[seq_id] if known else None)
        self.check_plan(plan, keys, [counts[s] for s in keys])
        self.obey(plan)  # copies are handed out once, also with a plan that is not used
        if then in ("write", "commit"):
            self.write_all(plan, commit=then == "commit")
        elif then == "hold":
            self.hold(plan, keys)

    def hold(self, plan, keys):
        self.plans.append((plan, {s: (self.live[s], self.live[s].version) for s in keys}))

    def check_plan(self, plan, keys, counts):
        """Everything in a plan follows from the tables and the tokens."""
        assert plan.num_sequences == len(keys) and plan.total_tokens == sum(counts)
        assert plan.num_query_tokens.tolist() == counts
        for i, (seq_id, count) in enumerate(zip(keys, counts, strict=True)):
            sequence, table = self.live[seq_id], self.cache.get_sequence(seq_id).block_ids
            start, end = plan.holes[i].tolist()
            total = len(sequence.tokens)
            span = slice(plan.cu_seqlens_q[i], plan.cu_seqlens_q[i + 1])
            assert plan.seq_lens[i] == total and plan.num_dropped[i] == sequence.dropped
            assert tuple(plan.block_tables[i, : len(table)].tolist()) == table
            positions = list(range(total - count, total))
            assert plan.positions[span].tolist() == positions
            assert plan.text_positions[span].tolist() == [p + sequence.dropped for p in positions]
            places = [p if p < start else p + end - start for p in positions]
            assert plan.slot_mapping[span].tolist() == [
                table[p // self.size] * self.size + p % self.size for p in places
            ]

    def write_all(self, plan, commit):
        """Write the query tokens of a fresh plan, then say so."""
        self.obey(plan)
        numbers = []
        keys = [int(s) % 2**64 for s in plan.seq_ids]
        for seq_id, count in zip(keys, plan.num_query_tokens.tolist(), strict=True):
            sequence = self.live[seq_id]
            for token in sequence.tokens[len(sequence.tokens) - count :]:
                token.written = True
                numbers.append(token.value)
        self.store(plan, numbers)
        if commit and all(token.written for s in keys for token in self.live[s].tokens):
            self.cache.commit(plan)
            for seq_id in keys:
                self.committed(seq_id, len(self.live[seq_id].tokens))

    def committed(self, seq_id, upto):
        sequence = self.live[seq_id]
        sequence.committed = max(sequence.committed, min(upto, len(sequence.tokens)))
        assert self.cache.get_sequence(seq_id).num_committed_tokens == sequence.committed
        if sequence.is_opaque or not self.caching:
            return
        full = min(sequence.committed, len(sequence.ids)) // self.size * self.size
        for end in range(1, full + 1):
            self.findable.add((sequence.era, sequence.salt, *sequence.ids[:end]))
        blocks = self.cache.get_sequence(seq_id).block_ids[: full // self.size]
        if all(self.cache.block(block).ref_count == 1 for block in blocks):  # no duplicate that forks still share
            assert self.cache.match_prefix([*sequence.ids[:full], 7], sequence.salt) == full

    @precondition(lambda self: self.live)
    @rule(data=st.data(), hold=st.booleans())
    def plan_some(self, data, hold):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True))
        counts = [data.draw(st.integers(0, len(self.live[s].tokens))) for s in keys]
        plan = self.obey(self.cache.plan(keys, counts))
        self.check_plan(plan, keys, counts)
        default = self.obey(self.cache.plan(keys))
        self.check_plan(default, keys, [len(self.live[s].tokens) - self.live[s].committed for s in keys])
        if hold:
            self.hold(plan, keys)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), write=st.booleans())
    def use_held_plan(self, data, write):
        plan, made_for = self.plans.pop(data.draw(st.integers(0, len(self.plans) - 1)))
        if any(s not in self.live for s in made_for):
            self.refused(SequenceNotFound, self.cache.commit, plan)
            return
        same = all(self.live[s] is made for s, (made, _) in made_for.items())
        if not same or any(self.live[s].stale_before > at for s, (_, at) in made_for.items()):
            self.refused(InvalidOperation, self.cache.commit, plan)
            return
        if write and all(made.version == at for made, at in made_for.values()):
            tables = [self.cache.get_sequence(s).block_ids for s in made_for]
            if all(plan.block_tables[i, : len(t)].tolist() == list(t) for i, t in enumerate(tables)):
                self.write_all(plan, commit=False)
        if any(self.live[s].stale_before == at and at for s, (_, at) in made_for.items()):
            return  # made between taking back and appending: may be refused
        lens = dict(zip(made_for, plan.seq_lens.tolist(), strict=True))
        if all(token.written for s in made_for for token in self.live[s].tokens[: lens[s]]):
            self.cache.commit(plan)
            for seq_id in made_for:
                self.committed(seq_id, lens[seq_id])

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids)
    def commit_by_id(self, seq_id):
        if seq_id not in self.live:
            self.refused(SequenceNotFound, self.cache.commit, seq_id)
        else:
            missing = [not token.written for token in self.live[seq_id].tokens]
            if any(missing):
                self.write_all(self.cache.plan([seq_id], len(missing) - missing.index(True)), commit=False)
            self.cache.commit(seq_id)
            self.committed(seq_id, len(missing))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), with_plan=st.booleans())
    def commit_some(self, data, with_plan):
        """The first tokens of some sequences, as many as are written or fewer."""
        keys = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True))
        lens = [len(self.live[s].tokens) for s in keys]
        given = self.obey(self.cache.plan(keys, lens)) if with_plan else keys
        written = [[token.written for token in self.live[s].tokens] for s in keys]
        upto = [data.draw(st.integers(0, [*row, False].index(False))) for row in written]
        if keys:
            self.refused(InvalidOperation, self.cache.commit, given, upto=[*upto[:-1], lens[-1] + 1])
        self.cache.commit(given, upto=upto)
        for seq_id, count in zip(keys, upto, strict=True):
            self.committed(seq_id, count)

    @precondition(lambda self: self.live or self.is_rare)
    @rule(src=seq_ids, dst=new_ids)
    def fork(self, src, dst):
        if src not in self.live:
            self.refused(SequenceNotFound, self.cache.fork, src, dst)
        elif dst in self.live:
            self.refused(InvalidOperation, self.cache.fork, src, dst)
        else:
            free = self.cache.free_block_count
            info = self.cache.fork(src, dst)
            assert info.block_ids == self.cache.get_sequence(src).block_ids and self.cache.free_block_count == free
            self.live[dst] = twin = deepcopy(self.live[src])
            self.clock += 1
            twin.created, twin.is_pinned, twin.stale_before = self.clock, False, 0

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids, less=st.integers(-1, 7))
    def truncate(self, seq_id, less):
        keep = max(0, len(self.live[seq_id].tokens) - less) if seq_id in self.live else less + 1
        if seq_id not in self.live:
            self.refused(SequenceNotFound, self.cache.truncate, seq_id, keep)
            return
        sequence = self.live[seq_id]
        if keep > len(sequence.tokens):
            self.refused(InvalidOperation, self.cache.truncate, seq_id, keep)
            return
        self.cache.truncate(seq_id, keep)
        if keep < len(sequence.tokens):
            del sequence.tokens[keep:], sequence.ids[keep:]
            sequence.committed = min(sequence.committed, keep)
            sequence.take_back()

    @precondition(lambda self: self.live)
    @rule(seq_id=seq_ids, less=st.integers(1, 6), tokens=growth)
    def roll_back_and_go_on(self, seq_id, less, tokens):
        """What speculative decoding does: commit, take back, append something else."""
        if seq_id in self.live:
            self.commit_by_id(seq_id)
            self.truncate(seq_id, less)
            self.append(seq_id, tokens, True)

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids)
    def free(self, seq_id):
        if seq_id not in self.live:
            self.refused(SequenceNotFound, self.cache.free, seq_id)
            return
        self.cache.free(seq_id)
        self.drop(seq_id)
        self.refused(SequenceNotFound, self.cache.free, seq_id)

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids)
    def touch(self, seq_id):
        if seq_id not in self.live:
            self.refused(SequenceNotFound, self.cache.touch, seq_id)
            return
        before = self.cache.get_sequence(seq_id)
        after = self.cache.touch(seq_id)
        assert after.access_count == before.access_count + 1 and after.last_access > before.last_access

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids, priority=st.integers(-1, 3))
    def set_priority(self, seq_id, priority):
        if not 0 <= priority < self.levels:
            self.refused(InvalidOperation, self.cache.set_priority, seq_id, priority)
        elif seq_id not in self.live:
            self.refused(SequenceNotFound, self.cache.set_priority, seq_id, priority)
        else:
            assert self.cache.set_priority(seq_id, priority).priority == priority
            self.live[seq_id].priority = priority

    # ---------------------------------------------------------------- pins

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids, less=st.one_of(st.none(), st.integers(-1, 7)))
    def pin(self, seq_id, less):
        count = less
        if less is not None and seq_id in self.live:
            count = max(0, len(self.live[seq_id].tokens) - less)
        if seq_id not in self.live:
            self.refused(SequenceNotFound, self.cache.pin, seq_id, count)
        elif count is not None and count > len(self.live[seq_id].tokens):
            self.refused(InvalidOperation, self.cache.pin, seq_id, count)
        else:
            assert self.cache.pin(seq_id, count).pinned
            self.live[seq_id].is_pinned = True

    @precondition(lambda self: self.kept_pins or self.is_rare)
    @rule(seq_id=seq_ids)
    def unpin(self, seq_id):
        pinned = seq_id in self.live and self.live[seq_id].is_pinned
        if seq_id in self.kept_pins or pinned:
            self.cache.unpin(seq_id)
            self.kept_pins.discard(seq_id)
            if seq_id in self.live:
                self.live[seq_id].is_pinned = False
        else:
            self.refused(InvalidOperation if seq_id in self.live else SequenceNotFound, self.cache.unpin, seq_id)

    # ---------------------------------------------------------------- eviction

    @precondition(lambda self: self.is_rare)
    @rule()
    def leave_no_room_in_tables(self):
        state = self.cache._state
        self.cache._state = state._replace(tables=state.tables[: state.counter("tables_top")].copy())

    @rule()
    def evict(self):
        order = self.victims()
        assert self.cache.select_eviction_target() == (order[0] if order else None)
        if not order:
            self.refused(InvalidOperation, self.cache.evict)
            return
        assert self.cache.evict() == order[0]
        self.drop(order[0])

    @precondition(lambda self: self.is_rare)
    @rule(level=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0, -3, None]))
    def evict_to_threshold(self, level):
        order = self.victims()
        evicted = self.cache.evict_to_threshold(level)
        assert evicted == order[: len(evicted)]
        for seq_id in evicted:
            self.drop(seq_id)
        limit = 0.9 if level is None else max(0.0, level)
        assert self.cache.utilization <= limit or len(evicted) == len(order)

    @precondition(lambda self: self.live or self.is_rare)
    @rule(seq_id=seq_ids, sink=st.integers(0, 4), window=st.integers(0, 6))
    def stream(self, seq_id, sink, window):
        call = (self.cache.apply_streaming_llm, seq_id, sink, window)
        if seq_id not in self.live:
            self.refused(SequenceNotFound, *call)
            return
        sequence = self.live[seq_id]
        dropped = len(sequence.tokens) - sink - window
        if dropped > 0 and sequence.dropped and sequence.sink != sink:
            self.refused(InvalidOperation, *call)
            return
        before = self.digest()
        try:
            assert self.cache.apply_streaming_llm(seq_id, sink, window) == max(0, dropped)
        except OutOfMemory as error:
            assert error.requested > error.available == self.cache.free_block_count
            assert self.digest() == before
            return
        if dropped > 0:
            del sequence.tokens[sink : sink + dropped], sequence.ids[sink:]
            sequence.committed = max(min(sequence.committed, sink), sequence.committed - dropped)
            sequence.dropped, sequence.sink, sequence.is_opaque = sequence.dropped + dropped, sink, True
            sequence.version += 1
            sequence.stale_before, sequence.taken_back_at = sequence.version, None

    # ---------------------------------------------------------------- the prefix index

    @rule(ids=token_ids, salt=salts)
    def match_prefix(self, ids, salt):
        before = self.digest()
        found = self.cache.match_prefix(ids, salt)
        assert self.digest() == before
        full, partial = self.index.match(ids, salt)
        assert found == len(full) * self.size + partial

        assert self.cache.matching_block_ids(ids, salt) == tuple(full)
        assert self.cache.blocks_to_allocate(ids, salt) == self.blocks_for(len(ids)) - sum(
            self.cache.block(b).ref_count > 0 or self.cache.block(b).is_pinned for b in full
        )

    @precondition(lambda self: self.cache.total_blocks)
    @rule(data=st.data())
    def evict_block(self, data):
        block = data.draw(st.integers(0, self.cache.total_blocks - 1))
        snap, free = self.cache.snapshot(), self.cache.free_block_count
        if not snap.cached[block] or snap.pinned[block] or self.index.parents[block]:
            error = self.refused(InvalidOperation, self.cache.evict_block, block)
            assert error.argument == "block_id" and f"B{block}, which" in error.reason
            return
        parent, tokens, _ = self.index.blocks[block]
        self.cache.evict_block(block)
        assert block not in self.index.blocks and self.cache.free_block_count == free
        assert parent is None or parent in self.index.blocks
        assert self.cache.cached_block_count == int(snap.cached.sum()) - 1

    @precondition(lambda self: self.steps_taken % 40 == 39)
    @rule()
    def clear_prefix_cache(self):
        assert self.cache.cached_block_count == self.cache.clear_prefix_cache()
        assert self.cache.cached_block_count == 0 and self.index.blocks == {}
        self.era += 1
        self.kept_pins.clear()
        self.findable.clear()
        for sequence in self.live.values():
            sequence.is_opaque = True

    # ---------------------------------------------------------------- mistakes

    @precondition(lambda self: self.is_rare)
    @rule(
        seq_id=seq_ids,
        bad=st.sampled_from([-1, 1.5, True, None, "x", [0.5], [-1], [[1], [2, 3]], [[1]], [True], 2**70, float("nan")]),
    )
    def bad_tokens(self, seq_id, bad):
        self.refused(InvalidOperation, self.cache.allocate, seq_id, bad)
        self.refused(InvalidOperation, self.cache.append, seq_id, bad)
        self.refused(InvalidOperation, self.cache.match_prefix, bad)

    @precondition(lambda self: self.is_rare)
    @rule(bad=st.sampled_from([-1, 1.0, True, None, "1", 2**64]))
    def bad_ids(self, bad):
        cache = self.cache
        for call in (cache.free, cache.touch, cache.commit, cache.pin, cache.unpin, cache.get_sequence):
            self.refused(InvalidOperation, call, bad)
        self.refused(InvalidOperation, cache.append_batch, [bad])
        self.refused(InvalidOperation, cache.fork, 0, bad)
        assert bad not in cache

    @precondition(lambda self: self.is_rare)
    @rule(seq_id=seq_ids)
    def too_large(self, seq_id):
        if seq_id in self.live:
            spared = [seq_id]
            need = lambda leaving=(): self.growth_need({seq_id: 10**6}, leaving)  # noqa: E731
            append = lambda seq_ids: self.cache.append_batch(seq_ids, counts=10**6)  # noqa: E731
            assert self.attempt(need, spared, append, [seq_id]) is None
        else:
            need = lambda leaving=(): self.allocation_need(10**6, None, "", leaving)  # noqa: E731
            assert self.attempt(need, (), self.cache.allocate, seq_id, 10**6) is None

    # ---------------------------------------------------------------- after every step

    @invariant()
    def everything_holds(self):
        if not hasattr(self, "cache"):
            return
        type(self).steps += 1
        self.steps_taken += 1
        cache = self.cache
        cache.check()
        self.check_counts()
        snap = cache.snapshot()
        assert set(np.flatnonzero(snap.indexed).tolist()) == set(self.index.blocks)
        assert not (snap.ref_count[snap.pinned & ~snap.cached] < 1).any()
        if self.checks_every_step:
            self.check_contents()

    def check_counts(self):
        cache, snap = self.cache, self.cache.snapshot()
        assert cache.sequence_ids == sorted(self.live) and cache.num_sequences == len(self.live)
        held = {block for table in self.tables().values() for block in table}
        assert cache.used_block_count == len(held)
        assert cache.free_block_count == cache.total_blocks - len(held) - int((snap.cached & snap.pinned).sum())
        assert cache.utilization == (len(held) / cache.total_blocks if cache.total_blocks else 0.0)
        for seq_id, sequence in self.live.items():
            info = cache.get_sequence(seq_id)
            assert info.num_tokens == len(sequence.tokens) and info.num_committed_tokens == sequence.committed
            assert info.num_dropped_tokens == sequence.dropped and info.priority == sequence.priority
            assert info.pinned == sequence.is_pinned

    def check_contents(self):
        """Every slot that is written holds what its owner wrote."""
        if not self.live:
            return
        lens = [len(sequence.tokens) for sequence in self.live.values()]
        plan = self.obey(self.cache.plan(list(self.live), lens))
        self.check_plan(plan, list(self.live), lens)
        wanted: list[Token] = [token for sequence in self.live.values() for token in sequence.tokens]
        for token, found in zip(wanted, self.stored(plan.slot_mapping), strict=True):
            assert not token.written or found == token.value, (token, found)
