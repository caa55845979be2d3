"""The scheduler: which sequences the next forward pass computes, admission of waiting requests, preemption.

Decoding sequences always take part, one token each. What is left of the token budget goes to prompts: first those that
have begun, then those that wait, by priority and arrival. A request is not admitted if its blocks would have to be
taken from a running one at once, nor while another request is computing a prefix that it can share. A prompt is cut to
what is left of the budget, unless the model takes prompts whole: such a one waits until it fits, or until no other
prompt enters in the same step, and may then go beyond the budget. Where a model keeps states, a prompt is cut where a
snapshot of its state is worth keeping: at its last block boundary, and where it parts from other texts.

When running sequences outgrow the pool, they give back what no layer of the model can see any more, where all have a
sliding window. If that is not enough, one is preempted: of those with the lowest priority the one that the cache's
strategy ranks lowest, but never the one that is first in rank. So that one always makes progress, finishes, and leaves
its place to the next. The committed blocks of a preempted sequence stay findable until they are needed.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.plan import BatchPlan
from pagedkv.engine.request import Request, Sequence, SequenceState, shares_prefixes
from pagedkv.engine.runner import Runner
from pagedkv.errors import OutOfMemory, RequestRefused

# The waiting queue: a list in the order of rank. A preempted sequence keeps its rank, so it goes before later ones.


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _unqueue(waiting: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of the queue, in O(log n) comparisons."""
    place = bisect_left(waiting, sequence.rank, key=_rank)
    while waiting[place] is not sequence:
        place += 1
    del waiting[place]


# A batch: chunks of sequences, and whose logits are wanted.

Ids = npt.NDArray[np.int64]

NO_DRAFTS: Ids = np.empty(0, np.int64)


class ScheduledChunk:
    """The tokens of one sequence that a forward pass computes.

    Parameters
    ----------
    sequence : Sequence
    count : int
        Tokens of the sequence, from ``sequence.computed`` on.

    Attributes
    ----------
    drafts : int64 [num_drafts]
        Guesses behind its last token, to be verified.
    reaches_end : bool
        Whether the next token can be chosen after this.
    num_scored : int
        Tokens at its beginning whose logits tell how likely the next tokens of the prompt are.
    """

    __slots__ = ("sequence", "count", "drafts", "num_scored", "reaches_end")

    def __init__(self, sequence: Sequence, count: int) -> None:
        self.sequence, self.count = sequence, count
        self.drafts = NO_DRAFTS
        self.reaches_end = count == sequence.pending
        request = sequence.request
        self.num_scored = 0
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) < request.num_prompt_tokens:
            self.num_scored = max(0, min(count, request.num_prompt_tokens - 1 - sequence.computed))

    @property
    def num_query_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.count + len(self.drafts)

    @property
    def query_ids(self) -> Ids:
        """The tokens that go through the model."""
        sequence = self.sequence
        ids = sequence.ids[sequence.computed : sequence.computed + self.count]
        return np.concatenate([ids, self.drafts]) if len(self.drafts) else ids

    def wanted(self, start: int) -> Ids:
        """Return the query tokens whose logits are wanted, where the first one has the place `start`."""
        scored = np.arange(start, start + self.num_scored)
        end = start + self.num_query_tokens
        chosen = np.arange(end - len(self.drafts) - 1, end) if self.reaches_end else NO_DRAFTS
        return np.concatenate([scored, chosen])


@dataclass(slots=True, eq=False)
class Batch:
    """One forward pass.

    Attributes
    ----------
    chunks : list of ScheduledChunk
        In the order of the plan.
    plan : BatchPlan
    token_ids : int64 [total_tokens]
    wanted : int64 [k]
        Places in `token_ids` of the query tokens whose logits are wanted: chunk by chunk, those that are scored, then,
        if it reaches the end of its sequence, its last token and its drafts.
    """

    chunks: list[ScheduledChunk]
    plan: BatchPlan
    token_ids: Ids
    wanted: Ids


def query_tokens(chunks: list[ScheduledChunk]) -> Any:
    """Return the token ids of all chunks as ``append_batch`` takes them; most often one each: a flat array then."""
    if all(chunk.num_query_tokens == 1 for chunk in chunks):
        return np.array([chunk.sequence.token(chunk.sequence.computed) for chunk in chunks])
    return [chunk.query_ids for chunk in chunks]


