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
from collections.abc import Iterable

from pagedkv.control.plan import BatchPlan
from pagedkv.engine.admission import Admission
from pagedkv.engine.batch import NO_DRAFTS, Batch, Ids, Part, make_batch, query_tokens
from pagedkv.engine.request import Branch, Request, State
from pagedkv.engine.runner import Runner
from pagedkv.engine.waiting import WaitingQueue
from pagedkv.errors import OutOfMemory

__all__ = ["Scheduler"]

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
