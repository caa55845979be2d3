"""The scheduler: which sequences the next forward pass computes, admission of waiting requests, preemption.

Decoding sequences always take part, one token each. What is left of the token budget goes to prompts: first those that
have begun, then those that wait, by priority and arrival. A request is not admitted if its blocks would have to be
taken from a running one at once, nor while another request is computing a prefix that it can share. A prompt is cut to
what is left of the budget, unless the model takes prompts whole: such a one waits until it fits, or until no other
prompt enters in the same step, and may then go beyond the budget. Where a model keeps states, a prompt is cut where a
snapshot of its state is worth keeping: at its last block boundary, and where it parts from other texts.

When running sequences outgrow the pool, they give back what no layer of the model can see any more, where all have a
sliding window. If that is not enough, one is preempted: of those with the lowest priority the one that the cache's
strategy ranks lowest, but never the one that is first in rank. The committed blocks of a preempted sequence stay
findable until they are needed.

Where several tenants have something to compute, all that holds within a tenant, and between tenants:

- The tokens for prompts are split by deficit round robin, and what a tenant decodes is charged to it.
- Of those that wait, the first one of the tenant that holds least is the next to enter. If it finds no room, nobody
  enters behind it, so that the room which gets free is not taken by others for ever.
- When running sequences outgrow the pool, one of the tenant that holds most is preempted.

A sequence that waits and finds no room has others preempted in two cases: those of a tenant that holds more, if that
one keeps its first text and holds no less than the newcomer's tenant then, and those of its own tenant that have a
lower priority. It is settled before that the newcomer has tokens, a place and blocks in this very step; if not, nobody
goes.

This comes to an end, however small the pool and the budget. Of all that run, call the one that is first in rank the
leader. It gives up its place only to one that is before it in rank, of its own tenant: to the growth of others it is
never the victim, and against other tenants it is the first text of its own. So leaders follow each other in rank, and
there are only so many requests; at last one leader stays until it is done. In every step either somebody writes a
token, and there is a bounded number of them, or nobody decodes, and then the leader's prompt gets on, if by one token.
Where it is a beam search whose other beams wait, these go before all others, and those that hold their blocks go.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pagedkv.control.plan import BatchPlan
from pagedkv.engine.batch import (
    NO_DRAFTS,
    Batch,
    ReadingRoom,
    ScheduledChunk,
    belong_together,
    common_prefix,
    decoding_and_reading,
    drafts,
    fellows,
    make_batch,
    may_share,
    must_restart,
    piece,
    query_tokens,
    whole_length,
)
from pagedkv.engine.offload import Offload
from pagedkv.engine.request import Request, Sequence, SequenceState, shares_prefixes
from pagedkv.engine.room import Holdings, Room, RoomLeft
from pagedkv.engine.runner import Runner
from pagedkv.engine.tenants import DeficitRoundRobin, WaitingLines, rank
from pagedkv.errors import OutOfMemory
from pagedkv.tiers.ladder import Ladder

# Admission of waiting requests.

STEPS_STUCK = 4  # after so many steps those that found no room are asked again, as what was promised may be less
FIRST_IN_LINE = 16  # of what waits, so many are looked at to find out what a tenant wants
Rule = Callable[[Sequence, list[Sequence]], list[Sequence]]  # of those that run, who makes way for a newcomer


class Admission:
    """Takes sequences out of the queue of a scheduler, as budget, places and blocks allow.

    Attributes
    ----------
    stuck : set of str
        Tenants that found no room of late, and nothing was released since: they get no share of a step.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._cache = scheduler.cache
        self._shares_prefixes = shares_prefixes(scheduler.runner)
        self.stuck: set[str] = set()
        self._steps = 0

    def admit(self, budget: int, shares: Counter[str] | None, admitted: list[ScheduledChunk]) -> None:
        """Admit sequences that compute up to `budget` tokens now into `admitted`; their blocks are allocated.

        Where tenants have `shares` of the budget, what they leave over is there for all.
        """
        scheduler = self._scheduler
        if budget <= 0 or not scheduler.waiting:
            return
        before = scheduler.num_preemptions
        room = scheduler.room.left(scheduler.running, scheduler.has_tenants)
        budget = self._admit(budget, room, shares, admitted)
        # Who has just made way does not come back in the same step.
        if budget > 0 and shares is not None and scheduler.num_preemptions == before:
            self._admit(budget, room, None, admitted)

    def _admit(self, budget: int, room: RoomLeft, shares: Counter[str] | None, admitted: list[ScheduledChunk]) -> int:
        """Admit whose turn it is, within shares or without; returns what is left of the budget."""
        scheduler = self._scheduler
        lines, passed_over = scheduler.waiting.in_turn(2 * scheduler.max_num_seqs + 2), 0
        while budget > 0 and passed_over <= scheduler.max_num_seqs:
            sequence = _next_of(lines, room.held)
            if sequence is None:
                break
            tenant, size = sequence.request.tenant, 1 + sequence.request.num_unforked
            share = budget if shares is None else min(budget, shares[tenant])
            if share <= 0:
                lines.pop(tenant, None)
                continue
            has_place = room.places >= size or not scheduler.running
            if has_place or self._may_displace(sequence):
                if self._awaits_prefix(sequence):
                    passed_over += 1
                    continue
                if not scheduler.runner.chunkable and admitted and whole_length(sequence, scheduler.runner) > budget:
                    break  # it is not cut; alone it may go beyond the budget
            count = self._enter(sequence, share, room.promised) if has_place else 0
            if count == 0 and self._may_displace(sequence) and self._make_way(sequence, admitted):
                room = scheduler.room.left(scheduler.running, scheduler.has_tenants)
                count = self._enter(sequence, share, room.promised)
            if count == 0:
                self.stuck |= {tenant, *lines}
                break
            admitted.append(scheduler.reading.chunk(sequence, count))
            budget -= count
            room.places -= size
            room.promised += scheduler.room.promised(sequence)
            room.held.add(tenant, *scheduler.room.size(sequence))
            scheduler.waiting.end_turn(tenant)
            scheduler.charge(tenant, count, shares)
        return budget

    def wanted(self, tokens: int) -> dict[str, int]:
        """Return how many tokens, as far as they are of interest, each tenant's waiting sequences could compute now."""
        wanted: dict[str, int] = {}
        self._steps += 1
        if self._steps % STEPS_STUCK == 0:
            self.stuck.clear()
        for tenant, line in self._scheduler.waiting.lines.items():
            if tenant in self.stuck:
                continue
            ready = (
                sequence for sequence in itertools.islice(line, FIRST_IN_LINE) if not self._awaits_prefix(sequence)
            )
            for sequence in ready:
                wanted[tenant] = wanted.get(tenant, 0) + sequence.length
                if wanted[tenant] >= tokens:
                    break
        return wanted

    def of_who_holds_most(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return those of some running sequences that are of the tenant that holds most, of all that run."""
        held = self._scheduler.room.holdings(self._scheduler.running)
        most = max((sequence.request.tenant for sequence in sequences), key=held.part, default=None)
        return [sequence for sequence in sequences if sequence.request.tenant == most]

    # Making way: running texts give up their places and blocks for one that waits.

    def _may_displace(self, newcomer: Sequence) -> bool:
        return self._scheduler.has_tenants or newcomer.request.priority > 0

    def _make_way(self, newcomer: Sequence, admitted: list[ScheduledChunk]) -> bool:
        """Preempt as few texts as have to go for one that waits; nobody goes if it could not enter even so."""
        entered = {chunk.sequence.request for chunk in admitted}
        for rule in (self._of_who_hold_more, self._of_lower_priority):
            going = self._going(newcomer, rule, entered)
            for victim in going:
                if victim.is_running:  # beams go together
                    self._scheduler.preempt(victim)
            if going:
                return True
        return False

    def _going(self, newcomer: Sequence, rule: Rule, spared: set[Request]) -> list[Sequence]:
        """Return who has to go by a rule; nobody if that is not enough."""
        going: list[Sequence] = []
        staying = self._scheduler.running
        while not self._scheduler.room.suffices(newcomer, going, staying):
            victim = self._scheduler.choose([each for each in rule(newcomer, staying) if each.request not in spared])
            if victim is None:
                return []
            going += fellows(victim)
            staying = [sequence for sequence in staying if not belong_together(sequence, victim)]
        return going

    def _of_lower_priority(self, newcomer: Sequence, running: list[Sequence]) -> list[Sequence]:
        """Return the texts of the same tenant that have a lower priority."""
        mine = newcomer.request
        return [s for s in running if s.request.tenant == mine.tenant and s.request.priority < mine.priority]

    def _of_who_hold_more(self, newcomer: Sequence, running: list[Sequence]) -> list[Sequence]:
        """Return texts of the tenant that holds most, which keeps its first one and no less than the newcomer's has."""
        if not self._scheduler.has_tenants:
            return []
        held, mine = self._scheduler.room.holdings(running), newcomer.request.tenant
        then = held.part(mine, *self._scheduler.room.size(newcomer))
        for tenant in held.descending():
            if tenant == mine:
                break
            texts = [sequence for sequence in running if sequence.request.tenant == tenant]
            first = min(texts, key=rank)
            others = [sequence for sequence in texts if not belong_together(sequence, first)]
            may_go = [
                each
                for each in others
                if held.part(tenant, *self._scheduler.room.size(*fellows(each), sign=-1)) >= then
            ]
            if may_go:
                return may_go
        return []

    def _enter(self, sequence: Sequence, budget: int, promised: int) -> int:
        """Allocate a sequence, with as many tokens as it computes now; 0 if there is no room."""
        scheduler, request = self._scheduler, sequence.request
        alone = all(other.request is request for other in scheduler.running)
        if not alone and self._scheduler.room.needed(sequence) + promised > self._cache.free_block_count:
            return 0
        if scheduler.offload is not None:
            scheduler.offload.bring(sequence)
        if scheduler.runner.chunkable:
            matched = self._matched(sequence)
            if scheduler.runner.has_states and self._shares_prefixes:
                sequence.parting = self._parting(sequence, matched)
            most = min(budget, sequence.readable - matched, scheduler.reading.of(sequence))
            tokens = matched + piece(sequence, matched, most, scheduler.runner)
        else:
            tokens = whole_length(sequence, scheduler.runner)
        try:
            info = self._cache.allocate(
                sequence.seq_id,
                sequence.ids[:tokens] if may_share(sequence) else tokens,
                priority=request.priority,
                cache_salt=request.cache_salt,
            )
        except OutOfMemory:
            if scheduler.running:
                return 0
            raise  # blocks outside of the engine fill the pool
        scheduler.waiting.remove(sequence)
        scheduler.running.append(sequence)
        sequence.state, sequence.awaits = SequenceState.RUNNING, None
        sequence.computed = info.num_cached_tokens
        if request.first_scheduled is None:
            request.first_scheduled = time.monotonic()
            request.num_cached_tokens = info.num_cached_tokens
            scheduler.num_prompt_tokens += request.num_prompt_tokens
            scheduler.num_cached_tokens += info.num_cached_tokens
        return tokens - info.num_cached_tokens

    def _matched(self, sequence: Sequence) -> int:
        return self._cache.match_prefix(sequence.ids, sequence.request.cache_salt) if may_share(sequence) else 0

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Tell whether a longer prefix of this one than the cache has is being loaded, or computed by another."""
        offload = self._scheduler.offload
        if offload is not None and offload.awaits(sequence):
            return True
        if sequence.awaits is not None:
            other, until = sequence.awaits
            if other.state is SequenceState.RUNNING and other.computed < until:
                return True
            sequence.awaits = None
        if not self._shares_prefixes or not may_share(sequence):
            return False
        cached = -1
        for other in self._scheduler.running:
            if other.pending <= 1:
                continue
            common = self._common_blocks(sequence, other)
            if common <= other.computed:
                continue
            if cached < 0:
                cached = max(self._matched(sequence), offload.staged(sequence) if offload is not None else 0)
            if common > cached:
                if not other.computed < other.parting < common:
                    other.parting = common
                sequence.awaits = (other, common)
                return True
        return False

    def _common_blocks(self, sequence: Sequence, other: Sequence) -> int:
        """Return how many tokens of whole blocks a sequence could share with another."""
        if other.request.cache_salt != sequence.request.cache_salt or not may_share(other):
            return 0
        size = self._cache.block_size
        return min(common_prefix(sequence.ids, other.ids), sequence.length - 1) // size * size

    def _parting(self, sequence: Sequence, start: int) -> int:
        """Return where the next text that waits parts from one that enters: worth a snapshot; 0 if none does."""
        others = itertools.islice(self._scheduler.waiting, MOST_COMPARED)
        partings = (self._common_blocks(other, sequence) for other in others if other is not sequence)
        return min((parting for parting in partings if parting > start), default=0)


def _next_of(lines: dict[str, deque[Sequence]], held: Holdings) -> Sequence | None:
    """Take the next sequence out of a line; None if all are empty.

    It is a beam whose fellows run and need it or, else, the first one of the tenant that holds least.
    """
    if not lines:
        return None
    tenant = min(lines, key=lambda tenant: (not fellows(lines[tenant][0]), held.part(tenant)))
    sequence = lines[tenant].popleft()
    if not lines[tenant]:
        del lines[tenant]
    return sequence


MOST_COMPARED = 16
"""Waiting texts that one which enters is compared with."""

NEWEST_SEQ_ID = 2**62


class Scheduler:
    """Holds the sequences that wait and those that run, and lays out one batch after the other.

    Parameters
    ----------
    runner : Runner
    max_batch_tokens : int
        Query tokens of a forward pass; decoding sequences take part even beyond that.
    max_num_seqs : int
        Sequences that run at once; not more than have a slot for their state.
    weights : mapping, optional
        Tenants to their weights, above 0; 1 for those that are not in it.
    ladder : Ladder, optional
        Tiers.

    Attributes
    ----------
    waiting : WaitingLines
    running : list of Sequence
    tenants : Counter
        Whose sequences wait or run, and how many.
    turns : DeficitRoundRobin
        Between tenants.
    room : Room
    offload : Offload or None
        Between the pool and the tiers.
    num_preemptions : int
    num_prompt_tokens, num_cached_tokens : int
        Of all requests, when they were first admitted.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        weights: Mapping[str, float] | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        self.runner, self.cache = runner, runner.cache
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        if runner.has_states:
            self.max_num_seqs = min(max_num_seqs, runner.cache.total_states)
        self.waiting = WaitingLines()
        self.running: list[Sequence] = []
        self.tenants: Counter[str] = Counter()
        self.turns = DeficitRoundRobin(max_batch_tokens, weights)
        self.reading = ReadingRoom(runner.vocab_size)
        self.room = Room(self.cache, self.max_num_seqs, self.turns)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._admission = Admission(self)
        # Downwards: strategies break ties by id, and among equals the newest should go first.
        self.seq_ids = itertools.count(NEWEST_SEQ_ID, -1)
        self.offload = None if ladder is None else Offload(runner.cache, ladder, self.seq_ids)

    @property
    def has_tenants(self) -> bool:
        """Whether several tenants have something to compute."""
        return len(self.tenants) > 1

    def new_sequence(self, request: Request, index: int = 0) -> Sequence:
        """Return a sequence of a request, which waits for its turn."""
        sequence = Sequence(request, index, next(self.seq_ids))
        self.waiting.add(sequence)
        self.tenants[request.tenant] += 1
        self._admission.stuck.discard(request.tenant)
        if self.offload is not None:
            self.offload.look(sequence)
        return sequence

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """Return a running twin of a running sequence; both share every block until one of them writes."""
        twin = sequence.twin(index, next(self.seq_ids))
        self.cache.fork(sequence.seq_id, twin.seq_id)
        self.runner.fork(sequence.seq_id, twin.seq_id)
        self.running.append(twin)
        self.tenants[twin.request.tenant] += 1
        return twin

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its blocks are free at once."""
        if sequence.state is SequenceState.RUNNING:
            self._release(sequence)
            self.waiting.end_turn(sequence.request.tenant)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
            if self.offload is not None:
                self.offload.forget(sequence)
        if sequence.state is not SequenceState.FINISHED:
            self._leave(sequence.request.tenant)
        sequence.state = SequenceState.FINISHED

    def _leave(self, tenant: str) -> None:
        self.tenants[tenant] -= 1
        if not self.tenants[tenant]:
            del self.tenants[tenant]
            self.turns.forget(tenant)

    def schedule(self) -> Batch | None:
        """Lay out the next forward pass and make room for it; None if there is nothing to compute."""
        self.reading.renew()
        shares = self._split() if self.has_tenants else None
        chunks = self._continued(shares)
        before = self.num_preemptions
        chunks, plan, tokens = self._grow(chunks)
        if self.num_preemptions == before:
            used = 0 if plan is None else plan.total_tokens
            admitted: list[ScheduledChunk] = []
            try:
                self._admission.admit(self.max_batch_tokens - used, shares, admitted)
            except BaseException:  # a strategy of the user's, for instance; what has grown will not be computed
                self.recall([*chunks, *admitted])
                raise
            if self.num_preemptions != before:
                chunks = [chunk for chunk in chunks if chunk.sequence.is_running]
            if admitted:
                chunks += admitted
                tokens = query_tokens(chunks)
                plan = self.cache.plan([c.sequence.seq_id for c in chunks], [c.num_query_tokens for c in chunks])
        if plan is None:
            if self.running and self.num_preemptions == before:
                self._resolve_stall()
            return None
        return make_batch(chunks, plan, tokens)

    def _split(self) -> Counter[str]:
        """Return how many tokens of prompts each tenant may compute in this step."""
        wanted: Counter[str] = Counter()
        room = self.max_batch_tokens
        for sequence in self.running:
            tenant = sequence.request.tenant
            if sequence.pending > 1:
                wanted[tenant] += min(sequence.readable if self.runner.chunkable else 1, self.reading.of(sequence))
            else:
                self.turns.charge(tenant, 1)
                room -= 1
                wanted[tenant] += sequence.request.params.prompt_lookup or 0
        for tenant, tokens in self._admission.wanted(room).items():
            wanted[tenant] += tokens
        return Counter(self.turns.split(room, wanted))

    def charge(self, tenant: str, tokens: int, shares: Counter[str] | None) -> None:
        """Count tokens of prompts that a tenant computes: against its share, or, where it has none, as a debt."""
        if not self.has_tenants:
            return
        within = 0 if shares is None else max(0, min(tokens, shares[tenant]))
        self.turns.charge(tenant, tokens - within)
        if shares is not None:
            shares[tenant] -= tokens

    def _continued(self, shares: Counter[str] | None) -> list[ScheduledChunk]:
        """Return the chunks of what runs: all that decode, then prompts in the order of their rank."""
        if self.runner.restarts_beyond is not None:
            for sequence in [sequence for sequence in self.running if must_restart(sequence, self.runner)]:
                self.preempt(sequence)
        chunks, reading = decoding_and_reading(self.running)
        room = self.max_batch_tokens - len(chunks)
        for chunk in chunks:
            if chunk.sequence.request.params.prompt_lookup and room > 0:
                tenant = chunk.sequence.request.tenant
                most = room if shares is None else min(room, shares[tenant])
                chunk.drafts = drafts(chunk.sequence, most, self.runner)
                room -= len(chunk.drafts)
                self.charge(tenant, len(chunk.drafts), shares)
        for sequence in sorted(reading, key=rank):
            # What is not cut was computed whole when it was admitted; tokens behind it follow one by one.
            most = sequence.readable if self.runner.chunkable else 1
            count = min(most, room, self.reading.of(sequence))
            # Who is first in rank always gets on, whosever share that is.
            least = 0 if chunks else min(count, 1)
            if shares is not None:
                count = max(least, min(count, shares[sequence.request.tenant]))
            if count > 1:
                count = piece(sequence, sequence.computed, count, self.runner)
            if count > 0:
                chunks.append(self.reading.chunk(sequence, count))
                room -= count
                self.charge(sequence.request.tenant, count, shares)
        return chunks

    def _grow(self, chunks: list[ScheduledChunk]) -> tuple[list[ScheduledChunk], BatchPlan | None, Any]:
        """Make room for the new tokens of `chunks`, the last value; drafts, then victims, go if there is too little."""
        while chunks:
            tokens = query_tokens(chunks)
            try:
                return chunks, self.cache.append_batch([chunk.sequence.seq_id for chunk in chunks], tokens), tokens
            except OutOfMemory:
                if any(len(chunk.drafts) for chunk in chunks):
                    for chunk in chunks:
                        chunk.drafts = NO_DRAFTS
                    continue
                if self._slide():
                    continue
                victim = self._victim()
                if victim is None:
                    raise
                self.preempt(victim)
                chunks = [chunk for chunk in chunks if chunk.sequence.state is SequenceState.RUNNING]
        return chunks, None, None

    def _slide(self) -> bool:
        """Give back blocks before the window of a sequence, where no layer sees further; whether there were some.

        From then on the sequence leaves nothing to be found for others: so it is done only where blocks are short.
        """
        window = self.runner.window
        if window is None:
            return False
        for sequence in sorted(self.running, key=rank, reverse=True):
            if sequence.request.params.streaming is None and sequence.held >= window - 1 + self.cache.block_size:
                before = self.cache.free_block_count
                with contextlib.suppress(OutOfMemory):  # others share what it would have to copy
                    sequence.dropped += self.cache.apply_streaming_llm(sequence.seq_id, 0, window - 1)
                if self.cache.free_block_count > before:
                    return True
        return False

    def _victim(self) -> Sequence | None:
        first = min(self.running, key=lambda sequence: sequence.rank)
        candidates = [sequence for sequence in self.running if not belong_together(sequence, first)]
        if self.has_tenants:
            candidates = self._admission.of_who_holds_most(candidates)
        return self.choose(candidates)

    def choose(self, candidates: list[Sequence]) -> Sequence | None:
        """Return who of some running sequences goes first: the lowest in priority, then as the strategy says."""
        if not candidates:
            return None
        lowest = min(sequence.request.priority for sequence in candidates)
        candidates = [sequence for sequence in candidates if sequence.request.priority == lowest]
        # To compute an endless text again takes longest, and it holds few blocks.
        candidates = [sequence for sequence in candidates if not sequence.request.params.streaming] or candidates
        by_id = {sequence.seq_id: sequence for sequence in candidates}
        target = self.cache.select_eviction_target(spared=set(self.cache.sequence_ids) - by_id.keys())
        return None if target is None else by_id[int(target)]

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a sequence, and of its fellow beams; it waits, and is computed again later."""
        request = sequence.request
        together: Iterable[Sequence] = [sequence] if request.beams is None else list(request.sequences)
        for each in together:
            if each.state is SequenceState.RUNNING:
                self._release(each)
                each.state = SequenceState.WAITING
                each.computed = each.dropped = 0
                self.waiting.add(each)
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) < request.num_prompt_tokens:
            request.prompt_logprobs = [None]
        request.num_preemptions += 1
        self.num_preemptions += 1

    def recall(self, chunks: Iterable[ScheduledChunk]) -> None:
        """Undo `schedule()`: the sequences of `chunks` wait again and are computed anew."""
        for chunk in chunks:
            if chunk.sequence.state is SequenceState.RUNNING:
                self.preempt(chunk.sequence)

    def _release(self, sequence: Sequence) -> None:
        self._admission.stuck.clear()
        self.running.remove(sequence)
        if self.offload is not None:
            self.offload.keep(sequence)
        self.cache.free(sequence.seq_id)
        self.runner.release(sequence.seq_id)

    def _resolve_stall(self) -> None:
        """Take blocks from beams that wait for fellows, which may need them.

        Where the first in line waits itself, it begins anew: its beams could not share what they shared before, since
        the prefixes were forgotten meanwhile.
        """
        self.preempt(self._victim() or self.running[0])