def make_batch(chunks: list[ScheduledChunk], plan: BatchPlan) -> Batch:
    """Lay out the forward pass of `chunks`, which `plan` has in the same order."""
    tokens = query_tokens(chunks)
    if isinstance(tokens, np.ndarray) and not any(chunk.num_scored for chunk in chunks):
        return Batch(chunks, plan, tokens, np.flatnonzero([chunk.reaches_end for chunk in chunks]))
    starts = plan.cu_seqlens_q.tolist()
    wanted = [chunk.wanted(start) for chunk, start in zip(chunks, starts, strict=False)]
    return Batch(chunks, plan, np.concatenate([*tokens]), np.concatenate(wanted))


# Admission of waiting requests.


class Admission:
    """Takes sequences out of the queue of a scheduler, as budget, places and blocks allow."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._cache = scheduler.cache
        self._shares_prefixes = shares_prefixes(scheduler.runner)

    def admit(self, budget: int) -> list[ScheduledChunk]:
        """Admit sequences that compute up to `budget` tokens now; their blocks are allocated."""
        scheduler = self._scheduler
        if budget <= 0 or not scheduler.waiting:
            return []
        admitted: list[ScheduledChunk] = []
        places = scheduler.max_num_seqs - sum(sequence.request.num_unforked + 1 for sequence in scheduler.running)
        promised = sum(map(self._promised, scheduler.running))
        passed_over = 0
        for sequence in scheduler.waiting[: 2 * scheduler.max_num_seqs + 2]:
            places -= 1 + sequence.request.num_unforked
            if budget <= 0 or passed_over > scheduler.max_num_seqs or (places < 0 and scheduler.running):
                break
            if self._awaits_prefix(sequence):
                places += 1 + sequence.request.num_unforked
                passed_over += 1
                continue
            if not scheduler.runner.chunkable and admitted and whole_length(sequence, scheduler.runner) > budget:
                break  # it is not cut; alone it may go beyond the budget
            count = self._enter(sequence, budget, promised)
            if count == 0:
                break
            admitted.append(ScheduledChunk(sequence, count))
            promised += self._promised(sequence)
            budget -= count
        return admitted

    def _enter(self, sequence: Sequence, budget: int, promised: int) -> int:
        """Allocate a sequence, with as many tokens as it computes now; 0 if there is no room."""
        scheduler, request = self._scheduler, sequence.request
        alone = all(other.request is request for other in scheduler.running)
        if not alone and self._needed(sequence) + promised > self._cache.free_block_count:
            return 0
        if scheduler.runner.chunkable:
            matched = self._matched(sequence)
            if scheduler.runner.has_states and self._shares_prefixes:
                sequence.parting = self._parting(sequence, matched)
            tokens = matched + piece(sequence, matched, min(budget, sequence.readable - matched), scheduler.runner)
        else:
            tokens = whole_length(sequence, scheduler.runner)
        if request.params.streaming is not None:
            tokens = max(1, min(tokens, sum(request.params.streaming)))
        try:
            info = self._cache.allocate(
                sequence.seq_id,
                sequence.ids[:tokens] if _shares(sequence) else tokens,
                priority=request.priority,
                cache_salt=request.cache_salt,
            )
        except OutOfMemory:
            if scheduler.running:
                return 0
            raise  # blocks outside of the engine fill the pool
        _unqueue(scheduler.waiting, sequence)
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
        return self._cache.match_prefix(sequence.ids, sequence.request.cache_salt) if _shares(sequence) else 0

    def _needed(self, sequence: Sequence) -> int:
        """Return the blocks that it takes until it decodes, its copies of a shared last block included."""
        size, more = self._cache.block_size, sequence.request.num_unforked + 1
        if sequence.request.params.streaming is not None:
            return _streaming_blocks(sequence.length, sequence.request.params.streaming, size) + more
        tokens = sequence.ids if _shares(sequence) else sequence.length
        return self._cache.blocks_to_allocate(tokens, sequence.request.cache_salt) + more

    def _promised(self, sequence: Sequence) -> int:
        """Return the blocks that a running sequence takes for the rest of its prompt, and one for what it writes."""
        size = self._cache.block_size
        length = sequence.length - sequence.dropped
        if sequence.request.params.streaming is not None:
            length = min(length, sum(sequence.request.params.streaming) + size)
        return max(0, -(-length // size) + (-sequence.held // size)) + sequence.request.num_unforked + 1

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Tell whether another sequence is computing a longer prefix of this one than the cache has."""
        if sequence.awaits is not None:
            other, until = sequence.awaits
            if other.state is SequenceState.RUNNING and other.computed < until:
                return True
            sequence.awaits = None
        if not self._shares_prefixes or not _shares(sequence):
            return False
        cached = -1
        for other in self._scheduler.running:
            if other.pending <= 1:
                continue
            common = self._common_blocks(sequence, other)
            if common <= other.computed:
                continue
            cached = self._matched(sequence) if cached < 0 else cached
            if common > cached:
                if not other.computed < other.parting < common:
                    other.parting = common
                sequence.awaits = (other, common)
                return True
        return False

    def _common_blocks(self, sequence: Sequence, other: Sequence) -> int:
        """Return how many tokens of whole blocks a sequence could share with another."""
        if other.request.cache_salt != sequence.request.cache_salt or not _shares(other):
            return 0
        size = self._cache.block_size
        return min(_common_prefix(sequence.ids, other.ids), sequence.length - 1) // size * size

    def _parting(self, sequence: Sequence, start: int) -> int:
        """Return where the next text that waits parts from one that enters: worth a snapshot; 0 if none does."""
        others = self._scheduler.waiting[:MOST_COMPARED]
        partings = (self._common_blocks(other, sequence) for other in others if other is not sequence)
        return min((parting for parting in partings if parting > start), default=0)


