"""Who computes what in the next forward pass.

Decoding branches always take part, one token each. What is left of the token budget goes to prompts: first those that
have begun, then those that wait, by priority and arrival. Nobody is let in whose blocks would have to be taken from
somebody else at once, and nobody computes a prefix that another is computing right now: it waits for it instead.

When running branches outgrow the pool, one is preempted: of those with the lowest priority the one that the cache's
strategy gives up first, but never the one whose turn it is before all others. So that one always makes progress,
finishes, and leaves its place to the next. The victim's committed blocks stay findable until they are needed.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.plan import BatchPlan
from pagedkv.engine.request import Branch, Request, State, shares_prefixes
from pagedkv.engine.runner import Runner
from pagedkv.errors import OutOfMemory, RequestRefused

# The queue of what waits for its turn: by priority, then by arrival.


def _rank(branch: Branch) -> tuple[int, int, int]:
    return branch.rank


class WaitingQueue:
    """Branches in the order of their rank. A preempted branch keeps its rank: it goes before whoever came later."""

    def __init__(self) -> None:
        self._branches: list[Branch] = []

    def add(self, branch: Branch) -> None:
        """Put a branch in its place, O(log n) comparisons."""
        insort(self._branches, branch, key=_rank)

    def remove(self, branch: Branch) -> None:
        """Take a branch out."""
        place = bisect_left(self._branches, branch.rank, key=_rank)
        while self._branches[place] is not branch:
            place += 1
        del self._branches[place]

    def __len__(self) -> int:
        return len(self._branches)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._branches)


# What one forward pass computes: parts of branches, and whose logits are wanted.

Ids = npt.NDArray[np.int64]

NO_DRAFTS: Ids = np.empty(0, np.int64)


class Part:
    """The tokens of one branch that a forward pass computes.

    Parameters
    ----------
    branch : Branch
    count : int
        Tokens of the branch, from ``branch.computed`` on.

    Attributes
    ----------
    drafts : int64 [num_drafts]
        Guesses behind its last token, to be verified.
    reaches_end : bool
        Whether the next token can be chosen after this.
    num_scored : int
        Tokens at its beginning whose logits tell how likely the next tokens of the prompt are.
    """

    __slots__ = ("branch", "count", "drafts", "num_scored", "reaches_end")

    def __init__(self, branch: Branch, count: int) -> None:
        self.branch, self.count = branch, count
        self.drafts = NO_DRAFTS
        self.reaches_end = count == branch.pending
        request = branch.request
        self.num_scored = 0
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) < request.num_prompt_tokens:
            self.num_scored = max(0, min(count, request.num_prompt_tokens - 1 - branch.computed))

    @property
    def num_query_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.count + len(self.drafts)

    @property
    def query_ids(self) -> Ids:
        """The tokens that go through the model."""
        branch = self.branch
        ids = branch.ids[branch.computed : branch.computed + self.count]
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
    parts : sequence of Part
        In the order of the plan.
    plan : BatchPlan
    token_ids : int64 [total_tokens]
    wanted : int64 [k]
        Places in `token_ids` of the query tokens whose logits are wanted: part by part, those that are scored, then,
        if it reaches the end of its branch, its last token and its drafts.
    """

    parts: Sequence[Part]
    plan: BatchPlan
    token_ids: Ids
    wanted: Ids


def query_tokens(parts: Sequence[Part]) -> Any:
    """Return the token ids of all parts as ``append_batch`` takes them; most often one each: a flat array then."""
    if all(part.num_query_tokens == 1 for part in parts):
        return np.array([part.branch.token(part.branch.computed) for part in parts])
    return [part.query_ids for part in parts]


def make_batch(parts: Sequence[Part], plan: BatchPlan) -> Batch:
    """Lay out the forward pass of `parts`, which `plan` has in the same order."""
    tokens = query_tokens(parts)
    if isinstance(tokens, np.ndarray) and not any(part.num_scored for part in parts):
        return Batch(parts, plan, tokens, np.flatnonzero([part.reaches_end for part in parts]))
    starts = plan.cu_seqlens_q.tolist()
    wanted = [part.wanted(start) for part, start in zip(parts, starts, strict=False)]
    return Batch(parts, plan, np.concatenate([*tokens]), np.concatenate(wanted))


