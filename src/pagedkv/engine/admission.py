"""Who is let in: from the queue into the batch."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedkv.engine.batch import Part
from pagedkv.engine.intake import shares_prefixes
from pagedkv.engine.request import Branch, Request, State
from pagedkv.errors import OutOfMemory, RequestRefused

if TYPE_CHECKING:
    from pagedkv.engine.runner import Runner
    from pagedkv.engine.scheduler import Scheduler

__all__ = ["Admission", "blocks_at_most", "refuse_what_never_fits"]


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