def _shares(sequence: Sequence) -> bool:
    """Whether equal prefixes may be used: not where tokens are dropped, nor where the logits of a prompt are wanted."""
    params = sequence.request.params
    return params.streaming is None and params.prompt_logprobs is None


def _common_prefix(one: Any, other: Any) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(np.argmax(differs)) if length else 0
    return first if length and differs[first] else length


def _streaming_blocks(tokens: int, streaming: tuple[int, int], size: int) -> int:
    """Return how many blocks so many tokens of a stream take: the sinks', the window's with two ragged ends."""
    sink, window = streaming
    return min(-(-tokens // size), -(-sink // size) - (-window // size) + 1)


def blocks_at_most(request: Request, block_size: int, shared: bool) -> int:
    """Return how many blocks a request needs at once at most, with the pool to itself; its last token needs none."""
    params, prompt = request.params, request.num_prompt_tokens
    tokens = prompt + request.max_tokens - 1
    if params.streaming is not None:
        return _streaming_blocks(tokens, params.streaming, block_size)
    blocks = -(-tokens // block_size)
    if params.beam_width is None:
        return blocks
    once = prompt // block_size if shared and params.prompt_logprobs is None else 0
    return once + params.beam_width * (blocks - once)


def refuse_what_never_fits(request: Request, runner: Runner, max_num_seqs: int, max_batch_tokens: int) -> None:
    """Raise if a request could not be computed with the whole engine to itself.

    Raises
    ------
    RequestRefused
        With the numbers.
    """
    prompt, cache = request.num_prompt_tokens, runner.cache
    needed = blocks_at_most(request, cache.block_size, shares_prefixes(runner))
    if runner.window is not None and runner.chunkable and request.num_sequences == 1:
        # A step reads a chunk behind the window; with ragged ends.
        needed = min(needed, -(-(runner.window - 1 + max_batch_tokens) // cache.block_size) + 2)
    text = f"{prompt} prompt tokens and max_tokens = {request.max_tokens}"
    if needed > cache.total_blocks:
        raise RequestRefused(
            f"{text} need {needed} blocks of {cache.block_size} tokens at once, the pool has {cache.total_blocks}"
        )
    _refuse_what_would_be_cut(request, runner)
    positions = prompt + request.max_tokens
    if request.params.streaming is not None:
        positions = min(positions, sum(request.params.streaming) + 1)
    if runner.max_positions is not None and positions > runner.max_positions:
        raise RequestRefused(f"{text} are {positions} positions, the model has {runner.max_positions}")
    if request.num_sequences > max_num_seqs:
        raise RequestRefused(f"{request.num_sequences} texts at once exceed max_num_seqs = {max_num_seqs}")


def _refuse_what_would_be_cut(request: Request, runner: Runner) -> None:
    """Refuse what would cut the prompt of a model that takes prompts whole."""
    prompt, streaming = request.num_prompt_tokens, request.params.streaming
    if not runner.chunkable and streaming is not None and prompt > sum(streaming):
        raise RequestRefused(
            f"{prompt} prompt tokens exceed streaming = {streaming}, and the model takes prompts whole"
        )
    limit, longest = runner.restarts_beyond, prompt + request.max_tokens - 1
    if limit is not None and request.params.beam_width is not None and prompt <= limit < longest:
        raise RequestRefused(
            f"beams of {longest} tokens: the model begins anew beyond {limit}, where beams cannot follow"
        )


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

    Attributes
    ----------
    waiting : list of Sequence
        In the order of their rank.
    running : list of Sequence
    num_preemptions : int
    num_prompt_tokens, num_cached_tokens : int
        Of all requests, when they were first admitted.
    """

    def __init__(self, runner: Runner, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.runner, self.cache = runner, runner.cache
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        if runner.has_states:
            self.max_num_seqs = min(max_num_seqs, runner.cache.total_states)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._admission = Admission(self)
        # Downwards: strategies break ties by id, and among equals the newest should go first.
        self._seq_ids = itertools.count(NEWEST_SEQ_ID, -1)

    def new_sequence(self, request: Request, index: int = 0) -> Sequence:
        """Return a sequence of a request, which waits for its turn."""
        sequence = Sequence(request, index, next(self._seq_ids))
        insort(self.waiting, sequence, key=_rank)
        return sequence

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """Return a running twin of a running sequence; both share every block until one of them writes."""
        twin = sequence.twin(index, next(self._seq_ids))
        self.cache.fork(sequence.seq_id, twin.seq_id)
        self.runner.fork(sequence.seq_id, twin.seq_id)
        self.running.append(twin)
        return twin

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its blocks are free at once."""
        if sequence.state is SequenceState.RUNNING:
            self._release(sequence)
        elif sequence.state is SequenceState.WAITING:
            _unqueue(self.waiting, sequence)
        sequence.state = SequenceState.FINISHED

    def schedule(self) -> Batch | None:
        """Lay out the next forward pass and make room for it; None if there is nothing to compute."""
        chunks = self._continued()
        before = self.num_preemptions
        chunks, plan = self._grow(chunks)
        if self.num_preemptions == before:
            used = sum(chunk.num_query_tokens for chunk in chunks)
            try:
                admitted = self._admission.admit(self.max_batch_tokens - used)
            except BaseException:  # a strategy of the user's, for instance; what has grown will not be computed
                self.recall(chunks)
                raise
            if admitted:
                chunks += admitted
                plan = self.cache.plan(
                    [chunk.sequence.seq_id for chunk in chunks], [p.num_query_tokens for p in chunks]
                )
        if plan is None:
            if self.running and self.num_preemptions == before:
                self._resolve_stall()
            return None
        return make_batch(chunks, plan)

    def _continued(self) -> list[ScheduledChunk]:
        """Return the chunks of what runs: all that decode, then prompts in the order of their rank."""
        if self.runner.restarts_beyond is not None:
            for sequence in [sequence for sequence in self.running if _must_restart(sequence, self.runner)]:
                self.preempt(sequence)
        decoding = [sequence for sequence in self.running if sequence.pending == 1 and _is_ready(sequence)]
        chunks = [ScheduledChunk(sequence, 1) for sequence in decoding]
        room = self.max_batch_tokens - len(chunks)
        for chunk in chunks:
            if chunk.sequence.request.params.prompt_lookup and room > 0:
                chunk.drafts = self._drafts(chunk.sequence, room)
                room -= len(chunk.drafts)
        for sequence in sorted((sequence for sequence in self.running if sequence.pending > 1), key=_rank):
            # What is not cut was computed whole when it was admitted; tokens behind it follow one by one.
            most = sequence.readable if self.runner.chunkable else 1
            count = min(most, room, streaming_room(sequence))
            if count > 1:
                count = piece(sequence, sequence.computed, count, self.runner)
            if count > 0:
                chunks.append(ScheduledChunk(sequence, count))
                room -= count
        return chunks

    def _drafts(self, sequence: Sequence, room: int) -> Ids:
        request, params = sequence.request, sequence.request.params
        # The token that follows the drafts is chosen in the same pass.
        most = min(params.prompt_lookup, room, request.max_tokens - len(sequence.output_ids) - 1)
        runner = self.runner
        if most <= 0 or params.streaming or request.num_unforked or not runner.chunkable or runner.has_states:
            return NO_DRAFTS
        from pagedkv.engine.prompt_lookup import propose

        return propose(sequence.ids, most)

    def _grow(self, chunks: list[ScheduledChunk]) -> tuple[list[ScheduledChunk], BatchPlan | None]:
        """Make room for the new tokens of `chunks`; drafts, then victims, go if there is too little."""
        while chunks:
            try:
                plan = self.cache.append_batch([chunk.sequence.seq_id for chunk in chunks], query_tokens(chunks))
                return chunks, plan
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
        return chunks, None

    def _slide(self) -> bool:
        """Give back blocks before the window of a sequence, where no layer sees further; whether there were some.

        From then on the sequence leaves nothing to be found for others: so it is done only where blocks are short.
        """
        window = self.runner.window
        if window is None:
            return False
        for sequence in sorted(self.running, key=_rank, reverse=True):
            if sequence.request.params.streaming is None and sequence.held >= window - 1 + self.cache.block_size:
                before = self.cache.free_block_count
                with contextlib.suppress(OutOfMemory):  # others share what it would have to copy
                    sequence.dropped += self.cache.apply_streaming_llm(sequence.seq_id, 0, window - 1)
                if self.cache.free_block_count > before:
                    return True
        return False

    def _victim(self) -> Sequence | None:
        first = min(self.running, key=lambda sequence: sequence.rank)
        candidates = [sequence for sequence in self.running if not _belong_together(sequence, first)]
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
                insort(self.waiting, each, key=_rank)
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
        self.running.remove(sequence)
        self.cache.free(sequence.seq_id)
        self.runner.release(sequence.seq_id)

    def _resolve_stall(self) -> None:
        """Take blocks from beams that wait for fellows, which may need them.

        Where the first in line waits itself, it begins anew: its beams could not share what they shared before, since
        the prefixes were forgotten meanwhile.
        """
        self.preempt(self._victim() or self.running[0])


def streaming_room(sequence: Sequence) -> int:
    """Return how many tokens the sequence may read at once: each sees at most sinks and window, and itself."""
    streaming = sequence.request.params.streaming
    return sequence.length if streaming is None else max(1, sum(streaming) - sequence.held)


def piece(sequence: Sequence, start: int, most: int, runner: Runner) -> int:
    """Return how many of the next `most` tokens from `start` on a step reads: to where a snapshot is worth keeping."""
    if not runner.has_states or not _shares(sequence) or not shares_prefixes(runner):
        return most
    size, end = runner.cache.block_size, start + most
    shared = runner.cache.match_blocks(sequence.ids, sequence.request.cache_salt)
    places = (sequence.parting, shared, (sequence.length - 1) // size * size)
    wanted = [place for place in places if start < place <= end]
    if not wanted and end < sequence.length and end // size * size > start:
        wanted = [end // size * size]
    return min(wanted, default=end) - start


def whole_length(sequence: Sequence, runner: Runner) -> int:
    """Return how many tokens of a text go through the model in one piece where a prompt is not cut."""
    prompt, limit = sequence.request.num_prompt_tokens, runner.restarts_beyond
    return prompt if limit is None or not prompt <= limit < sequence.length else limit + 1


def _must_restart(sequence: Sequence, runner: Runner) -> bool:
    limit = runner.restarts_beyond
    if limit is None or sequence.computed != limit or sequence.pending != 1:
        return False
    return whole_length(sequence, runner) > limit and sequence.request.params.streaming is None


def _belong_together(one: Sequence, other: Sequence) -> bool:
    return one is other or (one.request is other.request and one.request.beams is not None)


def _is_ready(sequence: Sequence) -> bool:
    """Beams are compared with each other, so they choose their next tokens in one step."""
    request = sequence.request
    return request.beams is None or all(b.state is SequenceState.RUNNING and b.pending == 1 for b in request.sequences)