# Who is let in: from the queue into the batch.

if TYPE_CHECKING:
    from pagedkv.engine.runner import Runner


class Admission:
    """Takes branches out of the queue of a scheduler, as budget, places and blocks allow."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._cache = scheduler.cache
        self._shares_prefixes = shares_prefixes(scheduler.runner)

    def admit(self, budget: int) -> list[Part]:
        """Let in who may compute up to `budget` tokens now; their blocks are allocated."""
        scheduler = self._scheduler
        if budget <= 0 or not len(scheduler.waiting):
            return []
        admitted: list[Part] = []
        places = scheduler.max_num_seqs - sum(branch.request.num_unborn + 1 for branch in scheduler.running)
        promised = sum(map(self._promised, scheduler.running))
        passed_over = 0
        for branch in list(islice(scheduler.waiting, 2 * scheduler.max_num_seqs + 2)):
            places -= 1 + branch.request.num_unborn
            if budget <= 0 or passed_over > scheduler.max_num_seqs or (places < 0 and scheduler.running):
                break
            if self._awaits_prefix(branch):
                places += 1 + branch.request.num_unborn
                passed_over += 1
                continue
            count = self._enter(branch, budget, promised)
            if count == 0:
                break
            admitted.append(Part(branch, count))
            promised += self._promised(branch)
            budget -= count
        return admitted

    def _enter(self, branch: Branch, budget: int, promised: int) -> int:
        """Give a branch its sequence, with as many tokens as it computes now; 0 if there is no room."""
        scheduler, request = self._scheduler, branch.request
        alone = all(other.request is request for other in scheduler.running)
        if not alone and self._needed(branch) + promised > self._cache.free_block_count:
            return 0
        cached = self._matched(branch)
        tokens = min(cached + budget, branch.readable)
        if request.params.streaming is not None:
            tokens = max(1, min(tokens, sum(request.params.streaming)))
        try:
            info = self._cache.allocate(
                branch.seq_id,
                branch.ids[:tokens] if _shares(branch) else tokens,
                priority=request.priority,
                cache_salt=request.cache_salt,
            )
        except OutOfMemory:
            if scheduler.running:
                return 0
            raise  # somebody else holds the pool
        scheduler.waiting.remove(branch)
        scheduler.running.append(branch)
        branch.state, branch.awaits = State.RUNNING, None
        branch.computed = info.num_cached_tokens
        if request.first_scheduled is None:
            request.first_scheduled = time.monotonic()
            request.num_cached_tokens = info.num_cached_tokens
            scheduler.num_prompt_tokens += request.num_prompt_tokens
            scheduler.num_cached_tokens += info.num_cached_tokens
        return tokens - info.num_cached_tokens

    def _matched(self, branch: Branch) -> int:
        return self._cache.match_prefix(branch.ids, branch.request.cache_salt) if _shares(branch) else 0

    def _needed(self, branch: Branch) -> int:
        """Return the blocks that it takes until it decodes, its copies of a shared last block included."""
        size, more = self._cache.block_size, branch.request.num_unborn + 1
        if branch.request.params.streaming is not None:
            return _streaming_blocks(branch.length, branch.request.params.streaming, size) + more
        tokens = branch.ids if _shares(branch) else branch.length
        return self._cache.blocks_to_allocate(tokens, branch.request.cache_salt) + more

    def _promised(self, branch: Branch) -> int:
        """Return the blocks that a running branch takes for the rest of its prompt, and one for what it writes."""
        size = self._cache.block_size
        length = branch.length - branch.dropped
        if branch.request.params.streaming is not None:
            length = min(length, sum(branch.request.params.streaming) + size)
        return max(0, -(-length // size) + (-branch.held // size)) + branch.request.num_unborn + 1

    def _awaits_prefix(self, branch: Branch) -> bool:
        """Tell whether another branch is computing a longer prefix of this one than the cache has."""
        if branch.awaits is not None:
            other, until = branch.awaits
            if other.state is State.RUNNING and other.computed < until:
                return True
            branch.awaits = None
        if not self._shares_prefixes or not _shares(branch):
            return False
        size, cached = self._cache.block_size, -1
        for other in self._scheduler.running:
            if other.pending <= 1 or other.request.cache_salt != branch.request.cache_salt or not _shares(other):
                continue
            common = min(_common_prefix(branch.ids, other.ids), branch.length - 1) // size * size
            if common <= other.computed:
                continue
            cached = self._matched(branch) if cached < 0 else cached
            if common > cached:
                branch.awaits = (other, common)
                return True
        return False


def _shares(branch: Branch) -> bool:
    """A stream lets go of its middle, and the logits of a prompt must be computed: those start from nothing."""
    params = branch.request.params
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


def refuse_what_never_fits(request: Request, runner: Runner, max_num_seqs: int) -> None:
    """Raise if a request could not be computed with the whole engine to itself.

    Raises
    ------
    RequestRefused
        With the numbers.
    """
    prompt, cache = request.num_prompt_tokens, runner.cache
    needed = blocks_at_most(request, cache.block_size, shares_prefixes(runner))
    text = f"{prompt} prompt tokens and max_tokens = {request.max_tokens}"
    if needed > cache.total_blocks:
        raise RequestRefused(
            f"{text} need {needed} blocks of {cache.block_size} tokens at once, the pool has {cache.total_blocks}"
        )
    positions = prompt + request.max_tokens
    if request.params.streaming is not None:
        positions = min(positions, sum(request.params.streaming) + 1)
    if runner.max_positions is not None and positions > runner.max_positions:
        raise RequestRefused(f"{text} are {positions} positions, the model has {runner.max_positions}")
    if request.num_branches > max_num_seqs:
        raise RequestRefused(f"{request.num_branches} texts at once exceed max_num_seqs = {max_num_seqs}")


NEWEST_SEQ_ID = 2**62


class Scheduler:
    """Holds the branches that wait and those that run, and lays out one batch after the other.

    Parameters
    ----------
    runner : Runner
    max_batch_tokens : int
        Query tokens of a forward pass; decoding branches take part even beyond that.
    max_num_seqs : int
        Branches that run at once.

    Attributes
    ----------
    waiting : WaitingQueue
    running : list of Branch
    num_preemptions : int
    num_prompt_tokens, num_cached_tokens : int
        Of all requests, when they were first let in.
    """

    def __init__(self, runner: Runner, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.runner, self.cache = runner, runner.cache
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        self.waiting = WaitingQueue()
        self.running: list[Branch] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._admission = Admission(self)
        # Downwards: strategies break ties by id, and among equals the newest should go first.
        self._seq_ids = itertools.count(NEWEST_SEQ_ID, -1)

    def new_branch(self, request: Request, index: int = 0) -> Branch:
        """Return a branch of a request, which waits for its turn."""
        branch = Branch(request, index, next(self._seq_ids))
        self.waiting.add(branch)
        return branch

    def fork(self, branch: Branch, index: int) -> Branch:
        """Return a running twin of a running branch; both share every block until one of them writes."""
        twin = branch.twin(index, next(self._seq_ids))
        self.cache.fork(branch.seq_id, twin.seq_id)
        self.runner.fork(branch.seq_id, twin.seq_id)
        self.running.append(twin)
        return twin

    def drop(self, branch: Branch) -> None:
        """Take a branch out, wherever it is; its blocks are free at once."""
        if branch.state is State.RUNNING:
            self._release(branch)
        elif branch.state is State.WAITING:
            self.waiting.remove(branch)
        branch.state = State.FINISHED

    def schedule(self) -> Batch | None:
        """Lay out the next forward pass and make room for it; None if there is nothing to compute."""
        parts = self._continued()
        before = self.num_preemptions
        parts, plan = self._grow(parts)
        if self.num_preemptions == before:
            used = sum(part.num_query_tokens for part in parts)
            try:
                admitted = self._admission.admit(self.max_batch_tokens - used)
            except BaseException:  # a strategy of the user's, for instance; what has grown will not be computed
                self.recall(parts)
                raise
            if admitted:
                parts += admitted
                plan = self.cache.plan([part.branch.seq_id for part in parts], [p.num_query_tokens for p in parts])
        if plan is None:
            if self.running and self.num_preemptions == before:
                self._resolve_stall()
            return None
        return make_batch(parts, plan)

    def _continued(self) -> list[Part]:
        """Return the parts of what runs: all that decode, then prompts in the order of their rank."""
        parts = [Part(branch, 1) for branch in self.running if branch.pending == 1 and _is_ready(branch)]
        room = self.max_batch_tokens - len(parts)
        for part in parts:
            if part.branch.request.params.prompt_lookup and room > 0:
                part.drafts = self._drafts(part.branch, room)
                room -= len(part.drafts)
        for branch in sorted((branch for branch in self.running if branch.pending > 1), key=lambda b: b.rank):
            count = min(branch.readable, room, streaming_room(branch))
            if count > 0:
                parts.append(Part(branch, count))
                room -= count
        return parts

    def _drafts(self, branch: Branch, room: int) -> Ids:
        params = branch.request.params
        # The token that follows the drafts is chosen in the same pass.
        most = min(params.prompt_lookup, room, branch.request.max_tokens - len(branch.output_ids) - 1)
        if most <= 0 or params.streaming or not self.runner.reuses_prefixes or branch.request.beams is not None:
            return NO_DRAFTS
        from pagedkv.engine.prompt_lookup import propose

        return propose(branch.ids, most)

    def _grow(self, parts: list[Part]) -> tuple[list[Part], BatchPlan | None]:
        """Make room for the new tokens of `parts`; drafts, then victims, go if there is too little."""
        while parts:
            try:
                plan = self.cache.append_batch([part.branch.seq_id for part in parts], query_tokens(parts))
                return parts, plan
            except OutOfMemory:
                if any(len(part.drafts) for part in parts):
                    for part in parts:
                        part.drafts = NO_DRAFTS
                    continue
                victim = self._victim()
                if victim is None:
                    raise
                self.preempt(victim)
                parts = [part for part in parts if part.branch.state is State.RUNNING]
        return parts, None

    def _victim(self) -> Branch | None:
        first = min(self.running, key=lambda branch: branch.rank)
        candidates = [branch for branch in self.running if not _belong_together(branch, first)]
        if not candidates:
            return None
        lowest = min(branch.request.priority for branch in candidates)
        candidates = [branch for branch in candidates if branch.request.priority == lowest]
        # To compute an endless text again takes longest, and it holds few blocks.
        candidates = [branch for branch in candidates if not branch.request.params.streaming] or candidates
        by_id = {branch.seq_id: branch for branch in candidates}
        target = self.cache.select_eviction_target(spared=set(self.cache.sequence_ids) - by_id.keys())
        return None if target is None else by_id[int(target)]

    def preempt(self, branch: Branch) -> None:
        """Take the blocks of a branch, and of its fellow beams; it waits, and is computed again later."""
        request = branch.request
        together: Iterable[Branch] = [branch] if request.beams is None else list(request.branches)
        for each in together:
            if each.state is State.RUNNING:
                self._release(each)
                each.state = State.WAITING
                each.computed = each.dropped = 0
                self.waiting.add(each)
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) < request.num_prompt_tokens:
            request.prompt_logprobs = [None]
        request.num_preemptions += 1
        self.num_preemptions += 1

    def recall(self, parts: Iterable[Part]) -> None:
        """Forget that `parts` were laid out: their branches wait again and are computed anew."""
        for part in parts:
            if part.branch.state is State.RUNNING:
                self.preempt(part.branch)

    def _release(self, branch: Branch) -> None:
        self.running.remove(branch)
        self.cache.free(branch.seq_id)
        self.runner.release(branch.seq_id)

    def _resolve_stall(self) -> None:
        """Take blocks from beams that wait for fellows, which may need them.

        Where the first in line waits itself, it begins anew: its beams could not share what they shared before, since
        the prefixes were forgotten meanwhile.
        """
        self.preempt(self._victim() or self.running[0])


def streaming_room(branch: Branch) -> int:
    """Return how many tokens the branch may read at once: each sees at most sinks and window, and itself."""
    streaming = branch.request.params.streaming
    return branch.length if streaming is None else max(1, sum(streaming) - branch.held)


def _belong_together(one: Branch, other: Branch) -> bool:
    return one is other or (one.request is other.request and one.request.beams is not None)


def _is_ready(branch: Branch) -> bool:
    """Beams are compared with each other, so they choose their next tokens in one step."""
    request = branch.request
    return request.beams is None or all(b.state is State.RUNNING and b.pending == 1 for b in request.branches)
